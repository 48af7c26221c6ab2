"""From images of any size to label maps of the same size.

Whole images or sliding windows; one pass, or the mean of several scales and mirror images.

Networks are compiled for one input size each; `memseg_jax.inference.sizes` says for which. All
other programs are small and depend only on the capacity of their arrays, not on image sizes: see
`score_maps`.
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
from memseg_jax.runtime.compilation import Programs
from memseg_jax.runtime.sharding import replicated, split_batch

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The result for one image.

    Attributes:
        key: what the caller gave with the image.
        label: uint8 [height, width], the class of every pixel of the original image.
        confidence: float32 [height, width], the probability of that class, if it was asked for.
    """

    key: Any
    label: np.ndarray
    confidence: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class _Item:
    """One network input on its way: an image, a window of one, or one pass over an image."""

    key: Any
    image: np.ndarray  # normalised [height, width, 3]
    output: Size  # size of the result
    mirrored: bool = False


@dataclasses.dataclass(frozen=True)
class _Pending:
    """Results that the devices are still computing.

    Attributes:
        items: what they belong to.
        labels: uint8 [items or more, pixels].
        confidence: float32, the same shape, or None.
    """

    items: list[_Item]
    labels: Array
    confidence: Array | None

    def fetch(self) -> Iterator[Prediction]:
        """Waits for the results."""
        arrays = [None if x is None else np.asarray(x) for x in (self.labels, self.confidence)]
        for index, item in enumerate(self.items):
            valid = np.s_[index, : math.prod(item.output)]
            yield Prediction(
                item.key,
                *(None if x is None else x[valid].reshape(item.output).copy() for x in arrays),
            )


class Predictor:
    """Segments images on the devices of one mesh. It keeps programs, no weights.

    One predictor should serve all images, and all weights of one model.

    Args:
        model: the segmentor.
        evaluation: `config.eval`.
        mesh: devices of this process; a batch is split over them.
        flip_pairs: `config.augment.flip_pairs`, the classes that mirroring swaps.
        confidence: whether the probability of the predicted class is asked for.

    Raises:
        UserError: a field of `config.eval` or a pair of classes has an impossible value.
    """

    def __init__(
        self,
        model: Segmentor,
        evaluation: ml_collections.ConfigDict,
        mesh: Mesh,
        flip_pairs: Sequence[Sequence[int]] = (),
        confidence: bool = False,
    ):
        check_evaluation(evaluation, model, flip_pairs)
        self._model = model
        self._evaluation = evaluation
        self._mesh = mesh
        self._batch = evaluation.batch_size * mesh.size
        self._sizes = sizes.size_policy(evaluation, model.coarsest_stride)
        self._run = Programs()
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
        self._add_resized = jax.jit(score_maps.add_resized, donate_argnums=0)
        asked = {"probabilities": softmax, "confidence": confidence}

        @functools.cache
        def label_maps(pixels: int) -> Any:
            return jax.jit(functools.partial(score_maps.label_maps, pixels=pixels, **asked))

        @functools.cache
        def mean_label_map(pixels: int) -> Any:
            of_mean = functools.partial(score_maps.mean_label_map, passes=self._passes, **asked)
            return jax.jit(functools.partial(of_mean, pixels=pixels))

        self._label_maps, self._mean_label_map = label_maps, mean_label_map

    def predict(
        self, variables: dict[str, Any], images: Iterable[tuple[Any, np.ndarray]]
    ) -> Iterator[Prediction]:
        """Segments images; a few are held back to fill batches, so the order may change.

        Args:
            variables: params, batch_stats and memory; put onto the mesh for as long as this takes.
                Arrays that are replicated there already are used without a copy.
            images: pairs of any key and an RGB image uint8 [height, width, 3].

        Yields:
            One `Prediction` per image, at the original size.
        """
        yield from self.segment(
            variables,
            (
                (key, evaluation_transform(image, self._evaluation), image.shape[:2])
                for key, image in images
            ),
        )

    def segment(
        self, variables: dict[str, Any], inputs: Iterable[tuple[Any, np.ndarray, Size]]
    ) -> Iterator[Prediction]:
        """The same for images that are normalised already.

        The devices compute one batch while the results of the one before are used.

        Args:
            variables: as in `predict`.
            inputs: any key, the network's input float32 [h, w, 3], and the size of the result.

        Yields:
            One `Prediction` per input.
        """
        variables = jax.device_put(variables, replicated(self._mesh))
        before = None
        for pending in self._dispatched(variables, (_Item(*x) for x in inputs)):
            for array in (pending.labels, pending.confidence):
                if array is not None:
                    array.copy_to_host_async()
            if before:
                yield from before.fetch()
            before = pending
        if before:
            yield from before.fetch()

    def _dispatched(self, variables: Any, items: Iterable[_Item]) -> Iterator[_Pending]:
        slide = self._evaluation.mode == "slide"
        if self._averages:
            average = self._average_windows if slide else self._average_whole
            yield from average(variables, items)
        elif slide:
            for item in items:
                canvas, plan = self._slide(variables, item)
                yield self._labels([item], canvas, [plan])
        else:
            for group, padded, exact in self._batches(items):
                scores = self._forward(variables, group, padded, exact)
                yield self._labels(group, scores, [self._resize(x, padded) for x in group])

    def _passes_over(self, item: _Item, key: Any) -> Iterator[_Item]:
        evaluation = self._evaluation
        for image, mirrored in passes.passes(item.image, evaluation.scales, evaluation.flip):
            yield _Item(key, image, item.output, mirrored)

    def _average_whole(self, variables: Any, items: Iterable[_Item]) -> Iterator[_Pending]:
        """Batches hold passes of one size over any images; an image is done with its last pass.

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
            scores = self._on_one_device(self._forward(variables, group, padded, exact))
            for index, part in enumerate(group):
                number, key = part.key
                waiting[number].append((scores, index, self._resize(part, padded), part))
                if len(waiting[number]) == self._passes:
                    total = None
                    for done in waiting.pop(number):
                        total = self._add(total, *done)
                    yield self._mean(dataclasses.replace(part, key=key), total)

    def _average_windows(self, variables: Any, items: Iterable[_Item]) -> Iterator[_Pending]:
        """One image after the other, one pass after the other."""
        for item in items:
            total = None
            for part in self._passes_over(item, item.key):
                canvas, plan = self._slide(variables, part)
                total = self._add(total, canvas, 0, plan, part)
            yield self._mean(item, total)

    def _add(
        self, total: Array | None, scores: Array, index: int, plan: Resize, part: _Item
    ) -> Array:
        """Adds the scores of a pass to the sum at full size, which starts as None."""
        pixels = math.prod(part.output)
        if total is None:
            shape = (score_maps.capacity(pixels, score_maps.PIXELS), scores.shape[-1])
            total = jnp.zeros(shape, jnp.float32)
        return self._run(
            self._add_resized,
            f"the sum of passes for results of up to {total.shape[0]} pixels",
            total,
            scores,
            np.int32(index),
            plan,
            score_maps.blocks_of(pixels),
            self._mirrored_classes if part.mirrored else None,
        )

    def _mean(self, item: _Item, total: Array) -> _Pending:
        """The result of an image, given the sum of all its passes."""
        pixels = math.prod(item.output)
        length = score_maps.label_capacity(pixels)
        labels, confidence = self._run(
            self._mean_label_map(length),
            f"label maps of up to {length} pixels",
            total,
            score_maps.blocks_of(pixels),
        )
        return _Pending([item], labels[None], None if confidence is None else confidence[None])

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

    def _place(self, array: np.ndarray) -> Array:
        """Splits the first axis of a full batch over the devices."""
        return jax.device_put(array, split_batch(self._mesh))

    def _forward(self, variables: Any, group: list[_Item], padded: Size, exact: bool) -> Array:
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
        return self._run(self._network, what, variables, self._place(images), valid_size)

    def _on_one_device(self, array: Array) -> Array:
        return jax.device_put(array, jax.local_devices()[0])

    def _resize(self, item: _Item, padded: Size) -> Resize:
        """How an item's result follows from its scores, which are of a padded input."""
        stride = self._model.output_stride
        valid = tuple(-(-side // stride) for side in item.image.shape[:2])
        return score_maps.resize(valid, -(-padded[1] // stride), item.output, item.mirrored)

    def _labels(self, group: list[_Item], scores: Array, plans: list[Resize]) -> _Pending:
        """The results of a batch of one pass."""
        largest = max(math.prod(item.output) for item in group)
        pixels = score_maps.label_capacity(largest)
        plans = score_maps.stack(plans, len(scores))
        labels, confidence = self._run(
            self._label_maps(pixels),
            f"label maps of up to {pixels} pixels",
            scores,
            jax.tree.map(self._place, plans) if len(scores) == self._batch else plans,
            score_maps.blocks_of(largest),
        )
        return _Pending(group, labels, confidence)

    def _slide(self, variables: Any, item: _Item) -> tuple[Array, Resize]:
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
            scores = self._forward(variables, group, padded, exact)
            matrices = []
            for axis in (0, 1):
                positions = -(-window[axis] // self._model.output_stride)
                matrices.append(
                    score_maps.resize_matrix(
                        positions, window[axis], full[axis], scores.shape[1 + axis]
                    )
                )
            scores = self._run(self._window_scores, "window scores", scores, *matrices)
            if canvas is None:  # the last row of a window may reach beyond the image
                pixels = score_maps.capacity(math.prod(size) + full[1], score_maps.PIXELS)
                canvas = jnp.zeros((pixels, scores.shape[-1]), jnp.float32)
            starts = np.zeros((self._batch, 2), np.int32)
            for index, (y, x) in enumerate(w.key for w in group):
                starts[index] = y.start, x.start
            canvas = self._run(
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
    with jax.default_matmul_precision(model.precision):
        logits = model.apply(rest, images, variables["memory"], valid_size=valid_size)["logits"]
    return jax.nn.softmax(logits, axis=-1) if softmax else logits


def check_evaluation(
    evaluation: ml_collections.ConfigDict,
    model: Segmentor,
    flip_pairs: Sequence[Sequence[int]] = (),
) -> None:
    """Refuses values of `config.eval` that do not fit the model.

    Args:
        evaluation: `config.eval`; `config_rules.check` has been asked about it.
        model: the segmentor.
        flip_pairs: `config.augment.flip_pairs`, which only matter if images are mirrored.

    Raises:
        UserError: names the field.
    """
    if evaluation.flip:
        passes.mirrored_classes(flip_pairs, model.num_classes)
    stride = model.coarsest_stride
    if evaluation.size_multiple % stride:
        raise UserError(
            f"config.eval.size_multiple is {evaluation.size_multiple}; "
            f"expected a multiple of the network's stride {stride}"
        )
    for index, canvas in enumerate(evaluation.canvases):
        if any(side % stride for side in canvas):
            raise UserError(
                f"config.eval.canvases[{index}] is {tuple(canvas)}; expected (height, width), both "
                f"multiples of the network's stride {stride}"
            )
