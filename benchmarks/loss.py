"""Cross entropy at label size and its gradient: ours in blocks, the plain form, PyTorch.

python -m benchmarks.loss
python -m benchmarks.loss --logits 2x16x16x20 --labels 128x128
"""

import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import measure
from converters.torch_model.layers import resize
from memseg_jax import command_line
from memseg_jax.data import IGNORE_LABEL
from memseg_jax.models.layers import resize_bilinear
from memseg_jax.training.losses import cross_entropy
from memseg_jax.training.program import random_batch

FLAGS = {
    "logits": "batch x height x width x classes (default: 2x64x64x150)",
    "labels": "height x width (default: 512x512)",
    "compile": (False, "PyTorch with torch.compile as well"),
}


def plain_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """`losses.cross_entropy` with the logits at label size, as one would write it."""
    log_probabilities = jax.nn.log_softmax(resize_bilinear(logits, labels.shape[1:]), axis=-1)
    valid = labels < logits.shape[-1]
    own = jnp.where(valid, labels, 0)[..., None].astype(jnp.int32)
    entropy = -jnp.take_along_axis(log_probabilities, own, axis=-1)[..., 0]
    return jnp.sum(jnp.where(valid, entropy, 0)) / jnp.sum(valid)


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    values = measure.parse(argv, FLAGS, __doc__)
    shape = measure.numbers("logits", values.logits, (2, 64, 64, 150), "x")
    size = measure.numbers("labels", values.labels, (512, 512), "x")
    logits = np.random.default_rng(0).standard_normal(shape, np.float32)
    labels = random_batch(shape[0], size, shape[-1])["label"]

    arrays = jax.device_put((logits, labels))
    candidates, losses = [], {}
    for name, function in (("JAX", cross_entropy), ("JAX, plain form", plain_cross_entropy)):
        gradient, held = measure.compiled(jax.value_and_grad(function), *arrays)
        losses[name] = float(gradient(*arrays)[0])

        def call(gradient=gradient) -> None:
            jax.block_until_ready(gradient(*arrays))

        candidates.append(measure.Candidate(name, call, held))
    if device := measure.torch_device():
        inputs = measure.from_jax_layout(logits, device).requires_grad_()
        target = torch.from_numpy(labels.astype(np.int64)).to(device)

        def entropy(x: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(resize(x, target.shape[1:]), target, ignore_index=IGNORE_LABEL)

        functions = {"PyTorch": entropy}
        if values.compile:
            functions["PyTorch, torch.compile"] = torch.compile(entropy)
        for name, function in functions.items():

            @measure.finished
            def call(function=function) -> torch.Tensor:
                inputs.grad = None
                loss = function(inputs)
                loss.backward()
                return loss.detach()

            losses[name] = float(call())
            held = measure.array_bytes(inputs, target)
            candidates.append(measure.Candidate(name, call, held=held, on_torch=True))
    print("losses:", ", ".join(f"{name} {loss:.7g}" for name, loss in losses.items()))
    what = f"loss and gradient: logits {shape}, labels {size}, float32"
    results = measure.compare(candidates, values.seconds)
    measure.report("loss", what, results, losses=losses)
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
