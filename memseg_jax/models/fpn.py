"""Feature pyramid: the finer maps of a backbone joined with the context (UPerNet)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from memseg_jax.models import rematerialise
from memseg_jax.models.layers import Array, ConvNorm, ValidSize, record, resize_like


class FPN(nn.Module):
    """Adds every map's coarser neighbours to it, from the top down, and joins all at the finest.

    Lin et al., "Feature Pyramid Networks for Object Detection", section 3; Xiao et al., "Unified
    Perceptual Parsing for Scene Understanding", section 3.

    Attributes:
        features: channels of the results of all maps but the top, which stays as it is.
        activation: name, see `layers.activation`.
        dtype: compute type.
        remat: whether training recomputes the inside of every layer.
    """

    features: int
    activation: str = "relu"
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        maps: Sequence[Array],
        top: Array,
        *,
        train: bool,
        valid_size: ValidSize | None = None,
    ) -> Array:
        """Returns all levels at the size of the finest, [batch, h, w, channels].

        The channels are `features` for each of `maps`, then those of `top`.

        Args:
            maps: of the backbone, finest first, [batch, h_i, w_i, channels_i] each.
            top: the coarsest level [batch, h', w', channels]. All maps get as many channels before
                it is added to them.
            train: use and update batch statistics.
            valid_size: the valid part of padded images.
        """
        kw = {"activation": self.activation, "dtype": self.dtype}
        on = {"train": train, "valid_size": valid_size, "remat": self.remat}
        levels = []
        for index, x in enumerate(maps):
            lateral = ConvNorm(top.shape[-1], name=f"lateral_{index}", **kw)
            levels.append(rematerialise.call(lateral, x, **on))
            record(self, f"lateral.{index}", levels[-1])
        levels.append(top)
        for index in reversed(range(len(maps))):
            above = resize_like(levels[index + 1], levels[index], valid_size)
            levels[index] = levels[index] + above
        for index in range(len(maps)):
            output = ConvNorm(self.features, 3, name=f"output_{index}", **kw)
            levels[index] = rematerialise.call(output, levels[index], **on)
            record(self, f"fpn.{index}", levels[index])
        return jnp.concatenate([resize_like(x, levels[0], valid_size) for x in levels], axis=-1)
