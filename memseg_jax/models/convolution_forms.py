"""Forms of the convolution: the same numbers, summed in another order; `convolution` chooses."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ConvParams:
    """What a convolution does besides its kernel; see `convolution.convolve`."""

    stride: int = 1
    dilation: int = 1
    groups: int = 1


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
    """`convolve` of one group and a 1x1 kernel, as one matrix product."""
    x = x[:, :: conv_params.stride, :: conv_params.stride]
    # Flat on purpose: as a product of four axes its filter gradient is slow.
    y = x.reshape(-1, x.shape[-1]) @ kernel[0, 0]
    return y.reshape(*x.shape[:-1], -1)


def convolve_by_shifts(x: Array, kernel: Array, conv_params: ConvParams) -> Array:
    """`convolve` of one group at stride 1 as one matrix product per tap of the kernel.

    Each is computed where the tap is inside the map, and nowhere else. Sums are at least float32.
    """
    size, y = x.shape[1:3], 0
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    for index in np.ndindex(kernel.shape[:2]):
        (rows, result_rows), (columns, result_columns) = overlaps(
            size, size, kernel.shape[:2], index, conv_params
        )
        seen = x[:, rows, columns]
        part = jnp.matmul(
            seen.reshape(-1, x.shape[-1]), kernel[index], preferred_element_type=dtype
        ).reshape(*seen.shape[:-1], -1)
        margins = [(s.start, n - s.stop) for s, n in zip((result_rows, result_columns), size)]
        y += jnp.pad(part, ((0, 0), *margins, (0, 0)))
    return y.astype(x.dtype)


def convolve_by_group(
    x: Array, kernel: Array, conv_params: ConvParams, form: Callable = convolve_plainly
) -> Array:
    """`convolve` as one convolution per group, each in the given form."""
    if conv_params.groups == 1:
        return form(x, kernel, conv_params)
    one = dataclasses.replace(conv_params, groups=1)
    groups = [jnp.split(array, conv_params.groups, axis=-1) for array in (x, kernel)]
    return jnp.concatenate([form(*pair, one) for pair in zip(*groups)], axis=-1)


def fold(x: Array, d: int) -> Array:
    """[batch, height, width, channels] -> [batch * d * d, ceil(height / d), ceil(width / d), ...].

    Every d-th row and column become an image of their own, padded with 0.
    """
    batch, height, width, channels = x.shape
    rows, columns = -(-height // d), -(-width // d)
    margin = ((0, 0), (0, rows * d - height), (0, columns * d - width), (0, 0))
    blocks = jnp.pad(x, margin).reshape(batch, rows, d, columns, d, channels)
    # The batch stays outermost: its sharding carries over to the folded batch.
    return blocks.transpose(0, 2, 4, 1, 3, 5).reshape(-1, rows, columns, channels)


def unfold(x: Array, d: int, size: tuple[int, ...]) -> Array:
    """The opposite of `fold`: [batch * d * d, rows, columns, ...] -> [batch, *size, ...]."""
    rows, columns, channels = x.shape[1:]
    blocks = x.reshape(-1, d, d, rows, columns, channels).transpose(0, 3, 1, 4, 2, 5)
    return blocks.reshape(-1, rows * d, columns * d, channels)[:, : size[0], : size[1]]


def overlaps(
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
