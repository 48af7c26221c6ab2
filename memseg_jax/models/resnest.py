"""ResNeSt-101 at output stride 8: a ResNet with split attention in its 3x3 convolutions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseg_jax.models.layers import (
    Array,
    BatchNorm,
    Conv,
    ConvNorm,
    ValidSize,
    mask_padding,
    spatial_mean,
)
from memseg_jax.models.resnet import ResNet
from memseg_jax.runtime import rows

RADIX = 2  # splits that a split-attention convolution chooses from
REDUCTION = 4  # channels of all splits per channel inside of the attention


def average_pool(x: Array, stride: int, valid_size: ValidSize | None = None) -> Array:
    """3x3 average pool, padded by one zero on every side; the zeros count.

    Args:
        x: [batch, height, width, channels], 0 where it is padded.
        stride: step between output positions.
        valid_size: the valid part of `x`.

    Returns:
        [batch, ceil(height / stride), ceil(width / stride), channels].
    """

    def pool(x: Array) -> Array:
        return nn.avg_pool(x, (3, 3), (stride, stride), ((1, 1), (1, 1)))

    return mask_padding(rows.in_equal_parts(pool, x, stride=stride), valid_size)


def average_pool_valid(x: Array, stride: int, valid_size: ValidSize | None = None) -> Array:
    """Mean over blocks of `stride` x `stride`; blocks at the border may be incomplete.

    Args:
        x: [batch, height, width, channels], 0 where it is padded.
        stride: side of a block. 1: the identity.
        valid_size: the valid part of `x`; only valid positions count.

    Returns:
        [batch, ceil(height / stride), ceil(width / stride), channels].
    """
    if stride == 1:
        return x
    valid = jnp.ones((1, *x.shape[1:3], 1), bool) if valid_size is None else valid_size.mask(x)

    def pool(x: Array) -> Array:
        window = ((stride, stride), (stride, stride), ((0, stride - 1), (0, stride - 1)))
        return nn.avg_pool(x, *window)

    share, mean = (rows.in_equal_parts(pool, a, stride=stride) for a in (valid.astype(x.dtype), x))
    return mean / jnp.where(share > 0, share, 1)


class SplitAttention(nn.Module):
    """A 3x3 convolution into two splits, mixed by weights that depend on the whole image.

    Zhang et al., "ResNeSt: Split-Attention Networks", section 3.1, with cardinality 1.
    """

    features: int
    dilation: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool, valid_size: ValidSize | None = None) -> Array:
        """[batch, height, width, features] -> [batch, height, width, features]."""
        kw = {"dtype": self.dtype}
        splits = Conv(
            RADIX * self.features, 3, dilation=self.dilation, groups=RADIX, name="conv", **kw
        )(x)
        splits = nn.relu(BatchNorm(name="bn0", **kw)(splits, train=train))
        splits = mask_padding(splits, valid_size).reshape(*splits.shape[:3], RADIX, self.features)
        pooled = spatial_mean(jnp.sum(splits, axis=3), valid_size)
        hidden = self.features * RADIX // REDUCTION
        pooled = Conv(hidden, use_bias=True, name="fc1", **kw)(pooled)
        pooled = nn.relu(BatchNorm(name="bn1", **kw)(pooled, train=train))
        scores = Conv(RADIX * self.features, use_bias=True, name="fc2", **kw)(pooled)
        # In float32 up to the product: the gradient of the weights is a sum over all positions.
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        scores = scores.reshape(-1, 1, 1, RADIX, self.features).astype(dtype)
        weights = jax.nn.softmax(scores, axis=3)
        return jnp.sum(splits.astype(dtype) * weights, axis=3).astype(self.dtype)


class SplitAttentionBottleneck(nn.Module):
    """1x1 reduce, split attention, 1x1 expand by 4, and a shortcut; strides are average pools."""

    planes: int
    stride: int
    dilation: int
    project: bool
    dtype: Any

    expansion = 4

    @nn.compact
    def __call__(self, x: Array, *, train: bool, valid_size: ValidSize | None) -> Array:
        """[batch, height, width, channels] -> [batch, height', width', 4 * planes]."""
        kw = {"train": train, "valid_size": valid_size}
        inner = self.planes + self.planes % RADIX  # narrow test models: groups need equal shares
        outer = self.planes * self.expansion
        shortcut = x
        y = ConvNorm(inner, dtype=self.dtype, name="conv1")(x, **kw)
        y = SplitAttention(inner, self.dilation, self.dtype, name="split_attention")(y, **kw)
        if self.stride > 1:
            y = average_pool(y, self.stride, valid_size)
        y = ConvNorm(outer, activation="none", dtype=self.dtype, name="conv3")(y, **kw)
        if self.project:
            shortcut = average_pool_valid(x, self.stride, valid_size)
            shortcut = ConvNorm(
                outer, activation="none", dtype=self.dtype, name="downsample_pooled"
            )(shortcut, **kw)
        return nn.relu(y + shortcut)


VARIANTS = {"resnest101": (SplitAttentionBottleneck, (3, 4, 23, 3))}


class ResNeSt(ResNet):
    """The skeleton of the dilated ResNet with split-attention blocks and a stem twice as wide."""

    variants = VARIANTS
    stem_channels = (64, 64, 128)


def build(variant: str, width: float = 1.0, dtype: Any = jnp.float32) -> ResNeSt:
    """Returns the backbone called `variant`; see `memseg_jax.models.segmentor.build_backbone`."""
    return ResNeSt(variant, width, dtype)
