"""What every backbone offers, so that the segmentor need not know which one it has."""

import dataclasses

import flax.linen as nn

from memseg_jax.models.layers import Array, ValidSize


class Backbone(nn.Module):
    """Base of all backbones; a subclass overrides what is different.

    Attributes:
        output_stride: pixels per position of the last map, in each direction.
        finest_stride: the same for the first map; 0: all maps are of one size.
        coarsest_stride: the same for the coarsest map inside; sides of padded images are multiples.
        auxiliary_levels: the maps that get an auxiliary head.
        auxiliary_upsampling: whether those heads work at full resolution (ViT).
        normalise_maps: whether each of the four maps goes through a layer normalisation (ViT).
        remat: whether training recomputes the inside of every block (`rematerialise`).
    """

    output_stride = 8
    finest_stride = 4
    coarsest_stride = 8
    auxiliary_levels = (2,)
    auxiliary_upsampling = False
    normalise_maps = False

    remat: bool = dataclasses.field(default=False, kw_only=True)

    def __call__(
        self, x: Array, *, train: bool, valid_size: ValidSize | None = None
    ) -> tuple[Array, ...]:
        """Returns feature maps, coarsest last.

        Args:
            x: normalised images [batch, height, width, 3].
            train: use and update batch statistics.
            valid_size: the valid part of padded images, which are 0 outside of it. What is outside
                has no influence on the maps, and they are 0 there, too.
        """
        raise NotImplementedError
