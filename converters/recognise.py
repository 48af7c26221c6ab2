"""Tells from names and shapes what a PyTorch file is: for messages, never to decide silently."""

import re
from collections.abc import Mapping

import ml_collections
import numpy as np

from converters.torch_files import TorchFile

_DATA_SETS = {
    150: "ADE20K",
    19: "Cityscapes",
    182: "COCO-Stuff-10k",
    20: "LIP",
    21: "PASCAL VOC",
    59: "PASCAL-Context",
    124: "VSPW",
}
_CLASSIFIERS = {"mcibi": "decoder_stage2.4.weight", "mcibi_plus_plus": "decoder_cls.conv2.weight"}
_TABLE = "backbone_net.pos_embed"
_PREFIX = "backbone_net."
_HUGGING_FACE_TABLES = ("embeddings.position_embeddings", "vit.embeddings.position_embeddings")
_SWIN_WIDTH = ("stages.0.blocks.0.norm1.bias", "layers.0.blocks.0.norm1.bias")
# By whether the third stage has 18 blocks, and the channels of the first one.
_SWINS = {
    (False, 96): "swintiny",
    (True, 96): "swinsmall",
    (True, 128): "swinbase",
    (True, 192): "swinlarge",
}
_VIT_BLOCK = re.compile(r"\b(?:layers|blocks|layer)\.(\d+)\.")


def file_kind(backbone: str) -> str:
    """Returns the name of a backbone without what leaves no trace in the names of its tensors.

    Those are the ReLU of HRNet's stem and the size of a ViT's position table.
    """
    return re.sub(r"_(relu|\d+)$", "", backbone)


def backbone_of(tensors: Mapping[str, np.ndarray]) -> str | None:
    """Returns our name of the backbone that has these tensors, None if none has.

    Args:
        tensors: by their names in the PyTorch reference, without "backbone_net."; of a ViT also as
            in timm or Hugging Face's transformers, of a Swin as in the official files.

    Returns:
        A name such as `file_kind` returns.
    """
    names = set(tensors)
    if swin := next((name for name in _SWIN_WIDTH if name in names), None):
        deep = any(re.match(r"(stages|layers)\.2\.blocks\.17\.", name) for name in names)
        return _SWINS.get((deep, *tensors[swin].shape))
    if names >= {"cls_token", "pos_embed"} or not names.isdisjoint(_HUGGING_FACE_TABLES):
        blocks = {m[1] for name in names if (m := _VIT_BLOCK.search(name))}
        return "vitbase" if len(blocks) == 12 else "vitlarge"
    if any(name.startswith("transition3.") for name in names):
        return "hrnetv2w48"
    if "layer1.0.conv2.conv.weight" in names:
        return "resnest101"
    if "layer1.0.conv2.weight" not in names:
        return None
    if "stem.0.weight" in names:
        stem = ""
    elif "conv1.weight" in names:
        stem = "_v1b"
    else:
        return None
    if "layer1.0.conv3.weight" not in names:
        return f"resnet18{stem}"
    return f"resnet101{stem}" if "layer3.6.conv1.weight" in names else f"resnet50{stem}"


def likely_cause(
    file: TorchFile, config: ml_collections.ConfigDict, wanted: Mapping[str, tuple[int, ...]]
) -> str:
    """Returns a sentence on why a file does not fit a model, and what to do.

    Args:
        file: the file.
        config: the config of the model.
        wanted: {name: shape} of the model's tensors.
    """
    backbone, found = config.model.backbone, file.tensors
    alone = backbone_of(found)
    if alone:
        return (
            f"The file seems to hold a {alone} alone: for training from it, give "
            f"--config.init.backbone={file.path}"
        )
    inside = {
        name.removeprefix(_PREFIX): x for name, x in found.items() if name.startswith(_PREFIX)
    }
    other = backbone_of(inside)
    method = next((name for name, key in _CLASSIFIERS.items() if key in found), None)
    if other is None or method is None:
        return "These are not the names of a segmentor with memory of the PyTorch reference."
    if file_kind(backbone) != other:
        return f"The likely cause: the file has the backbone {other}, the config has {backbone}."
    if method != config.model.method:
        return (
            f"The likely cause: the model in the file is of config.model.method = {method!r}, the "
            f"config's is {config.model.method!r}."
        )
    classifier = _CLASSIFIERS[method]
    classes = found[classifier].shape[0]
    if classes != wanted[classifier][0]:
        of = f" as {_DATA_SETS[classes]} has" if classes in _DATA_SETS else ""
        return (
            f"The likely cause: the file is for {classes} classes{of}, the config for "
            f"{wanted[classifier][0]}. Take the config of that data set."
        )
    if _TABLE in wanted and found[_TABLE].shape != wanted[_TABLE]:
        return (
            f"The likely cause: another era. The file's position table is for images of "
            f"{_image_size(found[_TABLE].shape)}, the config's for {_image_size(wanted[_TABLE])}. "
            "The COCO-Stuff ViT of 2021 has 29x29, which configs/cocostuff10k_vit.py describes; "
            "every other one has 32x32 (configs/cocostuff10k_vit.py:2025)."
        )
    halved = ["downsample_backbone.0.weight" in keys for keys in (found, wanted)]
    if halved[0] != halved[1]:
        need = 2 if halved[0] else 1
        return (
            f"The likely cause: another data set. The file needs config.model.downsample = {need} "
            "(HRNet on Cityscapes and LIP has 2, on ADE20K and COCO-Stuff 1)."
        )
    return "The file is not complete, or of a changed model (see config.model for its widths)."


def _image_size(shape: tuple[int, ...]) -> str:
    side = round((shape[1] - 1) ** 0.5)
    return f"{side}x{side} patches"


def remarks(file: TorchFile, config: ml_collections.ConfigDict) -> list[str]:
    """Returns what the user should know about the era of a file that fits the config."""
    era = None
    if "cur_epoch" in file.entries or "cur_iter" in file.entries:
        era = "a later version of the reference (cur_epoch beside the tensors)"
    elif "epoch" in file.entries:
        era = "the reference of 2021 (epoch beside the tensors)"
    lines = [f"the file was written by {era}"] if era else []
    if config.model.backbone.startswith("hrnet"):
        has = "has" if config.model.backbone == "hrnetv2w48_relu" else "has no"
        lines.append(
            "names and shapes cannot tell whether the first normalisation of HRNet's stem is "
            f"followed by a ReLU. This config {has} ReLU there, as the models released in 2021 "
            "have none; the reference has one since June 2025, except for Cityscapes. If the "
            "scores are bad, try the other form (config argument :2025)."
        )
    if _TABLE in file.tensors:
        size = _image_size(file.tensors[_TABLE].shape)
        lines.append(f"the position table is for images of {size}")
    return lines
