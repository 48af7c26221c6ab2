"""From images of any size to label maps of the same size.

Whole images, sliding windows, or, where the mode is "auto", whole images and blended windows of
large ones; one pass, or the mean of several scales and mirror images.

Networks are compiled for one input size each; `memseg_jax.inference.sizes` says for which. All
other programs are small and depend only on the capacity of their arrays, not on image sizes: see
`score_maps`.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from memseg_jax.data.transforms import evaluation_resize, normalise
from memseg_jax.inference import blending, passes, score_maps, sizes, windows
from memseg_jax.inference.checks import check_evaluation
from memseg_jax.inference.score_maps import Resize
from memseg_jax.inference.sizes import Size
from memseg_jax.models.layers import ValidSize
from memseg_jax.models.segmentor import Segmentor
from memseg_jax.runtime import bars, rows, sharding
from memseg_jax.runtime.compilation import Programs

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
    image: np.ndarray  # [height, width, 3]; normalised, float32, or as read, uint8
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
        mesh: devices of this process; a batch is split over them, and so are the rows of its images
            if the mesh says so.
        flip_pairs: `config.augment.flip_pairs`, the classes that mirroring swaps.
        confidence: whether the probability of the predicted class is asked for.
        crop: `config.augment.crop`, which mode "auto" needs.

    Raises:
        UserError: a field of `config.eval` or a pair of classes has an impossible value.
        ValueError: the mode is "auto", and there is no crop.
    """

    def __init__(
        self,
        model: Segmentor,
        evaluation: ml_collections.ConfigDict,
        mesh: Mesh,
        flip_pairs: Sequence[Sequence[int]] = (),
        confidence: bool = False,
        crop: Size | None = None,
    ):
        check_evaluation(evaluation, model, flip_pairs)
        if evaluation.mode == "auto" and crop is None:
            raise ValueError("mode 'auto' needs the size of the training crops")
        self._model = model
        self._evaluation = evaluation
        self._mesh = mesh
        self._crop = tuple(crop) if evaluation.mode == "auto" else None
        self._batch = evaluation.batch_size * sharding.batch_pieces(mesh)
        self._sizes = sizes.size_policy(evaluation, model.coarsest_stride)
        self._run = Programs()
        self._passes = len(evaluation.scales) * (2 if evaluation.flip else 1)
        self._averages = self._passes > 1 or evaluation.scales[0] != 1
        self._confidence = confidence
        self._mirrored_classes = None
        if evaluation.flip:
            self._mirrored_classes = passes.mirrored_classes(flip_pairs, model.num_classes)
        slide = evaluation.mode == "slide"
        softmax = evaluation.softmax_before_resize

        def network(function: Callable, softmax: bool) -> Callable:
            function = functools.partial(function, model, softmax=softmax)
            return jax.jit(sharding.traced_by_rows(function, mesh))

        self._network = network(network_scores, False) if slide else network(_flat_scores, softmax)
        self._blended_network = network(network_scores, softmax)
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
        evaluation = self._evaluation
        yield from self._segment(
            variables,
            (_Item(key, evaluation_resize(x, evaluation), x.shape[:2]) for key, x in images),
        )

    def segment(
        self, variables: dict[str, Any], inputs: Iterable[tuple[Any, np.ndarray, Size]]
    ) -> Iterator[Prediction]:
        """The same for images that are normalised already.

        Args:
            variables: as in `predict`.
            inputs: any key, the network's input float32 [h, w, 3], and the size of the result.

        Yields:
            One `Prediction` per input.
        """
        yield from self._segment(variables, (_Item(*x) for x in inputs))

    def _segment(self, variables: dict[str, Any], items: Iterable[_Item]) -> Iterator[Prediction]:
        """The devices compute one batch while the results of the one before are used."""
        variables = jax.device_put(variables, sharding.replicated(self._mesh))
        before = None
        for large, run in itertools.groupby(items, self._is_large):
            if large:
                if before:
                    yield from before.fetch()
                    before = None
                for item in run:
                    yield self._blended(variables, item)
                continue
            for pending in self._dispatched(variables, map(_normalised, run)):
                for array in (pending.labels, pending.confidence):
                    if array is not None:
                        array.copy_to_host_async()
                if before:
                    yield from before.fetch()
                before = pending
        if before:
            yield from before.fetch()

    def _is_large(self, item: _Item) -> bool:
        return bool(self._crop) and blending.is_large(item.image.shape[:2], self._crop)

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
        return jax.device_put(array, sharding.split_images(self._mesh))

    def _forward(
        self, variables: Any, group: list[_Item], padded: Size, exact: bool, network: Any = None
    ) -> Array:
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
        network = network or self._network
        return self._run(network, what, variables, self._place(images), valid_size)

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

    def _blended(self, variables: Any, item: _Item) -> Prediction:
        """Segments a large image in windows, and makes its result band by band."""
        parts = list(self._passes_over(item, item.key))
        strides = self._model.output_stride, self._model.coarsest_stride
        label = np.empty(item.output, np.uint8)
        confidence = np.empty(item.output, np.float32) if self._confidence else None
        with bars.bar(None, "windows", "window") as bar:

            def score(cut: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
                for scores in self._scores_of_windows(variables, cut):
                    bar.update()
                    yield scores

            settings = self._crop, self._evaluation.overlap, strides, score
            maps = [blending.BlendedMap(x.image, x.mirrored, x.output, *settings) for x in parts]
            bar.total = sum(x.windows for x in maps)
            for first, end in blending.bands(item.output):
                size = (end - first, item.output[1])
                scored = (blended.band(first, end) for blended in maps)
                (band,) = self._band([dataclasses.replace(x, output=size) for x in parts], scored)
                label[first:end] = band.label
                if self._confidence:
                    confidence[first:end] = band.confidence
        return Prediction(item.key, label, confidence)

    def _band(
        self, parts: list[_Item], scored: Iterable[tuple[np.ndarray, Resize]]
    ) -> Iterator[Prediction]:
        """Some rows of a result, of the blended scores of all passes."""
        total = None
        for part, (scores, plan) in zip(parts, scored):
            height, width, classes = scores.shape
            positions = score_maps.capacity(height * width, score_maps.POSITIONS, 4)
            flat = np.zeros((1, positions, classes), np.float32)
            flat[0, : height * width] = scores.reshape(-1, classes)
            flat = self._on_one_device(flat)
            if not self._averages:
                return self._labels([part], flat, [plan]).fetch()
            total = self._add(total, flat, 0, plan, part)
        return self._mean(part, total).fetch()

    def _scores_of_windows(self, variables: Any, cut: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Scores at the network's stride, while the devices compute those of the next batch."""
        cut, waiting = iter(cut), collections.deque()
        while True:
            group = [_Item(None, x, x.shape[:2]) for x in itertools.islice(cut, self._batch)]
            if group:
                group, network = [*map(_normalised, group)], self._blended_network
                scores = self._forward(variables, group, group[0].output, True, network)
                waiting.append((scores, len(group)))
            if not waiting:
                return
            if not group or len(waiting) == 2:
                scores, count = waiting.popleft()
                yield from np.asarray(scores)[:count]

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


def _normalised(item: _Item) -> _Item:
    if item.image.dtype != np.uint8:
        return item
    return dataclasses.replace(item, image=normalise(item.image))


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
    """Class scores at the network's stride, float32 [batch, h, w, classes].

    Where the rows of images are split over devices, each of these has all scores in the end.
    """
    images = rows.split(images)
    rest = {"params": variables["params"], "batch_stats": variables["batch_stats"]}
    with jax.default_matmul_precision(model.precision):
        logits = model.apply(rest, images, variables["memory"], valid_size=valid_size)["logits"]
    return rows.whole(jax.nn.softmax(logits, axis=-1) if softmax else logits)
