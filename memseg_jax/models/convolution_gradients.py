"""Forms of a convolution's input and filter gradients; `convolution` chooses.

The arguments are the same everywhere.

- Input gradients `form(x, kernel, dy, conv_params)`: only shape and type of `x` count.
- Filter gradients `form(x, dy, window, conv_params)`: `window` is height and width of the kernel.

`x` [batch, height, width, in channels], `kernel` [*window, in channels / groups, out channels] and
`conv_params` are those of the convolution; `dy` is the gradient with respect to its result, [batch,
ceil(height / stride), ceil(width / stride), out channels].
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from memseg_jax.models.convolution_forms import (
    Array,
    ConvParams,
    convolve_by_group,
    convolve_by_shifts,
    convolve_plainly,
    convolve_positions,
    fold,
    overlaps,
)
from memseg_jax.models.winograd import convolve_by_tiles

# ---- By the input ------------------------------------------------------------------------------


def _transpose_by_input(
    form: Callable, x: jax.ShapeDtypeStruct, kernel: Array, dy: Array, conv_params: ConvParams
) -> Array:
    convolved = functools.partial(convolve_by_group, conv_params=conv_params, form=form)
    return jax.linear_transpose(lambda x: convolved(x, kernel), x)(dy)[0]


# Those of XLA's own convolution and of the matrix product, group by group.
input_gradient_plainly = functools.partial(_transpose_by_input, convolve_plainly)
input_gradient_by_positions = functools.partial(_transpose_by_input, convolve_positions)


def input_gradient_by_shifts(
    x: jax.ShapeDtypeStruct, kernel: Array, dy: Array, conv_params: ConvParams
) -> Array:
    """The input gradient at stride 1 as one matrix product for each tap of the kernel."""
    del x
    # Not the transpose of `convolve_by_shifts`, which would round every tap's part.
    return convolve_by_group(
        dy, _turned(kernel, conv_params.groups), conv_params, convolve_by_shifts
    )


def input_gradient_by_tiles(
    x: jax.ShapeDtypeStruct, kernel: Array, dy: Array, conv_params: ConvParams
) -> Array:
    """The input gradient at stride 1 of 3x3 taps, tile by tile."""
    del x
    # Not the transpose of `convolve_by_tiles`, which adds up tiles that overlap.
    tiles = functools.partial(convolve_by_tiles, transposed=True)
    return convolve_by_group(dy, kernel[::-1, ::-1], conv_params, tiles)


def _turned(kernel: Array, groups: int) -> Array:
    """The kernel of the input gradient at stride 1: turned by 180 degrees, channels exchanged."""
    parts = jnp.split(kernel[::-1, ::-1], groups, axis=-1)
    return jnp.concatenate([part.swapaxes(2, 3) for part in parts], axis=-1)


# ---- By the kernel -----------------------------------------------------------------------------


def _transpose_by_kernel(
    convolution: Callable, x: Array, dy: Array, window: tuple[int, int], conv_params: ConvParams
) -> Array:
    shape = (*window, x.shape[-1] // conv_params.groups, dy.shape[-1])
    kernel = jax.ShapeDtypeStruct(shape, x.dtype)
    return jax.linear_transpose(lambda kernel: convolution(x, kernel, conv_params), kernel)(dy)[0]


# XLA's own form, and those of the other convolutions.
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
    """The filter gradient as that of an undilated convolution on subsampled maps (space to batch).

    A dilated convolution of stride 1 works on dilation^2 interleaved maps independently: those
    that take every dilation-th row and column. Each becomes an image of its own.

    Costs one copy of `x` and of `dy`, padded to a multiple of the dilation.
    """
    d, undilated = conv_params.dilation, dataclasses.replace(conv_params, dilation=1)
    return filter_gradient_plainly(fold(x, d), fold(dy, d), window, undilated)


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
        (rows, result_rows), (columns, result_columns) = overlaps(
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
