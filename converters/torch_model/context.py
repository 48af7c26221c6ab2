"""The context within an image: which module a config asks for."""

import ml_collections
from torch import nn

from converters.torch_model.head import ASPP
from converters.torch_model.pyramid import PyramidPooling


def build_context(config: ml_collections.ConfigDict, channels: int) -> nn.Module | None:
    """Returns the context within the image; None: the model has none.

    Args:
        config: config.model.
        channels: of the backbone's last map.
    """
    common = channels, config.aspp_dim
    return {
        "aspp": lambda: ASPP(*common, tuple(config.aspp_dilations), config.activation),
        "pyramid_pooling": lambda: PyramidPooling(
            *common, tuple(config.pool_scales), config.activation
        ),
        "none": lambda: None,
    }[config.context]()
