"""Weights of classes that are rare: `config.loss.class_weights = "balanced"`.

The rule is median-frequency balancing (Eigen and Fergus, 2015, arXiv:1411.4734, section 6.3.1): the
frequency of a class is its share of the labelled pixels of those images in which it occurs, and its
weight is the median frequency of all classes over its own.
"""

import json
import logging
import sys
import time
from typing import Any

import ml_collections
import numpy as np
from tqdm import tqdm

from memseg_jax.data.reading import map_ahead
from memseg_jax.errors import UserError
from memseg_jax.runtime import distributed, files
from memseg_jax.runtime.text import format_duration

log = logging.getLogger(__name__)

BALANCED = "balanced"
FILE = "class_weights.json"


def class_weights_of(
    config: ml_collections.ConfigDict, source: Any, workdir: files.Place
) -> tuple[float, ...]:
    """Returns the weights of a run: those of the config, or balanced ones.

    Balanced weights are computed once, and kept in the workdir. Of several processes all have to
    call it; the first one computes.

    Args:
        config: the whole config.
        source: the training images.
        workdir: folder of the run.

    Returns:
        One weight per class, or () for equal ones.

    Raises:
        UserError: a label cannot be read, or what is kept cannot.
    """
    if config.loss.class_weights != BALANCED:
        return tuple(config.loss.class_weights)
    path, names = workdir / FILE, list(config.data.class_names)

    def weights() -> list[float]:
        kept = files.read_text(path)
        if kept is not None:
            return _kept_weights(path, kept, len(names))
        log.info("counting the pixels of every class for config.loss.class_weights = 'balanced'")
        start = time.monotonic()
        found = balanced(*count_pixels(source, len(names), config.data.threads)).tolist()
        listed = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(names, found))
        log.info("class weights after %s: %s", format_duration(time.monotonic() - start), listed)
        files.write_text(path, json.dumps({"class_names": names, "class_weights": found}) + "\n")
        return found

    return tuple(distributed.on_primary("class_weights", weights))


def _kept_weights(path: files.Place, text: str, num_classes: int) -> list[float]:
    try:
        weights = list(map(float, json.loads(text)["class_weights"]))
        if len(weights) == num_classes:
            return weights
        reason = f"{len(weights)} weights for {num_classes} classes"
    except (ValueError, TypeError, LookupError) as error:
        reason = str(error)
    raise UserError(
        f"{path}: the kept class weights cannot be used ({reason}). Remove the file: they are "
        "computed anew."
    )


def count_pixels(source: Any, num_classes: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts the labelled pixels of a split; its images are not read if that can be helped.

    Args:
        source: the split, see `memseg_jax.data`.
        num_classes: K.
        threads: number of labels that are read at the same time.

    Returns:
        int64 `[K]`: the pixels of every class, and the labelled pixels of the images in which the
        class occurs.
    """
    read = getattr(source, "label", None) or (lambda index: source[index]["label"])

    def count(index: int) -> np.ndarray:
        return np.bincount(read(index).ravel(), minlength=256)[:num_classes]

    pixels, around = np.zeros((2, num_classes), np.int64)
    counts = tqdm(
        map_ahead(count, range(len(source)), threads),
        total=len(source),
        desc="counting classes",
        unit="image",
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    for of_image in counts:
        pixels += of_image
        around += np.where(of_image > 0, of_image.sum(), 0)
    return pixels, around


def balanced(pixels: np.ndarray, around: np.ndarray) -> np.ndarray:
    """Computes the weights by median frequency.

    Args:
        pixels: `[K]`, of every class.
        around: `[K]`, labelled pixels of the images in which the class occurs.

    Returns:
        float64 `[K]`; 1 for a class that never occurs, whose weight multiplies nothing.
    """
    seen = pixels > 0
    frequency = pixels[seen] / around[seen]
    weights = np.ones(len(pixels))
    weights[seen] = np.median(frequency) / frequency if seen.any() else 1.0
    return weights


def with_class_weights(
    config: ml_collections.ConfigDict, weights: tuple[float, ...] | None
) -> ml_collections.ConfigDict:
    """Returns a config whose class weights are numbers.

    Args:
        config: the whole config.
        weights: from `class_weights_of`; None: equal ones, for programs that learn nothing.
    """
    if config.loss.class_weights != BALANCED:
        return config
    values = config.to_dict()
    values["loss"]["class_weights"] = weights or (1.0,) * len(config.data.class_names)
    return ml_collections.ConfigDict(values)
