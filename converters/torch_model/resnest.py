"""ResNeSt-101 at output stride 8: a ResNet with split attention in its 3x3 convolutions."""

import torch
import torch.nn.functional as F
from torch import nn

from converters.torch_model.layers import conv, conv_norm
from converters.torch_model.resnet import ResNet

RADIX = 2  # splits that a split-attention convolution chooses from
REDUCTION = 4  # channels of all splits per channel inside of the attention


class SplitAttention(nn.Module):
    """A 3x3 convolution into two splits, mixed by weights that depend on the whole image."""

    def __init__(self, features: int, dilation: int) -> None:
        super().__init__()
        hidden = features * RADIX // REDUCTION
        self.conv = conv(features, RADIX * features, 3, dilation=dilation, groups=RADIX)
        self.bn0 = nn.BatchNorm2d(RADIX * features)
        self.fc1 = nn.Conv2d(features, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.fc2 = nn.Conv2d(hidden, RADIX * features, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, features, height, width] -> [batch, features, height, width]."""
        splits = F.relu(self.bn0(self.conv(x)), inplace=True).unflatten(1, (RADIX, -1))
        pooled = F.adaptive_avg_pool2d(splits.sum(dim=1), 1)
        pooled = F.relu(self.bn1(self.fc1(pooled)), inplace=True)
        weights = torch.softmax(self.fc2(pooled).unflatten(1, (RADIX, -1)), dim=1)
        return (splits * weights).sum(dim=1)


class SplitAttentionBottleneck(nn.Module):
    """1x1 reduce, split attention, 1x1 expand by 4, and a shortcut; strides are average pools."""

    expansion = 4

    def __init__(self, channels: int, planes: int, stride: int, dilation: int, project: bool):
        super().__init__()
        inner = planes + planes % RADIX  # as our models: groups need equal shares
        outer = planes * self.expansion
        self.downsample = nn.Identity()
        if project:
            # Blocks at the border may be incomplete, and only what is there counts.
            pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
            self.downsample = nn.Sequential(pool, *conv_norm(channels, outer, activate="none"))
        self.conv1 = conv(channels, inner)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = SplitAttention(inner, dilation)
        # Here the zeros of the padding count.
        self.pool = nn.AvgPool2d(3, stride, 1) if stride > 1 else nn.Identity()
        self.conv3 = conv(inner, outer)
        self.bn3 = nn.BatchNorm2d(outer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channels, height, width] -> [batch, 4 * planes, height', width']."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn3(self.conv3(self.pool(self.conv2(y))))
        return F.relu(y + self.downsample(x), inplace=True)


VARIANTS = {"resnest101": (SplitAttentionBottleneck, (3, 4, 23, 3))}


class ResNeSt(ResNet):
    """The skeleton of the dilated ResNet with split-attention blocks and a stem twice as wide."""

    variants = VARIANTS
    stem_channels = (64, 64, 128)


def build(variant: str, width: float = 1.0) -> ResNeSt:
    """Returns the backbone called `variant`; see `segmentor.build_backbone`."""
    return ResNeSt(variant, width)
