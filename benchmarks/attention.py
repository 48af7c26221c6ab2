"""Attention over the positions of an image: ours in blocks, the plain form, PyTorch's fused one.

python -m benchmarks.attention
python -m benchmarks.attention --tokens 1024,2048,4096,8192,16384
"""

import sys
from collections.abc import Sequence

import jax
import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import measure
from memseg_jax import command_line
from memseg_jax.models.attention import attend, attend_at_once

FLAGS = {
    "tokens": "numbers of positions, comma-separated (default: 1024,4096)",
    "batch": "images (default: 1)",
    "dim": "channels (default: 256)",
    "dtype": "float32 or bfloat16 (default: float32)",
    "forward": (False, "the forward pass alone; else with the gradients"),
    "plain_up_to": "leave the plain form out for more positions (default: 16384)",
}


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    values = measure.parse(argv, FLAGS, __doc__)
    lengths = measure.numbers("tokens", values.tokens, (1024, 4096), ",")
    for tokens in lengths:
        _measure(tokens, values, values.seconds / len(lengths))
    return 0


def _measure(tokens: int, values, seconds: float) -> None:
    batch = measure.number("batch", values.batch, 1)
    dim = measure.number("dim", values.dim, 256)
    dtype = measure.data_type(values.dtype, "float32")
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((batch, tokens, dim), np.float32) for _ in range(4)]
    inputs = [jax.device_put(x).astype(dtype) for x in arrays]

    def step(function, query, key, value, cotangent):
        if values.forward:
            return function(query, key, value)
        out, transpose = jax.vjp(function, query, key, value)
        return out, transpose(cotangent)

    functions = {"JAX": attend}
    if tokens <= measure.number("plain_up_to", values.plain_up_to, 16384):
        functions["JAX, plain form"] = lambda *x: attend_at_once(*x, None)
    candidates = []
    for name, function in functions.items():
        run, held = measure.compiled(lambda *x, function=function: step(function, *x), *inputs)
        candidates.append(
            measure.Candidate(name, lambda run=run: jax.block_until_ready(run(*inputs)), held)
        )
    if device := measure.torch_device():
        kind = getattr(torch, dtype)
        tensors = [torch.from_numpy(x).to(device, kind)[:, None] for x in arrays]
        query, key, value = (x.requires_grad_(not values.forward) for x in tensors[:3])

        @measure.finished
        def call() -> None:
            with torch.set_grad_enabled(not values.forward):
                out = F.scaled_dot_product_attention(query, key, value)
            if not values.forward:
                torch.autograd.grad(out, (query, key, value), tensors[3])

        held = measure.array_bytes(tensors)
        candidates.append(measure.Candidate("PyTorch", call, held=held, on_torch=True))
    what = f"attention{'' if values.forward else ' and gradients'}: {batch} x {tokens} x {dim}"
    measure.report("attention", f"{what}, {dtype}", measure.compare(candidates, seconds))


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
