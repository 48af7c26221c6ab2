"""ResNet-18, -50 and -101 at output stride 8, with a stem of three 3x3 convolutions or of one 7x7.

The former ("v1c") is that of the published models. The latter ("v1b") is the ResNet of torchvision
and timm, for which most people have weights.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from memseg_jax.models import rematerialise
from memseg_jax.models.backbone import Backbone
from memseg_jax.models.layers import Array, ConvNorm, ValidSize, mask_padding, max_pool, record

STRIDES = (1, 2, 1, 1)
DILATIONS = (1, 1, 2, 4)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the first one carries stride and dilation.

    The second one is not dilated in v1c (as OpenMMLab has it). In v1b it is dilated like its stage,
    so that every position sees what it would see in the network with strides, whose weights these
    are; so does timm.
    """

    planes: int
    stride: int
    dilation: int
    project: bool
    dtype: Any
    second_dilation: int = 1

    expansion = 1

    @nn.compact
    def __call__(self, x: Array, *, train: bool, valid_size: ValidSize | None) -> Array:
        """[batch, height, width, channels] -> [batch, height', width', planes]."""
        kw = {"train": train, "valid_size": valid_size}
        shortcut = x
        y = ConvNorm(self.planes, 3, self.stride, self.dilation, dtype=self.dtype, name="conv1")(
            x, **kw
        )
        y = ConvNorm(
            self.planes,
            3,
            dilation=self.second_dilation,
            activation="none",
            dtype=self.dtype,
            name="conv2",
        )(y, **kw)
        if self.project:
            shortcut = ConvNorm(
                self.planes,
                stride=self.stride,
                activation="none",
                dtype=self.dtype,
                name="downsample",
            )(x, **kw)
        return nn.relu(y + shortcut)


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3 with stride and dilation, 1x1 expand by 4, and a shortcut."""

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
        width = self.planes * self.expansion
        shortcut = x
        y = ConvNorm(self.planes, dtype=self.dtype, name="conv1")(x, **kw)
        y = ConvNorm(self.planes, 3, self.stride, self.dilation, dtype=self.dtype, name="conv2")(
            y, **kw
        )
        y = ConvNorm(width, activation="none", dtype=self.dtype, name="conv3")(y, **kw)
        if self.project:
            shortcut = ConvNorm(
                width, stride=self.stride, activation="none", dtype=self.dtype, name="downsample"
            )(x, **kw)
        return nn.relu(y + shortcut)


VARIANTS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet18_v1b": (BasicBlock, (2, 2, 2, 2)),
    "resnet50_v1b": (Bottleneck, (3, 4, 6, 3)),
    "resnet101_v1b": (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(Backbone):
    """ResNet whose last two stages are dilated instead of strided.

    Attributes:
        variant: a key of `variants`; "_v1b" at its end: one 7x7 convolution as stem.
        width: multiplies the number of channels; 1.0 is the published network.
        dtype: compute type.
        variants: block and number of blocks of every stage, by name.
        stem_channels: output channels of the three stem convolutions; the last is that of v1b.
    """

    variant: str
    width: float = 1.0
    dtype: Any = jnp.float32

    variants = VARIANTS
    stem_channels = (32, 32, 64)

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool, valid_size: ValidSize | None = None
    ) -> tuple[Array, Array, Array, Array]:
        """Returns four feature maps at strides 4, 8, 8, 8.

        Args:
            x: normalised images [batch, height, width, 3].
            train: use and update batch statistics.
            valid_size: the valid part of padded images.
        """
        block, depths = self.variants[self.variant]
        kw = {"train": train, "valid_size": valid_size}
        stem = [max(int(c * self.width), 1) for c in self.stem_channels]
        v1b = self.variant.endswith("_v1b")
        if v1b:
            x = ConvNorm(stem[2], 7, 2, dtype=self.dtype, name="conv1")(x, **kw)
        else:
            x = ConvNorm(stem[0], 3, 2, dtype=self.dtype, name="stem_0")(x, **kw)
            x = ConvNorm(stem[1], 3, dtype=self.dtype, name="stem_1")(x, **kw)
            x = ConvNorm(stem[2], 3, dtype=self.dtype, name="stem_2")(x, **kw)
        record(self, "stem", x)
        # Activations are never negative here, so masked padding (0) loses every maximum. Windows
        # outside of the valid part may still see a part of it: the result is masked again.
        x = mask_padding(max_pool(x), valid_size)
        record(self, "maxpool", x)
        maps = []
        for stage, depth in enumerate(depths):
            planes = max(int(64 * 2**stage * self.width), 1)
            more = {"second_dilation": DILATIONS[stage]} if v1b and block is BasicBlock else {}
            for index in range(depth):
                first = index == 0
                stride = STRIDES[stage] if first else 1
                # The first block of a dilated stage has half the dilation ("contract dilation").
                dilation = DILATIONS[stage]
                if first and dilation > 1:
                    dilation //= 2
                project = first and (stride > 1 or x.shape[-1] != planes * block.expansion)
                name = f"layer{stage + 1}_{index}"
                layer = block(planes, stride, dilation, project, self.dtype, name=name, **more)
                x = rematerialise.call(layer, x, remat=self.remat, **kw)
                if first and stage in (0, 2):
                    record(self, f"layer{stage + 1}_block0", x)
            record(self, f"backbone.{stage}", x)
            maps.append(x)
        return tuple(maps)


def build(variant: str, width: float = 1.0, dtype: Any = jnp.float32) -> ResNet:
    """Returns the backbone called `variant`; see `memseg_jax.models.segmentor.build_backbone`."""
    return ResNet(variant, width, dtype)
