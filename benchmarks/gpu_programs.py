"""What convolutions and whole training steps compile to on an H200, without one.

    pip install jax-cuda13-plugin jax-cuda13-pjrt    # both in the version of jax
    python -m benchmarks.gpu_programs                # the forms of single convolutions
    python -m benchmarks.gpu_programs --config configs/ade20k_resnet50.py --devices 8

Nothing is timed. "Temporary" is the memory of a program besides its arguments and results; for a
step it is that of one device. "TFLOP" counts positions in the padding, too.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp

from benchmarks import measure
from benchmarks.shapes import DILATED, GROUPED, Shape
from memseg_jax import command_line
from memseg_jax.errors import UserError
from memseg_jax.hlo import gpu
from memseg_jax.hlo.flops import count_flops
from memseg_jax.models import convolution_gradients as gradients
from memseg_jax.models.convolution_forms import ConvParams, convolve_plainly

FLAGS = {
    "batch": "images in the single convolutions (default: 16)",
    "devices": "number of GPUs for a training step (default: 1)",
}
SIDE = 64
SHAPES = [Shape(512, 512), *DILATED, *GROUPED]


def main(argv: Sequence[str]) -> int:
    """Prints a Markdown table; returns the exit status."""
    with_config = command_line.names_config(argv)
    values = command_line.parse(list(argv), FLAGS, doc=__doc__, with_config=with_config)
    if reason := gpu.missing():
        raise UserError(reason)
    if with_config:
        _report_step(values.config, measure.number("devices", values.devices, 1))
    else:
        _report_forms(measure.number("batch", values.batch, 16))
    return 0


def _report_step(config: Any, devices: int) -> None:
    found = gpu.contents(gpu.compile_step(config, gpu.make_mesh(devices)))
    print("| operation | number |\n|---|---|")
    for name, count in found["convolutions"].items():
        print(f"| {name} | {count} |")
    for name, shapes in found["collectives"].items():
        print(f"| {name}, different shapes | {len(shapes)} |")
    print(f"\nTemporary: {found['temporary bytes'] / 1e9:.2f} GB")


def _report_forms(batch: int) -> None:
    mesh = gpu.make_mesh()
    print("| channels | dilation | groups | what | type | becomes | temporary | TFLOP |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype in (jnp.bfloat16, jnp.float32):
        for shape in SHAPES:
            inside, outside, conv_params = shape.inside, shape.outside, shape.conv_params
            x = jax.ShapeDtypeStruct((batch, SIDE, SIDE, inside), dtype)
            y = jax.ShapeDtypeStruct((batch, SIDE, SIDE, outside), dtype)
            kernel = jax.ShapeDtypeStruct((3, 3, inside // conv_params.groups, outside), dtype)
            for name, (function, *args) in _programs(x, kernel, y, conv_params).items():
                found = gpu.contents(compiled := gpu.compile_for(mesh, function, *args))
                products = _matrix_products(compiled)
                parts = [f"{count} x {what}" for what, count in found["convolutions"].items()]
                parts += [f"{products} x matrix product"] if products else []
                print(
                    f"| {inside} -> {outside} "
                    f"| {conv_params.dilation} | {conv_params.groups} | {name} "
                    f"| {jnp.dtype(dtype).name} | {', '.join(parts)} "
                    f"| {found['temporary bytes'] / 1e6:.0f} MB "
                    f"| {count_flops(function, *args) / 1e12:.2f} |",
                    flush=True,
                )


def _programs(x: Any, kernel: Any, y: Any, conv_params: ConvParams) -> dict[str, tuple]:
    """Functions and their arguments by name."""

    def input_gradient(kernel: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda x: plainly(x, kernel), x)(dy)[0]

    def plainly(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return convolve_plainly(x, kernel, conv_params)

    programs = {
        "forward, XLA's own": (plainly, x, kernel),
        "input gradient, XLA's own": (input_gradient, kernel, y),
    }
    forms = {"XLA's own": gradients.filter_gradient_plainly}
    if conv_params.dilation > 1:
        forms["folding"] = gradients.filter_gradient_by_folding
        forms["shifts"] = gradients.filter_gradient_by_shifts
    for name, form in forms.items():
        programs[f"filter gradient, {name}"] = (
            lambda x, dy, form=form: form(x, dy, (3, 3), conv_params),
            x,
            y,
        )
    return programs


def _matrix_products(compiled: Any) -> int:
    """Number of matrix products in a program: dots, alone or in fusions, and calls of cuBLAS."""
    text = compiled.as_text()
    return sum(text.count(mark) for mark in (" dot(", '"__cublas$'))


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
