"""What the model says about one pixel, and what it reads from its memory there."""

import functools
from typing import Any

import jax
import numpy as np

from memseg_jax.data.transforms import evaluation_resize, normalise
from memseg_jax.inference import blending
from memseg_jax.inference.predictor import network_scores
from memseg_jax.inference.sizes import size_policy
from memseg_jax.models.layers import ValidSize
from memseg_jax.models.segmentor import Segmentor, build_segmentor
from memseg_jax.runtime.compilation import Programs
from memseg_jax.trained_model import TrainedModel


def look(model: TrainedModel, image: np.ndarray, pixel: tuple[int, int]) -> dict[str, Any]:
    """Returns the probabilities of all classes at a pixel, and what is read from the memory.

    The probabilities are those of one pass over the picture; of a large one, over a window of the
    training crop's size around the pixel.

    Args:
        model: the model.
        image: RGB uint8 [height, width, 3].
        pixel: row and column of the picture, within it.

    Returns:
        "row", "column", and "classes": "class_id", "name" and "probability" (0..1) of every class,
        the most probable first. With a memory also "rows": "class_id", "name" and "weight" of the
        classes whose rows are read, and "attention": "memory" and "image", [h][w] of sum 1, where
        the pixel looks at what was read and within the image (see `inspection.looking`); null: the
        model has no such attention. It can be written as JSON.
    """
    found = {"row": pixel[0], "column": pixel[1], "classes": _classes(model, image, pixel)}
    settings: Any = model.config
    return found | (_reads(model, image, pixel) if settings.model.memory.enabled else {})


def _reads(model: TrainedModel, image: np.ndarray, pixel: tuple[int, int]) -> dict[str, Any]:
    """The parts of `look` that are about the memory."""
    looked = model.look(image).at(*pixel)
    of_image = looked.image_attention
    return {
        "rows": [
            {"class_id": k, "name": model.class_names[k], "weight": _rounded(looked.weights[k])}
            for k in looked.rows
        ],
        "attention": {
            "memory": _rounded(looked.memory_attention.mean(axis=0)),  # over the rows of a class
            "image": None if of_image is None else _rounded(of_image),
        },
    }


def _rounded(value: np.ndarray) -> Any:
    return np.round(value.astype(np.float64), 6).tolist()


def _classes(
    model: TrainedModel, image: np.ndarray, pixel: tuple[int, int]
) -> list[dict[str, Any]]:
    """The part of `look` that is about the classes."""
    settings: Any = model.config
    evaluation = settings.eval
    segmentor = build_segmentor(model.config)
    shown = evaluation_resize(image, evaluation)
    # Where the pixel's centre lies in the resized picture, in its pixels.
    at = [
        (index + 0.5) * after / before - 0.5
        for index, after, before in zip(pixel, shown.shape, image.shape)
    ]
    if evaluation.mode == "slide":
        shown, at = _cut(shown, at, evaluation.window)
    elif evaluation.mode == "auto" and blending.is_large(shown.shape[:2], settings.augment.crop):
        shown, at = _cut(shown, at, settings.augment.crop)
    size = shown.shape[:2]
    padded = size_policy(evaluation, segmentor.coarsest_stride).canvas(size)
    canvas = np.zeros((1, *padded, 3), np.float32)
    canvas[0, : size[0], : size[1]] = normalise(shown)
    valid = ValidSize(np.array([size], np.int32), padded)
    network = _network(segmentor, evaluation.softmax_before_resize)
    what = f"the network for a look at {padded[0]}x{padded[1]} inputs"
    scores = np.asarray(_programs(network, what, model.variables, canvas, valid))[0]
    probabilities = _at(scores, size, at, segmentor.output_stride)
    if not evaluation.softmax_before_resize:
        probabilities = np.exp(probabilities - probabilities.max())
        probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    return [
        {
            "class_id": int(k),
            "name": model.class_names[k],
            "probability": round(float(probabilities[k]), 6),
        }
        for k in order
    ]


_programs = Programs()


@functools.cache
def _network(segmentor: Segmentor, softmax: bool) -> Any:
    return jax.jit(functools.partial(network_scores, segmentor, softmax=softmax))


def _cut(
    image: np.ndarray, at: list[float], window: tuple[int, int]
) -> tuple[np.ndarray, list[float]]:
    """The window of this size, within the image, whose middle is nearest to a place in it."""
    starts = [
        int(np.clip(round(place) - side // 2, 0, max(whole - side, 0)))
        for place, side, whole in zip(at, window, image.shape)
    ]
    rows, columns = (slice(start, start + side) for start, side in zip(starts, window))
    return image[rows, columns], [place - start for place, start in zip(at, starts)]


def _at(scores: np.ndarray, size: tuple[int, int], at: list[float], stride: int) -> np.ndarray:
    """Scores [h, w, classes] between positions: half-pixel centres, edge clamp, as in resizes."""
    weights = []
    for place, side, held in zip(at, size, scores.shape):
        positions = -(-side // stride)
        position = np.clip((place + 0.5) * positions / side - 0.5, 0, positions - 1)
        lower = int(position)
        weight = np.zeros(held)
        weight[lower] = 1 - (position - lower)
        weight[min(lower + 1, positions - 1)] += position - lower
        weights.append(weight)
    return np.einsum("hwk,h,w->k", scores.astype(np.float64), *weights)
