"""The convolution that every model uses, in an exact form that each kind of device runs well.

XLA's own form is the right one almost everywhere. It is replaced where it is not:

- 1x1 kernels, on CPU: a matrix product (`convolve_positions`); XLA's convolution takes up to eleven
  times as long for its gradients. (On GPU, matrix products of this kind have crashed XLA's
  compiler, and its convolution is native.)
- Groups: when the batch is split over devices, XLA gathers the whole batch on every device and each
  of them computes all of it; and on CPU it takes several times as long even on one device. One
  convolution per group avoids both (`convolve_by_group`).
- Filter gradient of a dilated convolution on GPU: XLA makes it a forward convolution with the whole
  feature map as its window, for which there is no fast algorithm. It is computed on subsampled
  maps (`filter_gradient_by_folding`) or tap by tap (`filter_gradient_by_shifts`).
- Strong dilation on CPU, a sixth of the map or more: tap by tap (`convolve_by_shifts` and the
  filter gradient), because most of the arithmetic of XLA's form is on padding.
- Other 3x3 kernels with many channels, on CPU: tile by tile (`convolve_by_tiles`), with less than
  half of the multiplications.

All forms compute the same numbers, summed in another order. `benchmarks/gpu_programs.py` shows what
they compile to, `benchmarks/convolutions.py` measures them. The platform is the one that a program
is lowered for, not the one at hand.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from memseg_jax.models import convolution_gradients as gradients
from memseg_jax.models.convolution_forms import (
    Array,
    ConvParams,
    convolve_by_group,
    convolve_by_shifts,
    convolve_plainly,
    convolve_positions,
)
from memseg_jax.models.symbolic import is_symbolic
from memseg_jax.models.winograd import convolve_by_tiles
from memseg_jax.runtime import rows

PLATFORMS = ("cpu", "gpu", "tpu")
# GPU: folding copies both maps once, but computes on padding and makes small maps (of 3 and fewer
# positions XLA makes no native gradient either); taps one by one copy the overlap of both maps for
# each tap, but compute nothing outside. Counting bytes and arithmetic at the rates of an H200, not
# timed, they cost the same where 5 to 6 dilations fit into the map.
DILATIONS_PER_MAP_TO_FOLD = 6
# CPU: with at most this many dilations in the map, taps one by one are faster than XLA's form.
DILATIONS_PER_MAP_TO_SHIFT = 6
# CPU: tiles cost additions for every channel and save multiplications for every pair of them.
CHANNELS_TO_TILE = 128
# CPU: the tiles of larger inputs (numbers in the whole batch) would take more than 512 MiB.
LARGEST_INPUT_TO_TILE = 2**25


@dataclasses.dataclass(frozen=True)
class Forms:
    """How one platform computes a convolution and its gradients.

    Attributes:
        convolve: (x, kernel, conv_params) -> y, of one group.
        input_gradient: see `convolution_gradients`.
        filter_gradient: see there.
    """

    convolve: Callable
    input_gradient: Callable
    filter_gradient: Callable


PLAIN = Forms(convolve_plainly, gradients.input_gradient_plainly, gradients.filter_gradient_plainly)
POSITIONS = Forms(
    convolve_positions,
    gradients.input_gradient_by_positions,
    gradients.filter_gradient_by_positions,
)
SHIFTS = Forms(
    convolve_by_shifts, gradients.input_gradient_by_shifts, gradients.filter_gradient_by_shifts
)
TILES = Forms(
    convolve_by_tiles, gradients.input_gradient_by_tiles, gradients.filter_gradient_by_tiles
)


def convolve(
    x: Array, kernel: Array, *, stride: int = 1, dilation: int = 1, groups: int = 1
) -> Array:
    """Convolution with PyTorch's padding `dilation * (k - 1) / 2` on both sides.

    Differentiable in reverse mode only, and once.

    Args:
        x: [batch, height, width, in channels].
        kernel: [k, k, in channels / groups, out channels], k odd.
        stride: step between output positions.
        dilation: step between kernel taps.
        groups: number of channel groups.

    Returns:
        [batch, ceil(height / stride), ceil(width / stride), out channels].
    """
    if not is_symbolic(x.shape):
        kernel = _drop_unreachable_taps(kernel, x.shape[1:3], dilation)

    def of_equal_parts(x: Array) -> Array:
        return _convolve_in_form(x, kernel, ConvParams(stride, dilation, groups))

    return rows.in_equal_parts(of_equal_parts, x, stride=stride)


def _convolve_in_form(x: Array, kernel: Array, conv_params: ConvParams) -> Array:
    stride, dilation, groups = dataclasses.astuple(conv_params)
    conv_params = ConvParams(stride, dilation if max(kernel.shape[:2]) > 1 else 1, groups)
    if conv_params.dilation == groups == 1:
        chosen = [
            choose(platform, x, kernel.shape[:2], kernel.shape[3], conv_params)
            for platform in PLATFORMS
        ]
        if all(forms == PLAIN for forms in chosen):
            return convolve_plainly(x, kernel, conv_params)
    return _convolve(x, kernel, conv_params)


def _drop_unreachable_taps(kernel: Array, size: tuple[int, int], dilation: int) -> Array:
    """Cuts off the taps that only ever see padding, equally many on opposite sides."""
    above, beside = (
        max(k // 2 - (side - 1) // dilation, 0) for k, side in zip(kernel.shape[:2], size)
    )
    if above == beside == 0:
        return kernel
    return kernel[above : kernel.shape[0] - above, beside : kernel.shape[1] - beside]


# ---- The choice --------------------------------------------------------------------------------


def choose(
    platform: str,
    x: Array | jax.ShapeDtypeStruct,
    window: tuple[int, int],
    out_channels: int,
    conv_params: ConvParams,
) -> Forms:
    """The forms in which a platform runs a convolution best.

    Args:
        platform: one of `PLATFORMS`.
        x: [batch, height, width, in channels]; only shape and type count.
        window: height and width of the kernel.
        out_channels: of the result.
        conv_params: of the convolution.
    """
    if is_symbolic(x.shape):  # what is best at one size may take all the memory at another
        positions = platform == "cpu" and tuple(window) == (1, 1)
        return POSITIONS if positions else PLAIN
    if platform == "cpu":
        return _choose_on_cpu(x, window, out_channels, conv_params)
    if platform == "gpu" and conv_params.dilation > 1:
        folds = min(x.shape[1:3]) // conv_params.dilation
        by_folding = conv_params.stride == 1 and folds >= DILATIONS_PER_MAP_TO_FOLD
        return dataclasses.replace(
            PLAIN,
            filter_gradient=gradients.filter_gradient_by_folding
            if by_folding
            else gradients.filter_gradient_by_shifts,
        )
    return PLAIN


def _choose_on_cpu(
    x: Array | jax.ShapeDtypeStruct,
    window: tuple[int, int],
    out_channels: int,
    conv_params: ConvParams,
) -> Forms:
    if tuple(window) == (1, 1):
        return POSITIONS
    d = conv_params.dilation
    strongly_dilated = d > 1 and d * DILATIONS_PER_MAP_TO_SHIFT >= max(x.shape[1:3])
    if strongly_dilated and conv_params.stride == 1:
        return SHIFTS
    channels = min(x.shape[-1], out_channels) // conv_params.groups
    # In shorter types the sums and differences would be rounded; who computes in double precision
    # wants the plain sums.
    single = x.dtype == jnp.float32
    small = x.size <= LARGEST_INPUT_TO_TILE
    many = tuple(window) == (3, 3) and channels >= CHANNELS_TO_TILE
    if many and conv_params.stride == 1 and single and small:
        return TILES
    filter_gradient = PLAIN.filter_gradient
    if strongly_dilated:
        filter_gradient = gradients.filter_gradient_by_shifts
    elif conv_params.groups > 1:
        filter_gradient = gradients.filter_gradient_by_group
    return dataclasses.replace(PLAIN, filter_gradient=filter_gradient)


def _on_platform(part: str, function: Callable, case: tuple, *args: Array) -> Array:
    """Calls `function(form, *args)` with the form that suits the platform.

    Args:
        part: a field of `Forms`.
        function: its result does not depend on the form.
        case: arguments of `choose` after the platform.
        *args: arrays.
    """
    cpu, gpu, tpu = (getattr(choose(platform, *case), part) for platform in PLATFORMS)
    if cpu == gpu == tpu:
        return function(tpu, *args)
    # Platforms that are not listed, such as TPUs, are traced once.
    listed = {"cpu": cpu} | ({} if gpu == tpu else {"cuda": gpu, "rocm": gpu})
    calls = {name: functools.partial(function, form) for name, form in listed.items()}
    return lax.platform_dependent(*args, **calls, default=functools.partial(function, tpu))


# ---- The convolution and its gradients ---------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: Array, kernel: Array, conv_params: ConvParams) -> Array:
    """`convolve` with gradients of our own."""

    def convolved(form: Callable, x: Array, kernel: Array) -> Array:
        return convolve_by_group(x, kernel, conv_params, form)

    case = (x, kernel.shape[:2], kernel.shape[3], conv_params)
    return _on_platform("convolve", convolved, case, x, kernel)


def _convolve_forward(
    x: Array, kernel: Array, conv_params: ConvParams
) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, kernel, conv_params), (x, kernel)


def _convolve_backward(
    conv_params: ConvParams, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    like_x = jax.ShapeDtypeStruct(x.shape, x.dtype)

    def input_gradient(form: Callable, kernel: Array, dy: Array) -> Array:
        return form(like_x, kernel, dy, conv_params)

    case = (x, kernel.shape[:2], kernel.shape[3], conv_params)
    return (
        _on_platform("input_gradient", input_gradient, case, kernel, dy),
        filter_gradient(x, dy, kernel.shape[:2], conv_params),
    )


_convolve.defvjp(_convolve_forward, _convolve_backward)


def filter_gradient(x: Array, dy: Array, window: tuple[int, int], conv_params: ConvParams) -> Array:
    """The gradient of `convolve` with respect to its kernel, in the form that suits the platform.

    Args:
        x: [batch, height, width, in channels].
        dy: gradient with respect to the result,
            [batch, ceil(height / stride), ceil(width / stride), out channels].
        window: height and width of the kernel, odd.
        conv_params: of the convolution.

    Returns:
        [*window, in channels / groups, out channels] in the type of `x`.
    """

    def gradient(form: Callable, x: Array, dy: Array) -> Array:
        return form(x, dy, window, conv_params)

    return _on_platform("filter_gradient", gradient, (x, window, dy.shape[-1], conv_params), x, dy)
