"""Filter gradients of the models' dilated and grouped 3x3 convolutions: all forms, this device.

python -m benchmarks.filter_gradient
python -m benchmarks.filter_gradient --batch 16 --shrink 1 --dtype bfloat16

The convolutions are those of ResNet-50 (stages 3 and 4, the pyramid) and ResNeSt (groups) on maps
of 64x64. The form that `convolve` takes on this kind of device is "JAX". `gpu_programs` shows what
the forms compile to on a GPU, without one.
"""

import sys
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from benchmarks import measure
from converters import command_line
from memseg_jax.models import convolution
from memseg_jax.models.convolution import Geometry

FLAGS = {
    "batch": "images (default: 2)",
    "shrink": "divides all numbers of channels (default: 4)",
    "dtype": "float32 or bfloat16 (default: float32)",
}
SIDE = 64
WINDOW = (3, 3)
CASES = [  # input channels, output channels, geometry
    (256, 256, Geometry(dilation=2)),
    (512, 512, Geometry(dilation=4)),
    (2048, 512, Geometry(dilation=12)),
    (2048, 512, Geometry(dilation=24)),
    (2048, 512, Geometry(dilation=36)),
    (256, 512, Geometry(groups=2)),
    (256, 512, Geometry(dilation=2, groups=2)),
]
FORMS = {
    "XLA's own": convolution.filter_gradient_plainly,
    "group by group": convolution.filter_gradient_by_group,
    "shifts": convolution.filter_gradient_by_shifts,
    "folding": convolution.filter_gradient_by_folding,
}


def forms_of(geometry: Geometry) -> Iterator[str]:
    """Names of the forms that differ from each other for a geometry."""
    yield "XLA's own"
    yield "shifts"
    if geometry.groups > 1:
        yield "group by group"
    if geometry.dilation > 1:
        yield "folding"


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    values = measure.parse(argv, FLAGS, __doc__)
    batch = measure.number("batch", values.batch, 2)
    shrink = measure.number("shrink", values.shrink, 4)
    dtype = measure.data_type(values.dtype, "float32")
    rng = np.random.default_rng(0)
    for inside, outside, geometry in CASES:
        arrays = [
            rng.standard_normal((batch, SIDE, SIDE, channels // shrink), np.float32)
            for channels in (inside, outside)
        ]
        x, dy = (jax.device_put(array).astype(dtype) for array in arrays)
        candidates = []
        for name in ("JAX", *forms_of(geometry)):
            form = FORMS.get(name, convolution.filter_gradient)
            run, held = measure.compiled(
                lambda x, dy, form=form, geometry=geometry: form(x, dy, WINDOW, geometry), x, dy
            )
            call = lambda run=run, x=x, dy=dy: jax.block_until_ready(run(x, dy))  # noqa: E731
            candidates.append(measure.Candidate(name, call, held))
        what = (
            f"filter gradient {batch} x {SIDE}x{SIDE} x {inside // shrink} -> {outside // shrink}, "
            f"dilation {geometry.dilation}, groups {geometry.groups}, {dtype}"
        )
        results = measure.compare(candidates, values.seconds / len(CASES))
        measure.report("filter_gradient", what, results)
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
