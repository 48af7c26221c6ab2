"""The dataset-level feature memory: how it is read (`MemoryModule`) and written (`update_memory`).

The memory is an array [classes, slots, channels]. It is an argument and a result of the training
step, never hidden in a module. It is read in training and in inference, and written in training
only. Paper: Jin et al., "Mining Contextual Information Beyond Image for Semantic Segmentation".
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memseg_jax.models import rematerialise
from memseg_jax.models.attention import SelfAttention
from memseg_jax.models.layers import Array, ConvNorm, ValidSize, bilinear_taps, record
from memseg_jax.runtime import rows

COSINE_EPSILON = 1e-8  # lower bound of a norm in a cosine, as in PyTorch
# A class whose pixels deviate less than this (mean of 1 - cosine) from its row is left alone: the
# weights (1 - cosine) / sum(1 - cosine) are 0 / 0 there. Float32 cosines are good to about 1e-7.
LEAST_DEVIATION = 1e-6
_INSIDE = "promise_in_bounds"

# Which cells the positions along one axis lie between; see `_cells_around`.
Between = tuple[np.ndarray | Array, np.ndarray | Array]


@jax.custom_vjp
def read_memory(probabilities: Array, memory: Array, gradient_memory: Array) -> Array:
    """Mean of the classes' rows, weighted by the class probabilities of every position.

    The reference updates the memory in place between the forward and the backward pass, so its
    gradient for the probabilities goes through the updated rows, while the value was read from the
    old ones. This does the same, to train as the reference does; the memory itself gets no
    gradient.

    Args:
        probabilities: [batch, height, width, classes].
        memory: [classes, channels], the rows that are read.
        gradient_memory: [groups, classes, channels], the rows that the gradient sees, one memory
            per replica group (equal, contiguous parts of the batch).

    Returns:
        [batch, height, width, channels].
    """
    del gradient_memory
    return jnp.einsum("bhwk,kc->bhwc", probabilities, memory)


def _read_forward(
    probabilities: Array, memory: Array, gradient_memory: Array
) -> tuple[Array, Array]:
    return read_memory(probabilities, memory, gradient_memory), gradient_memory


def _read_backward(gradient_memory: Array, gradient: Array) -> tuple[Array, None, None]:
    grouped = gradient.reshape(gradient_memory.shape[0], -1, *gradient.shape[1:])
    grouped = jnp.einsum("gbhwc,gkc->gbhwk", grouped, gradient_memory)
    return grouped.reshape(*gradient.shape[:3], -1), None, None


read_memory.defvjp(_read_forward, _read_backward)


class MemoryModule(nn.Module):
    """Augments pixel features with what the memory knows about their likely classes.

    Attributes:
        features: channels of the result.
        attention_dim: channels inside the attentions.
        hard: read the row of the most likely class instead of the mean over all classes.
        within_image_context: fuse the context of the image (ASPP) through a second attention.
        activation: name, see `layers.activation`.
        dtype: compute type.
        remat: whether training recomputes the inside of every layer.
    """

    features: int
    attention_dim: int
    hard: bool = False
    within_image_context: bool = True
    activation: str = "relu"
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        pixels: Array,
        logits: Array,
        context: Array,
        memory: Array,
        gradient_memory: Array | None = None,
        *,
        train: bool,
        valid_size: ValidSize | None = None,
    ) -> Array:
        """Returns the augmented features [batch, height, width, features].

        Args:
            pixels: features of the bottleneck [batch, height, width, channels].
            logits: coarse prediction (stage 1) [batch, height, width, classes]. The gradient of
                the result reaches them.
            context: within-image context [batch, height, width, channels'].
            memory: [classes, slots, channels]; a constant for the gradient.
            gradient_memory: [groups, classes, slots, channels], see `read_memory`. None: the
                gradient sees the memory that is read.
            train: use and update batch statistics.
            valid_size: the valid part of padded images.
        """
        kw = {"activation": self.activation, "dtype": self.dtype}
        on = {"train": train, "valid_size": valid_size, "remat": self.remat}
        slots = memory.shape[1]
        if gradient_memory is None:
            gradient_memory = memory[None]
        probabilities = jax.nn.softmax(logits, axis=-1)
        if self.hard:
            probabilities = jax.nn.one_hot(
                jnp.argmax(probabilities, axis=-1), logits.shape[-1], dtype=probabilities.dtype
            )
        gathered = []
        for slot in range(slots):
            selected = read_memory(
                probabilities.astype(self.dtype),
                memory[:, slot].astype(self.dtype),
                gradient_memory[:, :, slot].astype(self.dtype),
            )
            if slot == 0:
                record(self, "selected_memory", selected)
            name = "self_attention" if slots == 1 else f"self_attentions_{slot}"
            attention = SelfAttention(self.attention_dim, self.features, name=name, **kw)
            gathered.append(rematerialise.call(attention, pixels, selected, **on))
        if slots == 1:
            augmentation = gathered[0]
        else:
            fuse = ConvNorm(self.features, name="fuse_memory_conv", **kw)
            augmentation = rematerialise.call(fuse, jnp.concatenate(gathered, axis=-1), **on)
        record(self, "selfatt_memory", augmentation)
        x = jnp.concatenate([pixels, augmentation], axis=-1)
        bottleneck = ConvNorm(self.features, 3, name="bottleneck", **kw)
        x = rematerialise.call(bottleneck, x, **on)
        record(self, "memory_bottleneck", x)
        if self.within_image_context:
            attention = SelfAttention(
                self.attention_dim, self.features, name="self_attention_ms", **kw
            )
            refined = rematerialise.call(attention, pixels, context, **on)
            record(self, "selfatt_ms", refined)
            x = jnp.concatenate([refined, x], axis=-1)
            bottleneck = ConvNorm(self.features, 3, name="bottleneck_ms", **kw)
            x = rematerialise.call(bottleneck, x, **on)
        record(self, "memory_output", x)
        return x


class MemorySums(NamedTuple):
    """What the update needs to know about the pixels: sums, which add up over images.

    Attributes:
        features: weighted sum of the pixels' features [classes, slots, channels].
        weight: sum of their weights [classes, slots].
        count: number of pixels [classes, slots].
    """

    features: Array
    weight: Array
    count: Array


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
    neighbouring cells, and the sum over pixels from one weight per cell and slot.

    Args:
        memory: [classes, slots, channels].
        features: [batch, h, w, channels]; batch is a multiple of `groups`.
        labels: [batch, H, W].
        groups: number of equal, contiguous parts of the batch.
        strategy: see `update_memory`.

    Returns:
        The sums of every group: arrays with a first axis [groups].

    Raises:
        ValueError: the strategy is unknown.
    """
    if strategy not in ("cosine", "mean"):
        raise ValueError(f"memory update strategy is {strategy!r}; expected 'cosine' or 'mean'")
    # A map of one row or column becomes one of two equal ones: every pixel lies between two cells.
    margin = [(0, max(2 - side, 0)) for side in features.shape[1:3]]
    features = jnp.pad(features, ((0, 0), *margin, (0, 0)), mode="edge")
    down, across = map(_cells_around, features.shape[1:3], labels.shape[1:3])
    sums_of = functools.partial(_memory_sums, across=across, strategy=strategy)
    if rows.parts() == 1:
        return sums_of(memory, features, labels, *down, groups=groups)
    features, labels = rows.pad(features), rows.pad(labels, fill=len(memory))
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


def _memory_sums(
    memory: Array,
    features: Array,
    labels: Array,
    top: Array | np.ndarray,
    share: Array | np.ndarray,
    *,
    across: Between,
    groups: int,
    strategy: str,
) -> MemorySums:
    """`memory_sums_groups` of the rows that one device has.

    Args:
        memory: [classes, slots, channels].
        features: [batch, h, w, channels].
        labels: [batch, H, W].
        top: int [H], the first of the two rows of cells that each row of labels lies between.
        share: [H], the second one's weight.
        across: the same along the width.
        groups: see `memory_sums_groups`.
        strategy: see there.
    """
    classes, slots, _ = memory.shape
    memory_rows = classes * slots
    features = features.astype(memory.dtype)
    between = ((top, share), across)
    labels = labels.astype(jnp.int32)
    valid = (labels >= 0) & (labels < classes)
    label = jnp.where(valid, labels, 0)

    cosine = _cosines(memory, features, label, between)
    empty = jnp.all(memory == 0, axis=-1)  # [classes, slots]
    starts = _take(jnp.any(empty, axis=-1), label)  # is stored for the first time in some slot
    weight = valid.astype(memory.dtype)
    if strategy == "cosine":
        weight *= jnp.where(starts, 1, 1 - jnp.max(cosine, axis=-1))
    row = label
    if slots > 1:
        first_empty = _take(jnp.argmax(empty, axis=-1), label)
        row = label * slots + jnp.where(starts, first_empty, jnp.argmax(cosine, axis=-1))

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
    shape = (groups, classes, slots)
    return MemorySums(summed.reshape(*shape, -1), total.reshape(shape), count.reshape(shape))


def _cells_around(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """`bilinear_taps` of at least two cells, the second one always after the first.

    Returns:
        The first cell int [target], below source - 1; the second one's weight float64 [target].
    """
    lower, upper, fraction = bilinear_taps(source, target)
    last = lower == upper
    return lower - last, np.where(last, 1.0, fraction)


def _take(table: Array, index: Array) -> Array:
    """`table[index]` where every index is known to be inside."""
    return table.at[index].get(mode=_INSIDE)


def _cosines(memory: Array, features: Array, label: Array, between: Sequence[Between]) -> Array:
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
            dot += share[..., None] * jax.vmap(_take)(products, cell * classes + label)
    pixel_norm = jnp.sqrt(_squared_norm(features, between))
    row_norm = jnp.sqrt(jnp.sum(jnp.square(memory), axis=-1))
    norms = jnp.maximum(pixel_norm, COSINE_EPSILON)[..., None] * _take(
        jnp.maximum(row_norm, COSINE_EPSILON), label
    )
    # Where cells cancel to nothing, the quotient is rounding noise over almost zero.
    return jnp.clip(dot / norms, -1, 1)


def _squared_norm(features: Array, between: Sequence[Between]) -> Array:
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


def _spread(
    weight: Array, row: Array, shape: tuple[int, int, int], between: Sequence[Between]
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
