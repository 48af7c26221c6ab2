"""From images of any size to label maps of the same size.

Whole images or sliding windows; one pass, or the mean of several scales and mirror images.

Networks are compiled for one input size each. The first `config.eval.exact_sizes` sizes get a
program of their own; images of further sizes share programs: they are padded to multiples of
`config.eval.size_multiple`, and every layer masks the padding, so that the numbers stay those of
the exact size. That bounds the programs by the number of padded sizes, whatever the number of
images and scales: photographs with short side 512 and long side up to 1024, at the six published
scales, need at most 8 networks with a multiple of 512, and 22 with 256. A few small programs come
with each: the sum over passes one per padded input and result, the label map one per result.

Backbones that cannot mask padding (HRNet, ViT) get a program for every input size. Sliding windows
have one size, except where an image is smaller than the window: it is a window as it is.
"""

import collections
import dataclasses
import functools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from memseg_jax.compilation import compile_with_notice
from memseg_jax.data.transforms import evaluation_transform
from memseg_jax.errors import UserError
from memseg_jax.inference import passes, score_maps, windows
from memseg_jax.models.layers import Extent
from memseg_jax.models.segmentor import Segmentor
from memseg_jax.sharding import replicated, split_batch

Array = jax.Array
Size = tuple[int, int]

_OUTPUT_MULTIPLE = 128  # output sizes are padded to this, which only adds rows of zeros


@dataclasses.dataclass
class SizePolicy:
    """Decides for which input size an image of some size is compiled.

    Attributes:
        exact_sizes: so many different sizes get programs of their own.
        multiple: all further sizes are padded up to multiples of this.
        seen: the sizes with programs of their own.
    """

    exact_sizes: int
    multiple: int
    seen: set[Size] = dataclasses.field(default_factory=set)

    def padded(self, size: Size) -> tuple[Size, bool]:
        """Returns the input size for an image of `size`, and whether that is the exact size."""
        if size in self.seen or len(self.seen) < self.exact_sizes:
            self.seen.add(size)
            return size, True
        return (_round_up(size[0], self.multiple), _round_up(size[1], self.multiple)), False


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The result for one image.

    Attributes:
        key: what the caller gave with the image.
        label: uint8 [height, width], the class of every pixel of the original image.
        confidence: float32 [height, width], the probability of that class.
    """

    key: Any
    label: np.ndarray
    confidence: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Item:
    """One network input on its way: an image, a window of one, or one pass over an image."""

    key: Any
    image: np.ndarray  # normalised [height, width, 3]
    output: Size  # size of the result
    mirrored: bool = False


class Predictor:
    """Segments images with fixed weights on the devices of one mesh.

    Compiled programs are kept, so one predictor should serve all images.

    Args:
        model: the segmentor.
        variables: params, batch_stats and memory; put onto the mesh here.
        evaluation: `config.eval`.
        mesh: devices of this process; a batch is split over them.
        flip_pairs: `config.augment.flip_pairs`, the classes that a mirror exchanges.

    Raises:
        UserError: a field of `config.eval` or a pair of classes has an impossible value.
    """

    def __init__(
        self,
        model: Segmentor,
        variables: dict[str, Any],
        evaluation: ml_collections.ConfigDict,
        mesh: Mesh,
        flip_pairs: Sequence[Sequence[int]] = (),
    ):
        check_evaluation(evaluation, model, flip_pairs)
        self._model = model
        self._variables = jax.device_put(variables, replicated(mesh))
        self._evaluation = evaluation
        self._mesh = mesh
        self._batch = evaluation.batch_size * mesh.size
        # A backbone that cannot mask padding gets a program for every size.
        exact_sizes = evaluation.exact_sizes if model.backbone.supports_extent else sys.maxsize
        self._sizes = SizePolicy(exact_sizes, evaluation.size_multiple)
        self._programs: dict[Any, Any] = {}
        self._passes = len(evaluation.scales) * (2 if evaluation.flip else 1)
        self._averages = self._passes > 1 or evaluation.scales[0] != 1
        self._mirrored_classes = None
        if evaluation.flip:
            self._mirrored_classes = passes.mirrored_classes(flip_pairs, model.num_classes)
        # With several scales the sizes of results are as many as those of inputs.
        self._multiple = _round_up(
            evaluation.size_multiple if self._averages else 1, _OUTPUT_MULTIPLE
        )
        slide = evaluation.mode == "slide"
        softmax = evaluation.softmax_before_resize
        self._network = jax.jit(functools.partial(_network, model, softmax=softmax and not slide))
        self._window_scores = jax.jit(functools.partial(_window_scores, softmax=softmax and slide))
        self._accumulate = jax.jit(windows.accumulate, donate_argnums=0)
        self._label_maps = jax.jit(functools.partial(score_maps.label_maps, probabilities=softmax))
        self._add_resized = jax.jit(score_maps.add_resized, donate_argnums=0)
        self._mean_label_map = jax.jit(
            functools.partial(score_maps.mean_label_map, passes=self._passes, probabilities=softmax)
        )

    def replace_variables(self, variables: dict[str, Any]) -> None:
        """Goes on with other weights of the same model; no program is compiled again.

        Arrays that lie on the mesh already are used as they are, without a copy.
        """
        self._variables = jax.device_put(variables, replicated(self._mesh))

    def predict(self, images: Iterable[tuple[Any, np.ndarray]]) -> Iterator[Prediction]:
        """Segments images; a few are held back to fill batches, so the order may change.

        Args:
            images: pairs of any key and an RGB image uint8 [height, width, 3].

        Yields:
            One `Prediction` an image, at the original size.
        """
        yield from self.segment(
            (key, evaluation_transform(image, self._evaluation), image.shape[:2])
            for key, image in images
        )

    def segment(self, inputs: Iterable[tuple[Any, np.ndarray, Size]]) -> Iterator[Prediction]:
        """The same for images that are normalised already.

        Args:
            inputs: any key, the network's input float32 [h, w, 3], and the size of the result.

        Yields:
            One `Prediction` an input.
        """
        items = (_Item(*x) for x in inputs)
        slide = self._evaluation.mode == "slide"
        if self._averages:
            yield from (self._average_windows if slide else self._average_whole)(items)
        elif slide:
            for item in items:
                yield from self._labels([item], *self._slide(item))
        else:
            for group, padded, exact in self._batches(items):
                scores = self._forward(group, padded, exact)
                rows, columns = self._matrices(group, scores.shape[1:3])
                yield from self._labels(group, scores, rows, columns)

    def _passes_over(self, item: _Item, key: Any) -> Iterator[_Item]:
        evaluation = self._evaluation
        for image, mirrored in passes.passes(item.image, evaluation.scales, evaluation.flip):
            yield _Item(key, image, item.output, mirrored)

    def _average_whole(self, items: Iterable[_Item]) -> Iterator[Prediction]:
        """Batches are of passes of one size over any images; an image is done with its last pass.

        Until then its scores are kept at the network's stride, so that the array at full size is
        that of one image at a time.
        """
        parts = (
            part
            for number, item in enumerate(items)
            for part in self._passes_over(item, (number, item.key))
        )
        waiting = collections.defaultdict(list)
        for group, padded, exact in self._batches(parts):
            scores = self._on_one_device(self._forward(group, padded, exact))
            for index, part in enumerate(group):
                number, key = part.key
                waiting[number].append((scores, index, *self._pair(part, scores.shape[1:3]), part))
                if len(waiting[number]) == self._passes:
                    total = None
                    for done in waiting.pop(number):
                        total = self._add(total, *done)
                    yield self._mean(key, total, part.output)

    def _average_windows(self, items: Iterable[_Item]) -> Iterator[Prediction]:
        """One image after the other, one pass after the other."""
        for item in items:
            total = None
            for part in self._passes_over(item, item.key):
                canvas, rows, columns = self._slide(part)
                total = self._add(total, canvas, 0, rows[0], columns[0], part)
            yield self._mean(item.key, total, item.output)

    def _add(
        self, total: Array | None, scores: Array, index: int, rows: Any, columns: Any, part: _Item
    ) -> Array:
        """Adds the scores of a pass to the sum at full size, which starts as None."""
        size = (rows.shape[0], columns.shape[0])
        if total is None:
            total = jnp.zeros((*size, scores.shape[-1]), jnp.float32)
        return self._compiled(
            "sum",
            self._add_resized,
            f"the sum of passes for results up to {size[0]}x{size[1]}",
            total,
            scores,
            np.int32(index),
            rows,
            columns,
            self._mirrored_classes if part.mirrored else None,
        )

    def _mean(self, key: Any, total: Array, output: Size) -> Prediction:
        """The result of an image, given the sum of all its passes."""
        height, width = output
        what = f"label maps up to {total.shape[0]}x{total.shape[1]}"
        label, confidence = self._compiled("mean", self._mean_label_map, what, total)
        label, confidence = np.asarray(label), np.asarray(confidence)
        return Prediction(key, label[:height, :width].copy(), confidence[:height, :width].copy())

    def _batches(self, items: Iterable[_Item]) -> Iterator[tuple[list[_Item], Size, bool]]:
        """Groups items by input size into batches; what is left over comes at the end."""
        waiting: dict[tuple[Size, bool], list[_Item]] = collections.defaultdict(list)
        for item in items:
            key = self._sizes.padded(item.image.shape[:2])
            waiting[key].append(item)
            if len(waiting[key]) == self._batch:
                yield waiting.pop(key), *key
        for key, group in waiting.items():
            yield group, *key

    def _compiled(self, name: str, function: Any, what: str, *args: Any) -> Any:
        """Runs a program, compiling it first when the shapes are new."""
        key = (name, *(x.shape for x in jax.tree.leaves(args) if hasattr(x, "shape")))
        if name == "network":  # the weights' shapes never change
            key = (name, args[1].shape, args[2] is None)
        if key not in self._programs:
            self._programs[key] = compile_with_notice(function, what, *args)
        return self._programs[key](*args)

    def _place(self, array: np.ndarray) -> Array:
        """Splits the first axis of a full batch over the devices."""
        return jax.device_put(array, split_batch(self._mesh))

    def _forward(self, group: list[_Item], padded: Size, exact: bool) -> Array:
        """Scores at the network's stride [batch, h, w, classes]; missing items are blank."""
        images = np.zeros((self._batch, *padded, 3), np.float32)
        valid = np.tile(np.array(padded, np.int32), (self._batch, 1))
        for index, item in enumerate(group):
            height, width = item.image.shape[:2]
            images[index, :height, :width] = item.image
            valid[index] = height, width
        extent = None if exact else Extent(self._place(valid), padded)
        what = f"the network for {padded[0]}x{padded[1]} inputs" + (
            "" if exact else " (padded; shared by all sizes up to it)"
        )
        return self._compiled(
            "network", self._network, what, self._variables, self._place(images), extent
        )

    def _on_one_device(self, array: Array) -> Array:
        return jax.device_put(array, jax.local_devices()[0])

    def _pair(
        self, item: _Item, shape: Size, full: Size | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Matrices that resize the real part of an item's scores to its output size.

        Args:
            item: the item.
            shape: height and width of its scores, padding included.
            full: the same of the result; None: the output size, rounded up.
        """
        stride = self._model.output_stride
        pair = []
        for axis, mirrored in ((0, False), (1, item.mirrored)):
            real, target = -(-item.image.shape[axis] // stride), item.output[axis]
            rows = full[axis] if full else _round_up(target, self._multiple)
            pair.append(score_maps.resize_matrix(real, target, rows, shape[axis], mirrored))
        return pair[0], pair[1]

    def _matrices(
        self, group: list[_Item], shape: Size, multiple: int = _OUTPUT_MULTIPLE
    ) -> tuple[Array, Array]:
        """The matrices of a batch: [batch, H, h] and [batch, W, w]."""
        full = [_round_up(max(item.output[axis] for item in group), multiple) for axis in (0, 1)]
        rows, columns = (
            np.zeros((self._batch, full[axis], shape[axis]), np.float32) for axis in (0, 1)
        )
        for index, item in enumerate(group):
            rows[index], columns[index] = self._pair(item, shape, full)
        return self._place(rows), self._place(columns)

    def _labels(
        self, group: list[_Item], scores: Array, rows: Array, columns: Array
    ) -> Iterator[Prediction]:
        what = f"label maps up to {rows.shape[1]}x{columns.shape[1]}"
        labels, confidence = self._compiled("labels", self._label_maps, what, scores, rows, columns)
        labels, confidence = np.asarray(labels), np.asarray(confidence)
        for index, item in enumerate(group):
            height, width = item.output
            yield Prediction(
                item.key,
                labels[index, :height, :width].copy(),
                confidence[index, :height, :width].copy(),
            )

    def _slide(self, item: _Item) -> tuple[Array, Array, Array]:
        """Adds up the windows' scores at the size of the network's input.

        Returns:
            The sum [1, h, w, classes], and the matrices [1, H, h] and [1, W, w] that divide it by
            the number of windows at each place and resize it to the output size.
        """
        size = item.image.shape[:2]
        evaluation = self._evaluation
        places = windows.windows_of(size, tuple(evaluation.window), tuple(evaluation.stride))
        window = (places[0][0].stop - places[0][0].start, places[0][1].stop)
        padded, exact = self._sizes.padded(window)
        canvas = None
        for first in range(0, len(places), self._batch):
            group = [
                _Item(place, item.image[place], window)
                for place in places[first : first + self._batch]
            ]
            scores = self._forward(group, padded, exact)
            rows, columns = self._matrices(group, scores.shape[1:3], multiple=1)
            scores = self._compiled(
                "windows", self._window_scores, "window scores", scores, rows, columns
            )
            if canvas is None:
                shape = [max(_round_up(n, self._multiple), w) for n, w in zip(size, window)]
                canvas = jax.device_put(np.zeros((*shape, scores.shape[-1]), np.float32))
            starts = np.zeros((self._batch, 2), np.int32)
            for index, (y, x) in enumerate(w.key for w in group):
                starts[index] = y.start, x.start
            active = np.arange(self._batch) < len(group)
            canvas = self._compiled(
                "canvas",
                self._accumulate,
                f"the sum of windows for images up to {canvas.shape[0]}x{canvas.shape[1]}",
                canvas,
                self._on_one_device(scores),
                jax.device_put(starts),
                jax.device_put(active),
            )
        matrices = []
        for axis, mirrored in ((0, False), (1, item.mirrored)):
            target, length = item.output[axis], canvas.shape[axis]
            matrix = score_maps.resize_matrix(
                size[axis], target, _round_up(target, self._multiple), length, mirrored
            )
            cover = windows.cover_counts(places, axis, length)
            matrices.append(jax.device_put((matrix / cover)[None]))
        return canvas[None], matrices[0], matrices[1]


def _network(
    model: Segmentor,
    variables: dict[str, Any],
    images: Array,
    extent: Extent | None,
    *,
    softmax: bool,
) -> Array:
    """Class scores at the network's stride, float32 [batch, h, w, classes]."""
    rest = {"params": variables["params"], "batch_stats": variables["batch_stats"]}
    logits = model.apply(rest, images, variables["memory"], extent=extent)["logits"]
    return jax.nn.softmax(logits, axis=-1) if softmax else logits


def _window_scores(scores: Array, rows: Array, columns: Array, *, softmax: bool) -> Array:
    """Scores at the size of the windows: [batch, h, w, classes] -> [batch, H, W, classes]."""
    scores = score_maps.resize_scores(scores, rows, columns)
    return jax.nn.softmax(scores, axis=-1) if softmax else scores


def check_evaluation(
    evaluation: ml_collections.ConfigDict,
    model: Segmentor,
    flip_pairs: Sequence[Sequence[int]] = (),
) -> None:
    """Refuses values of `config.eval` that no image could be segmented with.

    Args:
        evaluation: `config.eval`.
        model: the segmentor.
        flip_pairs: `config.augment.flip_pairs`, which only matter if images are mirrored.

    Raises:
        UserError: names the field.
    """
    if evaluation.flip:
        passes.mirrored_classes(flip_pairs, model.num_classes)
    stride = model.output_stride
    if evaluation.mode not in ("whole", "slide"):
        raise UserError(f"config.eval.mode is {evaluation.mode!r}; expected 'whole' or 'slide'")
    scales = tuple(evaluation.scales)
    numbers = all(isinstance(s, (int, float)) and 0 < s < math.inf for s in scales)
    if not scales or not numbers:
        raise UserError(
            f"config.eval.scales is {scales}; expected at least one positive number such as "
            "(0.75, 1.0, 1.25)"
        )
    if evaluation.batch_size < 1:
        raise UserError(f"config.eval.batch_size is {evaluation.batch_size}; expected 1 or more")
    if evaluation.size_multiple < stride or evaluation.size_multiple % stride:
        raise UserError(
            f"config.eval.size_multiple is {evaluation.size_multiple}; "
            f"expected a multiple of the network's stride {stride}"
        )
    if evaluation.mode == "slide":
        for name in ("window", "stride"):
            value = tuple(evaluation[name])
            if len(value) != 2 or min(value) < 1:
                raise UserError(
                    f"config.eval.{name} is {value}; expected (height, width), both positive"
                )
        if any(s > w for s, w in zip(evaluation.stride, evaluation.window)):
            raise UserError(
                f"config.eval.stride {tuple(evaluation.stride)} is larger than "
                f"config.eval.window {tuple(evaluation.window)}: pixels between windows would "
                "get no prediction"
            )
