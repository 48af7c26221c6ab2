"""The convolution that every model uses, in the exact form that each kind of device runs well.

XLA's own form is the right one almost everywhere. It is replaced where it is not:

- Windows of one position, on CPU: a matrix product (`convolve_positions`); XLA's convolution takes
  up to eleven times as long for its gradients. (On GPU, matrix products of this kind have crashed
  XLA's compiler, and its convolution is native.)
- Groups: when the batch is split over devices, XLA gathers the whole batch on every device and
  each of them computes all of it; and on CPU it takes several times as long even on one device.
  One convolution for each group has neither fault (`convolve_by_group`).
- Filter gradient of a dilated convolution on GPU: XLA makes it a forward convolution with the whole
  feature map as its window, for which there is no fast algorithm. It is computed on subsampled
  maps (`filter_gradient_by_folding`) or tap by tap (`filter_gradient_by_shifts`).
- Strong dilation on CPU, a sixth of the map or more: tap by tap (`convolve_by_shifts` and the
  filter gradient), because most of the arithmetic of XLA's form is on padding.
- Other windows of 3x3 positions on CPU, of many channels: tile by tile (`convolve_by_tiles`), with
  less than half of the multiplications.

All forms compute the same numbers, summed in another order. `benchmarks/gpu_programs.py` shows what
they compile to, `benchmarks/convolutions.py` measures them. The platform is the one that a program
is lowered for, not the one at hand.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

# GPU: folding copies both maps once, but computes on padding and makes small maps (of 3 and fewer
# positions XLA makes no native gradient either); taps one by one copy the overlap of both maps for
# each tap, but compute nothing outside. Counting bytes and arithmetic at the rates of an H200, not
# timed, they cost the same where 5 to 6 dilations fit into the map.
DILATIONS_PER_MAP_TO_FOLD = 6
# CPU: with at most so many dilations in the map, taps one by one are faster than XLA's form.
DILATIONS_PER_MAP_TO_SHIFT = 6
# CPU: tiles cost additions for every channel and save multiplications for every pair of them.
CHANNELS_TO_TILE = 128
# CPU: the tiles of larger inputs (numbers in the whole batch) would take more than 512 MiB.
LARGEST_INPUT_TO_TILE = 2**25


@dataclasses.dataclass(frozen=True)
class ConvParams:
    """What a convolution does besides its kernel; see `convolve`."""

    stride: int = 1
    dilation: int = 1
    groups: int = 1


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
    kernel = _drop_unreachable_taps(kernel, x.shape[1:3], dilation)
    conv_params = ConvParams(stride, dilation if max(kernel.shape[:2]) > 1 else 1, groups)
    form = _form_on_cpu(x, kernel.shape[:2], kernel.shape[3], conv_params)
    if form is convolve_plainly and conv_params.dilation == groups == 1:
        return convolve_plainly(x, kernel, conv_params)
    return _convolve(x, kernel, conv_params)


def _drop_unreachable_taps(kernel: Array, size: tuple[int, int], dilation: int) -> Array:
    """Cuts off the taps that only ever see padding, equally many on opposite sides."""
    rows, columns = (
        max(k // 2 - (side - 1) // dilation, 0) for k, side in zip(kernel.shape[:2], size)
    )
    if rows == columns == 0:
        return kernel
    return kernel[rows : kernel.shape[0] - rows, columns : kernel.shape[1] - columns]


# ---- The whole convolution ---------------------------------------------------------------------


def convolve_plainly(x: Array, kernel: Array, conv_params: ConvParams) -> Array:
    """`convolve` as one operation of XLA."""
    padding = [((k - 1) * conv_params.dilation // 2,) * 2 for k in kernel.shape[:2]]
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(conv_params.stride,) * 2,
        padding=padding,
        rhs_dilation=(conv_params.dilation,) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=conv_params.groups,
    )


def convolve_positions(x: Array, kernel: Array, conv_params: ConvParams) -> Array:
    """`convolve` of one group and a window of one position, as one matrix product."""
    x = x[:, :: conv_params.stride, :: conv_params.stride]
    # Flat on purpose: as a product of four axes its filter gradient is slow.
    y = x.reshape(-1, x.shape[-1]) @ kernel[0, 0]
    return y.reshape(*x.shape[:-1], -1)


def convolve_by_shifts(x: Array, kernel: Array, conv_params: ConvParams) -> Array:
    """`convolve` of one group at stride 1 as one matrix product for each tap of the kernel.

    Each is computed where the tap is inside the map, and nowhere else. Sums are at least float32.
    """
    size, y = x.shape[1:3], 0
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    for index in np.ndindex(kernel.shape[:2]):
        (rows, result_rows), (columns, result_columns) = _overlaps(
            size, size, kernel.shape[:2], index, conv_params
        )
        seen = x[:, rows, columns]
        part = jnp.matmul(
            seen.reshape(-1, x.shape[-1]), kernel[index], preferred_element_type=dtype
        ).reshape(*seen.shape[:-1], -1)
        margins = [(s.start, n - s.stop) for s, n in zip((result_rows, result_columns), size)]
        y += jnp.pad(part, ((0, 0), *margins, (0, 0)))
    return y.astype(x.dtype)


def convolve_by_tiles(
    x: Array, kernel: Array, conv_params: ConvParams, transposed: bool = False
) -> Array:
    """`convolve` of one group, 3x3 taps and stride 1 on tiles of 2x2 results.

    Each tile sees 4x4 positions. Sums and differences of these, times sums and differences of the
    taps, hold all products that the tile needs: 16 products a tile instead of 36. Winograd's
    minimal filtering F(2x2, 3x3); A. Lavin and S. Gray, "Fast algorithms for convolutional neural
    networks", CVPR 2016. Exact; rounding is about three times that of the plain sums.

    Costs four times the memory of `x`, and 16/9 times that of `kernel`.

    Args:
        x: [batch, height, width, in channels].
        kernel: [3, 3, in channels, out channels].
        conv_params: of the convolution; dilated maps are folded first.
        transposed: `kernel` has out and in channels exchanged.

    Returns:
        [batch, height, width, out channels].
    """
    d, size = conv_params.dilation, x.shape[1:3]
    x = _fold(x, d)
    (height, width), (rows, columns) = x.shape[1:3], (-(-side // 2) for side in x.shape[1:3])
    margins = [(1, 2 * n + 1 - side) for n, side in ((rows, height), (columns, width))]
    x = jnp.pad(x, ((0, 0), *margins, (0, 0)))

    def of_positions(a: Array, b: Array, c: Array, d: Array) -> list[Array]:
        return [a - c, b + c, c - b, b - d]

    def of_taps(a: Array, b: Array, c: Array) -> list[Array]:
        outer, inner = (a + c) / 2, b / 2
        return [a, outer + inner, outer - inner, c]

    def of_results(a: Array, b: Array, c: Array, d: Array) -> list[Array]:
        return [a + b + c, b - c - d]

    # In lists and not in arrays: with separate products nothing has to be stacked.
    positions = [
        of_positions(*(line[:, :, j : j + 2 * columns : 2] for j in range(4)))
        for line in of_positions(*(x[:, i : i + 2 * rows : 2] for i in range(4)))
    ]
    taps = [of_taps(*line) for line in of_taps(*kernel)]

    def product(a: Array, b: Array) -> Array:
        # Flat on purpose, as in `convolve_positions`.
        y = a.reshape(-1, a.shape[-1]) @ (b.T if transposed else b)
        return y.reshape(*a.shape[:-1], -1)

    products = [[product(*pair) for pair in zip(*line)] for line in zip(positions, taps)]
    results = zip(*(of_results(*line) for line in products))  # by column of the tile
    results = zip(*(of_results(*column) for column in results))
    tiles = jnp.stack([jnp.stack(row, axis=3) for row in results], axis=2)
    y = tiles.reshape(len(x), 2 * rows, 2 * columns, -1)[:, :height, :width]
    return _unfold(y, d, size)


def convolve_by_group(
    x: Array, kernel: Array, conv_params: ConvParams, form: Callable = convolve_plainly
) -> Array:
    """`convolve` as one convolution of a form for each group."""
    if conv_params.groups == 1:
        return form(x, kernel, conv_params)
    one = dataclasses.replace(conv_params, groups=1)
    groups = [jnp.split(array, conv_params.groups, axis=-1) for array in (x, kernel)]
    return jnp.concatenate([form(*pair, one) for pair in zip(*groups)], axis=-1)


def _is_strongly_dilated(size: tuple[int, ...], conv_params: ConvParams) -> bool:
    return conv_params.dilation > 1 and conv_params.dilation * DILATIONS_PER_MAP_TO_SHIFT >= max(
        size
    )


def _form_on_cpu(
    x: Array, window: tuple[int, ...], out_channels: int, conv_params: ConvParams
) -> Callable:
    """The form of one group's convolution that is fastest on CPU."""
    if tuple(window) == (1, 1):
        return convolve_positions
    if conv_params.stride > 1:
        return convolve_plainly
    if _is_strongly_dilated(x.shape[1:3], conv_params):
        return convolve_by_shifts
    channels = min(x.shape[-1], out_channels) // conv_params.groups
    # In shorter types the sums and differences would be rounded; who computes in double precision
    # wants the plain sums.
    single = x.dtype == jnp.float32
    small = x.size <= LARGEST_INPUT_TO_TILE
    if tuple(window) == (3, 3) and channels >= CHANNELS_TO_TILE and single and small:
        return convolve_by_tiles
    return convolve_plainly


def _on_platform(function: Callable, cpu_form: Callable, *args: Array) -> Array:
    """Calls `function(form, *args)` with the form of a convolution that suits the platform."""
    if cpu_form is convolve_plainly:
        return function(convolve_plainly, *args)
    return lax.platform_dependent(
        *args,
        cpu=functools.partial(function, cpu_form),
        default=functools.partial(function, convolve_plainly),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: Array, kernel: Array, conv_params: ConvParams) -> Array:
    """`convolve` with gradients of our own."""

    def convolved(form: Callable, x: Array, kernel: Array) -> Array:
        return convolve_by_group(x, kernel, conv_params, form)

    form = _form_on_cpu(x, kernel.shape[:2], kernel.shape[3], conv_params)
    return _on_platform(convolved, form, x, kernel)


def _convolve_forward(
    x: Array, kernel: Array, conv_params: ConvParams
) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, kernel, conv_params), (x, kernel)


def _convolve_backward(
    conv_params: ConvParams, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = saved

    def input_gradient(form: Callable, kernel: Array, dy: Array) -> Array:
        if form is convolve_by_shifts:  # not its transpose, which would round every tap's part
            return convolve_by_group(dy, _turned(kernel, conv_params.groups), conv_params, form)
        if form is convolve_by_tiles:  # its transpose adds up tiles that overlap
            form = functools.partial(form, transposed=True)
            return convolve_by_group(dy, kernel[::-1, ::-1], conv_params, form)
        convolved = functools.partial(convolve_by_group, conv_params=conv_params, form=form)
        return jax.linear_transpose(lambda x: convolved(x, kernel), x)(dy)[0]

    form = _form_on_cpu(x, kernel.shape[:2], kernel.shape[3], conv_params)
    return (
        _on_platform(input_gradient, form, kernel, dy),
        filter_gradient(x, dy, kernel.shape[:2], conv_params),
    )


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _turned(kernel: Array, groups: int) -> Array:
    """The kernel of the input gradient at stride 1: turned by 180 degrees, channels exchanged."""
    parts = jnp.split(kernel[::-1, ::-1], groups, axis=-1)
    return jnp.concatenate([part.swapaxes(2, 3) for part in parts], axis=-1)


# ---- The filter gradient -----------------------------------------------------------------------


def filter_gradient(x: Array, dy: Array, window: tuple[int, int], conv_params: ConvParams) -> Array:
    """The gradient of `convolve` by its kernel, in the form that suits the platform.

    Args:
        x: [batch, height, width, in channels].
        dy: gradient by the result, [batch, ceil(height / stride), ceil(width / stride),
            out channels].
        window: height and width of the kernel, odd.
        conv_params: of the convolution.

    Returns:
        [*window, in channels / groups, out channels] in the type of `x`.
    """

    def with_form(form: Callable) -> Callable:
        return lambda x, dy: form(x, dy, window, conv_params)

    gpu, cpu = filter_gradient_plainly, filter_gradient_by_group
    if conv_params.dilation > 1:
        folds = min(x.shape[1:3]) // conv_params.dilation
        by_folding = conv_params.stride == 1 and folds >= DILATIONS_PER_MAP_TO_FOLD
        gpu = filter_gradient_by_folding if by_folding else filter_gradient_by_shifts
    form = _form_on_cpu(x, window, dy.shape[-1], conv_params)
    if form is convolve_positions:
        cpu = filter_gradient_by_positions
    elif form is convolve_by_tiles:
        cpu = filter_gradient_by_tiles
    elif _is_strongly_dilated(x.shape[1:3], conv_params):
        cpu = filter_gradient_by_shifts
    return lax.platform_dependent(
        x,
        dy,
        cpu=with_form(cpu),
        cuda=with_form(gpu),
        rocm=with_form(gpu),
        default=with_form(filter_gradient_plainly),
    )


def _transpose_by_kernel(
    convolution: Callable, x: Array, dy: Array, window: tuple[int, int], conv_params: ConvParams
) -> Array:
    shape = (*window, x.shape[-1] // conv_params.groups, dy.shape[-1])
    kernel = jax.ShapeDtypeStruct(shape, x.dtype)
    return jax.linear_transpose(lambda kernel: convolution(x, kernel, conv_params), kernel)(dy)[0]


# XLA's own form, and those of the other convolutions; arguments as of `filter_gradient`.
filter_gradient_plainly = functools.partial(_transpose_by_kernel, convolve_plainly)
filter_gradient_by_group = functools.partial(_transpose_by_kernel, convolve_by_group)
filter_gradient_by_positions = functools.partial(
    _transpose_by_kernel, functools.partial(convolve_by_group, form=convolve_positions)
)
filter_gradient_by_tiles = functools.partial(
    _transpose_by_kernel, functools.partial(convolve_by_group, form=convolve_by_tiles)
)


def filter_gradient_by_folding(
    x: Array, dy: Array, window: tuple[int, int], conv_params: ConvParams
) -> Array:
    """`filter_gradient` of a convolution without dilation on subsampled maps (space to batch).

    A dilated convolution of stride 1 works on dilation^2 interleaved maps independently: those
    that take every dilation-th row and column. Each becomes an image of its own.

    Costs one copy of `x` and of `dy`, padded to a multiple of the dilation.
    """
    d, undilated = conv_params.dilation, dataclasses.replace(conv_params, dilation=1)
    return filter_gradient_plainly(_fold(x, d), _fold(dy, d), window, undilated)


def _fold(x: Array, d: int) -> Array:
    """[batch, height, width, channels] -> [batch * d * d, ceil(height / d), ceil(width / d), ...].

    Every d-th row and column become an image of their own, padded with 0.
    """
    batch, height, width, channels = x.shape
    rows, columns = -(-height // d), -(-width // d)
    margin = ((0, 0), (0, rows * d - height), (0, columns * d - width), (0, 0))
    blocks = jnp.pad(x, margin).reshape(batch, rows, d, columns, d, channels)
    # The batch stays outermost: its sharding carries over to the folded batch.
    return blocks.transpose(0, 2, 4, 1, 3, 5).reshape(-1, rows, columns, channels)


def _unfold(x: Array, d: int, size: tuple[int, ...]) -> Array:
    """The opposite of `_fold`: [batch * d * d, rows, columns, ...] -> [batch, *size, ...]."""
    rows, columns, channels = x.shape[1:]
    blocks = x.reshape(-1, d, d, rows, columns, channels).transpose(0, 3, 1, 4, 2, 5)
    return blocks.reshape(-1, rows * d, columns * d, channels)[:, : size[0], : size[1]]


def filter_gradient_by_shifts(
    x: Array, dy: Array, window: tuple[int, int], conv_params: ConvParams
) -> Array:
    """`filter_gradient` as one matrix product for each tap of the kernel.

    The gradient of tap (i, j) is the sum, over the positions where the tap is inside the map, of
    what the tap sees of `x` times `dy`. Sums are at least float32.

    Costs, tap after tap, a copy of the parts of `x` and `dy` that overlap.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)

    def by_group(array: Array) -> Array:
        *sizes, channels = array.shape
        return array.reshape(*sizes, conv_params.groups, channels // conv_params.groups)

    def record(i: int, j: int) -> Array:
        """[in channels / groups, out channels]."""
        (rows, result_rows), (columns, result_columns) = _overlaps(
            x.shape[1:3], dy.shape[1:3], window, (i, j), conv_params
        )
        product = lax.dot_general(
            by_group(x[:, rows, columns]),
            by_group(dy[:, result_rows, result_columns]),
            (((0, 1, 2), (0, 1, 2)), ((3,), (3,))),
            preferred_element_type=dtype,
        )
        return product.transpose(1, 0, 2).reshape(product.shape[1], -1)

    taps = jnp.stack([record(i, j) for i in range(window[0]) for j in range(window[1])])
    return taps.reshape(*window, *taps.shape[1:]).astype(x.dtype)


def _overlaps(
    size: tuple[int, ...],
    result_size: tuple[int, ...],
    window: tuple[int, ...],
    index: tuple[int, ...],
    conv_params: ConvParams,
) -> list[tuple[slice, slice]]:
    """Where a tap is inside the map: per axis, the positions it sees, and those it adds to."""
    slices = []
    for side, result_side, k, i in zip(size, result_size, window, index):
        offset = (i - k // 2) * conv_params.dilation
        first = max(-(offset // conv_params.stride), 0)
        count = max(min(result_side, (side - 1 - offset) // conv_params.stride + 1) - first, 0)
        start = first * conv_params.stride + offset
        stop = start + count * conv_params.stride
        slices.append((slice(start, stop, conv_params.stride), slice(first, first + count)))
    return slices
