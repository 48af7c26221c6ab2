"""How the cost of our training step grows with the batch, the pixels and the classes.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --config configs/ade20k_resnet50.py --crops 256,384,512 \
        --batches 1,2,4 --classes 19,75,150

One of the three varies at a time; the first value of the others stays. Compiles one program for
every value.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from benchmarks import measure
from converters import command_line
from memseg_jax.benchmark import format_bytes, network_flops, random_batch
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.training import optimizer
from memseg_jax.training.state import init_state, init_variables
from memseg_jax.training.step import make_train_step

FLAGS = {
    "batches": "numbers of images, separated by commas (default: 2,4,8)",
    "crops": "sides of the square images (default: 96,128,192)",
    "classes": "numbers of classes (default: 10,50,150)",
}
SMALL_CONFIG = "configs/quickstart.py"


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    argv = list(argv)
    if not any(argument.split("=")[0] in ("--config", "--help", "-h") for argument in argv):
        argv.insert(1, f"--config={SMALL_CONFIG}")
    values = measure.parse(argv, FLAGS, __doc__, config=True)
    sweeps = {
        "batch": measure.numbers("batches", values.batches, (2, 4, 8), ","),
        "crop": measure.numbers("crops", values.crops, (96, 128, 192), ","),
        "classes": measure.numbers("classes", values.classes, (10, 50, 150), ","),
    }
    start = {name: points[0] for name, points in sweeps.items()}
    points = [start] + [
        start | {name: value} for name, sweep in sweeps.items() for value in sweep[1:]
    ]
    candidates, flops = [], []
    for point in points:
        config = _at(values.config, **point)
        candidates.append(_candidate(config))
        network = build_segmentor(config)
        flops.append(
            point["batch"] * network_flops(network, tuple(config.augment.crop), train=True)
        )
    results = measure.compare(candidates, values.seconds)
    rows = [point | result | {"flops": work} for point, result, work in zip(points, results, flops)]
    _report(values.config_flag, rows)
    return 0


def _at(
    config: ml_collections.ConfigDict, batch: int, crop: int, classes: int
) -> ml_collections.ConfigDict:
    """The config with this batch, crop and number of classes."""
    config = config.copy_and_resolve_references()
    config.replica_groups = 1
    config.train.accumulate = 1
    config.train.batch_size = batch
    config.augment.crop = (crop, crop)
    with config.unlocked():
        config.data.class_names = tuple(f"class {index}" for index in range(classes))
        config.loss.class_weights = ()
    return config


def _candidate(config: ml_collections.ConfigDict) -> measure.Candidate:
    schedule = optimizer.schedule_from_config(config, 1000)
    model, tx = build_segmentor(config), optimizer.sgd(config, schedule)
    state = init_state(init_variables(model, config.seed), tx)
    state = jax.tree.map(lambda x: jax.numpy.array(x, copy=True), state)
    batch = random_batch(
        config.train.batch_size, tuple(config.augment.crop), len(config.data.class_names)
    )
    batch = jax.device_put(batch)
    step = make_train_step(model, config, tx, schedule, 1000)
    step, held = measure.compiled(step, state, batch, donate_argnums=0)

    def call() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, batch))

    return measure.Candidate("step", call, held)


def _report(config: str, rows: Sequence[dict[str, Any]]) -> None:
    """Prints what grew, how far, and how far the costs did."""
    first = rows[0]
    print(f"\ntraining step of {config}: ratios to the first row\n")
    print("| batch | pixels | classes | size | arithmetic | time | ms | peak memory |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        size = row["batch"] * row["crop"] ** 2 / (first["batch"] * first["crop"] ** 2)
        print(
            f"| {row['batch']} | {row['crop']}x{row['crop']} | {row['classes']} | {size:.3g} | "
            f"{row['flops'] / first['flops']:.3g} | {row['ratio']:.3g} | "
            f"{1e3 * row['seconds']:.4g} | {format_bytes(row['memory'])} |"
        )
    print()
    facts = {"benchmark": "scaling", "config": config} | measure.machine()
    print(json.dumps(facts | {"results": list(rows)}, default=np.ndarray.tolist), flush=True)


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
