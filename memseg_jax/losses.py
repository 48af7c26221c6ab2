"""Losses as pure functions of logits and labels."""

import jax
import jax.numpy as jnp

from memseg_jax.models.layers import resize_bilinear

Array = jax.Array


def cross_entropy(
    logits: Array, labels: Array, *, groups: int = 1, class_weights: Array | None = None
) -> Array:
    """Cross entropy at label size: the mean over each group's labelled pixels, then over groups.

    The reference takes the mean in every process and averages over processes; `groups` plays the
    part of the number of processes. A group without any labelled pixel counts as 0 (PyTorch
    gives NaN there).

    Args:
        logits: [batch, h, w, classes], resized bilinearly to the size of the labels.
        labels: integer [batch, H, W]; values outside 0..classes-1 are ignored.
        groups: number of equal, contiguous parts of the batch.
        class_weights: [classes]; the mean is then weighted, as PyTorch's `weight=` does it.

    Returns:
        A scalar.
    """
    classes = logits.shape[-1]
    logits = resize_bilinear(logits, labels.shape[1:3])
    labels = labels.astype(jnp.int32)
    valid = (labels >= 0) & (labels < classes)
    label = jnp.where(valid, labels, 0)
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, label[..., None], axis=-1)[..., 0]
    weight = valid.astype(logits.dtype)
    if class_weights is not None:
        weight = weight * class_weights[label]
    weight = weight.reshape(groups, -1)
    loss = (log_normaliser - chosen).reshape(groups, -1)
    loss = jnp.sum(jnp.where(weight > 0, loss, 0) * weight, axis=1)
    total = jnp.sum(weight, axis=1)
    return jnp.mean(loss / jnp.where(total > 0, total, 1))


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
