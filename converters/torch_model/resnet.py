"""ResNet-18, -50 and -101 at output stride 8; see `memseg_jax.models.resnet` for the two stems."""

import torch
import torch.nn.functional as F
from torch import nn

from converters.torch_model.layers import conv, conv_norm

STRIDES = (1, 2, 1, 1)
DILATIONS = (1, 1, 2, 4)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the first one carries stride and dilation."""

    expansion = 1

    def __init__(
        self,
        channels: int,
        planes: int,
        stride: int,
        dilation: int,
        project: bool,
        second_dilation: int = 1,
    ):
        super().__init__()
        self.downsample = (
            conv_norm(channels, planes, stride=stride, activate="none")
            if project
            else nn.Identity()
        )
        self.conv1 = conv(channels, planes, 3, stride, dilation)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3, dilation=second_dilation)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channels, height, width] -> [batch, planes, height', width']."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3 with stride and dilation, 1x1 expand by 4, and a shortcut."""

    expansion = 4

    def __init__(self, channels: int, planes: int, stride: int, dilation: int, project: bool):
        super().__init__()
        width = planes * self.expansion
        self.downsample = (
            conv_norm(channels, width, stride=stride, activate="none") if project else nn.Identity()
        )
        self.conv1 = conv(channels, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3, stride, dilation)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv(planes, width)
        self.bn3 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channels, height, width] -> [batch, 4 * planes, height', width']."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x), inplace=True)


VARIANTS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet18_v1b": (BasicBlock, (2, 2, 2, 2)),
    "resnet50_v1b": (Bottleneck, (3, 4, 6, 3)),
    "resnet101_v1b": (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(nn.Module):
    """ResNet whose last two stages are dilated instead of strided.

    Attributes:
        channels: of the four maps.
        auxiliary_levels: the maps that get an auxiliary head.
        normalise_maps: whether the segmentor puts a layer normalisation on every map.
    """

    auxiliary_levels = (2,)
    normalise_maps = False
    variants = VARIANTS
    stem_channels = (32, 32, 64)

    def __init__(self, variant: str, width: float = 1.0):
        """Builds a variant.

        Args:
            variant: a key of `variants`.
            width: multiplies the number of channels; 1.0 is the published network.
        """
        super().__init__()
        block, depths = self.variants[variant]
        stem = [max(int(channels * width), 1) for channels in self.stem_channels]
        self.is_v1b = variant.endswith("_v1b")
        if self.is_v1b:
            self.conv1 = conv(3, stem[2], 7, 2)
            self.bn1 = nn.BatchNorm2d(stem[2])
            self.stem = nn.Identity()  # its output has a name in `taps`
        else:
            self.stem = nn.Sequential(
                *conv_norm(3, stem[0], 3, 2),
                *conv_norm(stem[0], stem[1], 3),
                *conv_norm(stem[1], stem[2], 3),
            )
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels, self.channels = stem[2], []
        for stage, depth in enumerate(depths):
            planes = max(int(64 * 2**stage * width), 1)
            dilate_both = self.is_v1b and block is BasicBlock
            more = {"second_dilation": DILATIONS[stage]} if dilate_both else {}
            blocks = []
            for index in range(depth):
                stride = STRIDES[stage] if index == 0 else 1
                dilation = DILATIONS[stage]
                if index == 0 and dilation > 1:  # the reference's "contract dilation"
                    dilation //= 2
                out = planes * block.expansion
                project = index == 0 and (stride > 1 or channels != out)
                blocks.append(block(channels, planes, stride, dilation, project, **more))
                channels = out
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            self.channels.append(channels)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[batch, 3, height, width] -> four maps [batch, channels, h, w], strides 4, 8, 8, 8."""
        if self.is_v1b:
            x = F.relu(self.bn1(self.conv1(x)))
        x = self.maxpool(self.stem(x))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps


def build(variant: str, width: float = 1.0) -> ResNet:
    """Returns the backbone called `variant`; see `segmentor.build_backbone`."""
    return ResNet(variant, width)
