"""Atrous spatial pyramid pooling: the within-image context of DeepLabV3."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from memseg_jax.models.layers import Array, ConvNorm, ValidSize, record, spatial_mean


class ASPP(nn.Module):
    """Parallel convolutions at several dilations and a global mean, fused by a 3x3 convolution.

    Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", section 3.3.

    Attributes:
        features: channels of every branch and of the result.
        dilations: one branch each; a dilation of 1 means a 1x1 convolution.
        activation: name, see `layers.activation`.
        dtype: compute type.
    """

    features: int
    dilations: tuple[int, ...]
    activation: str = "relu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool, valid_size: ValidSize | None = None) -> Array:
        """[batch, height, width, channels] -> [batch, height, width, features]."""
        kw = {"activation": self.activation, "dtype": self.dtype}
        branches = []
        for index, dilation in enumerate(self.dilations):
            branch = ConvNorm(
                self.features,
                kernel_size=1 if dilation == 1 else 3,
                dilation=dilation,
                name=f"branch_{index}",
                **kw,
            )(x, train=train, valid_size=valid_size)
            record(self, f"aspp_branch.{index}", branch)
            branches.append(branch)
        pooled = spatial_mean(x, valid_size)
        pooled = ConvNorm(self.features, name="global", **kw)(pooled, train=train)
        record(self, "aspp_global", pooled)
        # Resizing one position to the size of the map is a broadcast; in float32, because its
        # gradient is a sum over all positions.
        pooled = pooled.astype(jnp.promote_types(self.dtype, jnp.float32))
        pooled = jnp.broadcast_to(pooled, (*x.shape[:3], self.features))
        branches.append(pooled.astype(self.dtype))
        if valid_size is not None:
            branches[-1] = jnp.where(valid_size.mask(x), branches[-1], 0)
        y = jnp.concatenate(branches, axis=-1)
        y = ConvNorm(self.features, 3, name="bottleneck", **kw)(
            y, train=train, valid_size=valid_size
        )
        record(self, "aspp", y)
        return y
