"""ImageNet weights of backbones, from PyTorch files.

They are those that the published models started from, and those of torchvision, timm and Hugging
Face's transformers. `swin_files` has what is different for Swin.
"""

import collections
import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from converters import names, recognise, swin_files, torch_files
from converters.mismatch import mismatches
from converters.torch_files import TorchFile
from memseg_jax.errors import UserError
from memseg_jax.models.vit import fit_positions

_OPENMMLAB = "https://download.openmmlab.com/pretrain/third_party/"
_TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-vitjx/"
_TORCHVISION = "https://download.pytorch.org/models/"
# A file for every backbone, by `recognise.file_kind`.
SOURCES = {
    "resnet18": _OPENMMLAB + "resnet18_v1c-b5776b93.pth",
    "resnet50": _OPENMMLAB + "resnet50_v1c-2cccc1ad.pth",
    "resnet101": _OPENMMLAB + "resnet101_v1c-e67eebb6.pth",
    "resnest101": _OPENMMLAB + "resnest101_d2-f3b931b2.pth",
    "hrnetv2w48": _OPENMMLAB + "hrnetv2_w48-d2186c55.pth",
    "vitlarge": _TIMM + "jx_vit_large_p16_384-b3be5167.pth",
    "resnet18_v1b": _TORCHVISION + "resnet18-f37072fd.pth",
    "resnet50_v1b": _TORCHVISION + "resnet50-0676ba61.pth",
    "resnet101_v1b": _TORCHVISION + "resnet101-63fe2227.pth",
    "vitbase": _TIMM + "jx_vit_base_p16_384-83fb41ba.pth",
    **swin_files.SOURCES,
}

_PREFIX = "backbone_net."
_SEGMENTOR_PREFIXES = (_PREFIX, "backbone.")  # of the backbone in the file of a whole segmentor
_CLASSIFICATION = (
    "fc.", "head.", "norm.", "fc_norm.", "pre_logits.", "layernorm.", "pooler.",
    "incre_modules.", "downsamp_modules.", "final_layer.", "classifier.",
)  # fmt: skip
_COUNTER = "num_batches_tracked"
_POSITIONS = "/pos_embed"  # the end of its path

# The reference's names of a ViT's tensors -> those of the timm library.
_TIMM_NAMES = [
    (r"patch_embed\.projection\.(.+)", r"patch_embed.proj.\1"),
    (r"layers\.(\d+)\.ln([12])\.(.+)", r"blocks.\1.norm\2.\3"),
    (r"layers\.(\d+)\.attn\.attn\.in_proj_(.+)", r"blocks.\1.attn.qkv.\2"),
    (r"layers\.(\d+)\.attn\.attn\.out_proj\.(.+)", r"blocks.\1.attn.proj.\2"),
    (r"layers\.(\d+)\.ffn\.layers\.0\.0\.(.+)", r"blocks.\1.mlp.fc1.\2"),
    (r"layers\.(\d+)\.ffn\.layers\.1\.(.+)", r"blocks.\1.mlp.fc2.\2"),
]
# The same -> those of Hugging Face's transformers, without "vit.". There, queries, keys and values
# are three tensors, which `_join_attention` joins under a name of its own.
_HUGGING_FACE = "vit."
# Since version 5, transformers has other names in memory, and its files those that it had before.
# A state dict that was saved as it is has the new ones.
_HUGGING_FACE_5 = [
    (r"^layers\.", "encoder.layer."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
]
_PARTS = ("query", "key", "value")
_JOINED = "{query,key,value}"
_HUGGING_FACE_NAMES = [
    (r"cls_token", r"embeddings.cls_token"),
    (r"pos_embed", r"embeddings.position_embeddings"),
    (r"patch_embed\.(.+)", r"embeddings.patch_embeddings.\1"),
    (r"layers\.(\d+)\.ln1\.(.+)", r"encoder.layer.\1.layernorm_before.\2"),
    (r"layers\.(\d+)\.ln2\.(.+)", r"encoder.layer.\1.layernorm_after.\2"),
    (
        r"layers\.(\d+)\.attn\.attn\.in_proj_(.+)",
        rf"encoder.layer.\1.attention.attention.{_JOINED}.\2",
    ),
    (
        r"layers\.(\d+)\.attn\.attn\.out_proj\.(.+)",
        r"encoder.layer.\1.attention.output.dense.\2",
    ),
    (r"layers\.(\d+)\.ffn\.layers\.0\.0\.(.+)", r"encoder.layer.\1.intermediate.dense.\2"),
    (r"layers\.(\d+)\.ffn\.layers\.1\.(.+)", r"encoder.layer.\1.output.dense.\2"),
]


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every tensor of a file and of the model.

    Attributes:
        file: name of the file, without its folder.
        sha256: of the file, in hexadecimal digits.
        layout: in words, what the file is.
        taken: name in the file -> path of ours; three tensors that were joined have one name.
        dropped: name in the file -> reason.
        left: paths of ours that keep their initial values: everything but the backbone, and the
            normalisations of a Swin's maps, which are no part of a classification network.
        changes: what was done to values, in words.
    """

    file: str
    sha256: str
    layout: str
    taken: dict[str, str]
    dropped: dict[str, str]
    left: tuple[str, ...]
    changes: tuple[str, ...]

    def summary(self) -> str:
        """One line of counts."""
        reasons = collections.Counter(self.dropped.values())
        dropped = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        parts = [
            f"{len(self.taken)} tensors taken",
            f"{len(self.dropped)} dropped" + (f" ({dropped})" if dropped else ""),
            f"{len(self.left)} left at their initial values",
            *self.changes,
        ]
        return f"{self.file} (SHA-256 {self.sha256[:12]}): {', '.join(parts)}"


def read_backbone(
    path: str | os.PathLike, backbone: str, abstract: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], Report]:
    """Reads the weights of a backbone.

    Args:
        path: a file such as those of `SOURCES`, in any wrapping that `torch_files.read` knows, or
            the file of a segmentor that has this backbone.
        backbone: config.model.backbone.
        abstract: params and batch_stats of the whole model; only the leaves' shapes matter.

    Returns:
        {path: float32 array} for all tensors of the backbone, such as
        "params/backbone/stem_0/conv/kernel" [3, 3, 3, 32], and what became of the others. Of a
        Swin, without the normalisations of its maps where the file has none, as those of ImageNet.

    Raises:
        UserError: the file cannot be read; a tensor is missing, unknown, of another shape or
            type, or not finite.
    """
    file = torch_files.read(path)
    ours = names.flatten(abstract)
    paths = {
        names.torch_key(path).removeprefix(_PREFIX): path
        for path in ours
        if path.partition("/")[2].startswith("backbone/")
    }
    tensors, dropped = _split_off_segmentor(file.tensors)
    cause = _likely_cause(backbone, tensors)
    tensors, changes = _join_attention(tensors)
    if official_swin := swin_files.is_official(tensors):
        tensors = swin_files.as_official(tensors)
        if not any(map(swin_files.is_of_segmentor, tensors)):
            paths = {
                name: path for name, path in paths.items() if not swin_files.is_of_segmentor(name)
            }
    spelling = _spelling(tensors)
    paths = {_spelt(name, spelling): path for name, path in paths.items()}
    for name in tensors:
        if name not in paths and (reason := _reason_to_drop(name)):
            dropped[name] = reason
    found = {name: tensor for name, tensor in tensors.items() if name not in dropped}

    wanted = {name: names.torch_shape(ours[path].shape) for name, path in paths.items()}
    shapes = {name: tensor.shape for name, tensor in found.items()}
    resized = {
        name
        for name, path in paths.items()
        if name in shapes and _can_be_resized(path, shapes[name], wanted[name])
    }
    shapes |= {name: wanted[name] for name in resized}
    if lines := mismatches(shapes, wanted):
        raise UserError(
            "\n".join([f"{file.path} does not fit config.model.backbone = {backbone!r}:", *lines])
            + f"\n{cause} The file for {backbone} is\n  {_source(backbone)}"
        )

    types = collections.Counter(str(found[name].dtype) for name in paths)
    for dtype, count in types.items():
        if dtype != "float32":
            changes.append(f"{count} converted from {dtype}")
    if official_swin:
        changes.append("channels of patch merging in another order")
    arrays, windows = {}, collections.Counter()
    for name, path in paths.items():
        tensor = found[name]
        if official_swin:
            tensor = swin_files.in_reference_order(name, tensor)
        if name in resized and name.endswith(swin_files.TABLE):
            sides = len(tensor), wanted[name][0]
            windows[tuple((math.isqrt(side) + 1) // 2 for side in sides)] += 1
            tensor = swin_files.resize_table(tensor, sides[1])
        array = _checked(file, name, tensor)
        if name in resized and path.endswith(_POSITIONS):
            side, grid = (math.isqrt(shape[1] - 1) for shape in (array.shape, wanted[name]))
            array = np.array(fit_positions(jnp.asarray(array), (grid, grid)))
            changes.append(f"positions resized from {side}x{side} to {grid}x{grid}")
        arrays[path] = array
    for (old, new), count in windows.items():
        changes.append(f"{count} tables of windows resized from {old}x{old} to {new}x{new}")
    taken = dict(paths)
    left = tuple(path for path in ours if path not in arrays)
    return arrays, Report(
        file.path.name, file.sha256, file.layout, taken, dropped, left, tuple(changes)
    )


def _split_off_segmentor(
    tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the tensors without a segmentor's prefix, and why the others are dropped."""
    for prefix in _SEGMENTOR_PREFIXES:
        if any(name.startswith(prefix) for name in tensors):
            inside = {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            rest = [name for name in tensors if not name.startswith(prefix)]
            return inside, dict.fromkeys(rest, "outside of the backbone")
    return dict(tensors), {}


def _join_attention(
    tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Brings the tensors of Hugging Face's ViT into the form of the others.

    Returns:
        The tensors without the prefix, with queries, keys and values in one where there are all
        three; and in words what was done. Tensors by others as they are.
    """
    plain = {name.removeprefix(_HUGGING_FACE): tensor for name, tensor in tensors.items()}
    if _HUGGING_FACE_NAMES[0][1] not in plain:
        return dict(tensors), []
    for pattern, earlier in _HUGGING_FACE_5:
        plain = {re.sub(pattern, earlier, name): tensor for name, tensor in plain.items()}
    joined, count = dict(plain), 0
    for name in plain:
        parts = [name.replace(".attention.query.", f".attention.{kind}.") for kind in _PARTS]
        shapes = {plain[part].shape for part in parts if part in plain}
        if len(set(parts) & set(plain)) == len(_PARTS) and len(shapes) == 1:
            together = name.replace(".query.", f".{_JOINED}.")
            joined[together] = np.concatenate([joined.pop(part) for part in parts])
            count += 1
    return joined, [f"{count} triples of queries, keys and values joined"]


def _spelling(tensors: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
    """Returns the table of names that a file follows; empty: the reference's names."""
    if _HUGGING_FACE_NAMES[0][1] in tensors:
        return _HUGGING_FACE_NAMES
    if swin_files.is_official(tensors):
        return swin_files.NAMES
    return _TIMM_NAMES if any(name.startswith("blocks.") for name in tensors) else []


def _spelt(name: str, spelling: list[tuple[str, str]]) -> str:
    """Returns one of the reference's names as a file has it."""
    for pattern, replacement in spelling:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return name


def _reason_to_drop(name: str) -> str | None:
    """Why a tensor that the backbone does not have may be in its file; None: no reason known."""
    if name.rsplit(".", 1)[-1] == _COUNTER:
        return "counters of training steps"
    if name.endswith(swin_files.DERIVED):
        return "that follow from the size of windows and images"
    if name.startswith(_CLASSIFICATION):
        return "of the classification head"
    return None


def _can_be_resized(path: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a table of positions is one of wanted shape for images or windows of another size.

    Args:
        path: of ours; only tables of positions can be resized.
        shape: in the file; of a ViT [1, 1 + side * side, channels].
        wanted: in the model.
    """
    if path.endswith(swin_files.TABLE):
        return swin_files.can_be_resized(shape, wanted)
    if not path.endswith(_POSITIONS):
        return False
    if len(shape) != 3 or (shape[0], shape[2]) != (wanted[0], wanted[2]) or shape == wanted:
        return False
    return shape[1] > 1 and math.isqrt(shape[1] - 1) ** 2 == shape[1] - 1


def _checked(file: TorchFile, name: str, tensor: np.ndarray) -> np.ndarray:
    """Returns a float32 copy in our layout, so that the file can be released."""
    if not np.issubdtype(tensor.dtype, np.floating):
        raise UserError(
            f"{file.path}: {name} is {tensor.dtype}; expected float32 (or another float type)"
        )
    with np.errstate(over="ignore"):
        array = np.array(names.from_torch_layout(tensor), np.float32, order="C")
    torch_files.check_finite(file, name, array)
    return array


def _source(backbone: str) -> str:
    return SOURCES[recognise.file_kind(backbone)]


def _likely_cause(backbone: str, tensors: Mapping[str, np.ndarray]) -> str:
    """Returns a sentence on why a file does not fit."""
    if "conv1.0.weight" in tensors:
        return (
            "The likely cause: the file is by timm or by the authors of ResNeSt, with a stem of "
            "three convolutions, which they name conv1; the files of OpenMMLab are needed."
        )
    seen = recognise.backbone_of(tensors)
    if seen is None:
        return "The likely cause: these are not the names of any backbone that is known here."
    if seen != recognise.file_kind(backbone):
        stem = ", whose stem is one 7x7 convolution" if seen.endswith("_v1b") else ""
        return (
            f"The likely cause: the file seems to hold a {seen}{stem}; give "
            f"--config.model.backbone={seen}, or another file."
        )
    return (
        f"The likely cause: a {seen} of another depth or width, or one that is not complete "
        "(config.model.backbone_width has to be 1.0 for the published files)."
    )
