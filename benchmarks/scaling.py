"""How the cost of our training step grows with the batch, the pixels and the classes.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --config configs/ade20k_resnet50.py --crops 256,384,512 \
        --batches 1,2,4 --classes 19,75,150

One of the three varies at a time; the others keep their first value. Compiles one program per
value.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from benchmarks import measure
from memseg_jax import command_line
from memseg_jax.hlo.flops import network_flops
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime.text import format_bytes
from memseg_jax.training.program import random_batch
from memseg_jax.training.state import init_variables

FLAGS = {
    "batches": "numbers of images, comma-separated (default: 2,4,8)",
    "crops": "sides of the square images (default: 96,128,192)",
    "classes": "numbers of classes (default: 10,50,150)",
}


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    values = measure.parse(argv, FLAGS, __doc__, config=True, default_config=measure.SMALL_CONFIG)
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
    model = build_segmentor(config)
    variables = init_variables(model, config.seed)
    batch = random_batch(
        config.train.batch_size, tuple(config.augment.crop), len(config.data.class_names)
    )
    return measure.Candidate("step", *measure.training_step(config, model, variables, batch, 1000))


def _report(config: str, rows: Sequence[dict[str, Any]]) -> None:
    """Prints what grew, by how much, and by how much the costs grew."""
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
