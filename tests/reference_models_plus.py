"""The models of MCIBI++'s golden files: their recipes, with the weights that the rule gives."""

import importlib
import re

import jax.numpy as jnp
import ml_collections
import numpy as np

from converters import names
from memseg_jax.models.segmentor import Segmentor, build_segmentor
from memseg_jax.models.swin import Swin
from memseg_jax.training.state import abstract_variables
from tests.goldens_plus import rule_array

METHOD = "mcibi_plus_plus"
BACKBONES = {"hrnetv2w48": "hrnet", "swinreduced": "swinlarge"}


def reference_config(tag: str) -> ml_collections.ConfigDict:
    """The recipe of a golden file such as "upernet_resnet50os8_ade20k"."""
    match = re.fullmatch(r"(?:(upernet|aspp|ppm)_)?([a-z0-9]+?)(?:os8)?_([a-z0-9]+)", tag)
    head, backbone, dataset = match.groups()
    name = f"{dataset}_{head or 'fcn'}_{BACKBONES.get(backbone, backbone)}"
    return importlib.import_module(f"configs.plus.{name}").get_config()


def reduced_swin(dtype=jnp.float32, **options) -> Swin:
    """The small Swin of the golden files."""
    return Swin(48, (2, 2, 2, 2), (2, 4, 8, 16), 7, dtype=dtype, **options)


def reference_model(tag: str, config: ml_collections.ConfigDict | None = None) -> Segmentor:
    """The model of a golden file, that of its recipe or of a changed one."""
    model = build_segmentor(config or reference_config(tag))
    return model.clone(backbone=reduced_swin()) if "swinreduced" in tag else model


def rule_variables(model: Segmentor) -> dict:
    """Every variable of `model` filled by the rule, under the reference's names."""
    filled = {}
    for path, leaf in names.flatten(abstract_variables(model)).items():
        key = names.torch_key(path, METHOD)
        value = rule_array(key, names.torch_shape(leaf.shape, key))
        filled[path] = np.ascontiguousarray(names.from_torch_layout(value, key))
        assert filled[path].shape == leaf.shape, path
    return names.unflatten(filled)
