"""What the thread with the devices computes: several pictures in one forward pass, and `look`."""

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from memseg_jax import trained_model
from memseg_jax.data.transforms import resized_size
from memseg_jax.inference import Prediction, blending
from memseg_jax.inference.sizes import SizePolicy, round_up, size_policy
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.serving.look import look
from memseg_jax.trained_model import TrainedModel

log = logging.getLogger(__name__)


class Look(NamedTuple):
    """A pixel of a picture that is asked about.

    Attributes:
        image: uint8 [height, width, 3].
        pixel: row and column.
    """

    image: np.ndarray
    pixel: tuple[int, int]


class Engine:
    """One model, with programs for 1, 2, 4, ... pictures at a time.

    A forward pass takes as many pictures as wait, so that none of it is spent on blank ones. Every
    picture is padded to a canvas (`memseg_jax.inference.sizes`), with the padding masked out: this
    bounds the number of programs, whatever sizes are asked for, and lets like sizes share a pass.

    Args:
        model: loaded with `serving_config`.

    Attributes:
        model: as given.
        on_pass: called after each forward pass with the number of pictures and its seconds.
    """

    def __init__(self, model: TrainedModel):
        self.model = model
        self.on_pass: Callable[[int, float], None] = lambda pictures, seconds: None
        settings: Any = model.config
        self._evaluation = settings.eval
        self._crop = tuple(settings.augment.crop)
        segmentor = build_segmentor(model.config)
        self._sizes: SizePolicy = size_policy(settings.eval, segmentor.coarsest_stride)
        counts = [2**n for n in range(settings.serve.batch_size.bit_length())]
        self._models = {count: model.with_batches_of(count) for count in counts}
        self.most = counts[-1]

    def kind(self, image: np.ndarray) -> Hashable:
        """What pictures must have in common to share a forward pass.

        Args:
            image: uint8 [height, width, 3].

        Returns:
            The size of their canvas; None: it is segmented alone, as several windows or passes are.
        """
        evaluation = self._evaluation
        height, width = image.shape[:2]
        size = resized_size(height, width, evaluation.base_size, evaluation.keep_ratio)
        several = len(evaluation.scales) > 1 or evaluation.scales[0] != 1 or evaluation.flip
        windows = evaluation.mode == "slide" or (
            evaluation.mode == "auto" and blending.is_large(size, self._crop)
        )
        return None if several or windows else self._sizes.canvas(size)

    def run(self, kind: Hashable, items: Sequence[Any]) -> list[Any]:
        """Segments pictures of one kind, or looks at a pixel.

        Args:
            kind: of the items.
            items: images uint8 [height, width, 3], or one `Look`.

        Returns:
            A `Prediction` for each, or what `look` returns.
        """
        if isinstance(items[0], Look):
            return [look(self.model, item.image, item.pixel) for item in items]
        if kind is None:  # its windows fill the largest batch
            return [self._pass(self.most, [image])[0] for image in items]
        results: list[Prediction] = []
        while left := len(items) - len(results):
            count = max(count for count in self._models if count <= left)
            results += self._pass(count, items[len(results) : len(results) + count])
        return results

    def warm_up(self) -> None:
        """Compiles what pictures of the size of the training crops need, before the first asks."""
        image = np.zeros((*self._crop, 3), np.uint8)
        for count in self._models:
            self._pass(count, [image] * count)
        look(self.model, image, (0, 0))

    def _pass(self, count: int, images: Sequence[np.ndarray]) -> list[Prediction]:
        start = time.monotonic()
        made = {x.key: x for x in self._models[count].segment(enumerate(images))}
        self.on_pass(len(images), time.monotonic() - start)
        return [made[number] for number in range(len(images))]


def serving_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config with which a model is loaded to be served.

    No size gets a program of its own, as the sizes are the clients' choice, and pictures of other
    sizes could not share a forward pass. That of the training crops becomes a canvas, as it is what
    pictures of the data set often have. `config.serve.max_megapixels` takes the place of
    `config.eval.max_megapixels`.

    Args:
        config: the whole config, which stays as it is.
    """
    config = config.copy_and_resolve_references()
    settings: Any = config
    settings.eval.exact_sizes = 0
    stride = build_segmentor(config).coarsest_stride
    crop = tuple(round_up(side, stride) for side in settings.augment.crop)
    settings.eval.canvases = (*settings.eval.canvases, crop)
    settings.eval.max_megapixels = float(settings.serve.max_megapixels)
    return config


def load(workdir: str, config: ml_collections.ConfigDict, which: str | int) -> Engine:
    """Loads a checkpoint to be served; see `memseg_jax.trained_model.load`.

    Raises:
        UserError: there is no such checkpoint, it is damaged or of another model, or the config is
            wrong.
    """
    return Engine(trained_model.load(workdir, serving_config(config), which))
