"""The models of MCIBI++'s golden files in PyTorch, with the weights that the rule gives."""

import torch

from converters import names
from converters.torch_model import build_torch_model, mcibi_plus_plus
from converters.torch_model import swin as torch_swin
from tests.goldens_plus import rule_array
from tests.reference_models_plus import reduced_swin, reference_config


def torch_model(tag: str, config=None) -> torch.nn.Module:
    """The PyTorch model, without memory for its tensors.

    Args:
        tag: of a golden file.
        config: a changed `reference_config(tag)`.
    """
    config = config or reference_config(tag)
    with torch.device("meta"):
        if "swinreduced" in tag:
            return mcibi_plus_plus.build(torch_swin.Swin(reduced_swin()), config)
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
