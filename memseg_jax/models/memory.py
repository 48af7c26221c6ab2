"""The dataset-level feature memory: how it is read (`MemoryModule`) and written (`update_memory`).

The memory is an array [classes, slots, channels]. It is an argument and a result of the training
step, never hidden in a module. It is read in training and in inference, and written in training
only. Paper: Jin et al., "Mining Contextual Information Beyond Image for Semantic Segmentation".
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseg_jax.models import rematerialise
from memseg_jax.models.attention import SelfAttention
from memseg_jax.models.layers import Array, ConvNorm, Extent, bilinear_taps, tap

COSINE_EPSILON = 1e-8  # lower bound of a norm in a cosine, as in PyTorch
# A class whose pixels deviate less than this (mean of 1 - cosine) from its row is left alone: the
# weights (1 - cosine) / sum(1 - cosine) are 0 / 0 there. Float32 cosines are good to about 1e-7.
PARALLEL = 1e-6


@jax.custom_vjp
def read_memory(probabilities: Array, memory: Array, gradient_memory: Array) -> Array:
    """Mean of the classes' rows, weighted by the class probabilities of every position.

    The reference updates the memory in place between the forward and the backward pass, so its
    gradient for the probabilities goes through the rows of after the update, while the value was
    read from those of before. Training that is to equal it has to do the same; the memory itself
    gets no gradient.

    Args:
        probabilities: [batch, height, width, classes].
        memory: [classes, channels], the rows that are read.
        gradient_memory: [groups, classes, channels], the rows that the gradient sees, for every
            replica group (equal, contiguous parts of the batch) its own.

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
        remat: whether training computes the inside of every layer a second time.
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
        extent: Extent | None = None,
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
            extent: the real part of padded images.
        """
        kw = {"activation": self.activation, "dtype": self.dtype}
        on = {"train": train, "extent": extent, "remat": self.remat}
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
                tap(self, "selected_memory", selected)
            name = "self_attention" if slots == 1 else f"self_attentions_{slot}"
            attention = SelfAttention(self.attention_dim, self.features, name=name, **kw)
            gathered.append(rematerialise.call(attention, pixels, selected, **on))
        if slots == 1:
            augmentation = gathered[0]
        else:
            fuse = ConvNorm(self.features, name="fuse_memory_conv", **kw)
            augmentation = rematerialise.call(fuse, jnp.concatenate(gathered, axis=-1), **on)
        tap(self, "selfatt_memory", augmentation)
        x = jnp.concatenate([pixels, augmentation], axis=-1)
        bottleneck = ConvNorm(self.features, 3, name="bottleneck", **kw)
        x = rematerialise.call(bottleneck, x, **on)
        tap(self, "memory_bottleneck", x)
        if self.within_image_context:
            attention = SelfAttention(
                self.attention_dim, self.features, name="self_attention_ms", **kw
            )
            refined = rematerialise.call(attention, pixels, context, **on)
            tap(self, "selfatt_ms", refined)
            x = jnp.concatenate([refined, x], axis=-1)
            bottleneck = ConvNorm(self.features, 3, name="bottleneck_ms", **kw)
            x = rematerialise.call(bottleneck, x, **on)
        tap(self, "memory_output", x)
        return x


class MemorySums(NamedTuple):
    """What the update needs to know of the pixels: sums, which add up over images.

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

    Two rules of edge cases: a slot of a present class that gets no pixel is multiplied by
    (1 - momentum), as in the PyTorch reference; a slot whose pixels are all parallel to it stays
    as it is, where the reference divides 0 by 0.

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
    return move_memory(memory, memory_sums(memory, features, labels, strategy), momentum)


def memory_sums(memory: Array, features: Array, labels: Array, strategy: str) -> MemorySums:
    """The first half of `update_memory`, with its arguments: everything that looks at pixels.

    The features are never upsampled. A bilinear value is a sum over at most four cells, so its
    product with a row follows from the products of the cells with that row, its norm from the
    products of neighbouring cells, and the sum over pixels from one weight per cell and slot.
    """
    if strategy not in ("cosine", "mean"):
        raise ValueError(f"memory update strategy is {strategy!r}; expected 'cosine' or 'mean'")
    classes, slots, _ = memory.shape
    dtype = memory.dtype
    batch, height, width = features.shape[:3]
    features = features.astype(dtype)
    labels = labels.astype(jnp.int32)
    valid = (labels >= 0) & (labels < classes)
    label = jnp.where(valid, labels, 0)

    y0, y1, fy = bilinear_taps(height, labels.shape[1])
    x0, x1, fx = bilinear_taps(width, labels.shape[2])
    corners = [
        (y, x, jnp.asarray(wy[:, None] * wx[None, :], dtype))
        for y, wy in ((y0, 1 - fy), (y1, fy))
        for x, wx in ((x0, 1 - fx), (x1, fx))
    ]

    # Cosine of every pixel with every slot of its own class: [batch, H, W, slots].
    row_norm = jnp.sqrt(jnp.sum(jnp.square(memory), axis=-1))  # [classes, slots]
    products = jnp.einsum("bhwc,ktc->bhwkt", features, memory, precision="highest")
    products = products.reshape(batch, height * width * classes, slots)

    def at_label(y: Any, x: Any) -> Array:
        cell = jnp.asarray(y[:, None] * width + x[None, :], jnp.int32)
        index = cell[None] * classes + label
        return jnp.take_along_axis(
            products, index.reshape(batch, -1)[..., None], axis=1, mode="clip"
        ).reshape(*label.shape, slots)

    dot = sum(weight[None, :, :, None] * at_label(y, x) for y, x, weight in corners)
    pixel_norm = jnp.sqrt(_squared_norm(features, (y0, y1, fy), (x0, x1, fx)))
    norms = (
        jnp.maximum(pixel_norm, COSINE_EPSILON)[..., None]
        * jnp.maximum(row_norm, COSINE_EPSILON)[label]
    )
    # Where cells cancel to nothing, the quotient is rounding noise over almost zero.
    cosine = jnp.clip(dot / norms, -1, 1)

    empty = jnp.all(memory == 0, axis=-1)  # [classes, slots]
    starts = jnp.any(empty, axis=-1)  # classes that are stored for the first time in some slot
    first_empty = jnp.argmax(empty, axis=-1)
    slot = jnp.where(starts[label], first_empty[label], jnp.argmax(cosine, axis=-1))
    weight = jnp.ones(label.shape, dtype)
    if strategy == "cosine":
        own = jnp.take_along_axis(cosine, slot[..., None], axis=-1)[..., 0]
        weight = jnp.where(starts[label], weight, 1 - own)
    weight = jnp.where(valid, weight, 0)

    # Sums over pixels: total weight and pixel count per slot, and the weight of every cell.
    row = (label * slots + slot).reshape(-1)
    rows = classes * slots
    total = jnp.zeros((rows,), dtype).at[row].add(weight.reshape(-1))
    count = jnp.zeros((rows,), dtype).at[row].add(valid.reshape(-1).astype(dtype))
    image = jnp.arange(batch)[:, None]
    cell_weight = jnp.zeros((batch, height * width * rows), dtype)
    for y, x, corner in corners:
        cell = jnp.asarray(y[:, None] * width + x[None, :], jnp.int32)
        index = (cell[None] * rows).reshape(1, -1) + row.reshape(batch, -1)
        cell_weight = cell_weight.at[image, index].add((weight * corner[None]).reshape(batch, -1))
    cell_weight = cell_weight.reshape(batch, height, width, rows)
    summed = jnp.einsum("bhwr,bhwc->rc", cell_weight, features, precision="highest")

    total, count = (x.reshape(classes, slots) for x in (total, count))
    return MemorySums(summed.reshape(memory.shape), total, count)


def move_memory(memory: Array, sums: MemorySums, momentum: Array) -> Array:
    """The second half of `update_memory`: the new memory from the sums."""
    summed, total, count = sums
    empty = jnp.all(memory == 0, axis=-1)  # [classes, slots]
    starts = jnp.any(empty, axis=-1)
    settled = total <= PARALLEL * count  # no pixel, or all parallel to the row
    mean = summed / jnp.where(settled, 1, total)[..., None]
    mean = jnp.where(settled[..., None], 0, mean)
    moved = (1 - momentum) * memory + momentum * mean
    moved = jnp.where((settled & (count > 0))[..., None], memory, moved)
    present = jnp.any(count > 0, axis=-1)
    stored = jnp.where((empty & (count > 0))[..., None], mean, memory)
    return jnp.where(
        present[:, None, None], jnp.where(starts[:, None, None], stored, moved), memory
    )


def _squared_norm(features: Array, rows: tuple, columns: tuple) -> Array:
    """Squared norm of the bilinear values: [batch, h, w, channels] -> [batch, H, W].

    Expands |sum_k a_k f_k|^2 over the four cells: only products of a cell with itself and with
    its right, lower, lower right and (of the two below and beside it) diagonal neighbours occur.
    """
    (y0, y1, fy), (x0, x1, fx) = rows, columns
    dtype = features.dtype
    right = jnp.concatenate([features[:, :, 1:], features[:, :, -1:]], axis=2)
    lower = jnp.concatenate([features[:, 1:], features[:, -1:]], axis=1)
    lower_right = jnp.concatenate([right[:, 1:], right[:, -1:]], axis=1)

    def product(a: Array, b: Array) -> Array:
        return jnp.sum(a * b, axis=-1)

    def at(x: Array, y: Any, column: Any) -> Array:
        return x[:, y][:, :, column]

    itself = product(features, features)
    beside = product(features, right)
    below = product(features, lower)
    down = product(features, lower_right)
    up = product(right, lower)
    a, b = (jnp.asarray(v, dtype)[None, :, None] for v in (1 - fy, fy))
    c, d = (jnp.asarray(v, dtype)[None, None, :] for v in (1 - fx, fx))
    squared = (
        (a * c) ** 2 * at(itself, y0, x0)
        + (a * d) ** 2 * at(itself, y0, x1)
        + (b * c) ** 2 * at(itself, y1, x0)
        + (b * d) ** 2 * at(itself, y1, x1)
    )
    crossed = (
        (a * a * c * d) * at(beside, y0, x0)
        + (b * b * c * d) * at(beside, y1, x0)
        + (a * b * c * c) * at(below, y0, x0)
        + (a * b * d * d) * at(below, y0, x1)
        + (a * b * c * d) * (at(down, y0, x0) + at(up, y0, x0))
    )
    # At the last row or column a "neighbour" is the cell itself, and its weight there is 0 or
    # completes the square: the expansion stays exact.
    return jnp.maximum(squared + 2 * crossed, 0)


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


def memory_sums_groups(
    memory: Array, features: Array, labels: Array, *, groups: int, strategy: str
) -> MemorySums:
    """`memory_sums` of every group: arrays with a first axis [groups]."""

    def split(x: Array) -> Array:
        return x.reshape(groups, x.shape[0] // groups, *x.shape[1:])

    return jax.vmap(lambda f, y: memory_sums(memory, f, y, strategy))(
        split(features), split(labels)
    )


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
