"""Swin transformers; see `memseg_jax.models.swin`. Inside, maps are [batch, h, w, channels]."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from memseg_jax.models import swin as ours

EPSILON = ours.EPSILON


def norm(channels: int) -> nn.LayerNorm:
    """Returns a layer normalisation."""
    return nn.LayerNorm(channels, eps=EPSILON)


def pad_to_multiples(x: torch.Tensor, of: int) -> torch.Tensor:
    """Adds zeros at the bottom and at the right of [batch, height, width, channels]."""
    bottom, right = (-side % of for side in x.shape[1:3])
    return F.pad(x, (0, 0, 0, right, 0, bottom))


class PatchEmbed(nn.Module):
    """Projects every 4x4 patch to one position, and normalises it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, channels, ours.PATCH, ours.PATCH)
        self.norm = norm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 3, height, width] -> [batch, ceil(height / 4), ceil(width / 4), channels]."""
        bottom, right = (-side % ours.PATCH for side in x.shape[2:])
        return self.norm(self.projection(F.pad(x, (0, right, 0, bottom))).permute(0, 2, 3, 1))


class WindowAttention(nn.Module):
    """Multi-head attention inside of windows.

    Attributes:
        relative_position_bias_table: [(2 window - 1)^2, heads].
        relative_position_index: where in the table each pair of a query and a key stands.
    """

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        table = 0.02 * torch.randn((2 * window - 1) ** 2, heads)
        self.relative_position_bias_table = nn.Parameter(table)
        index = torch.from_numpy(ours.relative_positions(window))
        self.register_buffer("relative_position_index", index)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Returns [batch, windows, window^2, channels].

        Args:
            x: [batch, windows, window^2, channels].
            mask: what is added to the scores [windows, window^2, window^2].
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(3, 0, 1, 4, 2, 5)  # [batch, windows, heads, place, dim]
        scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
        scores = scores + self.relative_position_bias_table[self.relative_position_index].permute(
            2, 0, 1
        )
        if mask is not None:
            scores = scores + mask[:, None]
        gathered = torch.softmax(scores, dim=-1) @ value
        return self.proj(gathered.transpose(2, 3).flatten(-2))


class ShiftedAttention(nn.Module):
    """Divides a map into windows, shifted or not, and lets each attend to itself."""

    def __init__(self, channels: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.w_msa = WindowAttention(channels, heads, window)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, height, width, channels] -> the same shape."""
        height, width = x.shape[1:3]
        x = pad_to_multiples(x, self.window)
        mask = None
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), dims=(1, 2))
            mask = self.mask(x)
        padded = x.shape
        grid = [side // self.window for side in padded[1:3]]
        x = x.unflatten(2, (grid[1], self.window)).unflatten(1, (grid[0], self.window))
        x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        x = self.w_msa(x, mask)
        x = x.unflatten(1, grid).unflatten(3, (self.window, self.window))
        x = x.transpose(2, 3).reshape(padded)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), dims=(1, 2))
        return x[:, :height, :width]

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the scores between positions that only the shift made neighbours."""
        region = x.new_zeros(x.shape[1:3])
        parts = (slice(-self.window), slice(-self.window, -self.shift), slice(-self.shift, None))
        for row, rows in enumerate(parts):
            for column, columns in enumerate(parts):
                region[rows, columns] = 3 * row + column
        region = region.unfold(0, self.window, self.window).unfold(1, self.window, self.window)
        region = region.flatten(2).flatten(0, 1)
        return (region[:, :, None] != region[:, None, :]) * x.new_tensor(ours.OTHER_REGION)


class FeedForward(nn.Module):
    """An MLP with one hidden layer, and the exact GELU."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Sequential(nn.Linear(channels, hidden), nn.GELU()),
            nn.Linear(hidden, channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., channels] -> [..., channels]."""
        return self.layers(x)


class Block(nn.Module):
    """Attention and an MLP, each on normalised positions and with a shortcut."""

    def __init__(
        self, channels: int, heads: int, window: int, shift: int, hidden: int, drop_path: float
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = norm(channels)
        self.attn = ShiftedAttention(channels, heads, window, shift)
        self.norm2 = norm(channels)
        self.ffn = FeedForward(channels, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, height, width, channels] -> the same shape."""
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.ffn(self.norm2(x)))

    def drop(self, branch: torch.Tensor) -> torch.Tensor:
        """In training, leaves out the branch in some images, and enlarges it in the others."""
        if not self.training or not self.drop_path:
            return branch
        keep = 1 - self.drop_path
        return branch * (torch.rand(len(branch), 1, 1, 1, device=branch.device) < keep) / keep


class PatchMerging(nn.Module):
    """Joins 2x2 positions to one, with twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, height, width, C] -> [batch, ceil(height / 2), ceil(width / 2), 2 C]."""
        x = pad_to_multiples(x, 2).permute(0, 3, 1, 2)
        size = [side // 2 for side in x.shape[2:]]
        x = F.unfold(x, 2, stride=2).transpose(1, 2).unflatten(1, size)
        return self.reduction(self.norm(x))


class Stage(nn.Module):
    """Blocks, and what joins positions behind them; the latter is called by the network."""

    def __init__(self, blocks: list[Block], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class Swin(nn.Module):
    """Four stages, each of which ends with a map; the attributes are as for `resnet.ResNet`."""

    auxiliary_levels = (2,)
    normalise_maps = False

    def __init__(self, network: ours.Swin):
        """Builds the same network as one of ours."""
        super().__init__()
        stages = range(len(network.depths))
        self.channels = [network.embed_dim * 2**stage for stage in stages]
        self.patch_embed = PatchEmbed(network.embed_dim)
        rates = iter(np.linspace(0, network.drop_path, sum(network.depths)).tolist())
        self.stages = nn.ModuleList()
        for stage, (channels, heads) in enumerate(zip(self.channels, network.heads)):
            blocks = [
                Block(
                    channels,
                    heads,
                    network.window,
                    network.window // 2 if index % 2 else 0,
                    network.mlp_ratio * channels,
                    next(rates),
                )
                for index in range(network.depths[stage])
            ]
            self.stages.append(
                Stage(blocks, PatchMerging(channels) if stage < stages[-1] else None)
            )
        for stage in stages:
            setattr(self, f"norm{stage}", norm(self.channels[stage]))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[batch, 3, height, width] -> four maps [batch, channels, h, w], strides 4, 8, 16, 32."""
        x = self.patch_embed(x)
        maps = []
        for index, stage in enumerate(self.stages):
            for block in stage.blocks:
                x = block(x)
            maps.append(getattr(self, f"norm{index}")(x).permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps


VARIANTS = ours.VARIANTS


def build(variant: str, width: float = 1.0, drop_path: float = 0.0) -> Swin:
    """Returns the backbone called `variant`; see `segmentor.build_backbone`."""
    return Swin(ours.build(variant, width).clone(drop_path=drop_path))
