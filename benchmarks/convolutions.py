"""Single convolutions of the models: ours, XLA's own form, PyTorch; forward and both gradients.

python -m benchmarks.convolutions
python -m benchmarks.convolutions --crop 256x256 --batch 2 --only "3x3 512 -> 512" --all

`gpu_programs` shows what the forms compile to on a GPU, without one.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import measure
from benchmarks.shapes import GROUPED, RESNET50, Shape
from memseg_jax import command_line
from memseg_jax.errors import UserError
from memseg_jax.models import convolution_gradients as gradients
from memseg_jax.models.convolution import PLAIN, POSITIONS, SHIFTS, TILES, Forms, convolve
from memseg_jax.models.convolution_forms import (
    ConvParams,
    convolve_by_group,
    convolve_plainly,
)

FLAGS = {
    "crop": "height x width of the images (default: 512x512)",
    "batch": "images (default: 1)",
    "dtype": "float32 or bfloat16 (default: float32)",
    "only": "convolutions whose name in the table contains this (default: all)",
    "pass": "forward, input, filter, or all (default: all)",
    "all": (False, "every form that the convolution has, besides the one in use"),
}
PASSES = ("forward", "input", "filter")
OURS, XLA = "in use", "XLA's own"


def main(argv: Sequence[str]) -> int:
    """Prints a Markdown table of processor times; returns the exit status."""
    values = measure.parse(argv, FLAGS, __doc__)
    crop = measure.numbers("crop", values.crop, (512, 512), "x")
    batch = measure.number("batch", values.batch, 1)
    dtype = measure.data_type(values.dtype, "float32")
    chosen = getattr(values, "pass") or "all"
    if chosen not in (*PASSES, "all"):
        raise UserError(f"--pass {chosen}: expected {', '.join(PASSES)} or all")
    shapes = [shape for shape in RESNET50 + GROUPED if (values.only or "") in shape.name]
    if not shapes:
        raise UserError(f"--only {values.only}: no name contains it, such as {RESNET50[-1].name}")
    device = measure.torch_device()
    cases = [(s, kind) for s in shapes for kind in PASSES if chosen in (kind, "all")]
    print(f"\n{batch} x {crop[0]}x{crop[1]} pixels, {dtype}: core-ms (ms) of a call\n")
    print("| convolution, map | pass | in use | XLA's own | PyTorch | other forms |")
    print("|---|---|---|---|---|---|")
    rows = []
    for shape, kind in cases:
        candidates = list(_candidates(shape, kind, crop, batch, dtype, values.all, device))
        results = measure.compare(candidates, values.seconds / len(cases))
        times = {
            x["name"]: f"{1e3 * x['core_seconds']:.3g} ({1e3 * x['seconds']:.3g})" for x in results
        }
        known = [times.pop(name, "") for name in (OURS, XLA, "PyTorch")]
        others = ", ".join(f"{name} {time}" for name, time in times.items())
        print(f"| {shape.name} | {kind} | {' | '.join(known)} | {others} |", flush=True)
        sides = [-(-side // shape.reduction) for side in crop]
        row = {"convolution": shape.name, "pass": kind, "map": sides, "results": results}
        rows.append(row | {"dilation": shape.conv_params.dilation})
    print()
    facts = {"benchmark": "convolutions", "crop": crop, "batch": batch, "dtype": dtype}
    print(json.dumps(facts | measure.machine() | {"rows": rows}), flush=True)
    return 0


def _forms(shape: Shape, size: Sequence[int]) -> dict[str, Forms]:
    """What else computes a convolution on maps of that height and width, by name."""
    if shape.conv_params.dilation >= min(size):  # `convolve` cuts such kernels first
        return {}
    forms = {}
    if shape.conv_params.groups > 1:
        by_group = gradients.filter_gradient_by_group
        forms["group by group"] = dataclasses.replace(PLAIN, filter_gradient=by_group)
    if shape.window == 1:
        forms["matrix product"] = POSITIONS
    elif shape.conv_params.stride == 1:
        forms |= {"shifts": SHIFTS, "tiles": TILES}
    return forms


def _candidates(
    shape: Shape,
    kind: str,
    crop: Sequence[int],
    batch: int,
    dtype: str,
    every: bool,
    device: torch.device | None,
) -> Iterator[measure.Candidate]:
    rng = np.random.default_rng(0)
    conv_params = shape.conv_params
    size = [-(-side // shape.reduction) for side in crop]
    result_size = [-(-side // conv_params.stride) for side in size]
    arrays = [
        rng.standard_normal(sizes, np.float32)
        for sizes in (
            (batch, *size, shape.inside),
            (shape.window, shape.window, shape.inside // conv_params.groups, shape.outside),
            (batch, *result_size, shape.outside),
        )
    ]
    x, kernel, dy = (jax.device_put(array).astype(dtype) for array in arrays)
    programs = {
        OURS: _derived(functools.partial(convolve, **dataclasses.asdict(conv_params)), kind),
        XLA: _derived(functools.partial(convolve_plainly, conv_params=conv_params), kind),
    }
    if every:
        for name, forms in _forms(shape, size).items():
            programs[name] = _chosen(forms, kind, conv_params)
        if kind == "filter" and conv_params.dilation > 1 and conv_params.stride == 1:
            by_folding = gradients.filter_gradient_by_folding
            forms = dataclasses.replace(PLAIN, filter_gradient=by_folding)
            programs["folding"] = _chosen(forms, kind, conv_params)
    for name, program in programs.items():
        run, held = measure.compiled(program, x, kernel, dy)
        call = lambda run=run: jax.block_until_ready(run(x, kernel, dy))  # noqa: E731
        yield measure.Candidate(name, call, held)
    if device:
        yield _on_torch(shape, kind, arrays, getattr(torch, dtype), device)


def _derived(form: Callable, kind: str) -> Callable:
    """A function of input, kernel and gradient by the result, for a function of (x, kernel)."""
    if kind == "forward":
        return lambda x, kernel, dy: form(x, kernel)
    if kind == "input":
        return lambda x, kernel, dy: jax.vjp(lambda x: form(x, kernel), x)[1](dy)
    return lambda x, kernel, dy: jax.vjp(lambda kernel: form(x, kernel), kernel)[1](dy)


def _chosen(forms: Forms, kind: str, conv_params: ConvParams) -> Callable:
    """The same, as `convolve` runs it where it chooses these forms."""

    def filter_gradient(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
        return forms.filter_gradient(x, dy, kernel.shape[:2], conv_params)

    functions = {
        "forward": lambda x, kernel, dy: convolve_by_group(x, kernel, conv_params, forms.convolve),
        "input": lambda x, kernel, dy: forms.input_gradient(x, kernel, dy, conv_params),
        "filter": filter_gradient,
    }
    return functions[kind]


def _on_torch(
    shape: Shape, kind: str, arrays: Sequence[np.ndarray], dtype: torch.dtype, device: torch.device
) -> measure.Candidate:
    x, dy = (measure.from_jax_layout(array, device).to(dtype) for array in (arrays[0], arrays[2]))
    kernel = torch.from_numpy(arrays[1]).to(device, dtype).permute(3, 2, 0, 1)
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    g = shape.conv_params
    pairs = ([g.stride] * 2, [g.dilation * (shape.window - 1) // 2] * 2, [g.dilation] * 2)
    if kind == "forward":
        call = functools.partial(F.conv2d, x, kernel, None, *pairs, g.groups)
    else:
        wanted = [kind == "input", kind == "filter", False]
        call = functools.partial(
            torch.ops.aten.convolution_backward,
            *(dy, x, kernel, None, *pairs, False, [0, 0], g.groups, wanted),
        )
    held = measure.array_bytes(x, kernel, dy)
    return measure.Candidate("PyTorch", measure.finished(call), held=held, on_torch=True)


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
