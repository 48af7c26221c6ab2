"""From images of any size to label maps of the same size.

Whole images or sliding windows; one pass, or the mean of several scales and mirror images.

Networks are compiled for one input size each; `memseg_jax.inference.sizes` says for which. All
other programs are small and know no sizes, only how much their arrays hold: see `score_maps`.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from memseg_jax.data.transforms import evaluation_transform
from memseg_jax.errors import UserError
from memseg_jax.inference import passes, score_maps, sizes, windows
from memseg_jax.inference.score_maps import Resize
from memseg_jax.inference.sizes import Size
from memseg_jax.models.layers import ValidSize
from memseg_jax.models.segmentor import Segmentor
from memseg_jax.runtime.compilation import compile_with_notice
from memseg_jax.runtime.sharding import replicated, split_batch

Array = jax.Array


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
        self._sizes = sizes.size_policy(evaluation, model.coarsest_stride)
        self._programs: dict[Any, Any] = {}
        self._passes = len(evaluation.scales) * (2 if evaluation.flip else 1)
        self._averages = self._passes > 1 or evaluation.scales[0] != 1
        self._mirrored_classes = None
        if evaluation.flip:
            self._mirrored_classes = passes.mirrored_classes(flip_pairs, model.num_classes)
        slide = evaluation.mode == "slide"
        softmax = evaluation.softmax_before_resize
        self._network = jax.jit(
            functools.partial(network_scores, model, softmax=False)
            if slide
            else functools.partial(_flat_scores, model, softmax=softmax)
        )
        self._window_scores = jax.jit(functools.partial(score_maps.window_scores, softmax=softmax))
        self._accumulate = jax.jit(windows.accumulate, donate_argnums=0)
        self._label_maps = functools.partial(score_maps.label_maps, probabilities=softmax)
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
                canvas, plan = self._slide(item)
                yield from self._labels([item], canvas, [plan])
        else:
            for group, padded, exact in self._batches(items):
                scores = self._forward(group, padded, exact)
                yield from self._labels(group, scores, [self._resize(x, padded) for x in group])

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
                waiting[number].append((scores, index, self._resize(part, padded), part))
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
                canvas, plan = self._slide(part)
                total = self._add(total, canvas, 0, plan, part)
            yield self._mean(item.key, total, item.output)

    def _add(
        self, total: Array | None, scores: Array, index: int, plan: Resize, part: _Item
    ) -> Array:
        """Adds the scores of a pass to the sum at full size, which starts as None."""
        pixels = math.prod(part.output)
        if total is None:
            shape = (score_maps.capacity(pixels, score_maps.PIXELS), scores.shape[-1])
            total = jnp.zeros(shape, jnp.float32)
        return self._compiled(
            "sum",
            self._add_resized,
            f"the sum of passes for results of up to {total.shape[0]} pixels",
            total,
            scores,
            np.int32(index),
            plan,
            score_maps.blocks_of(pixels),
            self._mirrored_classes if part.mirrored else None,
        )

    def _mean(self, key: Any, total: Array, output: Size) -> Prediction:
        """The result of an image, given the sum of all its passes."""
        pixels = math.prod(output)
        what = f"label maps of up to {total.shape[0]} pixels"
        blocks = score_maps.blocks_of(pixels)
        found = self._compiled("mean", self._mean_label_map, what, total, blocks)
        label, confidence = (np.asarray(x)[:pixels].reshape(output).copy() for x in found)
        return Prediction(key, label, confidence)

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
        """Scores at the network's stride, flat if images are whole; missing items are blank."""
        images = np.zeros((self._batch, *padded, 3), np.float32)
        valid = np.tile(np.array(padded, np.int32), (self._batch, 1))
        for index, item in enumerate(group):
            height, width = item.image.shape[:2]
            images[index, :height, :width] = item.image
            valid[index] = height, width
        valid_size = None if exact else ValidSize(self._place(valid), padded)
        what = f"the network for {padded[0]}x{padded[1]} inputs" + (
            "" if exact else " (padded; shared by all sizes up to it)"
        )
        return self._compiled(
            "network", self._network, what, self._variables, self._place(images), valid_size
        )

    def _on_one_device(self, array: Array) -> Array:
        return jax.device_put(array, jax.local_devices()[0])

    def _resize(self, item: _Item, padded: Size) -> Resize:
        """How an item's result follows from its scores, which are of a padded input."""
        stride = self._model.output_stride
        valid = tuple(-(-side // stride) for side in item.image.shape[:2])
        return score_maps.resize(valid, -(-padded[1] // stride), item.output, item.mirrored)

    def _labels(
        self, group: list[_Item], scores: Array, plans: list[Resize]
    ) -> Iterator[Prediction]:
        """The results of a batch of one pass."""
        largest = max(math.prod(item.output) for item in group)
        pixels = score_maps.capacity(largest, score_maps.PIXELS)
        plans = score_maps.stack(plans, len(scores))
        labels, confidence = self._compiled(
            f"labels {pixels}",
            jax.jit(functools.partial(self._label_maps, pixels=pixels)),
            f"label maps of up to {pixels} pixels",
            scores,
            jax.tree.map(self._place, plans) if len(scores) == self._batch else plans,
            score_maps.blocks_of(largest),
        )
        labels, confidence = np.asarray(labels), np.asarray(confidence)
        for index, item in enumerate(group):
            valid = np.s_[index, : math.prod(item.output)]
            yield Prediction(
                item.key,
                labels[valid].reshape(item.output).copy(),
                confidence[valid].reshape(item.output).copy(),
            )

    def _slide(self, item: _Item) -> tuple[Array, Resize]:
        """Adds up the windows' scores at the size of the network's input.

        Returns:
            The sum, flat [1, pixels, classes], and how the result follows from it: divided by the
            number of windows at each place, and resized.
        """
        size = item.image.shape[:2]
        full, stride = tuple(self._evaluation.window), tuple(self._evaluation.stride)
        places = windows.windows_of(size, full, stride)
        window = (places[0][0].stop - places[0][0].start, places[0][1].stop)
        padded, exact = self._sizes.padded(window)
        canvas = None
        for first in range(0, len(places), self._batch):
            group = [
                _Item(place, item.image[place], window)
                for place in places[first : first + self._batch]
            ]
            scores = self._forward(group, padded, exact)
            matrices = []
            for axis in (0, 1):
                positions = -(-window[axis] // self._model.output_stride)
                matrices.append(
                    score_maps.resize_matrix(
                        positions, window[axis], full[axis], scores.shape[1 + axis]
                    )
                )
            scores = self._compiled(
                "windows", self._window_scores, "window scores", scores, *matrices
            )
            if canvas is None:  # the last row of a window may reach beyond the image
                pixels = score_maps.capacity(math.prod(size) + full[1], score_maps.PIXELS)
                canvas = jnp.zeros((pixels, scores.shape[-1]), jnp.float32)
            starts = np.zeros((self._batch, 2), np.int32)
            for index, (y, x) in enumerate(w.key for w in group):
                starts[index] = y.start, x.start
            canvas = self._compiled(
                "canvas",
                self._accumulate,
                f"the sum of windows for images of up to {len(canvas)} pixels",
                canvas,
                self._on_one_device(scores),
                starts,
                np.arange(self._batch) < len(group),
                np.int32(size[1]),
            )
        covers = [windows.cover_counts(places, axis, size[axis]) for axis in (0, 1)]
        return canvas[None], score_maps.resize(size, size[1], item.output, item.mirrored, covers)


def _flat_scores(*args: Any, **kw: Any) -> Array:
    """`network_scores`, flat: [batch, positions, classes]."""
    return score_maps.flatten(network_scores(*args, **kw))


def network_scores(
    model: Segmentor,
    variables: dict[str, Any],
    images: Array,
    valid_size: ValidSize | None,
    *,
    softmax: bool,
) -> Array:
    """Class scores at the network's stride, float32 [batch, h, w, classes]."""
    rest = {"params": variables["params"], "batch_stats": variables["batch_stats"]}
    logits = model.apply(rest, images, variables["memory"], valid_size=valid_size)["logits"]
    return jax.nn.softmax(logits, axis=-1) if softmax else logits


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
    stride = model.coarsest_stride
    if evaluation.size_multiple < stride or evaluation.size_multiple % stride:
        raise UserError(
            f"config.eval.size_multiple is {evaluation.size_multiple}; "
            f"expected a multiple of the network's stride {stride}"
        )
    for canvas in evaluation.canvases:
        if len(canvas) != 2 or min(canvas) < stride or any(side % stride for side in canvas):
            raise UserError(
                f"config.eval.canvases has {tuple(canvas)}; expected (height, width), both "
                f"multiples of the network's stride {stride}"
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
