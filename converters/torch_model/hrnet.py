"""HRNetV2-W48: parallel branches at strides 4, 8, 16, 32 that exchange features."""

import torch
import torch.nn.functional as F
from torch import nn

from converters.torch_model.layers import conv, conv_norm, resize
from converters.torch_model.resnet import BasicBlock, Bottleneck

# Is there a ReLU after the first normalisation of the stem? See `memseg_jax.models.hrnet`.
VARIANTS = {"hrnetv2w48": False, "hrnetv2w48_relu": True}
BRANCH_WIDTHS = (48, 96, 192, 384)
MODULES = {2: 1, 3: 4, 4: 3}  # of each stage; stage s has s branches
BLOCKS = 4  # of the first stage, and of every branch of every module


def exchange(widths: list[int], source: int, target: int) -> nn.Module:
    """Returns what brings branch `source` to the width and (almost) the size of `target`."""
    if source == target:
        return nn.Identity()
    if source > target:
        return nn.Sequential(
            *conv_norm(widths[source], widths[target], activate="none"),
            nn.Upsample(scale_factor=2 ** (source - target), mode="bilinear"),
        )
    steps = [conv_norm(widths[source], widths[source], 3, 2) for _ in range(target - source - 1)]
    return nn.Sequential(*steps, conv_norm(widths[source], widths[target], 3, 2, activate="none"))


class ExchangeModule(nn.Module):
    """Residual blocks on every branch, then every branch receives the sum of all of them."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*(BasicBlock(width, width, 1, 1, False) for _ in range(BLOCKS)))
            for width in widths
        )
        count = range(len(widths))
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(exchange(widths, source, target) for source in count) for target in count
        )

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Takes and returns one [batch, channels, height, width] per branch, shapes unchanged."""
        maps = [branch(x) for branch, x in zip(self.branches, maps)]
        fused = []
        for own, layers in zip(maps, self.fuse_layers):
            # An upsampled map can be larger than its target, where sizes were rounded up on the
            # way down; then this is a second interpolation.
            total = sum(resize(layer(x), own.shape[2:]) for layer, x in zip(layers, maps))
            fused.append(F.relu(total))
        return fused


class HRNet(nn.Module):
    """HRNetV2: the concatenation of four branches at the resolution of the finest one.

    Attributes: as for `resnet.ResNet`.
    """

    auxiliary_levels = ()
    normalise_maps = False

    def __init__(self, variant: str, width: float = 1.0):
        """Builds a variant.

        Args:
            variant: a key of `VARIANTS`.
            width: multiplies the number of channels; 1.0 is the published network.
        """
        super().__init__()
        self.first_relu = VARIANTS[variant]
        stem = max(int(64 * width), 1)
        widths = [max(int(channels * width), 1) for channels in BRANCH_WIDTHS]
        self.channels = [sum(widths)]
        self.conv1 = conv(3, stem, 3, 2)
        self.bn1 = nn.BatchNorm2d(stem)
        self.conv2 = conv(stem, stem, 3, 2)
        self.bn2 = nn.BatchNorm2d(stem)
        out = stem * Bottleneck.expansion
        self.layer1 = nn.Sequential(
            Bottleneck(stem, stem, 1, 1, True),
            *(Bottleneck(out, stem, 1, 1, False) for _ in range(BLOCKS - 1)),
        )
        # A transition keeps the branches and starts one more from the coarsest of them; the first
        # one also narrows its only branch.
        coarsest = out
        for stage, modules in MODULES.items():
            kept = [nn.Identity() for _ in range(stage - 1)]
            if stage == 2:
                kept = [conv_norm(out, widths[0], 3)]
            start = nn.Sequential(conv_norm(coarsest, widths[stage - 1], 3, 2))
            setattr(self, f"transition{stage - 1}", nn.ModuleList([*kept, start]))
            exchanges = (ExchangeModule(widths[:stage]) for _ in range(modules))
            setattr(self, f"stage{stage}", nn.Sequential(*exchanges))
            coarsest = widths[stage - 1]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[batch, 3, height, width] -> one map [batch, 720, ceil(height / 4), ceil(width / 4)]."""
        x = self.bn1(self.conv1(x))
        if self.first_relu:
            x = F.relu(x)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        maps = [self.layer1(x)]
        stages = (
            (self.transition1, self.stage2),
            (self.transition2, self.stage3),
            (self.transition3, self.stage4),
        )
        for transition, stage in stages:
            maps = [layer(x) for layer, x in zip(transition, [*maps, maps[-1]])]
            maps = stage(maps)
        return [torch.cat([resize(x, maps[0].shape[2:]) for x in maps], dim=1)]


def build(variant: str, width: float = 1.0) -> HRNet:
    """Returns the backbone called `variant`; see `segmentor.build_backbone`."""
    return HRNet(variant, width)
