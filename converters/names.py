"""The names and layouts of the PyTorch reference's tensors, as functions of ours.

Our variables are nested dicts; a path is their keys joined by "/", for example
"params/backbone/layer1_0/conv1/conv/kernel". The reference calls the same tensor
"backbone_net.layer1.0.conv1.weight". MCIBI and MCIBI++ share most names; `method` is that of
`segmentor.method_of`. The plain baselines, which the reference has not, go by MCIBI's names where
they can.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from memseg_jax.errors import UserError
from memseg_jax.models.swin import relative_positions

MEMORY_KEY = "memory_module.memory"
_TABLE = "relative_position_bias_table"
_INDEX = "relative_position_index"

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
    (r"context/branches_(\d)", r"context_within_image_module.branches.\1.", ("1", "2")),
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

_PYRAMID = [
    (r"fpn/lateral_(\d)", r"lateral_convs.\1.", ("0", "1")),
    (r"fpn/output_(\d)", r"fpn_convs.\1.", ("0", "1")),
]

# The same for what only one of the methods has, or calls by another name.
_MODULES_OF = {
    "mcibi": [
        (r"decoder_stage(\d)/project", r"decoder_stage\1.", ("0", "1")),
        (r"decoder_stage(\d)/classifier", r"decoder_stage\1.", ("4", None)),
    ],
    "mcibi_plus_plus": [
        (r"decoder_stage1/project", "decoder_pr.", ("conv1", "bn1")),
        (r"decoder_stage1/classifier", "decoder_pr.", ("conv2", None)),
        (r"decoder_context/project", "decoder_cwi.", ("conv1", "bn1")),
        (r"decoder_context/classifier", "decoder_cwi.", ("conv2", None)),
        (r"decoder_stage2/project", "decoder_cls.", ("conv1", "bn1")),
        (r"decoder_stage2/classifier", "decoder_cls.", ("conv2", None)),
        (r"memory_module/downsampling", "memory_module.downsample_before_sa.", ("0", "1")),
        (r"self_attention/(query|key)_project_(\d)", r"self_attention.\1_project.\2.", ("0", "1")),
        (r"self_attention/(value|out)_project", r"self_attention.\1_project.", ("0", "1")),
        *_PYRAMID,
    ],
    "plain": [(r"classifier", "", ("classifier", None)), *_PYRAMID],
}

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
    # Swin
    (r"backbone/patch_embed/(projection|norm)", r"backbone_net.patch_embed.\1."),
    (r"backbone/stages_(\d)_blocks_(\d+)/(norm[12])", r"backbone_net.stages.\1.blocks.\2.\3."),
    (r"backbone/stages_(\d)_blocks_(\d+)/attn", r"backbone_net.stages.\1.blocks.\2.attn.w_msa."),
    (
        r"backbone/stages_(\d)_blocks_(\d+)/attn/(qkv|proj)",
        r"backbone_net.stages.\1.blocks.\2.attn.w_msa.\3.",
    ),
    (
        r"backbone/stages_(\d)_blocks_(\d+)/ffn/fc1",
        r"backbone_net.stages.\1.blocks.\2.ffn.layers.0.0.",
    ),
    (
        r"backbone/stages_(\d)_blocks_(\d+)/ffn/fc2",
        r"backbone_net.stages.\1.blocks.\2.ffn.layers.1.",
    ),
    (r"backbone/stages_(\d)_downsample/(norm|reduction)", r"backbone_net.stages.\1.downsample.\2."),
    (r"backbone/norm(\d)", r"backbone_net.norm\1."),
    # ResNeSt
    (
        r"backbone/layer(\d)_(\d+)/split_attention/(conv|bn0|fc1|bn1|fc2)",
        r"backbone_net.layer\1.\2.conv2.\3.",
    ),
]

_LEAVES = {
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    _TABLE: _TABLE,
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def check_counterpart(config: Any) -> None:
    """Refuses models that the PyTorch reference does not have.

    Args:
        config: the whole config.

    Raises:
        UserError: says which field is in the way.
    """
    memory = config.model.memory
    if not memory.enabled:
        found = "enabled is False; expected True: the PyTorch reference only has models with memory"
    elif memory.fusion != "published":
        found = (
            f"fusion is {memory.fusion!r}; expected 'published': that form is not in the PyTorch "
            "reference, so nothing can be converted from or to it, or compared with it"
        )
    else:
        return
    raise UserError(f"config.model.memory.{found}. Take another model, or stay with the JAX one.")


def torch_key(path: str, method: str = "mcibi") -> str:
    """Returns the reference's name of the tensor at `path`.

    Args:
        path: "params/...", "batch_stats/..." or "memory".
        method: of `segmentor.method_of`.

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
    for pattern, prefix, members in _MODULES_OF[method] + _MODULES:
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


def from_torch_layout(array: np.ndarray, key: str = "") -> np.ndarray:
    """Convolution weights (out, in, kh, kw) -> HWIO, linear ones (out, in) -> (in, out).

    What else has two axes: a table of relative positions is turned, too, and so has the heads
    first; the memory of MCIBI++ stays as it is, and is known by its name.

    Args:
        array: a tensor of the reference.
        key: its name; may be left out if it is not the memory.
    """
    axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(array.ndim)
    return array if axes is None or key == MEMORY_KEY else array.transpose(axes)


def torch_shape(shape: tuple[int, ...], key: str = "") -> tuple[int, ...]:
    """Shape of the reference's tensor for one of ours; the inverse of `from_torch_layout`."""
    axes = {2: (1, 0), 4: (3, 2, 0, 1)}.get(len(shape))
    if axes is None or key == MEMORY_KEY:
        return tuple(shape)
    return tuple(shape[axis] for axis in axes)


def to_torch_layout(array: np.ndarray, key: str = "") -> np.ndarray:
    """One of our arrays in the reference's layout; the inverse of `from_torch_layout`."""
    axes = {2: (1, 0), 4: (3, 2, 0, 1)}.get(array.ndim)
    return array if axes is None or key == MEMORY_KEY else array.transpose(axes)


def torch_keys(variables: dict, method: str = "mcibi") -> dict[str, str]:
    """Returns {path of ours: key of the reference} for all tensors of a model.

    Args:
        variables: params, batch_stats and memory; the leaves do not matter.
        method: of `segmentor.method_of`.

    Raises:
        KeyError: the reference has no such tensor.
    """
    return {path: torch_key(path, method) for path in flatten(variables)}


def counter_keys(keys: Iterable[str]) -> list[str]:
    """The counters of training steps that stand beside running means in the reference.

    PyTorch's batch normalisations have them, and with a fixed momentum no number depends on them.
    """
    means = [key for key in keys if key.endswith(".running_mean")]
    return [key.removesuffix("running_mean") + "num_batches_tracked" for key in means]


def index_buffers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The buffers that stand beside a Swin's tables of relative positions in the reference.

    They follow from the size of the window alone.

    Args:
        shapes: {key: shape in the reference's layout} of a model's tensors.

    Returns:
        {key: int64 [window^2, window^2]}.
    """
    made = {}
    for key, shape in shapes.items():
        if key.endswith(_TABLE):
            window = (math.isqrt(shape[0]) + 1) // 2
            made[key.removesuffix(_TABLE) + _INDEX] = relative_positions(window)
    return made
