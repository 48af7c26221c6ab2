"""ViT-Large and -Base with patches of 16x16 pixels: plain transformers that return four maps."""

import torch
import torch.nn.functional as F
from torch import nn

from converters.torch_model.layers import resize

PATCH = 16
HEAD_CHANNELS = 64

# Side of the square grid of learned positions; see `memseg_jax.models.vit`.
VARIANTS = {"vitlarge": 512 // PATCH, "vitlarge_473": 473 // PATCH, "vitbase": 512 // PATCH}
# Channels, and the blocks whose results are returned, counted from 0.
SIZES = {"vitlarge": (1024, (9, 14, 19, 23)), "vitbase": (768, (2, 5, 8, 11))}


class PatchEmbed(nn.Module):
    """Projects every 16x16 patch to one token."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, channels, PATCH, PATCH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 3, height, width] -> [batch, channels, ceil(height / 16), ceil(width / 16)]."""
        bottom, right = (-size % PATCH for size in x.shape[2:])
        return self.projection(F.pad(x, (0, right, 0, bottom)))


class Attention(nn.Module):
    """Multi-head self-attention between tokens."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        heads = channels // HEAD_CHANNELS
        self.attn = nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, channels] -> [batch, tokens, channels]."""
        return self.attn(x, x, x, need_weights=False)[0]


class FeedForward(nn.Module):
    """An MLP with one hidden layer four times as wide, and the exact GELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU()),
            nn.Linear(4 * channels, channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, channels] -> [batch, tokens, channels]."""
        return self.layers(x)


class Block(nn.Module):
    """Self-attention and an MLP, each on normalised tokens and with a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = Attention(channels)
        self.ln2 = nn.LayerNorm(channels, eps=1e-6)
        self.ffn = FeedForward(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, channels] -> [batch, tokens, channels]."""
        x = x + self.attn(self.ln1(x))
        return x + self.ffn(self.ln2(x))


class ViT(nn.Module):
    """Vision transformer without a final normalisation.

    Attributes:
        cls_token: [1, 1, channels].
        pos_embed: [1, 1 + side * side, channels]: the class token's entry, then the square's rows.
        embedded: has no effect; its input is the tokens with their positions.
        outputs: blocks whose results are returned, counted from 0.

    The other attributes are as for `resnet.ResNet`.
    """

    auxiliary_levels = (0, 1, 2)
    normalise_maps = True

    def __init__(self, variant: str, width: float = 1.0):
        """Builds a variant.

        Args:
            variant: a key of `VARIANTS`.
            width: multiplies the number of channels, in steps of one head of 64.
        """
        super().__init__()
        channels, self.outputs = SIZES[variant.split("_")[0]]
        channels = max(round(channels * width / HEAD_CHANNELS), 1) * HEAD_CHANNELS
        self.channels = [channels] * len(self.outputs)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + VARIANTS[variant] ** 2, channels))
        self.patch_embed = PatchEmbed(channels)
        self.embedded = nn.Identity()
        self.layers = nn.ModuleList(Block(channels) for _ in range(self.outputs[-1] + 1))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[batch, 3, H, W] -> four maps [batch, channels, ceil(H / 16), ceil(W / 16)]."""
        x = self.patch_embed(x)
        grid = x.shape[2:]
        first = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([first, x.flatten(2).transpose(1, 2)], dim=1)
        x = self.embedded(x + self.positions(grid))
        maps = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in self.outputs:
                maps.append(x[:, 1:].transpose(1, 2).unflatten(2, grid))
        return maps

    def positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """The position table for a grid of tokens: [1, 1 + height * width, channels].

        It is resized only if the number of tokens differs, whatever the shape of the grid.
        """
        table = self.pos_embed
        if table.shape[1] == 1 + grid[0] * grid[1]:
            return table
        side = int((table.shape[1] - 1) ** 0.5)
        square = table[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        return torch.cat([table[:, :1], resize(square, grid).flatten(2).transpose(1, 2)], dim=1)


def build(variant: str, width: float = 1.0) -> ViT:
    """Returns the backbone called `variant`; see `segmentor.build_backbone`."""
    return ViT(variant, width)
