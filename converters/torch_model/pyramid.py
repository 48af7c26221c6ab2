"""Pyramid pooling, and the feature pyramid of UPerNet."""

import torch
from torch import nn

from converters.torch_model.layers import conv_norm, resize


class PyramidPooling(nn.Module):
    """Means over grids of a few cells beside the map itself, fused by a 3x3 convolution."""

    def __init__(
        self, channels: int, features: int, scales: tuple[int, ...], activate: str
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(scale), *conv_norm(channels, features, activate=activate)
            )
            for scale in scales
        )
        joined = channels + len(scales) * features
        self.bottleneck = conv_norm(joined, features, 3, activate=activate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channels, h, w] -> [batch, features, h, w]."""
        pooled = [resize(branch(x), x.shape[2:]) for branch in self.branches]
        return self.bottleneck(torch.cat([x, *pooled], dim=1))


def laterals(channels: list[int], features: int, activate: str) -> nn.ModuleList:
    """Returns 1x1 convolutions that bring all maps but the last to the same width."""
    return nn.ModuleList(conv_norm(c, features, activate=activate) for c in channels)


def outputs(count: int, channels: int, features: int, activate: str) -> nn.ModuleList:
    """Returns 3x3 convolutions for all levels of the pyramid but the coarsest."""
    return nn.ModuleList(conv_norm(channels, features, 3, activate=activate) for _ in range(count))


def fuse(
    maps: list[torch.Tensor],
    top: torch.Tensor,
    lateral_convs: nn.ModuleList,
    fpn_convs: nn.ModuleList,
) -> torch.Tensor:
    """Adds coarse maps to finer ones from the top down, and joins all levels at the finest size.

    Args:
        maps: of the backbone, without the last: [batch, channels, h, w] each, finest first.
        top: what is there instead of the last [batch, features, h, w].
        lateral_convs: see `laterals`.
        fpn_convs: see `outputs`.

    Returns:
        [batch, channels, h, w] at the size of the first map.
    """
    levels = [*(lateral(x) for lateral, x in zip(lateral_convs, maps)), top]
    for index in range(len(levels) - 1, 0, -1):
        below = levels[index - 1]
        levels[index - 1] = below + resize(levels[index], below.shape[2:])
    levels = [*(conv(x) for conv, x in zip(fpn_convs, levels)), levels[-1]]
    return torch.cat([resize(x, levels[0].shape[2:]) for x in levels], dim=1)
