"""How long a training waits for its checkpoints, and how long until they are complete.

    python -m benchmarks.saving
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m benchmarks.saving \
        --config configs/ade20k_resnet50.py --folder /mnt/disk --saves 5

The state is that of the config's training, on all devices, split as `config.sharding` says. The
first save also compiles what it needs; the others are what a run pays each time.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import measure
from memseg_jax import checkpoint, command_line
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import sharding
from memseg_jax.runtime.text import format_bytes
from memseg_jax.scoring import visualize
from memseg_jax.training.program import training_program

FLAGS = {
    "folder": "where to write, in a folder that is removed afterwards (default: the system's)",
    "saves": "number of saves (default: 5)",
}


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    values = measure.parse(argv, FLAGS, __doc__, config=True, default_config=measure.SMALL_CONFIG)
    count = measure.number("saves", values.saves, 5)
    config = values.config
    model = build_segmentor(config)
    mesh = sharding.make_mesh(layout=config.sharding)
    shapes = training_program(config, model, mesh, epoch_steps=100).state
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), shapes)
    names = tuple(config.data.class_names)
    palette = visualize.resolve_palette(config.data.palette, len(names))
    waits, totals = [], []
    with (
        tempfile.TemporaryDirectory(dir=values.folder) as folder,
        checkpoint.Checkpointer(Path(folder), keep=1) as checkpointer,
    ):
        for step in range(1, count + 1):
            meta = checkpoint.make_meta(config, step, names, palette, "zeros")
            start = time.perf_counter()
            checkpointer.save(state, meta)
            waits.append(time.perf_counter() - start)
            checkpointer.wait_until_finished()
            totals.append(time.perf_counter() - start)
    size = measure.array_bytes(state)
    print(f"\n{values.config_flag}, {format_bytes(size)}, {mesh.size} devices\n")
    print("| | s | complete after, s |")
    print("|---|---|---|")
    rows = {"first save": (waits[0], totals[0])}
    if count > 1:
        rows["median of the others"] = statistics.median(waits[1:]), statistics.median(totals[1:])
    for name, (wait, total) in rows.items():
        print(f"| {name} | {wait:.3g} | {total:.3g} |")
    facts = {"benchmark": "saving", "bytes": size, "devices": mesh.size} | measure.machine()
    print(json.dumps(facts | {"waits": waits, "totals": totals}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
