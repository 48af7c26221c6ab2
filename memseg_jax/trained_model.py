"""A model that was trained or converted, ready to segment pictures.

`memseg_jax.load` and the predict mode both use it: there is one way from a picture to its classes.
"""

import functools
import itertools
import os
import runpy
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, overload

import jax
import ml_collections
import numpy as np
from PIL import Image

from memseg_jax import checkpoint, config_rules
from memseg_jax.command_line import SHIPPED, load_config
from memseg_jax.data import images
from memseg_jax.data.reading import map_ahead
from memseg_jax.data.videos import VIDEO_SUFFIXES
from memseg_jax.errors import UserError
from memseg_jax.inference import Prediction, Predictor
from memseg_jax.inspection.looking import Look, Looker
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import files, sharding
from memseg_jax.scoring import visualize
from memseg_jax.scoring.segmentation import Segmentation
from memseg_jax.training.state import abstract_variables

Picture = str | os.PathLike[str] | Image.Image | np.ndarray
AnyPicture = TypeVar("AnyPicture", bound=Picture)

_THREADS = 2  # that read. More would hold more pictures at a time, which may be large.
# Pictures of different sizes leave the network in another order: so many batches are put in order
# at a time, and no more are held.
_BATCHES_IN_ORDER = 8


def load(
    workdir: str | os.PathLike[str],
    config: ml_collections.ConfigDict | str | None = None,
    which: str | int = "best",
    confidence: bool = True,
) -> "TrainedModel":
    """Reads a checkpoint; see `memseg_jax.api.load`.

    Args:
        workdir: folder of a run or of a converted model.
        config: the whole config, or "FILE.py" or "FILE.py:ARG"; None: that of the checkpoint.
        which: "best", "last" or a step.
        confidence: whether segmenting also gives the probability of the class.

    Raises:
        UserError: there is no such checkpoint, it is damaged or of another model, or the config is
            wrong.
    """
    folder = files.absolute(workdir, "the workdir")
    step, meta = checkpoint.read_meta(folder, which)
    if config is None:
        config = config_of(meta)
    elif isinstance(config, str):
        config = load_config(config)
    else:
        config = config.copy_and_resolve_references()
    config_rules.check(config)
    data: Any = config.data
    with config.unlocked():
        data.class_names = tuple(meta["class_names"])
    variables, _ = checkpoint.restore_for_inference(
        folder, abstract_variables(build_segmentor(config)), step
    )
    return TrainedModel(config.lock(), variables, meta, str(workdir), confidence)


def config_of(meta: dict[str, Any]) -> ml_collections.ConfigDict:
    """Returns the config that a checkpoint was trained with, completed by the defaults of now.

    Args:
        meta: the checkpoint's description.
    """
    config = runpy.run_path(str(SHIPPED / "common.py"))["get_config"]()
    with config.ignore_type():
        for field, value in checkpoint.recorded_config(meta).items():
            *groups, name = field.split(".")
            group = config
            for part in groups:
                if part not in group:
                    group[part] = ml_collections.ConfigDict()
                group = group[part]
            group[name] = _with_tuples(value)
    return config


def _with_tuples(value: Any) -> Any:
    """What JSON had to write as lists."""
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


class TrainedModel:
    """Segments pictures with the weights of a checkpoint, on all devices of this machine.

    Pillow's limit on the size of pictures is set to `config.eval.max_megapixels`, for this process.

    Args:
        config: the whole config; `config.eval` decides how pictures are segmented.
        variables: params, batch_stats and memory.
        meta: the checkpoint's description.
        workdir: where it is from, for `repr`.
        confidence: whether segmenting also gives the probability of the class.

    Attributes:
        config: as given.
        step: number of training steps of the checkpoint.
        class_names: K names.
        palette: uint8 [K, 3], the colours of the classes.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        variables: dict[str, Any],
        meta: dict[str, Any],
        workdir: str,
        confidence: bool = True,
    ):
        self.config = config
        self.step: int = meta["step"]
        settings: Any = config  # whose fields have no types
        self.class_names: tuple[str, ...] = tuple(meta["class_names"])
        self.palette = visualize.resolve_palette(meta["palette"], len(self.class_names))
        self._meta, self._workdir, self._with_confidence = meta, workdir, confidence
        images.allow_megapixels(settings.eval.max_megapixels)
        mesh = sharding.local_mesh(settings.eval.rows)
        self._variables = jax.device_put(variables, sharding.replicated(mesh))
        batch = settings.eval.batch_size * sharding.batch_pieces(mesh)
        self._in_order_at_a_time = _BATCHES_IN_ORDER * batch
        model = build_segmentor(config)
        self._looker = functools.cache(lambda: Looker(model, config))
        self._predictor = Predictor(
            model,
            settings.eval,
            mesh,
            settings.augment.flip_pairs,
            confidence,
            settings.augment.crop,
        )
        self._what = f"{settings.model.backbone}, {len(self.class_names)} classes"

    def __repr__(self) -> str:
        return f"<TrainedModel of {self._workdir}, step {self.step}: {self._what}>"

    @property
    def variables(self) -> dict[str, Any]:
        """Params, batch_stats and memory, on the devices; to be read only."""
        return self._variables

    def with_batches_of(self, batch_size: int) -> "TrainedModel":
        """The same weights, not copied, with programs for batches of another size.

        Args:
            batch_size: pictures per forward pass and device, as `config.eval.batch_size`.
        """
        config = self.config.copy_and_resolve_references()
        settings: Any = config
        settings.eval.batch_size = batch_size
        return TrainedModel(
            config.lock(), self._variables, self._meta, self._workdir, self._with_confidence
        )

    @property
    def memory(self) -> np.ndarray:
        """What the memory holds of each class: float32, of a shape that the method decides on.

        MCIBI: features [K, slots, channels]; a row that is all zero was never written. MCIBI++:
        mean and standard deviation of its features [K, 2], 0 and 1 at first. A model without memory
        has no row.
        """
        return np.asarray(self._variables["memory"])

    def look(self, picture: Picture) -> Look:
        """Shows what a picture reads from the memory.

        Args:
            picture: as `predict` takes it. It is looked at as a whole, in one pass, whatever
                `config.eval` says about windows, scales and mirror images; a large one is shrunk.

        Returns:
            A `Look`; its `at(row, column)` tells the class probabilities that weigh the rows of the
            memory at a pixel, which rows are read, and where the two attentions look.

        Raises:
            UserError: the picture cannot be read, or the model has no memory.
        """
        return self._looker().look(self._variables, _read(picture)[1])

    def segment(self, pictures: Iterable[tuple[Any, np.ndarray]]) -> Iterator[Prediction]:
        """Segments RGB images, in the order that suits the devices.

        Args:
            pictures: pairs of any key and an image uint8 [height, width, 3].

        Yields:
            One `Prediction` per image, with its key, at the image's size.
        """
        yield from self._predictor.predict(self._variables, pictures)

    @overload
    def predict(self, pictures: Picture) -> Segmentation: ...

    @overload
    def predict(
        self, pictures: list[AnyPicture] | tuple[AnyPicture, ...]
    ) -> list[Segmentation]: ...

    @overload
    def predict(self, pictures: Iterator[AnyPicture]) -> Iterator[Segmentation]: ...

    def predict(self, pictures: Any) -> Any:
        """Segments a picture or several.

        Args:
            pictures: a picture, a list of pictures, or an iterator of any number of them. A picture
                is a path (also in a bucket), a picture of Pillow, or an array: RGB uint8
                [height, width, 3], grey [height, width], or RGBA, whose alpha is dropped.

        Returns:
            A `Segmentation`; for a list a list of them; for an iterator an iterator of them, in
            the same order, which reads ahead by a few batches.

        Raises:
            UserError: a picture cannot be read, or an array is of another form; of an iterator,
                when its turn comes.
        """
        if isinstance(pictures, str | os.PathLike | Image.Image) or hasattr(pictures, "shape"):
            (result,) = self._in_order([pictures])
            return result
        if isinstance(pictures, list | tuple):
            return list(self._in_order(pictures))
        if not isinstance(pictures, Iterable):
            raise UserError(_not_a_picture(pictures))
        return self._in_order(pictures)

    def _in_order(self, pictures: Iterable[Picture]) -> Iterator[Segmentation]:
        numbered = enumerate(map_ahead(_read, pictures, _THREADS))
        for first in numbered:
            rest = itertools.islice(numbered, self._in_order_at_a_time - 1)
            yield from self._group_in_order(first[0], itertools.chain([first], rest))

    def _group_in_order(
        self, following: int, group: Iterable[tuple[int, tuple[str | None, np.ndarray]]]
    ) -> Iterator[Segmentation]:
        """Segments some pictures with consecutive numbers, of which `following` is the first."""
        waiting: dict[int, tuple[str | None, np.ndarray]] = {}
        done: dict[int, Prediction] = {}

        def inputs() -> Iterator[tuple[int, np.ndarray]]:
            for number, (source, image) in group:
                waiting[number] = source, image
                yield number, image

        for prediction in self.segment(inputs()):
            done[prediction.key] = prediction
            while following in done:
                source, image = waiting.pop(following)
                result = done.pop(following)
                assert result.confidence is not None, "load(confidence=False) is for `segment`"
                yield Segmentation(
                    result.label, result.confidence, self.class_names, image, self.palette, source
                )
                following += 1


# ---- Pictures -----------------------------------------------------------------------------------


def read_picture(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads a file as RGB uint8 [height, width, 3], upright.

    Raises:
        UserError: it cannot be read, or is larger than `config.eval.max_megapixels`.
    """
    try:
        return images.read_image(path)
    except images.TooLargeError as error:
        raise UserError(f"{error} Or raise config.eval.max_megapixels.") from None


def _read(picture: Picture) -> tuple[str | None, np.ndarray]:
    """The name of the file, if there is one, and RGB uint8 [height, width, 3]."""
    if isinstance(picture, str | os.PathLike):
        path = files.place(picture, "the picture")
        if path.suffix.lower() in VIDEO_SUFFIXES:
            raise UserError(f"{path}: this is a video. --mode predict --input segments videos.")
        if not files.in_bucket(path) and path.is_dir():
            raise UserError(
                f"{path}: this is a folder. Give a list of its pictures, such as "
                f"sorted(pathlib.Path({str(path)!r}).glob('*.jpg')), or use --mode predict --input."
            )
        return str(picture), read_picture(path)
    if isinstance(picture, Image.Image):
        return getattr(picture, "filename", "") or None, images.rgb_of(picture)
    return None, _rgb_array(picture)


def _rgb_array(picture: Any) -> np.ndarray:
    array = np.asarray(picture)
    grey, channels = array.ndim == 2, array.shape[-1] if array.ndim == 3 else 0
    if array.dtype != np.uint8 or not (grey or channels in (1, 3, 4)) or not array.size:
        raise UserError(_not_a_picture(picture))
    if grey:
        array = array[:, :, None]
    # A copy where the caller could change what the result shows.
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[:, :, :3].copy()


def _not_a_picture(given: Any) -> str:
    """What was given, what is expected, and what to do about it."""
    if not hasattr(given, "shape"):
        found, cure = f"{type(given).__name__} ({given!r:.60})", ""
    else:
        shape, kind = tuple(given.shape), str(given.dtype)
        found = f"an array {kind} {list(shape)}"
        if len(shape) == 4:
            cure = " Give several pictures as a list: list(array)."
        elif len(shape) == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4):
            cure = " The channels come last: array.transpose(1, 2, 0)."
        elif kind.startswith("float"):
            cure = " Of values from 0 to 1: (array * 255).round().astype('uint8')."
        else:
            cure = ""
    return (
        f"the picture is {found}; expected a path, a picture of Pillow, or an array uint8 "
        f"[height, width, 3], RGB.{cure}"
    )
