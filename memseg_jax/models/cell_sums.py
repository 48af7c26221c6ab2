"""Sums over the pixels of classes, of features that are never resized to the size of the labels.

A pixel's feature is the bilinear value of the cells around it. Its sum over some pixels is a sum
over cells, each with one weight: how much these pixels take of it. So the update of a memory needs
the weights, which are scalars, and a small matrix product.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memseg_jax.models.layers import Array, bilinear_taps
from memseg_jax.runtime import rows

_INSIDE = "promise_in_bounds"

# Which cells the positions along one axis lie between; see `_cells_around`.
Between = tuple[np.ndarray | Array, np.ndarray | Array]

# (memory, features [batch, h, w, channels], label int32 [batch, H, W], valid bool [batch, H, W],
# (between along the height, along the width)) -> weight [batch, H, W] of every pixel, 0 where it is
# not valid, and int32 [batch, H, W], the row that it belongs to. Where a pixel is not valid, its
# label is 0.
Assign = Callable[[Array, Array, Array, Array, tuple[Between, Between]], tuple[Array, Array]]


class MemorySums(NamedTuple):
    """What an update needs to know about the pixels: sums, which add up over images.

    Attributes:
        features: weighted sum of the pixels' features [rows, channels].
        weight: sum of their weights [rows].
        count: number of pixels [rows].
    """

    features: Array
    weight: Array
    count: Array


def sums_over_pixels(
    assign: Assign,
    memory: Array,
    features: Array,
    labels: Array,
    *,
    classes: int,
    memory_rows: int,
    groups: int,
) -> MemorySums:
    """Weighted sums over the pixels of every row of a memory, for every replica group.

    Args:
        assign: decides on the weight and the row of every pixel.
        memory: what `assign` gets to see of the memory. The sums have its type.
        features: [batch, h, w, channels]; batch is a multiple of `groups`.
        labels: [batch, H, W]; values outside 0..classes-1 are ignored.
        classes: their number.
        memory_rows: number of rows.
        groups: number of equal, contiguous parts of the batch.

    Returns:
        The sums of every group: arrays with a first axis [groups].
    """
    # A map of one row or column becomes one of two equal ones: every pixel lies between two cells.
    margin = [(0, max(2 - side, 0)) for side in features.shape[1:3]]
    features = jnp.pad(features, ((0, 0), *margin, (0, 0)), mode="edge")
    down, across = map(_cells_around, features.shape[1:3], labels.shape[1:3])
    sums_of = functools.partial(
        _sums, assign, across=across, classes=classes, memory_rows=memory_rows
    )
    if rows.parts() == 1:
        return sums_of(memory, features, labels, *down, groups=groups)
    features, labels = rows.pad(features), rows.pad(labels, fill=classes)
    (top, share), above, below = _down_by_part(down, features.shape[1] // rows.parts())

    def of_part(
        memory: Array, features: Array, labels: Array, top: Array, share: Array
    ) -> MemorySums:
        features = rows.with_border(features, above, below)
        sums = sums_of(memory, features, labels, top, share, groups=len(labels))
        return jax.tree.map(lambda x: x[:, None], sums)

    specs = (rows.SAME, rows.MAPS, rows.MAPS, rows.BY_PART, rows.BY_PART)
    share = jnp.asarray(share, memory.dtype)
    sums = rows.by_rows(of_part, specs, rows.MAPS)(
        memory, features, labels, jnp.asarray(top, jnp.int32), share
    )
    # Of every image and part: one message adds up those of a group.
    return jax.tree.map(lambda x: jnp.sum(x.reshape(groups, -1, *x.shape[2:]), axis=1), sums)


def take(table: Array, index: Array) -> Array:
    """`table[index]` where every index is known to be inside."""
    return table.at[index].get(mode=_INSIDE)


def _sums(
    assign: Assign,
    memory: Array,
    features: Array,
    labels: Array,
    top: Array | np.ndarray,
    share: Array | np.ndarray,
    *,
    across: Between,
    classes: int,
    memory_rows: int,
    groups: int,
) -> MemorySums:
    """`sums_over_pixels` of the rows of an image that one device has.

    Args:
        assign: see there.
        memory: see there.
        features: [batch, h, w, channels].
        labels: [batch, H, W].
        top: int [H], the first of the two rows of cells that each row of labels lies between.
        share: [H], the second one's weight.
        across: the same along the width.
        classes: see there.
        memory_rows: see there.
        groups: see there.
    """
    features = features.astype(memory.dtype)
    between = ((top, share), across)
    labels = labels.astype(jnp.int32)
    valid = (labels >= 0) & (labels < classes)
    weight, row = assign(memory, features, jnp.where(valid, labels, 0), valid, between)

    # Weight of every cell in every row's sum: [groups, images, rows, h, w].
    cell_weight = _spread(weight, row, (memory_rows, *features.shape[1:3]), between)
    cell_weight, features, row, valid = (
        x.reshape(groups, -1, *x.shape[1:]) for x in (cell_weight, features, row, valid)
    )
    summed = jnp.einsum("gbrhw,gbhwc->grc", cell_weight, features, precision="highest")
    total = jnp.sum(jnp.sum(cell_weight, axis=(3, 4)), axis=1)
    counted = jnp.where(valid, row, memory_rows)
    counted += jnp.arange(groups)[:, None, None, None] * (memory_rows + 1)
    count = jnp.zeros(groups * (memory_rows + 1), jnp.int32)
    count = count.at[counted.reshape(-1)].add(1, mode=_INSIDE)
    count = count.reshape(groups, -1)[:, :memory_rows].astype(memory.dtype)
    return MemorySums(summed, total, count)


def _down_by_part(down: Between, size: int) -> tuple[Between, int, int]:
    """`_cells_around` the label rows of every part, counted from the first row on its border.

    Args:
        down: for the label rows of the whole.
        size: rows of cells of a part.

    Returns:
        For the label rows of all parts, one part after the other; and how many rows of cells the
        parts need above and below their own.
    """
    count = rows.parts()
    length = -(-len(down[0]) // count)
    own = np.arange(count)[:, None] * size
    top = np.broadcast_to(own, (count, length)).copy().reshape(-1)  # beyond the labels
    top[: len(down[0])] = down[0]
    top = top.reshape(count, length)
    above, below = rows.border(top, top + 2, size)
    share = np.pad(down[1], (0, top.size - len(down[1])))
    return ((top - own + above).reshape(-1), share), above, below


def _cells_around(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """`bilinear_taps` of at least two cells, the second one always after the first.

    Returns:
        The first cell int [target], below source - 1; the second one's weight float64 [target].
    """
    lower, upper, fraction = bilinear_taps(source, target)
    last = lower == upper
    return lower - last, np.where(last, 1.0, fraction)


def _spread(
    weight: Array, row: Array, shape: tuple[int, int, int], between: tuple[Between, Between]
) -> Array:
    """Adds every pixel's weight to its four cells: the transpose of a bilinear resize, by row.

    Args:
        weight: [batch, H, W].
        row: int32 [batch, H, W], what the pixel belongs to.
        shape: number of rows, and h and w of the cells.
        between: cells around the pixels, per axis.

    Returns:
        [batch, rows, h, w].
    """
    (top, down), (left, across) = between
    shares = [
        jnp.stack([jnp.asarray(part, weight.dtype) for part in (1 - x, x)], axis=-1)
        for x in (down, across)
    ]
    windows = jnp.einsum("byx,yi,xj->byxij", weight, *shares, precision="highest")
    dimensions = lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0, 1, 2),
    )

    def of_image(windows: Array, row: Array) -> Array:
        corner = [jnp.broadcast_to(x, row.shape) for x in (top[:, None], left)]
        index = jnp.stack([row, *corner], axis=-1).astype(jnp.int32)
        return lax.scatter_add(
            jnp.zeros(shape, weight.dtype),
            index.reshape(-1, 3),
            windows.reshape(-1, 2, 2),
            dimensions,
            mode=_INSIDE,
        )

    return jax.vmap(of_image)(windows, row)
