"""The exported program: from a picture to the class of every pixel, as StableHLO.

The weights are arguments, so that programs for several sizes share one file of them.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from memseg_jax.data.transforms import MEAN, STD
from memseg_jax.exporting.folding import without_normalisations
from memseg_jax.exporting.weights import unpack
from memseg_jax.inference import score_maps
from memseg_jax.inference.predictor import network_scores
from memseg_jax.models.layers import ValidSize, valid_bilinear_taps
from memseg_jax.models.segmentor import Segmentor

Array = jax.Array

PLATFORMS = ("cpu", "cuda", "tpu")


def segment(
    model: Segmentor,
    weights: Mapping[str, Array],
    image: Array,
    size: Array | None = None,
    *,
    softmax_before_resize: bool,
) -> tuple[Array, Array]:
    """Segments one picture as a whole, as `Predictor` does with one pass.

    Args:
        model: the network.
        weights: from `weights.pack`, of "params" (folded) and "memory".
        image: uint8 [height, width, 3], RGB.
        size: int32 [2], height and width of the picture in the upper left corner of `image`, whose
            sides are multiples of `model.coarsest_stride` then; None: the picture is all of it.
        softmax_before_resize: `config.eval.softmax_before_resize`.

    Returns:
        Labels uint8 and the probability of each, float32, both [height, width].
    """
    height, width = image.shape[:2]
    tree = unpack(weights)
    normalised = (image.astype(jnp.float32) - jnp.array(MEAN, jnp.float32)) / jnp.array(
        STD, jnp.float32
    )
    valid = None if size is None else ValidSize(size[None], (height, width))
    scores = without_normalisations(network_scores)(
        model,
        {"params": tree["params"], "batch_stats": {}, "memory": tree["memory"]},
        normalised[None],
        valid,
        softmax=softmax_before_resize,
    )
    return label_map(scores, image.shape[:2], size, model.output_stride, softmax_before_resize)


def label_map(
    scores: Array,
    shape: tuple[Any, Any],
    size: Array | None,
    stride: int,
    probabilities: bool,
) -> tuple[Array, Array]:
    """The resize to the picture's size, and the best class there, some pixels at a time."""
    height, width = shape
    size = jnp.array(shape, jnp.int32) if size is None else size
    rows, columns = (
        valid_bilinear_taps(-(-size[axis] // stride), size[axis], shape[axis]) for axis in (0, 1)
    )
    plan = score_maps.Resize(
        *(jnp.stack(rows[:2]), jnp.stack([1 - rows[2], rows[2]])),
        *(jnp.stack(columns[:2]), jnp.stack([1 - columns[2], columns[2]])),
        jnp.array([scores.shape[2], width], jnp.int32),
    )
    blocks = -(-(height * width) // score_maps.BLOCK)
    flat = scores.reshape(1, scores.shape[1] * scores.shape[2], scores.shape[3])
    labels, confidence = score_maps.label_maps(
        flat,
        jax.tree.map(lambda x: x[None], plan),
        jnp.array(blocks, jnp.int32),
        pixels=blocks * score_maps.BLOCK,
        probabilities=probabilities,
    )
    return tuple(x[0, : height * width].reshape(height, width) for x in (labels, confidence))


def exported(
    model: Segmentor,
    weights: Mapping[str, np.ndarray],
    size: tuple[int, int] | None,
    softmax_before_resize: bool,
) -> export.Exported:
    """The program for pictures of one size, or of any size, for all of `PLATFORMS`.

    The program for any size takes a padded picture and its size: its symbolic sides count units of
    `model.coarsest_stride`, so that every map has a whole number of positions, and what is beyond
    the picture is masked in every layer. So its numbers are those of the picture's own size.

    Args:
        model: the network.
        weights: see `segment`.
        size: height and width; None: any.
        softmax_before_resize: see `segment`.
    """
    table = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}

    def program(weights: Mapping[str, Array], *picture: Array) -> tuple[Array, Array]:
        return segment(model, weights, *picture, softmax_before_resize=softmax_before_resize)

    if size is None:
        stride = model.coarsest_stride
        shape = export.symbolic_shape(f"{stride}*h, {stride}*w, 3")
        more = (jax.ShapeDtypeStruct((2,), jnp.int32),)
    else:
        shape, more = (*size, 3), ()
    picture = jax.ShapeDtypeStruct(shape, jnp.uint8)
    return export.export(jax.jit(program), platforms=PLATFORMS)(table, picture, *more)
