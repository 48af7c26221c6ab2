"""Scores at full size, and the label maps they give, a few rows at a time.

Scores at full size for all classes are the largest array of an evaluation by far. With one pass
over an image they never exist as a whole; several passes need their sum, one array.
"""

import jax
import jax.numpy as jnp
import numpy as np

from memseg_jax.models.layers import bilinear_matrix

Array = jax.Array

ROWS = 64  # rows at a time: heights at full size are multiples of this


def resize_matrix(
    source: int, target: int, rows: int, columns: int, mirrored: bool = False
) -> np.ndarray:
    """A bilinear resize matrix inside a larger matrix of zeros.

    Args:
        source: number of input positions.
        target: number of output positions.
        rows: at least `target`.
        columns: at least `source`.
        mirrored: whether the input is in reverse order.

    Returns:
        float32 [rows, columns].
    """
    matrix = np.zeros((rows, columns), np.float32)
    values = bilinear_matrix(source, target)
    matrix[:target, :source] = values[:, ::-1] if mirrored else values
    return matrix


def resize_scores(scores: Array, rows: Array, columns: Array) -> Array:
    """Resizes with a matrix per axis and image.

    Args:
        scores: [batch, h, w, classes].
        rows: [batch, H, h].
        columns: [batch, W, w].

    Returns:
        [batch, H, W, classes].
    """
    scores = jnp.einsum("bhwk,bWw->bhWk", scores, columns, precision="highest")
    return jnp.einsum("bhWk,bHh->bHWk", scores, rows, precision="highest")


def label_maps(
    scores: Array, rows: Array, columns: Array, *, probabilities: bool
) -> tuple[Array, Array]:
    """Resizes scores and takes the best class, a few rows at a time.

    Args:
        scores: [batch, h, w, classes], logits or probabilities.
        rows: [batch, H, h], H a multiple of `ROWS`.
        columns: [batch, W, w].
        probabilities: whether the scores are probabilities; logits go through a softmax to give
            the confidence.

    Returns:
        The best class, uint8 [batch, H, W], and its probability, float32 [batch, H, W].
    """
    scores = jnp.einsum("bhwk,bWw->bhWk", scores, columns, precision="highest")

    def block(rows: Array) -> tuple[Array, Array]:
        x = jnp.einsum("bhWk,bHh->bHWk", scores, rows, precision="highest")
        return best_class(x, probabilities=probabilities)

    batch, height, _ = rows.shape
    blocks = rows.reshape(batch, height // ROWS, ROWS, -1).swapaxes(0, 1)
    labels, confidence = jax.lax.map(block, blocks)

    def joined(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(batch, height, -1)

    return joined(labels), joined(confidence)


def best_class(scores: Array, *, probabilities: bool) -> tuple[Array, Array]:
    """Returns the class of the best score, uint8, and its probability; the last axis is gone."""
    best = jnp.max(scores, axis=-1)
    if not probabilities:
        best = jnp.exp(best - jax.nn.logsumexp(scores, axis=-1))
    return jnp.argmax(scores, axis=-1).astype(jnp.uint8), best


def add_resized(
    total: Array, scores: Array, index: Array, rows: Array, columns: Array, classes: Array | None
) -> Array:
    """Adds the scores of one pass to the sum of the passes over an image, a few rows at a time.

    Args:
        total: [H, W, classes], H a multiple of `ROWS`; best donated.
        scores: [batch, h, w, classes].
        index: which of the batch.
        rows: [H, h].
        columns: [W, w].
        classes: int32 [classes], which score to add to that of each class; None: its own.

    Returns:
        The new sum.
    """
    scores = jax.lax.dynamic_index_in_dim(scores, index, keepdims=False)

    def add(block: Array, total: Array) -> Array:
        first = block * ROWS
        some = jax.lax.dynamic_slice_in_dim(rows, first, ROWS)
        new = jnp.einsum("Hh,hwk->Hwk", some, scores, precision="highest")
        new = new if classes is None else jnp.take(new, classes, axis=-1)
        new = jnp.einsum("Hwk,Ww->HWk", new, columns, precision="highest")
        new += jax.lax.dynamic_slice_in_dim(total, first, ROWS)
        return jax.lax.dynamic_update_slice_in_dim(total, new, first, 0)

    return jax.lax.fori_loop(0, total.shape[0] // ROWS, add, total)


def mean_label_map(total: Array, *, passes: int, probabilities: bool) -> tuple[Array, Array]:
    """The label map of a mean, given the sum over the passes.

    Args:
        total: [H, W, classes].
        passes: how many scores were added up.
        probabilities: as for `label_maps`.

    Returns:
        The best class, uint8 [H, W], and its probability, float32 [H, W].
    """
    return best_class(total / passes, probabilities=probabilities)
