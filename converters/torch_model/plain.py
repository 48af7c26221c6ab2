"""The plain baselines in PyTorch, for prediction: DeepLabV3, PSPNet, FCN and UPerNet.

Their names are our own where MCIBI has none: the published reference has no models without memory.
"""

import ml_collections
import torch
from torch import nn

from converters.torch_model import pyramid
from converters.torch_model.body import Body
from converters.torch_model.layers import conv_norm


class Plain(Body):
    """Backbone, context (or one 3x3 convolution), feature pyramid if asked for, classifier."""

    def __init__(
        self, backbone: nn.Module, num_classes: int, config: ml_collections.ConfigDict
    ) -> None:
        """Puts the parts together.

        Args:
            backbone: a PyTorch backbone.
            num_classes: number of classes.
            config: config.model.
        """
        super().__init__(backbone, config)
        channels, context = backbone.channels, config.context != "none"
        width = config.aspp_dim if context else channels[-1]
        self.lateral_convs = self.fpn_convs = self.bottleneck = None
        if config.fpn:
            below = channels[:-1]
            self.lateral_convs = pyramid.laterals(below, width, config.activation)
            self.fpn_convs = pyramid.outputs(len(below), width, config.fpn_dim, config.activation)
            width += len(below) * config.fpn_dim
        if config.fpn or not context:
            self.bottleneck = conv_norm(width, config.feature_dim, 3, activate=config.activation)
            width = config.feature_dim
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images [batch, 3, H, W] -> logits [batch, classes, h, w]; no dropout."""
        maps = self.maps(images)
        x = maps[-1]
        if self.context_within_image_module is not None:
            x = self.context_within_image_module(x)
        if self.fpn_convs is not None:
            x = pyramid.fuse(maps[:-1], x, self.lateral_convs, self.fpn_convs)
        if self.bottleneck is not None:
            x = self.bottleneck(x)
        return self.classifier(x)


def build(backbone: nn.Module, config: ml_collections.ConfigDict) -> Plain:
    """Returns the model of a whole config around a PyTorch backbone."""
    return Plain(backbone, len(config.data.class_names), config.model)
