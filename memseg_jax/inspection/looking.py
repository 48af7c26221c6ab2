"""What one picture reads from the memory, pixel by pixel.

A picture goes through the network once, as a whole. What is kept of that answers for any pixel:
with which class probabilities it weighs the rows of the memory, and where its two attentions look.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.traverse_util
import jax
import ml_collections
import numpy as np

from memseg_jax.data.transforms import evaluation_resize, normalise, resize_image
from memseg_jax.errors import UserError
from memseg_jax.inference import blending, sizes
from memseg_jax.models.layers import ValidSize
from memseg_jax.models.segmentor import Segmentor
from memseg_jax.runtime.compilation import Programs

# A row of less weight is not said to be read.
LEAST_WEIGHT = 0.01


@dataclasses.dataclass(frozen=True)
class PixelLook:
    """What the network does at one pixel.

    Attributes:
        pixel: row and column in the picture.
        weights: float32 [classes], of sum 1: the probabilities that weigh the rows of the memory;
            they are those of a first prediction, made before the memory is read.
        prediction: float32 [classes], of sum 1: those of the final prediction there.
        rows: the classes whose rows are read, that of most weight first (weight >= `LEAST_WEIGHT`).
        memory_attention: float32 [rows of a class, h, w], each of sum 1: where in the picture the
            pixel looks at what was read from the memory.
        image_attention: float32 [h, w] of sum 1: where the attention within the image looks; None:
            the model has none.
    """

    pixel: tuple[int, int]
    weights: np.ndarray
    prediction: np.ndarray
    rows: list[int]
    memory_attention: np.ndarray
    image_attention: np.ndarray | None

    def as_plain(self) -> dict[str, Any]:
        """The same in numbers and lists, as JSON takes them."""
        plain = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                value = np.round(value.astype(np.float64), 6).tolist()
            plain[field.name] = list(value) if isinstance(value, tuple) else value
        return plain


@dataclasses.dataclass(frozen=True)
class Look:
    """What is kept of one picture.

    Attributes:
        size: height and width of the picture.
        weights: float32 [h, w, classes], see `PixelLook`; h and w are those of the network's
            feature map.
        prediction: float32 [h', w', classes]; a feature pyramid makes it finer.
        features: [h, w, channels], what the memory would store.
        attentions: by "memory" and "image" pairs of queries and keys, [h, w, dim] each.
    """

    size: tuple[int, int]
    weights: np.ndarray
    prediction: np.ndarray
    features: np.ndarray
    attentions: dict[str, list[tuple[np.ndarray, np.ndarray]]] = dataclasses.field(repr=False)

    def at(self, row: int, column: int) -> PixelLook:
        """Looks at one pixel.

        Args:
            row: in the picture, from 0.
            column: in the picture, from 0.

        Raises:
            UserError: the picture has no such pixel.
        """
        height, width = self.size
        if not (0 <= row < height and 0 <= column < width):
            raise UserError(
                f"the picture has no pixel {row},{column}: it has {height} rows and {width} columns"
            )
        weights = self._value(self.weights, row, column)
        by_weight = np.argsort(-weights, kind="stable")
        of_memory = [self._attention(*pair, row, column) for pair in self.attentions["memory"]]
        of_image = [self._attention(*pair, row, column) for pair in self.attentions["image"]]
        return PixelLook(
            (row, column),
            weights,
            self._value(self.prediction, row, column),
            [int(k) for k in by_weight if weights[k] >= LEAST_WEIGHT],
            np.stack(of_memory),
            of_image[0] if of_image else None,
        )

    def _value(self, array: np.ndarray, row: int, column: int) -> np.ndarray:
        """The position of a map [h, w, ...] that a pixel is in."""
        height, width = self.size
        return array[row * array.shape[0] // height, column * array.shape[1] // width]

    def _attention(self, query: np.ndarray, key: np.ndarray, row: int, column: int) -> np.ndarray:
        """Weights of all positions, of sum 1; see `models.attention.attend`."""
        asking = self._value(query, row, column).astype(np.float64)
        scores = key.astype(np.float64) @ asking / np.sqrt(len(asking))
        weights = np.exp(scores - scores.max())
        return (weights / weights.sum()).astype(np.float32)


class Looker:
    """Looks at pictures with a model. It keeps programs, no weights.

    Args:
        model: the segmentor.
        config: the whole config, which decides on the size of the network's input. Windows, scales
            and mirror images are left aside: a picture is looked at as a whole. One that would be
            segmented in windows is shrunk to what fits in one piece.

    Raises:
        UserError: the model has no memory.
    """

    def __init__(self, model: Segmentor, config: ml_collections.ConfigDict):
        if not model.memory_enabled:
            raise UserError(
                "this model has no memory to look into (config.model.memory.enabled is False); "
                "take a run that was trained with config.model.memory.enabled = True"
            )
        self._model = model
        settings: Any = config  # whose fields have no types
        evaluation = settings.eval
        self._evaluation = evaluation
        pieces = {"auto": settings.augment.crop, "slide": evaluation.window}
        piece = pieces.get(evaluation.mode)
        self._area = blending.WHOLE_AREA * math.prod(piece) if piece else math.inf
        whole = evaluation.copy_and_resolve_references()
        with whole.unlocked():
            whole.mode = "whole"
        self._sizes = sizes.size_policy(whole, model.coarsest_stride)
        self._network = jax.jit(functools.partial(_network, model))
        self._run = Programs()

    def look(self, variables: dict[str, Any], image: np.ndarray) -> Look:
        """Puts a picture through the network.

        Args:
            variables: params, batch_stats and memory.
            image: RGB uint8 [height, width, 3].
        """
        given = evaluation_resize(image, self._evaluation)
        if (area := math.prod(given.shape[:2])) > self._area:
            shrink = math.sqrt(self._area / area)
            given = resize_image(given, tuple(int(side * shrink) for side in given.shape[:2]))
        given = normalise(given)
        height, width = given.shape[:2]
        padded, exact = self._sizes.padded((height, width))
        images = np.zeros((1, *padded, 3), np.float32)
        images[0, :height, :width] = given
        valid_size = None
        if not exact:
            valid_size = ValidSize(np.array([[height, width]], np.int32), padded)
        what = f"the look into {padded[0]}x{padded[1]} inputs" + (
            "" if exact else " (padded; shared by all sizes up to it)"
        )
        made = self._run(self._network, what, variables, images, valid_size)

        def valid(x: jax.Array) -> np.ndarray:
            """The part of a map that is not padding; an exact input has none."""
            sides = x.shape[1:3]
            if not exact:
                strides = [side // of_map for side, of_map in zip(padded, sides)]
                sides = [-(-side // stride) for side, stride in zip((height, width), strides)]
            return np.asarray(x[0, : sides[0], : sides[1]]).astype(np.float32, copy=False)

        return Look(
            image.shape[:2],
            valid(made["weights"]),
            valid(made["prediction"]),
            valid(made["features"]),
            {
                kind: [tuple(map(valid, pair)) for pair in pairs]
                for kind, pairs in made["attentions"].items()
            },
        )


def look(model: Any, image: np.ndarray, pixel: tuple[int, int]) -> dict[str, Any]:
    """Looks at one pixel of a picture, in plain data.

    Args:
        model: a `memseg_jax.TrainedModel`.
        image: RGB uint8 [height, width, 3].
        pixel: its row and column.

    Returns:
        See `PixelLook`, as numbers and lists.

    Raises:
        UserError: there is no such pixel, or the model has no memory.
    """
    return model.look(image).at(*pixel).as_plain()


def _network(
    model: Segmentor, variables: dict[str, Any], images: jax.Array, valid_size: ValidSize | None
) -> dict[str, Any]:
    """One forward pass, and what it offers on the way."""
    rest = {"params": variables["params"], "batch_stats": variables["batch_stats"]}
    with jax.default_matmul_precision(model.precision):
        out, offered = model.apply(
            rest, images, variables["memory"], valid_size=valid_size, mutable=["attention"]
        )
    attention = flax.traverse_util.flatten_dict(offered["attention"], sep="/")
    return {
        "weights": model.row_weights(out),
        "prediction": jax.nn.softmax(out["logits"], axis=-1),
        "features": out["memory_input"],
        "attentions": {
            kind: [(attention[f"{name}/query"], attention[f"{name}/key"]) for name in names]
            for kind, names in model.attention_names().items()
        },
    }
