"""How the dataset-level feature memory is written: the update of a training step.

The memory is an array [classes, slots, channels]; `memory` has how it is read. Paper: Jin et al.,
"Mining Contextual Information Beyond Image for Semantic Segmentation", section 3.2.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memseg_jax.models.cell_sums import Between, MemorySums, sums_over_pixels, take
from memseg_jax.models.layers import Array

COSINE_EPSILON = 1e-8  # lower bound of a norm in a cosine, as in PyTorch
# A class whose pixels deviate less than this (mean of 1 - cosine) from its row is left alone: the
# weights (1 - cosine) / sum(1 - cosine) are 0 / 0 there. Float32 cosines are good to about 1e-7.
LEAST_DEVIATION = 1e-6


def update_memory(
    memory: Array, features: Array, labels: Array, momentum: Array, *, strategy: str = "cosine"
) -> Array:
    """Moves the rows of the classes in this batch towards their pixels' features.

    Every labelled pixel is a sample; its feature is the bilinear value of `features` at the size
    of the labels. A class with an all-zero slot stores the plain mean of its pixels there and is
    done. Otherwise every pixel belongs to the slot with the highest cosine, and each slot becomes
    (1 - momentum) * slot + momentum * (weighted mean of its pixels), the weights being
    (1 - cosine) / sum(1 - cosine): pixels far from the memory count more.

    Two edge cases: a slot of a present class that gets no pixel is multiplied by (1 - momentum), as
    in the PyTorch reference; a slot whose pixels are all parallel to it stays as it is, where the
    reference divides 0 by 0.

    Args:
        memory: float32 [classes, slots, channels].
        features: [batch, h, w, channels].
        labels: integer [batch, H, W]; values outside 0..classes-1 are ignored.
        momentum: scalar; see `memory_momentum`.
        strategy: "cosine", or "mean" for equal weights.

    Returns:
        float32 [classes, slots, channels].

    Raises:
        ValueError: the strategy is unknown.
    """
    sums = memory_sums_groups(memory, features, labels, groups=1, strategy=strategy)
    return move_memory(memory, MemorySums(*(x[0] for x in sums)), momentum)


def memory_sums_groups(
    memory: Array, features: Array, labels: Array, *, groups: int, strategy: str
) -> MemorySums:
    """The first half of `update_memory_groups`: everything that looks at pixels.

    The features are never upsampled. A bilinear value is a sum over four cells, so its product
    with a row follows from the products of the cells with that row, its norm from the products of
    neighbouring cells, and the sum over pixels from one weight per cell and slot (`cell_sums`).

    Args:
        memory: [classes, slots, channels].
        features: [batch, h, w, channels]; batch is a multiple of `groups`.
        labels: [batch, H, W].
        groups: number of equal, contiguous parts of the batch.
        strategy: see `update_memory`.

    Returns:
        The sums of every group: arrays [groups, classes, slots, ...].

    Raises:
        ValueError: the strategy is unknown.
    """
    if strategy not in ("cosine", "mean"):
        raise ValueError(f"memory update strategy is {strategy!r}; expected 'cosine' or 'mean'")
    classes, slots, _ = memory.shape
    sums = sums_over_pixels(
        functools.partial(_assign_slots, strategy=strategy),
        memory,
        features,
        labels,
        classes=classes,
        memory_rows=classes * slots,
        groups=groups,
    )
    return jax.tree.map(lambda x: x.reshape(groups, classes, slots, *x.shape[2:]), sums)


def _assign_slots(
    memory: Array,
    features: Array,
    label: Array,
    valid: Array,
    between: tuple[Between, Between],
    *,
    strategy: str,
) -> tuple[Array, Array]:
    """Weight and row of every pixel, see `cell_sums.Assign`; a class's rows are its slots."""
    slots = memory.shape[1]
    cosine = _cosines(memory, features, label, between)
    empty = jnp.all(memory == 0, axis=-1)  # [classes, slots]
    starts = take(jnp.any(empty, axis=-1), label)  # is stored for the first time in some slot
    weight = valid.astype(memory.dtype)
    if strategy == "cosine":
        weight *= jnp.where(starts, 1, 1 - jnp.max(cosine, axis=-1))
    row = label
    if slots > 1:
        first_empty = take(jnp.argmax(empty, axis=-1), label)
        row = label * slots + jnp.where(starts, first_empty, jnp.argmax(cosine, axis=-1))
    return weight, row


def _cosines(
    memory: Array, features: Array, label: Array, between: tuple[Between, Between]
) -> Array:
    """Cosine of every pixel with every slot of its own class: [batch, H, W, slots]."""
    (top, down), (left, across) = between
    classes, slots, _ = memory.shape
    width = features.shape[2]
    flat = memory.reshape(classes * slots, -1)
    products = jnp.einsum("bhwc,rc->bhwr", features, flat, precision="highest")
    products = products.reshape(len(features), -1, slots)
    dot = 0
    for y, share_y in ((top, 1 - down), (top + 1, down)):
        for x, share_x in ((left, 1 - across), (left + 1, across)):
            cell = jnp.asarray(y[:, None] * width + x, jnp.int32)
            share = jnp.asarray(share_y[:, None] * share_x, memory.dtype)
            dot += share[..., None] * jax.vmap(take)(products, cell * classes + label)
    pixel_norm = jnp.sqrt(_squared_norm(features, between))
    row_norm = jnp.sqrt(jnp.sum(jnp.square(memory), axis=-1))
    norms = jnp.maximum(pixel_norm, COSINE_EPSILON)[..., None] * take(
        jnp.maximum(row_norm, COSINE_EPSILON), label
    )
    # Where cells cancel to nothing, the quotient is rounding noise over almost zero.
    return jnp.clip(dot / norms, -1, 1)


def _squared_norm(features: Array, between: tuple[Between, Between]) -> Array:
    """Squared norm of the bilinear values: [batch, h, w, channels] -> [batch, H, W].

    Expands |sum_k a_k f_k|^2 over the four cells: only products of a cell with itself and with
    its right, lower, lower right and (of the two below and beside it) diagonal neighbours occur.
    Their weights are products of one factor per axis.
    """
    itself, beside, below, diagonal = _neighbour_products(features)
    (top, down), (left, across) = between
    dtype = features.dtype
    squares = np.zeros((features.shape[2], len(left)))
    squares[left, np.arange(len(left))] = (1 - across) ** 2
    squares[left + 1, np.arange(len(left))] = across**2
    crossed = np.zeros_like(squares)
    crossed[left, np.arange(len(left))] = (1 - across) * across

    def along_rows(x: Array, y: Array) -> Array:
        weights = jnp.asarray(np.concatenate([squares, crossed]), dtype)
        return jnp.matmul(jnp.concatenate([x, y], axis=-1), weights, precision="highest")

    same, other = along_rows(itself, 2 * beside), along_rows(below, diagonal)
    upper, lower, between_rows = (
        jnp.asarray(x, dtype)[:, None] for x in ((1 - down) ** 2, down**2, 2 * (1 - down) * down)
    )
    squared = upper * same[:, top] + lower * same[:, top + 1] + between_rows * other[:, top]
    return jnp.maximum(squared, 0)


def _neighbour_products(features: Array) -> list[Array]:
    """Inner products of the cells: itself, beside, below, and across and along the diagonal.

    The last is the sum of two, of a cell with its lower right neighbour and of those two that
    are beside and below it. Where there is no neighbour, the product is 0.

    Args:
        features: [batch, h, w, channels].

    Returns:
        Four times [batch, h, w].
    """
    margins = [((0, 0), (0, i), (0, j), (0, 0)) for i, j in ((0, 0), (0, 1), (1, 0), (1, 1))]
    operands = []
    # Sums over one half of the channels each: on a CPU, additions have to wait for each other.
    channels = features.shape[-1]
    for x in jnp.split(features, 2 if channels % 2 == 0 else 1, axis=-1):
        products = (
            x * x,
            x[:, :, :-1] * x[:, :, 1:],
            x[:, :-1] * x[:, 1:],
            x[:, :-1, :-1] * x[:, 1:, 1:] + x[:, :-1, 1:] * x[:, 1:, :-1],
        )
        operands += map(jnp.pad, products, margins)
    # All in one pass: one by one, XLA would make shifted copies of the features first.
    zeros = [jnp.zeros((), features.dtype)] * len(operands)
    sums = lax.reduce(operands, zeros, lambda a, b: [x + y for x, y in zip(a, b)], (3,))
    return [sum(sums[i::4]) for i in range(4)]


def move_memory(memory: Array, sums: MemorySums, momentum: Array) -> Array:
    """The second half of `update_memory`: the new memory from the sums."""
    summed, total, count = sums
    empty = jnp.all(memory == 0, axis=-1)  # [classes, slots]
    starts = jnp.any(empty, axis=-1)
    settled = total <= LEAST_DEVIATION * count  # no pixel, or all parallel to the row
    mean = summed / jnp.where(settled, 1, total)[..., None]
    mean = jnp.where(settled[..., None], 0, mean)
    moved = (1 - momentum) * memory + momentum * mean
    moved = jnp.where((settled & (count > 0))[..., None], memory, moved)
    present = jnp.any(count > 0, axis=-1)
    stored = jnp.where((empty & (count > 0))[..., None], mean, memory)
    return jnp.where(
        present[:, None, None], jnp.where(starts[:, None, None], stored, moved), memory
    )


def update_memory_groups(
    memory: Array,
    features: Array,
    labels: Array,
    momentum: Array,
    *,
    groups: int,
    strategy: str = "cosine",
) -> tuple[Array, Array]:
    """Updates the memory per replica group and averages the groups.

    The reference updates the memory in every process on that process's images and then averages
    over processes; `groups` plays the part of the number of processes. A class that only r of R
    groups see moves by r/R of a step, and is stored at r/R of its length the first time.

    Args:
        memory: [classes, slots, channels].
        features: [batch, h, w, channels]; batch is a multiple of `groups`.
        labels: [batch, H, W].
        momentum: scalar.
        groups: number of equal, contiguous parts of the batch.
        strategy: see `update_memory`.

    Returns:
        See `move_memory_groups`.
    """
    sums = memory_sums_groups(memory, features, labels, groups=groups, strategy=strategy)
    return move_memory_groups(memory, sums, momentum)


def move_memory_groups(memory: Array, sums: MemorySums, momentum: Array) -> tuple[Array, Array]:
    """Updates the memory by the groups' sums.

    Returns:
        The new memory [classes, slots, channels], and the groups' own memories before averaging
        [groups, classes, slots, channels], which the consistency loss sees.
    """
    local = jax.vmap(lambda x: move_memory(memory, x, momentum))(sums)
    return jnp.mean(local, axis=0), local


def memory_momentum(lr: Array, momentum: float, base_lr: float) -> Array:
    """Share of a row that is replaced in one update: momentum / base_lr * lr.

    Tied to the learning rate, it falls with it to a small floor. `base_lr` 0 means fixed.
    """
    return jnp.asarray(momentum / base_lr * lr if base_lr else momentum)
