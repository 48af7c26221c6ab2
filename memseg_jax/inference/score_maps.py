"""Scores at full size, and the label maps they give, a few pixels at a time.

Scores at full size for all classes are the largest array of an evaluation by far. With one pass
over an image they never exist as a whole; several passes need their sum, one array.

Arrays are flat here: positions or pixels row by row, and unused ones at the end. The sizes of maps
are values, not shapes, so that images of all sizes share programs. A bilinear resize picks four
positions for every pixel: the work is that of the pixels, whatever the size of the array.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memseg_jax.models.layers import bilinear_matrix, bilinear_taps

Array = jax.Array

BLOCK = 8192  # pixels at a time
POSITIONS = 2**14  # flat arrays at the network's stride hold this many positions, or 4, 16, ... x
PIXELS = 2**20  # flat sums at the size of images hold this many pixels, or 2, 4, ... times
# Label maps, which leave the device, hold as many pixels as sums, or a quarter, a sixteenth, ... of
# that where it suffices, but not fewer than these: small images move few bytes, and all sizes
# together need few programs.
LEAST_LABELS = 2**14
SIDE = 2**12  # sides of results have up to this many pixels, or 2, 4, ... times

Taps = tuple[np.ndarray, np.ndarray, np.ndarray]


def capacity(count: int, smallest: int, factor: int = 2) -> int:
    """Returns the first of smallest, factor * smallest, factor^2 * smallest, ... that suffices."""
    while smallest < count:
        smallest *= factor
    return smallest


def label_capacity(pixels: int) -> int:
    """Length of the array for label maps of up to `pixels` pixels."""
    return min(capacity(pixels, LEAST_LABELS, 4), capacity(pixels, PIXELS))


def flatten(scores: Array) -> Array:
    """[batch, h, w, classes] -> [batch, positions, classes], zero where it is unused."""
    batch, height, width, classes = scores.shape
    positions = capacity(height * width, POSITIONS, 4)
    flat = scores.reshape(batch, height * width, classes)
    return jnp.pad(flat, ((0, 0), (0, positions - height * width), (0, 0)))


class Resize(NamedTuple):
    """A bilinear resize of a flat map.

    Attributes:
        rows: int32 [2, side], the two rows of the map behind every row of the result.
        row_weights: float32 [2, side], their weights.
        columns: int32 [2, side], the same of the columns.
        column_weights: float32 [2, side].
        widths: int32 [2], the length of a row of the flat map and of the result.
    """

    rows: Any
    row_weights: Any
    columns: Any
    column_weights: Any
    widths: Any


def resize(
    valid: tuple[int, int],
    row_length: int,
    target: tuple[int, int],
    mirrored: bool = False,
    covers: tuple[np.ndarray, np.ndarray] | None = None,
) -> Resize:
    """Plans the resize of one map.

    Args:
        valid: height and width of the map's valid part, in its upper left corner.
        row_length: positions in a row of the map.
        target: height and width of the result.
        mirrored: whether the valid part is mirrored.
        covers: divisors of the map's rows [height] and columns [width]; None: 1.

    Returns:
        A `Resize` of NumPy arrays.
    """
    found = []
    for axis in (0, 1):
        lower, upper, fraction = bilinear_taps(valid[axis], target[axis])
        index = np.stack([lower, upper])
        weight = np.stack([1 - fraction, fraction]).astype(np.float32)
        if mirrored and axis == 1:
            index = valid[axis] - 1 - index
        if covers is not None:
            weight /= covers[axis][index]
        found.append((index, weight))
    return _plan(*found, row_length)


def plan_of_taps(rows: Taps, columns: Taps, row_length: int) -> Resize:
    """Plans a resize of which the positions are known.

    Args:
        rows: lower and upper position and the weight of the upper one, each [rows of the result],
            as `bilinear_taps` gives them.
        columns: the same of the columns.
        row_length: positions in a row of the map.

    Returns:
        A `Resize` of NumPy arrays.
    """
    found = [
        (np.stack([lower, upper]), np.stack([1 - fraction, fraction]).astype(np.float32))
        for lower, upper, fraction in (rows, columns)
    ]
    return _plan(*found, row_length)


def _plan(
    rows: tuple[np.ndarray, np.ndarray], columns: tuple[np.ndarray, np.ndarray], row_length: int
) -> Resize:
    """A `Resize` of positions and weights [2, length of the axis], with room up to a capacity."""
    target = rows[0].shape[1], columns[0].shape[1]
    side = capacity(max(target), SIDE)
    padded = []
    for length, (index, weight) in zip(target, (rows, columns)):
        room = ((0, 0), (0, side - length))
        padded += [np.pad(index.astype(np.int32), room), np.pad(weight, room)]
    return Resize(*padded, np.array([row_length, target[1]], np.int32))


def stack(plans: Sequence[Resize], count: int) -> Resize:
    """Stacks plans along a first axis [count]; the last one is repeated where there are fewer."""
    side = max(plan.rows.shape[1] for plan in plans)

    def whole(x: np.ndarray) -> np.ndarray:
        return x if x.ndim < 2 else np.pad(x, ((0, 0), (0, side - x.shape[1])))

    plans = [*plans, *[plans[-1]] * (count - len(plans))]
    return jax.tree.map(lambda *x: np.stack([whole(y) for y in x]), *plans)


def resized(scores: Array, plan: Resize, first: Array, count: int = BLOCK) -> Array:
    """Some pixels of a resized map.

    Args:
        scores: [positions, classes].
        plan: from `resize`.
        first: the first pixel, counted row by row.
        count: how many.

    Returns:
        [count, classes]; arbitrary beyond the end of the result.
    """
    pixel = first + jnp.arange(count, dtype=jnp.int32)
    row, column = pixel // plan.widths[1], pixel % plan.widths[1]
    total = 0.0
    for i in (0, 1):
        for j in (0, 1):
            position = plan.rows[i, row] * plan.widths[0] + plan.columns[j, column]
            weight = plan.row_weights[i, row] * plan.column_weights[j, column]
            total += weight[:, None] * jnp.take(scores, position, axis=0, mode="clip")
    return total


def blocks_of(pixels: int) -> np.int32:
    """How many blocks hold this many pixels."""
    return np.int32(-(-pixels // BLOCK))


def label_maps(
    scores: Array,
    plans: Resize,
    blocks: Array,
    *,
    pixels: int,
    probabilities: bool,
    confidence: bool = True,
) -> tuple[Array, Array | None]:
    """Resizes scores and takes the best class, a few pixels at a time.

    Args:
        scores: [batch, positions, classes], logits or probabilities.
        plans: from `resize`, with a first axis [batch].
        blocks: from `blocks_of`, for the largest result.
        pixels: length of the results, a multiple of `BLOCK`.
        probabilities: whether the scores are probabilities; logits go through a softmax to give
            the confidence.
        confidence: whether the probabilities are asked for.

    Returns:
        The best class, uint8 [batch, pixels], and its probability, float32 [batch, pixels], or
        None.
    """

    def best(first: Array) -> tuple[Array, Array | None]:
        x = jax.vmap(resized, in_axes=(0, 0, None))(scores, plans, first)
        return best_class(x, probabilities=probabilities, confidence=confidence)

    return _in_blocks(best, blocks, (scores.shape[0], pixels), confidence)


def _in_blocks(
    best: Callable[[Array], tuple[Array, Array | None]],
    blocks: Array,
    shape: tuple[int, ...],
    confidence: bool,
) -> tuple[Array, Array | None]:
    """Classes and probabilities of `shape`, made along the last axis."""

    def add(block: Array, made: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
        first = block * BLOCK
        return jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, first, len(shape) - 1),
            made,
            best(first),
        )

    empty = (jnp.zeros(shape, jnp.uint8), jnp.zeros(shape) if confidence else None)
    return jax.lax.fori_loop(0, blocks, add, empty)


def best_class(
    scores: Array, *, probabilities: bool, confidence: bool = True
) -> tuple[Array, Array | None]:
    """Returns the class of the best score, uint8, and its probability; the last axis is gone."""
    label = jnp.argmax(scores, axis=-1).astype(jnp.uint8)
    if not confidence:
        return label, None
    best = jnp.max(scores, axis=-1)
    if not probabilities:
        best = jnp.exp(best - jax.nn.logsumexp(scores, axis=-1))
    return label, best


def add_resized(
    total: Array, scores: Array, index: Array, plan: Resize, blocks: Array, classes: Array | None
) -> Array:
    """Adds the scores of one pass to the sum of the passes over an image, a few pixels at a time.

    Args:
        total: [pixels, classes], pixels a multiple of `BLOCK`; should be donated.
        scores: [batch, positions, classes].
        index: which item of the batch.
        plan: from `resize`.
        blocks: from `blocks_of`.
        classes: int32 [classes], which score to add to that of each class; None: its own.

    Returns:
        The new sum.
    """
    scores = jax.lax.dynamic_index_in_dim(scores, index, keepdims=False)

    def add(block: Array, total: Array) -> Array:
        first = block * BLOCK
        new = resized(scores, plan, first)
        new = new if classes is None else jnp.take(new, classes, axis=-1)
        new += jax.lax.dynamic_slice_in_dim(total, first, BLOCK)
        return jax.lax.dynamic_update_slice_in_dim(total, new, first, 0)

    return jax.lax.fori_loop(0, blocks, add, total)


def mean_label_map(
    total: Array,
    blocks: Array,
    *,
    pixels: int,
    passes: int,
    probabilities: bool,
    confidence: bool = True,
) -> tuple[Array, Array | None]:
    """The label map of a mean, given the sum over the passes.

    Args:
        total: [at least pixels, classes].
        blocks: from `blocks_of`.
        pixels: length of the results, a multiple of `BLOCK`.
        passes: how many scores were added up.
        probabilities: as for `label_maps`.
        confidence: as for `label_maps`.

    Returns:
        The best class, uint8 [pixels], and its probability, float32 [pixels], or None.
    """

    def best(first: Array) -> tuple[Array, Array | None]:
        mean = jax.lax.dynamic_slice_in_dim(total, first, BLOCK) / passes
        return best_class(mean, probabilities=probabilities, confidence=confidence)

    return _in_blocks(best, blocks, (pixels,), confidence)


# ---- Windows ------------------------------------------------------------------------------------


def resize_matrix(source: int, target: int, rows: int, columns: int) -> np.ndarray:
    """A bilinear resize matrix inside a larger matrix of zeros.

    Args:
        source: number of input positions.
        target: number of output positions.
        rows: at least `target`.
        columns: at least `source`.

    Returns:
        float32 [rows, columns].
    """
    matrix = np.zeros((rows, columns), np.float32)
    matrix[:target, :source] = bilinear_matrix(source, target)
    return matrix


def window_scores(scores: Array, rows: Array, columns: Array, *, softmax: bool) -> Array:
    """Resizes windows of one size with a matrix per axis.

    Args:
        scores: [batch, h, w, classes].
        rows: [H, h].
        columns: [W, w].
        softmax: whether probabilities are asked for.

    Returns:
        [batch, H, W, classes], 0 where rows or columns of the matrices are 0.
    """
    scores = jnp.einsum("bhwk,Ww->bhWk", scores, columns, precision="highest")
    scores = jnp.einsum("bhWk,Hh->bHWk", scores, rows, precision="highest")
    if not softmax:
        return scores
    valid = jnp.any(rows > 0, axis=-1)[:, None] & jnp.any(columns > 0, axis=-1)
    return jnp.where(valid[..., None], jax.nn.softmax(scores, axis=-1), 0)
