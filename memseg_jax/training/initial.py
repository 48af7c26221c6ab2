"""The values that a new run starts from."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from memseg_jax import checkpoint
from memseg_jax.errors import UserError
from memseg_jax.models.segmentor import Segmentor, build_segmentor
from memseg_jax.runtime import files
from memseg_jax.training.state import abstract_variables, init_variables

log = logging.getLogger(__name__)

# Parts of a path whose arrays belong to the classes: of no use for other classes.
_OF_CLASSES = ("memory", "classifier", "full_classifier")
_AUXILIARY = "auxiliary_decoders_"
# What models of all methods have, with or without a memory: it has to fit. All else is their head.
_BODY = ("backbone", "context", "fpn", "norm_layers", "downsampling")
_READING = "memory_module"  # what it computes, and how it starts, is another thing in each of them


def initial_variables(
    config: ml_collections.ConfigDict, model: Segmentor, converted: os.PathLike | None = None
) -> dict[str, Any]:
    """Params, batch_stats and memory: random, except for what comes from files.

    Args:
        config: the whole config.
        model: the model that it describes.
        converted: a workdir that holds weights alone, all of which are taken; None: those that
            `config.init` names.

    Returns:
        {"params", "batch_stats", "memory"}: nested dicts of float32 arrays.

    Raises:
        UserError: a file cannot be read, or does not fit the model.
    """
    given = [name for name in ("backbone", "checkpoint") if config.init[name]]
    if len(given) + (converted is not None) > 1:
        raise UserError(
            "there are several weights to start from: "
            + ", ".join([f"config.init.{name} = {config.init[name]}" for name in given])
            + (f", and those in {converted}" if converted else "")
            + ". Choose one; a new run needs a --workdir of its own."
        )
    known = {}
    if converted:
        meta = checkpoint.read_meta(converted)[1]
        checkpoint.check_class_names(meta, config.data.class_names)
        log.info("starting from the weights in %s (%s)", converted, meta["origin"]["file"])
        abstract = abstract_variables(model)
        variables, _ = checkpoint.restore_for_inference(converted, abstract, "last")
        return jax.tree.map(np.asarray, variables)
    if config.init.checkpoint:
        known = _known_from_checkpoint(config, model)
    if config.init.backbone:
        # Not at the top of this file: it imports PyTorch, which nothing else in training needs.
        from converters.backbone_files import read_backbone

        known, report = read_backbone(
            config.init.backbone, config.model.backbone, abstract_variables(model)
        )
        log.info("backbone from %s", report.summary())
    return init_variables(model, config.seed, known)


def _known_from_checkpoint(
    config: ml_collections.ConfigDict, model: Segmentor
) -> dict[str, np.ndarray]:
    """The arrays of a trained model that fit: all of them, or all but those of its classes."""
    folder = files.place(config.init.checkpoint, "config.init.checkpoint")
    step, meta = checkpoint.read_meta(folder, "best")
    recorded = unflatten_dict(checkpoint.recorded_config(meta), sep=".")
    trained = build_segmentor(ml_collections.ConfigDict(recorded))
    saved, _ = checkpoint.restore_for_inference(folder, abstract_variables(trained), step)
    saved = flatten_dict(saved, sep="/")
    wanted = flatten_dict(abstract_variables(model), sep="/")
    same_classes = list(meta["class_names"]) == list(config.data.class_names)

    def is_taken(path: str) -> bool:
        parts = path.split("/")
        if any(part.startswith(_AUXILIARY) for part in parts) and not (
            model.auxiliary and trained.auxiliary
        ):
            return False
        return same_classes or not any(part in _OF_CLASSES for part in parts)

    saved = {path: array for path, array in saved.items() if is_taken(path)}
    expected = {path: leaf for path, leaf in wanted.items() if is_taken(path)}
    if _head(recorded["model"]) != _head(config.model):
        taken = _same_modules(saved, expected) - {_READING}
        saved, expected = (
            {
                path: array
                for path, array in arrays.items()
                if _module(path).startswith(_BODY) or _module(path) in taken
            }
            for arrays in (saved, expected)
        )
    checkpoint.check_same_arrays(folder, saved, expected, meta)
    fresh = sorted({_module(path) for path in wanted.keys() - saved.keys()} - {"memory"})
    log.info(
        "starting from step %d of %s: %d of %d arrays%s",
        step,
        folder,
        len(saved),
        len(wanted),
        "" if same_classes else "; other classes, so the memory and all classifiers start anew",
    )
    if fresh:
        log.info("starting anew, wholly or in part: %s", ", ".join(fresh))
    return {path: np.asarray(array) for path, array in saved.items()}


def _head(model_config: Mapping[str, Any]) -> tuple:
    """What decides which modules come after the context."""
    memory = model_config["memory"]
    return model_config["method"], memory["enabled"], memory["enabled"] and memory["fusion"]


def _module(path: str) -> str:
    """The part of the model that an array belongs to: "backbone" of "params/backbone/..."."""
    return path.split("/")[1] if "/" in path else path


def _same_modules(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> set[str]:
    """Names of the modules whose arrays are the same in number, names and shapes."""

    def by_module(arrays: Mapping[str, Any]) -> dict[str, set]:
        modules: dict[str, set] = {}
        for path, array in arrays.items():
            modules.setdefault(_module(path), set()).add((path, tuple(array.shape)))
        return modules

    ours, theirs = by_module(saved), by_module(wanted)
    return {name for name in ours if ours[name] == theirs.get(name)}
