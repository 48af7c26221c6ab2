"""Our models with the weights that the rule of the golden numbers gives them."""

import re

import jax
import numpy as np
import pytest

from configs import common
from converters import names
from memseg_jax.errors import UserError
from memseg_jax.models.segmentor import Segmentor, build_segmentor
from memseg_jax.state import abstract_variables
from tests.goldens import rule_array

NUM_CLASSES = {"ade20k": 150, "cityscapes": 19, "cocostuff10k": 182, "lip": 20}
BACKBONES = {"resnet50os8": "resnet50", "resnet101os8": "resnet101"}


def reference_config(model: str, num_classes: int | None = None):
    """The config of a reference model such as "resnet50os8_ade20k"; skips if we lack it."""
    backbone, dataset = re.fullmatch(r"([a-z0-9]+)_([a-z0-9]+)(?:_2021)?", model).groups()
    config = common.get_config()
    config.model.backbone = BACKBONES.get(backbone, backbone)
    count = num_classes or NUM_CLASSES[dataset]
    config.data.class_names = tuple(f"class {i}" for i in range(count))
    if dataset == "lip" and backbone.startswith("resnet") and backbone[6].isdigit():
        config.model.activation = "leaky_relu"
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


def taps_of(model: Segmentor, variables: dict, images: np.ndarray) -> dict[str, np.ndarray]:
    """All named intermediates in evaluation, by the reference's names and layout (NCHW).

    Args:
        model: the segmentor.
        variables: params, batch_stats and memory.
        images: [batch, 3, height, width].
    """

    @jax.jit
    def forward(variables, x):
        memory = variables["memory"]
        rest = {k: variables[k] for k in ("params", "batch_stats")}
        _, taps = model.apply(rest, x, memory, mutable=["taps"])
        return taps["taps"]

    taps = names.flatten(forward(variables, images.transpose(0, 2, 3, 1)))
    return {
        path.rsplit("/", 1)[-1]: np.asarray(value).transpose(0, 3, 1, 2)
        for path, value in taps.items()
    }
