"""What models with and without a memory begin with: the backbone's maps, and the context."""

import ml_collections
import torch
from torch import nn

from converters.torch_model.context import build_context
from converters.torch_model.layers import conv_norm

# The reference lists a backbone's single map four times and downsamples every entry.
DOWNSAMPLE_CALLS = 4


class Body(nn.Module):
    """Backbone, normalisation or downsampling of its maps, context; in the reference's order."""

    def __init__(self, backbone: nn.Module, config: ml_collections.ConfigDict) -> None:
        """Puts the parts together.

        Args:
            backbone: a PyTorch backbone.
            config: config.model.
        """
        super().__init__()
        channels = backbone.channels[-1]
        self.backbone_net = backbone
        if backbone.normalise_maps:
            self.norm_layers = nn.ModuleList(nn.LayerNorm(c, eps=1e-6) for c in backbone.channels)
        self.downsample_backbone = None
        if config.downsample > 1:
            self.downsample_backbone = conv_norm(
                channels, channels, 3, config.downsample, activate=config.activation
            )
        self.context_within_image_module = build_context(config, channels)

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The backbone's maps [batch, channels, h, w], normalised or downsampled if they are."""
        maps = self.backbone_net(images)
        if self.backbone_net.normalise_maps:
            tokens = [x.flatten(2).transpose(1, 2) for x in maps]
            tokens = [norm(x) for norm, x in zip(self.norm_layers, tokens)]
            maps = [x.transpose(1, 2).unflatten(2, old.shape[2:]) for x, old in zip(tokens, maps)]
        if self.downsample_backbone is not None:
            # The same result each time, but in training the statistics move every time.
            calls = DOWNSAMPLE_CALLS if self.training else 1
            maps = [self.downsample_backbone(maps[-1]) for _ in range(calls)]
        return maps
