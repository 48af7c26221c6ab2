"""Batch normalisation in bfloat16 with statistics from one pass and from two: losses and time.

    python -m benchmarks.normalisation
    python -m benchmarks.normalisation --config configs/mine.py --steps 300

Trains a model from random weights, three times with the same batches: in bfloat16 with one pass, as
training does it, in bfloat16 with two, and in float32, which says how far apart two trainings are
that nobody would tell apart. From random weights the running means, around which one pass takes its
squares, are furthest from the means of the batches.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import ml_collections
import numpy as np

from benchmarks import measure
from memseg_jax import command_line
from memseg_jax.data import open_split
from memseg_jax.data.pipeline import train_batches
from memseg_jax.models import batch_norm
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import sharding
from memseg_jax.training.program import training_program
from memseg_jax.training.state import init_state, init_variables

FLAGS = {"steps": "training steps (default: 100)"}
FORMS = {  # name -> compute type, passes
    "bfloat16, two passes": ("bfloat16", 2),
    "bfloat16, one pass": ("bfloat16", 1),
    "float32, two passes": ("float32", 2),
}
ROWS = 10  # of the table of losses


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    values = measure.parse(
        list(argv), FLAGS, __doc__, config=True, default_config=measure.SMALL_CONFIG
    )
    steps = int(measure.number("steps", values.steps, 100))
    config, losses, candidates = values.config, {}, []
    source = open_split(config.data, config.data.train_split)
    for name, (dtype, passes) in FORMS.items():
        config.model.compute_dtype = dtype
        with _in_passes(passes):
            losses[name], candidate = _train(name, config, source, steps)
        candidates.append(candidate)
        print(f"trained: {name}", flush=True)
    _print_losses(losses)
    facts = {"losses": losses}
    results = measure.compare(candidates, values.seconds)
    measure.report("normalisation", f"A step of {config.model.backbone}", results, **facts)
    return 0


@contextlib.contextmanager
def _in_passes(passes: int) -> Iterator[None]:
    """In this context, normalisations are traced with so many passes."""

    def moments(x: Any, near: Any, in_one_pass: bool) -> tuple[Any, Any]:
        return in_passes(x, near, passes == 1)

    in_passes = batch_norm.batch_moments
    with mock.patch.object(batch_norm, "batch_moments", moments):
        yield


def _train(
    name: str, config: ml_collections.ConfigDict, source: Any, steps: int
) -> tuple[list[float], measure.Candidate]:
    """The losses of all steps, and one step more to take the time of."""
    mesh, model = sharding.make_mesh(jax.devices()[:1]), build_segmentor(config)
    program = training_program(config, model, mesh, steps)
    state = sharding.place(
        init_state(init_variables(model, config.seed), program.tx), program.state
    )
    step, held = measure.compiled(program.step, program.state, program.batch)
    losses = []
    stop = np.zeros(1, np.int32)
    with train_batches(source, config, 0, steps) as batches:
        for host in batches:
            images = {"image": host["image"], "label": host["label"], "stop": stop}
            batch = sharding.place_batch(images, mesh)
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))

    def one_more() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, batch))

    return losses, measure.Candidate(name, one_more, memory=held)


def _print_losses(losses: dict[str, list[float]]) -> None:
    """A Markdown table of means over the steps of a row."""
    print(f"\n| mean loss of steps | {' | '.join(losses)} |")
    print("|---" * (len(losses) + 1) + "|")
    count = len(next(iter(losses.values())))
    for rows in np.array_split(np.arange(count), min(ROWS, count)):
        cells = [f"{np.mean(np.array(values)[rows]):.4f}" for values in losses.values()]
        print(f"| {rows[0] + 1}-{rows[-1] + 1} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
