"""Pyramid pooling: the within-image context of PSPNet."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from memseg_jax.models.layers import (
    Array,
    ConvNorm,
    ValidSize,
    record,
    resize_bilinear,
    resize_valid,
)
from memseg_jax.models.symbolic import is_symbolic
from memseg_jax.runtime import rows


class PyramidPooling(nn.Module):
    """Means over grids of several sizes, resized to the map and fused with it by a 3x3 convolution.

    Zhao et al., "Pyramid Scene Parsing Network", section 3.2.

    Attributes:
        features: channels of every branch and of the result.
        scales: cells per side of the grids, one branch each.
        activation: name, see `layers.activation`.
        dtype: compute type.
    """

    features: int
    scales: tuple[int, ...] = (1, 2, 3, 6)
    activation: str = "relu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool, valid_size: ValidSize | None = None) -> Array:
        """[batch, height, width, channels] -> [batch, height, width, features]."""
        kw = {"activation": self.activation, "dtype": self.dtype}
        branches = [x]
        for index, scale in enumerate(self.scales):
            pooled = adaptive_mean(x, scale, valid_size)
            pooled = ConvNorm(self.features, name=f"branches_{index}", **kw)(pooled, train=train)
            # The resize is in float32: its gradient is a sum over many positions.
            if valid_size is None:
                resized = resize_bilinear(pooled, x.shape[1:3])
            else:
                cells = jnp.full((len(x), 2), scale, jnp.int32)
                sizes = [cells, valid_size.of_map(x.shape[1:3])]
                resized = resize_valid(pooled, sizes, x.shape[1:3])
            branches.append(resized)
        y = jnp.concatenate(branches, axis=-1)
        y = ConvNorm(self.features, 3, name="bottleneck", **kw)(
            y, train=train, valid_size=valid_size
        )
        record(self, "pyramid_pooling", y)
        return y


def adaptive_mean(x: Array, cells: int, valid_size: ValidSize | None = None) -> Array:
    """Means over a grid of cells, as PyTorch's adaptive average pooling divides a map.

    Of n positions, cell i of s covers floor(i n / s) to ceil((i + 1) n / s) - 1: where s does not
    divide n, cells overlap. A cell's mean is one of rows of means of columns, so two small matrices
    do it.

    Args:
        x: [batch, height, width, channels].
        cells: per side.
        valid_size: the valid part of padded images, which alone is divided.

    Returns:
        [batch, cells, cells, channels] of at least float32.
    """
    size = x.shape[1:3]
    if valid_size is None:
        matrices = [_cell_means(np.array([n]), cells, n)[0] for n in size]
        subscripts = "bhwc,Ww->bhWc", "bhwc,Hh->bHwc"
    else:
        valid = valid_size.of_map(size)
        matrices = [_cell_means(valid[:, axis], cells, n) for axis, n in enumerate(size)]
        subscripts = "bhwc,bWw->bhWc", "bhwc,bHh->bHwc"
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    y = x.astype(dtype)
    for name, matrix in zip(subscripts, reversed(matrices)):
        y = jnp.einsum(name, y, jnp.asarray(matrix, dtype), precision="highest")
    return rows.whole(y)  # a few cells: splitting them by rows gains nothing


def _cell_means(valid: Array | np.ndarray, cells: int, size: int) -> Array | np.ndarray:
    """The matrices that take the means of the cells along one axis.

    Args:
        valid: int [batch], the positions that are divided.
        cells: their number.
        size: all positions.

    Returns:
        [batch, cells, size], rows sum to 1.
    """
    index = np.arange(cells)
    position = jnp.arange(size) if is_symbolic((size,)) else np.arange(size)
    first = index * valid[:, None] // cells
    stop = -(-(index + 1) * valid[:, None] // cells)
    inside = (position >= first[..., None]) & (position < stop[..., None])
    return inside / (stop - first)[..., None]
