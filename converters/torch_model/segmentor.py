"""The PyTorch model of a config: its backbone, and the method around it."""

import ml_collections
from torch import nn

from converters import names
from converters.torch_model import (
    hrnet,
    mcibi,
    mcibi_plus_plus,
    plain,
    resnest,
    resnet,
    swin,
    vit,
)
from memseg_jax.models import segmentor as ours

METHODS = {"mcibi": mcibi, "mcibi_plus_plus": mcibi_plus_plus, "plain": plain}


def build_backbone(config: ml_collections.ConfigDict) -> nn.Module:
    """Returns the PyTorch backbone of a `config.model`."""
    name = config.backbone
    module = next(m for m in (resnet, resnest, hrnet, vit, swin) if name in m.VARIANTS)
    more = {"drop_path": config.drop_path} if module is swin else {}
    return module.build(name, config.backbone_width, **more)


def build_torch_model(
    config: ml_collections.ConfigDict,
) -> mcibi.MCIBI | mcibi_plus_plus.MCIBIPlusPlus | plain.Plain:
    """Returns the model that `config` describes, with PyTorch's random initial weights.

    Args:
        config: as for `memseg_jax.models.segmentor.build_segmentor`; the compute type plays no
            part, parameters are float32.

    Raises:
        UserError: it has a form of the memory that is not in PyTorch.
    """
    ours.build_segmentor(config)  # refuses what does not fit together
    if config.model.memory.enabled:
        names.check_counterpart(config)
    return METHODS[ours.method_of(config)].build(build_backbone(config.model), config)
