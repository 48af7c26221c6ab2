"""The dataset-level feature memory: how it is read. `memory_update` has how it is written.

The memory is an array [classes, slots, channels]. It is an argument and a result of the training
step, never hidden in a module. It is read in training and in inference, and written in training
only. Paper: Jin et al., "Mining Contextual Information Beyond Image for Semantic Segmentation".
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseg_jax.models import rematerialise
from memseg_jax.models.attention import SelfAttention
from memseg_jax.models.layers import Array, ConvNorm, ValidSize, record


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


def row_weights(logits: Array, hard: bool) -> Array:
    """The class probabilities that weigh the rows of the memory, at every position.

    Args:
        logits: [..., classes].
        hard: all weight on the most likely class.

    Returns:
        [..., classes], of sum 1.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    if not hard:
        return probabilities
    best = jnp.argmax(probabilities, axis=-1)
    return jax.nn.one_hot(best, logits.shape[-1], dtype=probabilities.dtype)


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
        linear_output: no activation after the last normalisation, for a result of either sign.
    """

    features: int
    attention_dim: int
    hard: bool = False
    within_image_context: bool = True
    activation: str = "relu"
    dtype: Any = jnp.float32
    remat: bool = False
    linear_output: bool = False

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
        last = kw | {"activation": "none"} if self.linear_output else kw
        on = {"train": train, "valid_size": valid_size, "remat": self.remat}
        slots = memory.shape[1]
        if gradient_memory is None:
            gradient_memory = memory[None]
        probabilities = row_weights(logits, self.hard)
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
        of_bottleneck = kw if self.within_image_context else last
        bottleneck = ConvNorm(self.features, 3, name="bottleneck", **of_bottleneck)
        x = rematerialise.call(bottleneck, x, **on)
        record(self, "memory_bottleneck", x)
        if self.within_image_context:
            attention = SelfAttention(
                self.attention_dim, self.features, name="self_attention_ms", **kw
            )
            refined = rematerialise.call(attention, pixels, context, **on)
            record(self, "selfatt_ms", refined)
            x = jnp.concatenate([refined, x], axis=-1)
            bottleneck = ConvNorm(self.features, 3, name="bottleneck_ms", **last)
            x = rematerialise.call(bottleneck, x, **on)
        record(self, "memory_output", x)
        return x
