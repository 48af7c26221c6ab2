"""The models of MCIBI++ whose numbers are stored, as configs, and their weights."""

import importlib

import torch

from converters import names
from converters.torch_model import build_torch_model, mcibi_plus_plus
from converters.torch_model import swin as torch_swin
from memseg_jax.models.swin import Swin
from tests.goldens_plus import rule_array

BACKBONES = {
    "resnet50os8": "resnet50",
    "resnet101os8": "resnet101",
    "resnest101os8": "resnest101",
    "hrnetv2w48": "hrnet",
    "swinreduced": "swinlarge",
}
# In the place of swinlarge in the recipe.
REDUCED = Swin(48, (2, 2, 2, 2), (2, 4, 8, 16), 7)


def reference_config(tag: str):
    """The config of a reference model such as "upernet_resnet50os8_ade20k", without its data."""
    *context, backbone, dataset = tag.split("_")
    short = BACKBONES.get(backbone, backbone)
    module = f"configs.plus.{dataset}_{context[0] if context else 'fcn'}_{short}"
    return importlib.import_module(module).get_config()


def torch_model(tag: str, config=None) -> torch.nn.Module:
    """The PyTorch model, without memory for its tensors.

    Args:
        tag: of a reference model.
        config: a changed `reference_config(tag)`.
    """
    config = config or reference_config(tag)
    with torch.device("meta"):
        if "swinreduced" in tag:
            return mcibi_plus_plus.build(torch_swin.Swin(REDUCED), config)
        return build_torch_model(config)


def rule_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The rule's values for every tensor of a PyTorch model."""
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    buffers = names.index_buffers(shapes)
    return {
        key: torch.from_numpy(buffers[key] if key in buffers else rule_array(key, shape))
        for key, shape in shapes.items()
    }


def rule_model(tag: str, config=None) -> torch.nn.Module:
    """The PyTorch model with the rule's weights; see `torch_model`."""
    model = torch_model(tag, config)
    model.load_state_dict(rule_weights(model), assign=True)
    return model
