"""ViT-Large and -Base with patches of 16x16 pixels: plain transformers that return four maps."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from memseg_jax.models import rematerialise
from memseg_jax.models.attention import attend
from memseg_jax.models.backbone import Backbone
from memseg_jax.models.layers import (
    Array,
    LayerNorm,
    Linear,
    ValidSize,
    mask_padding,
    record,
    resize_bilinear,
    torch_uniform,
    valid_bilinear_matrix,
)

PATCH = 16
HEAD_CHANNELS = 64

# Side of the square grid of learned positions: the training image size over 16. "vitlarge_473" is
# the form of the COCO-Stuff model released in 2021, whose table was made for 473x473 images.
VARIANTS = {"vitlarge": 512 // PATCH, "vitlarge_473": 473 // PATCH, "vitbase": 512 // PATCH}
# Channels, and the blocks whose results are returned.
_SIZES = {"vitlarge": (1024, (9, 14, 19, 23)), "vitbase": (768, (2, 5, 8, 11))}


class PatchProjection(nn.Module):
    """Projects every patch to one token: a convolution whose stride is its kernel size."""

    features: int
    dtype: Any
    patch: int = PATCH

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[batch, height, width, channels] -> [batch, height / patch, width / patch, features].

        Args:
            x: images whose sides are multiples of `patch`.
        """
        batch, height, width, channels = x.shape
        patch = self.patch
        shape = (patch, patch, channels, self.features)
        kernel = self.param("kernel", torch_uniform, shape).astype(self.dtype)
        fan_in = patch * patch * channels
        bias = self.param("bias", torch_uniform, (self.features,), jnp.float32, fan_in)
        grid = (batch, height // patch, patch, width // patch, patch, channels)
        patches = x.astype(self.dtype).reshape(grid).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(*patches.shape[:3], fan_in)
        tokens = patches @ kernel.reshape(fan_in, self.features)
        # The bias in float32: its gradient is a sum over all patches.
        return (tokens.astype(jnp.promote_types(self.dtype, jnp.float32)) + bias).astype(self.dtype)


class Block(nn.Module):
    """Multi-head self-attention and an MLP, each on normalised tokens and with a shortcut."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Returns [batch, tokens, channels].

        Args:
            x: [batch, tokens, channels].
            train: makes no difference.
            mask: bool [batch, tokens], the tokens that can be attended to; None: all.
        """
        del train
        batch, tokens, channels = x.shape
        heads = channels // HEAD_CHANNELS
        normed = LayerNorm(dtype=self.dtype, name="ln1")(x)
        qkv = Linear(3 * channels, self.dtype, name="in_proj")(normed)
        # Heads do not see each other: the attention takes them as separate images.
        qkv = qkv.reshape(batch, tokens, 3, heads, HEAD_CHANNELS).transpose(2, 0, 3, 1, 4)
        query, key, value = qkv.reshape(3, batch * heads, tokens, HEAD_CHANNELS)
        mask = None if mask is None else jnp.repeat(mask, heads, axis=0)
        gathered = attend(query, key, value, mask).reshape(batch, heads, tokens, HEAD_CHANNELS)
        gathered = gathered.transpose(0, 2, 1, 3).reshape(batch, tokens, channels)
        x = x + Linear(channels, self.dtype, name="out_proj")(gathered)
        normed = LayerNorm(dtype=self.dtype, name="ln2")(x)
        y = Linear(4 * channels, self.dtype, name="ffn_0")(normed)
        y = nn.gelu(y, approximate=False)
        return x + Linear(channels, self.dtype, name="ffn_1")(y)


def fit_positions(table: Array, grid: tuple[int, int]) -> Array:
    """The position table for the tokens of one image size.

    As in the PyTorch reference, what decides is the NUMBER of tokens: an image of 256x1024 has as
    many as one of 512x512, and takes the 32x32 table as it is, one row of the table after the
    other, although its grid is 16x64.

    Args:
        table: [1, 1 + side * side, channels]: the class token's entry, then the square's rows.
        grid: tokens along height and width.

    Returns:
        [1, 1 + height * width, channels].
    """
    if table.shape[1] == 1 + grid[0] * grid[1]:
        return table
    side = int((table.shape[1] - 1) ** 0.5)
    square = table[:, 1:].reshape(1, side, side, -1)
    resized = resize_bilinear(square, grid).reshape(1, grid[0] * grid[1], -1)
    return jnp.concatenate([table[:, :1], resized], axis=1)


def fit_positions_to_valid(table: Array, valid_size: ValidSize, grid: tuple[int, int]) -> Array:
    """`fit_positions` for padded images whose sizes are known only when the program runs.

    Args:
        table: as for `fit_positions`.
        valid_size: the valid part of the images.
        grid: tokens along height and width, padding included.

    Returns:
        [batch, 1 + height * width, channels]; arbitrary at the padding's tokens.
    """
    side = int((table.shape[1] - 1) ** 0.5)
    valid = valid_size.of_map(grid)
    sides = jnp.full_like(valid, side)
    rows, columns = (
        valid_bilinear_matrix(sides[:, axis], valid[:, axis], (grid[axis], side)) for axis in (0, 1)
    )
    square = table[0, 1:].reshape(side, side, -1)
    resized = jnp.einsum("yxc,bXx->byXc", square, columns, precision="highest")
    resized = jnp.einsum("byXc,bYy->bYXc", resized, rows, precision="highest")
    # As many tokens as the table has: the table as it is, counted along the valid rows.
    place = jnp.arange(grid[0])[:, None] * valid[:, 1, None, None] + jnp.arange(grid[1])
    as_it_is = jnp.take(table[0, 1:], place, axis=0, mode="clip")
    equal = (valid[:, 0] * valid[:, 1] == side * side)[:, None, None, None]
    fitted = jnp.where(equal, as_it_is, resized).reshape(len(valid), grid[0] * grid[1], -1)
    first = jnp.broadcast_to(table[:, :1], (len(valid), 1, table.shape[-1]))
    return jnp.concatenate([first, fitted], axis=1)


class ViT(Backbone):
    """Vision transformer without a final normalisation.

    Attributes:
        grid: side of the square of learned positions.
        width: multiplies `channels`, in steps of one head of 64; 1.0 is the published network.
        dtype: compute type.
        outputs: blocks whose results are returned, counted from 0; the last one ends the network.
        channels: of every token at width 1.0.
    """

    grid: int
    width: float = 1.0
    dtype: Any = jnp.float32
    outputs: tuple[int, ...] = (9, 14, 19, 23)
    channels: int = 1024

    output_stride = PATCH
    finest_stride = 0
    coarsest_stride = PATCH
    auxiliary_levels = (0, 1, 2)  # the maps that get an auxiliary head
    auxiliary_upsampling = True  # these heads enlarge their features by 4, twice
    normalise_maps = True  # the segmentor puts a LayerNorm on every map

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool, valid_size: ValidSize | None = None
    ) -> tuple[Array, ...]:
        """Returns one feature map for each of `outputs`, all at stride 16.

        Args:
            x: normalised images [batch, height, width, 3]; sides that are not multiples of 16 are
                padded with zeros at the bottom and at the right.
            train: makes no difference here: there is no dropout and no batch statistic.
            valid_size: the valid part of padded images.

        Returns:
            Maps [batch, ceil(height / 16), ceil(width / 16), channels].
        """
        channels = max(round(self.channels * self.width / HEAD_CHANNELS), 1) * HEAD_CHANNELS
        bottom, right = (-size % PATCH for size in x.shape[1:3])
        x = jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)))
        x = PatchProjection(channels, self.dtype, name="patch_projection")(x)
        record(self, "patch_embed", x)
        batch, *grid, _ = x.shape
        mask = None
        if valid_size is not None:
            seen = valid_size.mask(x).reshape(batch, -1)
            mask = jnp.concatenate([jnp.ones((batch, 1), bool), seen], axis=1)

        zeros = nn.initializers.zeros
        first = self.param("cls_token", zeros, (1, 1, channels))
        table = self.param("pos_embed", zeros, (1, 1 + self.grid**2, channels))
        first = jnp.broadcast_to(first, (batch, 1, channels))
        # In float32: the gradients of token and positions are sums over the batch.
        x = x.astype(jnp.promote_types(self.dtype, jnp.float32)).reshape(batch, -1, channels)
        if valid_size is None:
            positions = fit_positions(table, tuple(grid))
        else:
            positions = fit_positions_to_valid(table, valid_size, tuple(grid))
        x = (jnp.concatenate([first, x], axis=1) + positions).astype(self.dtype)
        record(self, "tokens_plus_pos", x)

        maps = []
        for index in range(self.outputs[-1] + 1):
            block = Block(self.dtype, name=f"layers_{index}")
            x = rematerialise.call(block, x, remat=self.remat, train=train, mask=mask)
            if index == 0:
                record(self, "layer0", x)
            if index in self.outputs:
                maps.append(mask_padding(x[:, 1:].reshape(batch, *grid, channels), valid_size))
                record(self, f"backbone.{len(maps) - 1}", maps[-1])
        return tuple(maps)


def build(name: str, width: float = 1.0, dtype: Any = jnp.float32) -> ViT:
    """Returns the backbone called `name`; see `memseg_jax.models.segmentor.build_backbone`."""
    channels, outputs = _SIZES[name.split("_")[0]]
    return ViT(VARIANTS[name], width, dtype, outputs, channels)
