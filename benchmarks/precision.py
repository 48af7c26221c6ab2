"""What `config.model.precision` costs on a TPU v5e, by its compiler's estimate; nothing runs.

pip install "jax[tpu]"    # in the version of jax
python -m benchmarks.precision

For each type and precision: the cycles that the compiler expects the convolution to take.
"""

import os
import re
import sys
from collections.abc import Sequence
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp

from benchmarks import measure
from benchmarks.shapes import Shape
from memseg_jax import command_line
from memseg_jax.errors import UserError
from memseg_jax.hlo import topologies
from memseg_jax.hlo.chips import TPU_PASSES
from memseg_jax.models.convolution_forms import ConvParams, convolve_plainly
from memseg_jax.runtime import sharding

FLAGS = {"batch": "images (default: 8)"}
TOPOLOGY = "v5e:1x1"
SIDE = 64
SHAPES = [Shape(256, 256), Shape(512, 512, conv_params=ConvParams(dilation=2)), Shape(1024, 512)]
CASES = [(jnp.bfloat16, "default"), *((jnp.float32, precision) for precision in TPU_PASSES)]


def main(argv: Sequence[str]) -> int:
    """Prints a Markdown table; returns the exit status."""
    values = command_line.parse(list(argv), FLAGS, doc=__doc__, with_config=False)
    batch = measure.number("batch", values.batch, 8)
    if reason := topologies.missing("v5e"):
        raise UserError(reason)
    names = [f"{jnp.dtype(dtype).name}, {precision}" for dtype, precision in CASES]
    print(f"| {batch} x {SIDE}x{SIDE} | {' | '.join(names)} |")
    print("|---" * (len(CASES) + 1) + "|")
    for shape in SHAPES:
        cells = [_compile(shape, batch, dtype, precision) for dtype, precision in CASES]
        print(f"| {shape.name} | {' | '.join(cells)} |", flush=True)
    return 0


def _compile(shape: Shape, batch: int, dtype: Any, precision: str) -> str:
    mesh = sharding.make_mesh(topologies.open_devices(topologies.parse(TOPOLOGY)).devices)
    x, kernel = (
        jax.ShapeDtypeStruct(size, dtype, sharding=sharding.replicated(mesh))
        for size in (
            (batch, SIDE, SIDE, shape.inside),
            (shape.window, shape.window, shape.inside, shape.outside),
        )
    )

    def convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
        with jax.default_matmul_precision(precision):
            return convolve_plainly(x, kernel, shape.conv_params)

    text = jax.jit(convolved).lower(x, kernel).compile().as_text()
    (cycles,) = (
        int(re.search(r'"estimated_cycles":"(\d+)"', line)[1])
        for line in text.splitlines()
        if "kind=kOutput" in line  # the fusion that holds the convolution
    )
    return f"{cycles / 1e6:.3g} M"


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
