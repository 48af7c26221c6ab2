"""Losses as pure functions of logits and labels."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memseg_jax.models.layers import bilinear_matrix, bilinear_taps
from memseg_jax.runtime import rows

Array = jax.Array

# What one image's logits at label size may take at a time. Small enough for a processor's cache,
# large enough to keep a GPU busy. The batch is not counted: every device has its own part of it.
BLOCK_BYTES = 4 * 2**20


def cross_entropy(
    logits: Array,
    labels: Array,
    *,
    groups: int = 1,
    class_weights: Array | None = None,
    total_weights: Array | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Array:
    """Cross entropy at label size: the mean over each group's labelled pixels, then over groups.

    The reference takes the mean in every process and averages over processes; `groups` plays the
    part of the number of processes. A group without any labelled pixel counts as 0 (PyTorch
    gives NaN there).

    The logits at label size never exist as a whole, neither here nor in the gradient; see
    `entropy_sums`.

    Args:
        logits: [batch, h, w, classes], resized bilinearly to the size of the labels.
        labels: integer [batch, H, W]; values outside 0..classes-1 are ignored.
        groups: number of equal, contiguous parts of the batch.
        class_weights: [classes]; the mean is then weighted, as PyTorch's `weight=` does it.
        total_weights: [groups], the denominators of the means where these images are only a part
            of the batch: `group_weights` of the whole. None: these images are the whole.
        block_bytes: memory for the logits of one image at label size.

    Returns:
        A scalar.
    """
    sums = entropy_sums(logits, labels, class_weights, block_bytes)
    loss, weight = (jnp.sum(x.reshape(groups, -1), axis=1) for x in sums)
    if total_weights is not None:
        weight = total_weights.astype(loss.dtype)
    return jnp.mean(loss / jnp.where(weight > 0, weight, 1))


def group_weights(
    labels: Array, classes: int, *, groups: int = 1, class_weights: Array | None = None
) -> Array:
    """The denominators of the means in `cross_entropy`: number of labelled pixels, or weights.

    Args:
        labels: integer [batch, H, W].
        classes: number of classes.
        groups: as in `cross_entropy`.
        class_weights: as in `cross_entropy`.

    Returns:
        [groups].
    """
    weight = _pixel_weights(labels, classes, class_weights, jnp.result_type(float))
    # By image first: the batch may be spread over devices, and what they exchange is then small.
    return jnp.sum(jnp.sum(weight, axis=(1, 2)).reshape(groups, -1), axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def entropy_sums(
    logits: Array, labels: Array, class_weights: Array | None, block_bytes: int
) -> tuple[Array, Array]:
    """Every image's cross entropy at label size, summed over its labelled pixels.

    Goes through the label rows block by block: resizes the few rows of logits that a block needs,
    takes the softmax, and - when differentiated - brings the block's gradient back to the size of
    the logits at once. Nothing but that gradient, which is as large as the logits, is kept for the
    backward pass, and no block is computed twice.

    Args:
        logits: [batch, h, w, classes].
        labels: integer [batch, H, W]; values outside 0..classes-1 are ignored.
        class_weights: [classes], or None for equal weights.
        block_bytes: memory for the logits of one image at label size.

    Returns:
        The weighted sums of the pixels' losses, and of their weights: [batch] each.
    """
    # Without the gradient, the compiler drops what only the gradient needs.
    return _sums_and_gradient(logits, labels, class_weights, block_bytes)[0]


def _sums_and_gradient(
    logits: Array, labels: Array, class_weights: Array | None, block_bytes: int
) -> tuple[tuple[Array, Array], Array]:
    """Returns `entropy_sums`, and the gradient of the first sum with respect to the logits."""
    height, width, classes = logits.shape[1:]
    label_height, label_width = labels.shape[1:]
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    if (height, width) == (label_height, label_width):
        # The logits are at label size already, and the gradient is as large: blocks save nothing.
        loss, weight, gradient = _pixel_entropy(logits.astype(dtype), labels, class_weights)
        sums = (jnp.sum(loss, axis=(1, 2)), jnp.sum(weight, axis=(1, 2)))
        return sums, gradient.astype(logits.dtype)
    rows_at_a_time = block_bytes // (label_width * classes * dtype.itemsize)
    blocks = _row_blocks(height, label_height, rows_at_a_time, rows.parts())
    columns = bilinear_matrix(width, label_width) if width != label_width else None

    def of_part(
        logits: Array, labels: Array, starts: Array, matrices: Array, class_weights: Array | None
    ) -> tuple[Array, Array, Array]:
        logits = rows.with_border(logits, blocks.above, blocks.below)
        *sums, gradient = _sums_by_block(
            logits, labels, starts[0], matrices[0], columns, class_weights
        )
        gradient = rows.add_border(gradient, blocks.above, blocks.below)
        return *(x[:, None] for x in sums), gradient

    if rows.parts() > 1:
        specs = (rows.MAPS, rows.MAPS, rows.BY_PART, rows.BY_PART, rows.SAME)
        of_part = rows.by_rows(of_part, specs, rows.MAPS)
    loss, weight, gradient = of_part(
        rows.pad(logits),
        rows.pad(labels, fill=classes),
        jnp.asarray(blocks.starts),
        jnp.asarray(blocks.matrices, dtype),
        class_weights,
    )
    sums = (jnp.sum(loss, axis=1), jnp.sum(weight, axis=1))
    return sums, gradient[:, :height].astype(logits.dtype)


def _sums_by_block(
    logits: Array,
    labels: Array,
    starts: Array,
    matrices: Array,
    columns: np.ndarray | None,
    class_weights: Array | None,
) -> tuple[Array, Array, Array]:
    """`_sums_and_gradient` of the rows that one device has, block by block.

    Args:
        logits: [batch, logit rows, w, classes].
        labels: [batch, label rows, W].
        starts: int32 [blocks], see `_RowBlocks`.
        matrices: [blocks, label rows of a block, logit rows of a block], see there.
        columns: see `_resize_rows`.
        class_weights: [classes] or None.

    Returns:
        The sums, [batch] each, and the gradient of the first, like `logits` in the type of
        `matrices`.
    """
    batch, _, _, classes = logits.shape
    dtype = matrices.dtype
    columns = None if columns is None else jnp.asarray(columns, dtype)
    # The last block may reach beyond the labels: its pixels there have no class.
    blocks, block_height, cell_rows = matrices.shape
    padding = (0, blocks * block_height - labels.shape[1])
    labels = jnp.pad(labels, ((0, 0), padding, (0, 0)), constant_values=classes)
    labels = labels.reshape(batch, blocks, block_height, -1)

    def add_block(carry: tuple, block: tuple) -> tuple[tuple, None]:
        loss, weight, gradient = carry
        start, matrix, labels = block
        cells = lax.dynamic_slice_in_dim(logits, start, cell_rows, axis=1).astype(dtype)
        pixels, resize_transposed = jax.vjp(lambda x: _resize_rows(x, matrix, columns), cells)
        pixel_loss, pixel_weight, slope = _pixel_entropy(pixels, labels, class_weights)
        (slope,) = resize_transposed(slope)
        slope += lax.dynamic_slice_in_dim(gradient, start, cell_rows, axis=1)
        gradient = lax.dynamic_update_slice_in_dim(gradient, slope, start, axis=1)
        loss += jnp.sum(pixel_loss, axis=(1, 2))
        weight += jnp.sum(pixel_weight, axis=(1, 2))
        return (loss, weight, gradient), None

    zeros = (jnp.zeros(batch, dtype), jnp.zeros(batch, dtype), jnp.zeros(logits.shape, dtype))
    over = (starts, matrices, jnp.moveaxis(labels, 1, 0))
    return lax.scan(add_block, zeros, over)[0]


def _sums_backward(
    block_bytes: int, gradient: Array, cotangents: tuple[Array, Array]
) -> tuple[Array, None, None]:
    scaled = gradient * cotangents[0][:, None, None, None]
    return scaled.astype(gradient.dtype), None, None


entropy_sums.defvjp(_sums_and_gradient, _sums_backward)


class _RowBlocks(NamedTuple):
    """The rows of the labels in blocks of one size, equally many in each part of the rows.

    Attributes:
        starts: the first row of logits that each block needs, int32 [parts, blocks], counted from
            the first one on the part's border.
        matrices: what makes a block's label rows from it and the following ones,
            [parts, blocks, label rows, logit rows]; 0 for label rows beyond the end.
        above: rows of logits before the part's own that its blocks need.
        below: the same after them.
    """

    starts: np.ndarray
    matrices: np.ndarray
    above: int
    below: int


def _row_blocks(height: int, label_height: int, most: int, parts: int) -> _RowBlocks:
    """Divides the rows of the labels.

    Args:
        height: rows of the logits.
        label_height: rows of the labels.
        most: label rows in a block.
        parts: equal parts of the rows of both, the last one padded.
    """
    part_height, part_rows = -(-height // parts), -(-label_height // parts)
    blocks = -(-part_rows // max(most, 1))
    size = -(-part_rows // blocks)
    blocks = -(-part_rows // size)
    lower, upper, _ = bilinear_taps(height, label_height)
    ends = np.minimum(np.arange(1, parts + 1) * part_rows, label_height)[:, None]
    first = np.arange(parts)[:, None] * part_rows + np.arange(blocks) * size
    stop = np.minimum(first + size, ends)
    empty = first >= stop  # beyond the labels
    first, stop = np.where(empty, 0, first), np.where(empty, 1, stop)
    needed = int(np.max(upper[stop - 1] - lower[first])) + 1
    starts = np.minimum(lower[first], height - needed)
    columns = starts[..., None] + np.arange(needed)
    label_rows = first[..., None] + np.arange(size)
    inside = (label_rows < stop[..., None]) & ~empty[..., None]
    label_rows = np.minimum(label_rows, label_height - 1)
    matrices = bilinear_matrix(height, label_height)[label_rows[..., None], columns[..., None, :]]
    matrices *= inside[..., None]

    # An empty block needs nothing: any rows of its part will do.
    own = np.arange(parts)[:, None] * part_height
    starts = np.where(empty, own, starts)
    stops = np.where(empty, own, starts + needed)
    above, below = rows.border(starts, stops, part_height)
    starts = np.minimum(starts - own + above, above + part_height + below - needed)
    return _RowBlocks(starts.astype(np.int32), matrices, above, below)


def _resize_rows(cells: Array, matrix: Array, columns: Array | None) -> Array:
    """Resizes some rows of logits.

    Args:
        cells: [batch, logit rows, w, classes].
        matrix: [label rows, logit rows].
        columns: [W, w]; None: the width stays.

    Returns:
        [batch, label rows, W, classes].
    """
    # One matrix product for every image and row: a single one would have to be transposed.
    batch, height = cells.shape[:2]
    if columns is not None:
        columns = jnp.broadcast_to(columns, (batch, height, *columns.shape))
        cells = jnp.matmul(columns, cells, precision="highest")
    matrix = jnp.broadcast_to(matrix, (batch, *matrix.shape))
    resized = jnp.matmul(matrix, cells.reshape(batch, height, -1), precision="highest")
    return resized.reshape(batch, matrix.shape[1], *cells.shape[2:])


def _pixel_entropy(
    logits: Array, labels: Array, class_weights: Array | None
) -> tuple[Array, Array, Array]:
    """Weighted cross entropy of every pixel, the weight, and the gradient of the first.

    Args:
        logits: [batch, height, width, classes].
        labels: integer [batch, height, width].
        class_weights: [classes] or None.

    Returns:
        [batch, height, width], [batch, height, width], [batch, height, width, classes].
    """
    classes = logits.shape[-1]
    weight = _pixel_weights(labels, classes, class_weights, logits.dtype)
    # Compared rather than indexed: an elementwise operation, where a gather's gradient scatters.
    own = labels[..., None] == jnp.arange(classes)
    logits -= jnp.max(logits, axis=-1, keepdims=True)
    log_total = jnp.log(jnp.sum(jnp.exp(logits), axis=-1, keepdims=True))
    chosen = jnp.sum(jnp.where(own, logits, 0), axis=-1)
    loss = jnp.where(weight > 0, log_total[..., 0] - chosen, 0) * weight
    # A second exponential costs less than keeping the first.
    slope = (jnp.exp(logits - log_total) - own) * weight[..., None]
    return loss, weight, slope


def _pixel_weights(
    labels: Array, classes: int, class_weights: Array | None, dtype: jnp.dtype
) -> Array:
    """How much every pixel counts: 0 where it is ignored, otherwise its class's weight or 1."""
    labels = labels.astype(jnp.int32)
    valid = (labels >= 0) & (labels < classes)
    weight = valid.astype(dtype)
    if class_weights is not None:
        weight *= class_weights.astype(dtype)[jnp.where(valid, labels, 0)]
    return weight


def consistency_loss(logits: Array) -> Array:
    """Representation consistency: each memory row should be classified as its own class.

    Args:
        logits: [groups, classes, slots, classes], of every row of every group's memory.

    Returns:
        A scalar, the mean cross entropy over all rows (never-seen classes included).
    """
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.arange(logits.shape[1])[None, :, None, None]
    return -jnp.mean(jnp.take_along_axis(log_probabilities, own, axis=-1))
