"""The update of the feature memory: ours, without upsampling, and the rule at full resolution.

python -m benchmarks.memory_update
python -m benchmarks.memory_update --features 2x16x16x64 --labels 128x128 --classes 20
"""

import sys
from collections.abc import Sequence

import jax
import numpy as np
import torch

from benchmarks import measure
from converters.torch_model import training
from memseg_jax import command_line
from memseg_jax.models.memory_update import update_memory
from memseg_jax.training.program import random_batch

FLAGS = {
    "features": "batch x height x width x channels (default: 2x64x64x512)",
    "labels": "height x width (default: 512x512)",
    "classes": "number of classes (default: 150)",
}
MOMENTUM = 0.1


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    values = measure.parse(argv, FLAGS, __doc__)
    shape = measure.numbers("features", values.features, (2, 64, 64, 512), "x")
    size = measure.numbers("labels", values.labels, (512, 512), "x")
    classes = measure.number("classes", values.classes, 150)
    rng = np.random.default_rng(0)
    features = np.maximum(rng.standard_normal(shape, np.float32), 0)
    memory = rng.standard_normal((classes, 1, shape[-1]), np.float32)
    labels = random_batch(shape[0], size, classes)["label"]

    arrays = jax.device_put((memory, features, labels))
    update, held = measure.compiled(lambda *x: update_memory(*x, MOMENTUM), *arrays)
    ours = measure.Candidate("JAX", lambda: jax.block_until_ready(update(*arrays)), held)
    candidates = [ours]
    facts = {}
    if device := measure.torch_device():
        theirs = [
            torch.from_numpy(memory).to(device),
            measure.from_jax_layout(features, device),
            torch.from_numpy(labels.astype(np.int64)).to(device),
        ]
        expected = theirs[0].clone()
        training.update_memory(expected, *theirs[1:], MOMENTUM)
        difference = np.abs(np.asarray(update(*arrays)) - expected.cpu().numpy()).max()
        facts["largest_difference"] = float(difference)
        print(f"largest difference between the two results: {difference:.2g}")

        @measure.finished
        def call() -> None:
            training.update_memory(theirs[0].clone(), *theirs[1:], MOMENTUM)

        held = measure.array_bytes(theirs)
        candidates.append(measure.Candidate("PyTorch", call, held=held, on_torch=True))
    what = f"memory update: features {shape}, labels {size}, {classes} classes, float32"
    measure.report("memory_update", what, measure.compare(candidates, values.seconds), **facts)
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
