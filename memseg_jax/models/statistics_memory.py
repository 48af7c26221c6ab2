"""A memory of two numbers per class, from which the class's features are drawn (MCIBI++).

The memory is an array [classes, 2]: mean and standard deviation of the class's features. A class's
row of features is mean + deviation * z, where z are fixed standard normal numbers of the class: the
same in every step, in training and in inference. The memory is an argument and a result of the
training step, never hidden in a module. Paper: Jin et al., "MCIBI++: Soft Mining Contextual
Information Beyond Image for Semantic Segmentation".
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memseg_jax.models import rematerialise
from memseg_jax.models.attention import SelfAttention
from memseg_jax.models.cell_sums import MemorySums, sums_over_pixels
from memseg_jax.models.layers import Array, ConvNorm, ValidSize, mask_padding, record, resize_like
from memseg_jax.models.memory import row_weights

# PyTorch's generator makes normal numbers in blocks of this size, at least one.
_BLOCK = 16


# ---- The rows -----------------------------------------------------------------------------------


def standard_draws(class_index: int, features: int) -> np.ndarray:
    """The fixed standard normal numbers of a class, by the rule of PyTorch's CPU generator.

    The generator is the Mersenne Twister with the class's index as its seed. Of each 32-bit word
    the lower 24 bits are a uniform number; sixteen of these become as many normal ones by the
    transform of Box and Muller. If 16 does not divide `features`, the last sixteen are drawn anew.
    (Fewer than sixteen are the first of sixteen; PyTorch has another rule for so few.)

    Args:
        class_index: the generator's seed.
        features: how many numbers.

    Returns:
        float32 [features].
    """
    count = max(features, _BLOCK)
    words = count + (_BLOCK if count % _BLOCK else 0)
    generator = np.random.RandomState(class_index)
    words = generator.randint(0, 2**32, words, dtype=np.uint32)
    uniform = (words & 0xFFFFFF).astype(np.float64) / 2**24
    whole = count // _BLOCK * _BLOCK
    draws = np.empty(count, np.float32)
    draws[:whole] = _normal(uniform[:whole])
    if whole < count:
        draws[-_BLOCK:] = _normal(uniform[-_BLOCK:])
    return draws[:features]


def _normal(uniform: np.ndarray) -> np.ndarray:
    """Box-Muller in blocks of 16: the first eight give the radius, the others the angle."""
    radius, angle = np.split(uniform.reshape(-1, _BLOCK), 2, axis=1)
    radius, angle = np.sqrt(-2 * np.log(1 - radius)), 2 * np.pi * angle
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


@functools.lru_cache(maxsize=8)
def draws_of_classes(classes: int, features: int) -> np.ndarray:
    """`standard_draws` of all classes: float32 [classes, features]. Not to be written to."""
    draws = np.stack([standard_draws(index, features) for index in range(classes)])
    draws.setflags(write=False)
    return draws


def draw_rows(memory: Array, features: int) -> Array:
    """The rows of a memory: float32 [classes, features], whatever the type of the memory.

    Args:
        memory: [classes, 2], mean and standard deviation.
        features: their number.
    """
    mean, deviation = memory[:, :1].astype(jnp.float32), memory[:, 1:].astype(jnp.float32)
    return draws_of_classes(len(memory), features) * deviation + mean


# ---- Reading ------------------------------------------------------------------------------------


class StatisticsMemoryModule(nn.Module):
    """Augments pixel features with the rows of their likely classes.

    Attributes:
        features: channels of the result.
        attention_dim: channels inside the attention.
        hard: read the row of the most likely class instead of the mean over all classes.
        downsample: 2: the attention is between maps of half the size, made by one convolution.
        activation: name, see `layers.activation`.
        dtype: compute type.
        remat: whether training recomputes the inside of every layer.
    """

    features: int
    attention_dim: int
    hard: bool = False
    downsample: int = 1
    activation: str = "relu"
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        pixels: Array,
        logits: Array,
        memory: Array,
        *,
        train: bool,
        valid_size: ValidSize | None = None,
    ) -> Array:
        """Returns the augmented features [batch, height, width, features].

        Args:
            pixels: features of the bottleneck [batch, height, width, channels].
            logits: the prediction that weighs the rows [batch, height, width, classes]. The
                gradient of the result reaches them, through the softmax.
            memory: [classes, 2]; a constant for the gradient.
            train: use and update batch statistics.
            valid_size: the valid part of padded images.
        """
        kw = {"activation": self.activation, "dtype": self.dtype}
        on = {"train": train, "valid_size": valid_size, "remat": self.remat}
        probabilities = row_weights(logits, self.hard)
        rows = draw_rows(jax.lax.stop_gradient(memory), pixels.shape[-1]).astype(self.dtype)
        selected = jnp.einsum("bhwk,kc->bhwc", probabilities.astype(self.dtype), rows)
        queries = pixels
        if self.downsample > 1:
            # Zeros beyond the image: the convolution sees what lies around it.
            selected = mask_padding(selected, valid_size)
            halve = ConvNorm(None, 3, self.downsample, name="downsampling", **kw)
            # Twice: its running statistics move for each of the two inputs.
            queries = rematerialise.call(halve, queries, **on)
            selected = rematerialise.call(halve, selected, **on)
        record(self, "selected_memory", selected)
        attention = SelfAttention(self.attention_dim, self.features, name="self_attention", **kw)
        gathered = rematerialise.call(attention, queries, selected, **on)
        record(self, "selfatt_memory", gathered)
        x = jnp.concatenate([pixels, resize_like(gathered, pixels, valid_size)], axis=-1)
        bottleneck = ConvNorm(self.features, 3, name="bottleneck", **kw)
        x = rematerialise.call(bottleneck, x, **on)
        record(self, "memory_output", x)
        return x


# ---- Writing ------------------------------------------------------------------------------------


def statistics_sums(memory: Array, features: Array, labels: Array, *, groups: int) -> MemorySums:
    """The first half of `update_statistics`: sums of the features of every class's pixels.

    Args:
        memory: [classes, 2]; only its size and type matter.
        features: [batch, h, w, channels]; batch is a multiple of `groups`.
        labels: integer [batch, H, W]; values outside 0..classes-1 are ignored.
        groups: number of equal, contiguous parts of the batch.

    Returns:
        The sums of every group: arrays [groups, classes, ...].
    """

    def assign(memory: Array, features: Array, label: Array, valid: Array, between: Any) -> tuple:
        del features, between
        return valid.astype(memory.dtype), label

    classes = len(memory)
    return sums_over_pixels(
        assign, memory, features, labels, classes=classes, memory_rows=classes, groups=groups
    )


def move_statistics(memory: Array, sums: MemorySums, momentum: Array) -> tuple[Array, Array]:
    """The second half of `update_statistics`: the new memory from the sums of the groups.

    Returns:
        The new memory [classes, 2], and the groups' own before averaging [groups, classes, 2].
    """
    feature = sums.features / jnp.maximum(sums.count, 1)[..., None]  # [groups, classes, channels]
    # Unbiased, as in the reference. In two passes.
    deviation = jnp.std(feature, axis=-1, ddof=1)
    seen = jnp.stack([jnp.mean(feature, axis=-1), deviation], axis=-1)
    moved = (1 - momentum) * memory + momentum * seen
    local = jnp.where(sums.count[..., None] > 0, moved, memory)
    return jnp.mean(local, axis=0), local


def update_statistics(
    memory: Array, features: Array, labels: Array, momentum: Array, *, groups: int = 1
) -> tuple[Array, Array]:
    """Moves the statistics of the classes in this batch towards those of their mean feature.

    The mean feature of a class is that of its labelled pixels, whose features are bilinear values
    of `features` at the size of the labels; its mean and standard deviation are over the channels.
    Every replica group updates the memory on its own images; then the groups are averaged, as the
    reference does with its processes.

    Args:
        memory: [classes, 2], mean and standard deviation.
        features: [batch, h, w, channels]; batch is a multiple of `groups`.
        labels: integer [batch, H, W]; values outside 0..classes-1 are ignored.
        momentum: share of the old value that is replaced.
        groups: number of equal, contiguous parts of the batch.

    Returns:
        See `move_statistics`.
    """
    sums = statistics_sums(memory, features, labels, groups=groups)
    return move_statistics(memory, sums, momentum)
