"""HRNetV2-W48: parallel branches at strides 4, 8, 16, 32 that exchange features.

Wang et al., "Deep High-Resolution Representation Learning for Visual Recognition", section 3,
with the details of the PyTorch reference.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from memseg_jax.models import rematerialise
from memseg_jax.models.backbone import Backbone
from memseg_jax.models.layers import (
    Array,
    ConvNorm,
    ValidSize,
    record,
    resize_bilinear,
    resize_valid,
)
from memseg_jax.models.resnet import BasicBlock, Bottleneck

# Is there a ReLU after the first normalisation of the stem? The ImageNet weights were trained with
# it, but all published segmentation results of this method were computed without it.
VARIANTS = {"hrnetv2w48": False, "hrnetv2w48_relu": True}
BRANCH_WIDTHS = (48, 96, 192, 384)
MODULES = {2: 1, 3: 4, 4: 3}  # of each stage; stage s has s branches
BLOCKS = 4  # of the first stage, and of every branch of every module


class ExchangeModule(nn.Module):
    """Residual blocks on every branch, then every branch receives the sum of all of them.

    Attributes:
        widths: channels of the branches, finest first.
        dtype: compute type.
        remat: see `Backbone`.
    """

    widths: tuple[int, ...]
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(
        self, maps: list[Array], *, train: bool, valid_size: ValidSize | None = None
    ) -> list[Array]:
        """Takes and returns one [batch, height, width, channels] per branch, shapes unchanged.

        Every branch is half as large (rounded up) as the one before.
        """
        on = {"train": train, "valid_size": valid_size}
        branches = []
        for index, (x, width) in enumerate(zip(maps, self.widths, strict=True)):
            for block in range(BLOCKS):
                name = f"branch_{index}_{block}"
                layer = BasicBlock(width, 1, 1, False, self.dtype, name=name)
                x = rematerialise.call(layer, x, remat=self.remat, **on)
            branches.append(x)
        fused = []
        for target in range(len(branches)):
            total = self._exchange(branches, 0, target, on)
            for source in range(1, len(branches)):
                total = total + self._exchange(branches, source, target, on)
            fused.append(nn.relu(total))
        return fused

    def _exchange(
        self, branches: list[Array], source: int, target: int, on: dict[str, Any]
    ) -> Array:
        """Brings branch `source` to the shape of branch `target`; the last step has no ReLU."""
        x, name = branches[source], f"fuse_{target}_{source}"
        kw = {"dtype": self.dtype}
        if source > target:
            width = self.widths[target]
            x = ConvNorm(width, activation="none", name=name, **kw)(x, **on)
            # Two interpolations, as in the reference: the first one overshoots where a size was
            # rounded up on the way down, and then the second one is not the identity.
            factor = 2 ** (source - target)
            size = branches[target].shape[1:3]
            if on["valid_size"] is not None:
                valid = on["valid_size"].of_map(x.shape[1:3])
                return resize_valid(x, (valid, factor * valid, on["valid_size"].of_map(size)), size)
            x = resize_bilinear(x, (x.shape[1] * factor, x.shape[2] * factor))
            return resize_bilinear(x, size)
        for step in range(target - source):
            last = step == target - source - 1
            x = ConvNorm(
                self.widths[target if last else source],
                3,
                2,
                activation="none" if last else "relu",
                name=f"{name}_{step}",
                **kw,
            )(x, **on)
        return x


class HRNet(Backbone):
    """HRNetV2: the concatenation of four branches at the resolution of the finest one.

    Attributes:
        variant: a key of `VARIANTS`.
        width: multiplies the number of channels; 1.0 is the published network.
        dtype: compute type.
    """

    variant: str
    width: float = 1.0
    dtype: Any = jnp.float32

    output_stride = 4
    finest_stride = 0
    coarsest_stride = 32
    auxiliary_levels = ()

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool, valid_size: ValidSize | None = None
    ) -> tuple[Array]:
        """Returns one feature map: [batch, ceil(height / 4), ceil(width / 4), 720].

        Args:
            x: normalised images [batch, height, width, 3].
            train: use and update batch statistics.
            valid_size: the valid part of padded images.
        """
        kw, on = {"dtype": self.dtype}, {"train": train, "valid_size": valid_size}
        stem = max(int(64 * self.width), 1)
        widths = [max(int(channels * self.width), 1) for channels in BRANCH_WIDTHS]
        x = ConvNorm(stem, 3, 2, activation="none", name="conv1", **kw)(x, **on)
        record(self, "stem_bn1", x)
        if VARIANTS[self.variant]:
            x = nn.relu(x)
        x = ConvNorm(stem, 3, 2, name="conv2", **kw)(x, **on)
        for index in range(BLOCKS):
            block = Bottleneck(stem, 1, 1, index == 0, self.dtype, name=f"layer1_{index}")
            x = rematerialise.call(block, x, remat=self.remat, **on)
        record(self, "layer1", x)
        # Stage 2 starts two branches from the one map; later stages keep their branches and start
        # one more from the coarsest.
        maps = [ConvNorm(widths[0], 3, name="transition1_0", **kw)(x, **on)]
        coarsest = x
        for stage, modules in MODULES.items():
            name = f"transition{stage - 1}_{stage - 1}"
            start = ConvNorm(widths[stage - 1], 3, 2, name=name, **kw)
            maps.append(start(coarsest, **on))
            for index in range(modules):
                exchange = ExchangeModule(
                    tuple(widths[:stage]), self.dtype, self.remat, name=f"stage{stage}_{index}"
                )
                maps = exchange(maps, **on)
            for branch, feature in enumerate(maps):
                record(self, f"stage{stage}.{branch}", feature)
            coarsest = maps[-1]
        size = maps[0].shape[1:3]
        if valid_size is None:
            coarse = [resize_bilinear(m, size) for m in maps[1:]]
        else:
            sizes = [valid_size.of_map(m.shape[1:3]) for m in maps]
            coarse = [resize_valid(m, (s, sizes[0]), size) for m, s in zip(maps[1:], sizes[1:])]
        features = jnp.concatenate([maps[0], *coarse], axis=-1)
        record(self, "backbone.0", features)
        return (features,)


def build(variant: str, width: float = 1.0, dtype: Any = jnp.float32) -> HRNet:
    """Returns the backbone called `variant`; see `memseg_jax.models.segmentor.build_backbone`."""
    return HRNet(variant, width, dtype)
