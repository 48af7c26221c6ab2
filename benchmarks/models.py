"""A config's model in JAX and in PyTorch with the same weights, for the benchmarks."""

import contextlib
from typing import Any

import jax
import ml_collections
import numpy as np
import torch

from benchmarks import measure
from converters.orbax_to_torch import state_dict
from converters.torch_model import build_torch_model
from memseg_jax.models.segmentor import Segmentor, build_segmentor
from memseg_jax.training.state import init_variables

FLAGS = {
    "crop": "height x width of the images (default: 256x256; the config's own: --crop config)",
    "batch": "images (default: 2)",
    "dtype": "float32 or bfloat16 (default: bfloat16 on GPU and TPU, else float32)",
    "compile": (False, "PyTorch with torch.compile as well"),
}


def prepare(values: Any) -> tuple[ml_collections.ConfigDict, Segmentor, dict[str, Any]]:
    """Reads the flags; returns the config for them, the model and random variables.

    Dropout is off, so that both sides compute the same numbers, and there is one replica group,
    because the PyTorch twin is one process. The memory's rows are filled, as in all but the first
    steps.
    """
    config = values.config.copy_and_resolve_references()
    if values.crop != "config":
        config.augment.crop = measure.numbers("crop", values.crop, (256, 256), "x")
    config.train.batch_size = measure.number("batch", values.batch, 2)
    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config.model.compute_dtype = measure.data_type(values.dtype, default)
    config.model.dropout = 0.0
    config.replica_groups = 1
    config.train.accumulate = 1
    config.loss.consistency_from_epoch = 1
    model = build_segmentor(config)
    variables = init_variables(model, config.seed)
    shape = variables["memory"].shape
    variables["memory"] = np.random.default_rng(0).standard_normal(shape, np.float32)
    return config, model, variables


def torch_model(
    config: ml_collections.ConfigDict, variables: dict[str, Any], device: torch.device
) -> torch.nn.Module:
    """The same model in PyTorch, with the weights `variables`, channels last."""
    model = build_torch_model(config)
    model.load_state_dict(state_dict(variables, config))
    return model.to(device, memory_format=torch.channels_last)


def autocast(
    config: ml_collections.ConfigDict, device: torch.device
) -> contextlib.AbstractContextManager:
    """PyTorch's way to compute in the config's type."""
    if config.model.compute_dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def describe(config: ml_collections.ConfigDict) -> str:
    """One line on what is measured."""
    crop = "x".join(map(str, config.augment.crop))
    return (
        f"{config.model.backbone}, {len(config.data.class_names)} classes, "
        f"{config.train.batch_size} x {crop}, {config.model.compute_dtype}"
    )
