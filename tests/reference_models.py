"""Our models with the weights that the rule of the golden numbers gives them."""

import re
import zlib

import pytest

from configs import common
from converters import names
from memseg_jax.errors import UserError
from memseg_jax.models.segmentor import Segmentor, build_segmentor
from memseg_jax.training.state import abstract_variables
from tests.goldens import rule_array

NUM_CLASSES = {"ade20k": 150, "cityscapes": 19, "cocostuff10k": 182, "lip": 20}
BACKBONES = {"resnet50os8": "resnet50", "resnet101os8": "resnet101", "resnest101os8": "resnest101"}


def reference_config(model: str, num_classes: int | None = None):
    """The config of a reference model such as "resnet50os8_ade20k"; skips if we lack it."""
    backbone, dataset, era = re.fullmatch(r"([a-z0-9]+)_([a-z0-9]+)(_2021)?", model).groups()
    config = common.get_config()
    config.model.backbone = BACKBONES.get(backbone, backbone)
    count = num_classes or NUM_CLASSES[dataset]
    config.data.class_names = tuple(f"class {i}" for i in range(count))
    if dataset == "lip" and backbone in ("resnet50os8", "resnet101os8"):
        config.model.activation = "leaky_relu"
    if backbone == "hrnetv2w48":
        config.model.downsample = 2 if dataset in ("cityscapes", "lip") else 1
        if dataset != "cityscapes" and not era:  # the newer reference has one more ReLU there
            config.model.backbone = "hrnetv2w48_relu"
    if backbone == "vitlarge":
        config.model.aspp_dilations = (1, 6, 12, 18)
        if dataset == "cocostuff10k" and era:
            config.model.backbone = "vitlarge_473"
        elif dataset == "cocostuff10k":
            config.model.aspp_dilations = (1, 12, 24, 36)
    try:
        build_segmentor(config)
    except UserError as error:
        pytest.skip(f"{model}: {error}")
    return config


def rule_variables(model: Segmentor) -> dict:
    """Every variable of `model` filled by the rule, under the reference's names."""
    flat = names.flatten(abstract_variables(model))
    filled = {}
    for path, leaf in flat.items():
        value = rule_array(names.torch_key(path), names.torch_shape(leaf.shape))
        filled[path] = names.from_torch_layout(value)
        assert filled[path].shape == leaf.shape, path
    return names.unflatten(filled)


def reference_list(variables: dict) -> dict[str, str]:
    """{name in the reference: shape in its layout, as "64x3x3x3"} of a backbone's variables."""
    lines = {}
    for path, leaf in names.flatten(variables).items():
        key = names.torch_key(path.replace("/", "/backbone/", 1))
        assert key not in lines
        lines[key] = "x".join(map(str, names.torch_shape(leaf.shape)))
    return lines


def checksum(lines: dict[str, str]) -> int:
    """One number for a whole list of names and shapes."""
    text = "\n".join(f"{key} {shape}" for key, shape in sorted(lines.items()))
    return zlib.crc32(text.encode())
