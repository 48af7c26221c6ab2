"""Named intermediate results of the PyTorch models: the taps that our own models offer."""

import torch
from torch import nn

from converters.torch_model.hrnet import HRNet
from converters.torch_model.resnet import ResNet
from converters.torch_model.swin import Swin
from converters.torch_model.vit import ViT

# Module of a backbone -> name of its result. A result (or a module) that is a list gives one tap
# per entry. The other modules are in `taps` of the model.
_BACKBONES = {
    ResNet: {
        "stem": "stem",
        "maxpool": "maxpool",
        "layer1.0": "layer1_block0",
        "layer3.0": "layer3_block0",
    },
    HRNet: {
        "bn1": "stem_bn1",
        "layer1": "layer1",
        "stage2": "stage2",
        "stage3": "stage3",
        "stage4": "stage4",
    },
    ViT: {"patch_embed": "patch_embed", "embedded": "tokens_plus_pos", "layers.0": "layer0"},
    Swin: {
        "patch_embed": "patch_embed",
        "stages.0.blocks.0": "stage0_block0",
        "stages.0.blocks.1": "stage0_block1",
    },
}


def _tapped_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Returns {name of the tap: module}."""
    table = next(t for kind, t in _BACKBONES.items() if isinstance(model.backbone_net, kind))
    table = {f"backbone_net.{path}": name for path, name in table.items()} | model.taps
    tapped = {}
    for path, module in model.named_modules():
        name = table.get(path)
        if name and isinstance(module, nn.ModuleList):  # never called itself
            tapped |= {f"{name}.{index}": entry for index, entry in enumerate(module)}
        elif name:
            tapped[name] = module
    return tapped


@torch.no_grad()
def taps_of(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Runs the model in evaluation mode, auxiliary heads included, and records the taps.

    Args:
        model: from `build_torch_model`; it keeps its mode.
        images: normalised images [batch, 3, height, width].

    Returns:
        Copies by name, [batch, channels, h, w], or [batch, tokens, channels] for the tokens of a
        transformer. Logits are those before any resize.
    """
    taps: dict[str, torch.Tensor] = {}
    # A Swin's inner maps have their channels last.
    as_tokens = _BACKBONES[Swin].values() if isinstance(model.backbone_net, Swin) else ()

    def record(name: str, value: torch.Tensor | list[torch.Tensor]) -> None:
        if isinstance(value, torch.Tensor):
            if name in as_tokens:
                value = value.flatten(1, 2)
            # Of several calls (memory slots) the first counts. The next layer may work in place.
            taps.setdefault(name, value.clone())
        else:
            for index, entry in enumerate(value):
                record(f"{name}.{index}", entry)

    hooks = [
        module.register_forward_hook(lambda _, inputs, output, name=name: record(name, output))
        for name, module in _tapped_modules(model).items()
    ]
    training = model.training
    try:
        model.eval().forward_train(images)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return taps
