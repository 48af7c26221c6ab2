"""The names and layouts of the PyTorch reference's tensors, as functions of ours.

Our variables are nested dicts; a path is their keys joined by "/", for example
"params/backbone/layer1_0/conv1/conv/kernel". The reference calls the same tensor
"backbone_net.layer1.0.conv1.weight".
"""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

MEMORY_KEY = "memory_module.memory"

# Path of a module -> prefix in the reference. First match wins. A convolution with normalisation
# is a sequence in the reference, whose members are numbered: {conv} and {norm} stand for them.
_MODULES = [
    (r"backbone/stem_0", "backbone_net.stem.", ("0", "1")),
    (r"backbone/stem_1", "backbone_net.stem.", ("3", "4")),
    (r"backbone/stem_2", "backbone_net.stem.", ("6", "7")),
    (r"backbone/layer(\d)_(\d+)/downsample", r"backbone_net.layer\1.\2.downsample.", ("0", "1")),
    (r"backbone/layer(\d)_(\d+)/conv(\d)", r"backbone_net.layer\1.\2.", (r"conv\3", r"bn\3")),
    (r"downsampling", "downsample_backbone.", ("0", "1")),
    (r"context/branch_(\d)", r"context_within_image_module.parallel_branches.\1.", ("0", "1")),
    (r"context/global", "context_within_image_module.global_branch.", ("1", "2")),
    (r"context/bottleneck", "context_within_image_module.bottleneck.", ("0", "1")),
    (r"bottleneck", "bottleneck.", ("0", "1")),
    (
        r"memory_module/(bottleneck|bottleneck_ms|fuse_memory_conv)",
        r"memory_module.\1.",
        ("0", "1"),
    ),
    (
        r"memory_module/(self_attention|self_attention_ms)/(query|key)_project_(\d)",
        r"memory_module.\1.\2_project.\3.",
        ("0", "1"),
    ),
    (
        r"memory_module/(self_attention|self_attention_ms)/(value|out)_project",
        r"memory_module.\1.\2_project.",
        ("0", "1"),
    ),
    (
        r"memory_module/self_attentions_(\d+)/(query|key)_project_(\d)",
        r"memory_module.self_attentions.\1.\2_project.\3.",
        ("0", "1"),
    ),
    (
        r"memory_module/self_attentions_(\d+)/(value|out)_project",
        r"memory_module.self_attentions.\1.\2_project.",
        ("0", "1"),
    ),
    (r"decoder_stage(\d)/project", r"decoder_stage\1.", ("0", "1")),
    (r"decoder_stage(\d)/classifier", r"decoder_stage\1.", ("4", None)),
    # A ViT has three auxiliary heads of two convolutions, the others one head of one convolution.
    (r"auxiliary_decoders_(\d)/project_0", r"auxiliary_decoder.\1.", ("0", "1")),
    (r"auxiliary_decoders_(\d)/project_1", r"auxiliary_decoder.\1.", ("4", "5")),
    (r"auxiliary_decoders_(\d)/full_classifier", r"auxiliary_decoder.\1.", ("9", None)),
    (r"auxiliary_decoders_0/project", "auxiliary_decoder.", ("0", "1")),
    (r"auxiliary_decoders_0/classifier", "auxiliary_decoder.", ("4", None)),
    # HRNet. Convolutions of stride 2 sit one list deeper than the others.
    (r"backbone/conv(\d)", "backbone_net.", (r"conv\1", r"bn\1")),
    (r"backbone/transition1_0", "backbone_net.transition1.0.", ("0", "1")),
    (r"backbone/transition(\d)_(\d)", r"backbone_net.transition\1.\2.0.", ("0", "1")),
    (
        r"backbone/stage(\d)_(\d)/branch_(\d)_(\d)/conv(\d)",
        r"backbone_net.stage\1.\2.branches.\3.\4.",
        (r"conv\5", r"bn\5"),
    ),
    (
        r"backbone/stage(\d)_(\d)/fuse_(\d)_(\d)",
        r"backbone_net.stage\1.\2.fuse_layers.\3.\4.",
        ("0", "1"),
    ),
    (
        r"backbone/stage(\d)_(\d)/fuse_(\d)_(\d)_(\d)",
        r"backbone_net.stage\1.\2.fuse_layers.\3.\4.\5.",
        ("0", "1"),
    ),
    # ResNeSt. Index 0 of the shortcut is the average pool.
    (
        r"backbone/layer(\d)_(\d+)/downsample_pooled",
        r"backbone_net.layer\1.\2.downsample.",
        ("1", "2"),
    ),
]

# The same for a module that owns its tensors itself: prefix and name of the tensor make the key.
_PLAIN_MODULES = [
    # ViT
    (r"backbone", "backbone_net."),
    (r"backbone/patch_projection", "backbone_net.patch_embed.projection."),
    (r"backbone/layers_(\d+)/(ln[12])", r"backbone_net.layers.\1.\2."),
    (r"backbone/layers_(\d+)/in_proj", r"backbone_net.layers.\1.attn.attn.in_proj_"),
    (r"backbone/layers_(\d+)/out_proj", r"backbone_net.layers.\1.attn.attn.out_proj."),
    (r"backbone/layers_(\d+)/ffn_0", r"backbone_net.layers.\1.ffn.layers.0.0."),
    (r"backbone/layers_(\d+)/ffn_1", r"backbone_net.layers.\1.ffn.layers.1."),
    (r"norm_layers_(\d)", r"norm_layers.\1."),
    # ResNeSt
    (
        r"backbone/layer(\d)_(\d+)/split_attention/(conv|bn0|fc1|bn1|fc2)",
        r"backbone_net.layer\1.\2.conv2.\3.",
    ),
]

_LEAVES = {
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def torch_key(path: str) -> str:
    """Returns the reference's name of the tensor at `path`.

    Args:
        path: "params/...", "batch_stats/..." or "memory".

    Returns:
        The state-dict key.

    Raises:
        KeyError: the reference has no such tensor.
    """
    if path == "memory":
        return MEMORY_KEY
    _, _, inner = path.partition("/")
    owner, _, leaf = inner.rpartition("/")
    for pattern, prefix in _PLAIN_MODULES:
        match = re.fullmatch(pattern, owner)
        if match:
            return match.expand(prefix) + _LEAVES[leaf]
    module, _, member = owner.rpartition("/")
    for pattern, prefix, members in _MODULES:
        match = re.fullmatch(pattern, module)
        if match and member in ("conv", "norm"):
            name = members[("conv", "norm").index(member)]
            return match.expand(prefix + name) + "." + _LEAVES[leaf]
    raise KeyError(f"the PyTorch reference has no tensor for {path}")


def flatten(tree: dict) -> dict[str, Any]:
    """Flattens nested dicts to {path: leaf} with "/" between the keys."""
    return flatten_dict(tree, sep="/")


def unflatten(flat: dict[str, Any]) -> dict:
    """The inverse of `flatten`."""
    return unflatten_dict(flat, sep="/")


def from_torch_layout(array: np.ndarray) -> np.ndarray:
    """Convolution weights (out, in, kh, kw) -> HWIO, linear ones (out, in) -> (in, out).

    Nothing else in the reference has two or four axes; it stays.
    """
    axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(array.ndim)
    return array if axes is None else array.transpose(axes)


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the reference's tensor for one of ours; the inverse of `from_torch_layout`."""
    axes = {2: (1, 0), 4: (3, 2, 0, 1)}.get(len(shape))
    return tuple(shape) if axes is None else tuple(shape[axis] for axis in axes)


def to_torch_layout(array: np.ndarray) -> np.ndarray:
    """One of our arrays in the reference's layout; the inverse of `from_torch_layout`."""
    axes = {2: (1, 0), 4: (3, 2, 0, 1)}.get(array.ndim)
    return array if axes is None else array.transpose(axes)


def torch_keys(variables: dict) -> dict[str, str]:
    """Returns {path of ours: key of the reference} for all tensors of a model.

    Args:
        variables: params, batch_stats and memory; the leaves do not matter.

    Raises:
        KeyError: the reference has no such tensor.
    """
    return {path: torch_key(path) for path in flatten(variables)}


def counter_keys(keys: Iterable[str]) -> list[str]:
    """The counters of training steps that stand beside running means in the reference.

    PyTorch's batch normalisations have them, and with a fixed momentum no number depends on them.
    """
    means = [key for key in keys if key.endswith(".running_mean")]
    return [key.removesuffix("running_mean") + "num_batches_tracked" for key in means]
