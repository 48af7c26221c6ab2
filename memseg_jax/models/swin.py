"""Swin transformers: attention inside of windows that are shifted in every second block.

(Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021.)
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memseg_jax.models import rematerialise
from memseg_jax.models.backbone import Backbone
from memseg_jax.models.layers import Array, LayerNorm, Linear, ValidSize, mask_padding, record
from memseg_jax.models.vit import PatchProjection

PATCH = 4
HEAD_CHANNELS = 32
EPSILON = 1e-5  # of all layer normalisations
# What is added to the score of a key of another region, as in the reference: not minus infinity.
OTHER_REGION = -100.0

# Depths of the four stages, heads in the first one, side of a window in patches. The two larger
# networks have the windows of ImageNet-22k at 384x384.
VARIANTS = {
    "swintiny": ((2, 2, 6, 2), 3, 7),
    "swinsmall": ((2, 2, 18, 2), 3, 7),
    "swinbase": ((2, 2, 18, 2), 4, 12),
    "swinlarge": ((2, 2, 18, 2), 6, 12),
}


def relative_positions(window: int) -> np.ndarray:
    """Where in the table of biases the pair of a query and a key stands.

    Args:
        window: side of the window in patches.

    Returns:
        int [window^2, window^2]: (2 window - 1) (dy + window - 1) + (dx + window - 1), with dy and
        dx from the key (column) to the query (row); patches are counted row by row.
    """
    y, x = np.divmod(np.arange(window * window), window)
    down, right = (place[:, None] - place + window - 1 for place in (y, x))
    return (2 * window - 1) * down + right


def into_windows(x: Array, window: int) -> Array:
    """[batch, height, width, ...] -> [batch, windows, window^2, ...], both row by row.

    Args:
        x: maps whose sides are multiples of `window`.
        window: side of the windows.
    """
    batch, height, width, *rest = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, *rest)
    return jnp.moveaxis(x, 2, 3).reshape(batch, -1, window * window, *rest)


def from_windows(x: Array, window: int, size: tuple[int, int]) -> Array:
    """The inverse of `into_windows`, to maps of `size` (height, width)."""
    batch, _, _, *rest = x.shape
    height, width = size
    x = x.reshape(batch, height // window, width // window, window, window, *rest)
    return jnp.moveaxis(x, 2, 3).reshape(batch, height, width, *rest)


def regions(
    size: tuple[int, int], shift: int, window: int, valid_size: Array | None = None
) -> Array:
    """Numbers the parts of a shifted map whose positions do not see each other.

    A map that is padded to multiples of the window is shifted: windows begin `shift` positions
    further down and to the right, and the last ones take in what was cut off at the upper and the
    left edge. Along an axis, that is a region of its own. The reference's mask of nine regions
    also tells apart what never meets in a window, and comes to the same.

    The padding of a padded evaluation is one region more: the unpadded image ends at the first
    multiple of the window behind its valid part, and what is beyond does not exist there.

    Args:
        size: height and width of the padded, shifted map; multiples of the window.
        shift: positions by which windows are shifted.
        window: side of the windows.
        valid_size: int32 [batch, 2], valid height and width of each map; None: `size`.

    Returns:
        int32 [batch or 1, height, width], at the places after the shift.
    """
    numbers = []
    for axis, side in enumerate(size):
        place = (jnp.arange(side) + shift) % side
        end = jnp.array([[side]])
        if valid_size is not None:
            end = -(-valid_size[:, axis, None] // window) * window
        numbers.append((place >= shift).astype(jnp.int32) + (place >= end).astype(jnp.int32))
    return 3 * numbers[0][:, :, None] + numbers[1][:, None, :]


class WindowAttention(nn.Module):
    """Multi-head attention of every position to those of its window.

    Attributes:
        heads: number of heads.
        window: side of a window in patches.
        dtype: compute type; the softmax is in at least float32.
    """

    heads: int
    window: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, region: Array | None = None) -> Array:
        """Returns [batch, windows, window^2, channels].

        Args:
            x: [batch, windows, window^2, channels].
            region: int [batch or 1, windows, window^2], see `regions`; None: all positions of a
                window see each other.
        """
        channels = x.shape[-1]
        dim = channels // self.heads
        wide = jnp.promote_types(self.dtype, jnp.float32)
        qkv = Linear(3 * channels, self.dtype, name="qkv")(x)
        query, key, value = jnp.moveaxis(qkv.reshape(*x.shape[:-1], 3, self.heads, dim), -3, 0)
        scores = jnp.einsum("bwqhd,bwkhd->bwhqk", query, key, preferred_element_type=wide)
        # Heads first, unlike the reference: a head's biases are one row.
        table = self.param(
            "relative_position_bias_table",
            nn.initializers.normal(0.02),
            (self.heads, (2 * self.window - 1) ** 2),
        )
        scores = scores * dim**-0.5 + jnp.take(table, relative_positions(self.window), axis=1)
        if region is not None:
            apart = region[..., :, None] != region[..., None, :]
            scores = scores + jnp.where(apart, OTHER_REGION, 0.0)[:, :, None].astype(wide)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        gathered = jnp.einsum("bwhqk,bwkhd->bwqhd", weights, value)
        return Linear(channels, self.dtype, name="proj")(gathered.reshape(x.shape))


class FeedForward(nn.Module):
    """Two affine maps with the exact GELU between them."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., channels] -> [..., channels]."""
        y = nn.gelu(Linear(self.features, self.dtype, name="fc1")(x), approximate=False)
        return Linear(x.shape[-1], self.dtype, name="fc2")(y)


class Block(nn.Module):
    """Attention in windows and an MLP, each on normalised positions and with a shortcut.

    Attributes:
        heads: number of heads.
        window: side of a window in patches.
        shift: positions by which windows are shifted.
        mlp_ratio: width of the MLP per channel.
        drop_path: probability that an image skips a branch in training.
        dtype: compute type.
    """

    heads: int
    window: int
    shift: int
    mlp_ratio: int
    drop_path: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool, valid_size: ValidSize | None = None) -> Array:
        """Returns [batch, height, width, channels].

        Args:
            x: [batch, height, width, channels].
            train: drop branches; a block and an image have a key of their own.
            valid_size: the valid part of padded maps; what is outside has no influence on it.
        """

        def drop(branch: Array) -> Array:
            layer = nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3))
            return layer(branch, deterministic=not train)

        normed = LayerNorm(epsilon=EPSILON, dtype=self.dtype, name="norm1")(x)
        x = x + drop(self._attend(normed, valid_size))
        normed = LayerNorm(epsilon=EPSILON, dtype=self.dtype, name="norm2")(x)
        features = self.mlp_ratio * x.shape[-1]
        return x + drop(FeedForward(features, self.dtype, name="ffn")(normed))

    def _attend(self, x: Array, valid_size: ValidSize | None) -> Array:
        """Attention inside of the windows of a normalised map."""
        height, width = x.shape[1:3]
        # Zeros behind the normalisation take part as keys, as in the reference: up to the end of
        # the window in which the image ends, which is the same with and without its padding.
        x = mask_padding(x, valid_size)
        x = jnp.pad(x, ((0, 0), *((0, -side % self.window) for side in (height, width)), (0, 0)))
        size = x.shape[1:3]
        region = None
        if self.shift:
            x = jnp.roll(x, (-self.shift, -self.shift), axis=(1, 2))
            valid = None if valid_size is None else valid_size.of_map((height, width))
            region = into_windows(regions(size, self.shift, self.window, valid), self.window)
        attention = WindowAttention(self.heads, self.window, self.dtype, name="attn")
        x = attention(into_windows(x, self.window), region)
        x = from_windows(x, self.window, size)
        if self.shift:
            x = jnp.roll(x, (self.shift, self.shift), axis=(1, 2))
        return x[:, :height, :width]


class PatchMerging(nn.Module):
    """Joins 2x2 positions to one, with twice the channels."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[batch, height, width, C] -> [batch, ceil(height / 2), ceil(width / 2), 2 C].

        Odd sides are padded with zeros at the bottom and at the right. The 4 C values that are
        joined are in the order (channel, row, column).
        """
        batch, height, width, channels = x.shape
        x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        x = x.reshape(batch, -(-height // 2), 2, -(-width // 2), 2, channels)
        x = x.transpose(0, 1, 3, 5, 2, 4).reshape(*x.shape[:2], x.shape[3], 4 * channels)
        x = LayerNorm(epsilon=EPSILON, dtype=self.dtype, name="norm")(x)
        return Linear(2 * channels, self.dtype, use_bias=False, name="reduction")(x)


def record_tokens(module: nn.Module, name: str, x: Array) -> None:
    """Offers a map as the reference has it there: [batch, height * width, channels]."""
    record(module, name, x.reshape(x.shape[0], -1, x.shape[-1]))


class PatchEmbedding(nn.Module):
    """Projects every 4x4 patch to one position, and normalises it."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[batch, height, width, 3] -> [batch, ceil(height / 4), ceil(width / 4), features]."""
        bottom, right = (-side % PATCH for side in x.shape[1:3])
        x = jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)))
        x = PatchProjection(self.features, self.dtype, PATCH, name="projection")(x)
        x = LayerNorm(epsilon=EPSILON, dtype=self.dtype, name="norm")(x)
        record_tokens(self, "patch_embed", x)
        return x


class Swin(Backbone):
    """Four stages at strides 4, 8, 16 and 32, each of which ends with a map.

    Padded evaluation is exact: the maps of a padded image are those of the image alone, for every
    size, apart from rounding (and from what a score of 100 less than others adds to a softmax).

    Attributes:
        embed_dim: channels of the first map; every stage has twice as many as the one before.
        depths: blocks of each stage; every second one has shifted windows.
        heads: of each stage; they divide its channels.
        window: side of a window in patches. It is shifted by half of that, rounded down, also where
            a map is smaller than the window.
        mlp_ratio: width of the MLPs per channel.
        drop_path: probability that an image skips a branch of the last block in training; it rises
            linearly from 0 over the blocks. Needs a random key called "dropout".
        dtype: compute type; normalisations and softmax are in at least float32.
    """

    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    mlp_ratio: int = 4
    drop_path: float = dataclasses.field(default=0.0, kw_only=True)
    dtype: Any = jnp.float32

    output_stride = 32
    coarsest_stride = 32

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool, valid_size: ValidSize | None = None
    ) -> tuple[Array, ...]:
        """Returns one map for each stage, normalised.

        Args:
            x: normalised images [batch, height, width, 3].
            train: drop branches.
            valid_size: the valid part of padded images.

        Returns:
            Maps [batch, ceil(height / s), ceil(width / s), embed_dim s / 4], s in 4, 8, 16, 32.
        """
        on = {"train": train, "valid_size": valid_size}
        x = PatchEmbedding(self.embed_dim, self.dtype, name="patch_embed")(x)
        rates = iter(np.linspace(0, self.drop_path, sum(self.depths)))
        maps = []
        for stage, (depth, heads) in enumerate(zip(self.depths, self.heads)):
            if stage > 0:
                name = f"stages_{stage - 1}_downsample"
                x = PatchMerging(self.dtype, name=name)(mask_padding(x, valid_size))
            for index in range(depth):
                shift = self.window // 2 if index % 2 else 0
                block = Block(
                    heads,
                    self.window,
                    shift,
                    self.mlp_ratio,
                    float(next(rates)),
                    self.dtype,
                    name=f"stages_{stage}_blocks_{index}",
                )
                x = rematerialise.call(block, x, remat=self.remat, **on)
                if stage == 0 and index < 2:
                    record_tokens(self, f"stage0_block{index}", x)
            norm = LayerNorm(epsilon=EPSILON, dtype=self.dtype, name=f"norm{stage}")
            maps.append(mask_padding(norm(x), valid_size))
            record(self, f"backbone.{stage}", maps[-1])
        return tuple(maps)


def build(name: str, width: float = 1.0, dtype: Any = jnp.float32) -> Swin:
    """Returns the backbone called `name`; see `memseg_jax.models.segmentor.build_backbone`.

    Args:
        name: a key of `VARIANTS`.
        width: multiplies the number of heads, of 32 channels each; 1.0 is the published network.
        dtype: compute type.
    """
    depths, heads, window = VARIANTS[name]
    heads = max(round(heads * width), 1)
    per_stage = tuple(heads * 2**stage for stage in range(len(depths)))
    return Swin(HEAD_CHANNELS * heads, depths, per_stage, window, dtype=dtype)
