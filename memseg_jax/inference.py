"""From images of any size to label maps of the same size: whole images or sliding windows.

Networks are compiled for one input size each. The first few sizes get a program of their own;
images of further sizes share programs: they are padded to a multiple, and every layer masks the
padding, so that the numbers stay those of the exact size.
"""

import collections
import dataclasses
import functools
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from memseg_jax.compilation import compile_with_notice
from memseg_jax.data.transforms import evaluation_transform
from memseg_jax.errors import UserError
from memseg_jax.models.layers import Extent, bilinear_matrix
from memseg_jax.models.segmentor import Segmentor
from memseg_jax.sharding import replicated, split_batch

Array = jax.Array
Size = tuple[int, int]

# Label maps are computed this many rows at a time: scores at full size for all classes would be
# the largest array of an evaluation by far.
_ROWS = 64
_OUTPUT_MULTIPLE = 128  # output sizes are padded to this, which only adds rows of zeros


# ---- Pure parts ---------------------------------------------------------------------------------


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """First positions of the windows that cover `size`; the last one is shifted back inside."""
    window = min(window, size)
    count = max(size - window + stride - 1, 0) // stride + 1
    return [min(i * stride, size - window) for i in range(count)]


def windows_of(size: Size, window: Size, stride: Size) -> list[tuple[slice, slice]]:
    """The windows that cover an image, row by row.

    Args:
        size: height and width of the image.
        window: height and width of a window; an image that is smaller is taken as it is.
        stride: vertical and horizontal step.
    """
    rows = window_starts(size[0], window[0], stride[0])
    columns = window_starts(size[1], window[1], stride[1])
    height, width = min(window[0], size[0]), min(window[1], size[1])
    return [(slice(y, y + height), slice(x, x + width)) for y in rows for x in columns]


def resize_matrix(source: int, target: int, rows: int, columns: int) -> np.ndarray:
    """A bilinear resize matrix inside a larger matrix of zeros: float32 [rows, columns]."""
    matrix = np.zeros((rows, columns), np.float32)
    matrix[:target, :source] = bilinear_matrix(source, target)
    return matrix


def resize_scores(scores: Array, rows: Array, columns: Array) -> Array:
    """Resizes with a matrix per axis and image.

    Args:
        scores: [batch, h, w, classes].
        rows: [batch, H, h].
        columns: [batch, W, w].

    Returns:
        [batch, H, W, classes].
    """
    scores = jnp.einsum("bhwk,bWw->bhWk", scores, columns, precision="highest")
    return jnp.einsum("bhWk,bHh->bHWk", scores, rows, precision="highest")


def label_maps(
    scores: Array, rows: Array, columns: Array, *, probabilities: bool
) -> tuple[Array, Array]:
    """Resizes scores and takes the best class, a few rows at a time.

    Args:
        scores: [batch, h, w, classes], logits or probabilities.
        rows: [batch, H, h], H a multiple of 64.
        columns: [batch, W, w].
        probabilities: whether the scores are probabilities; logits go through a softmax to give
            the confidence.

    Returns:
        The best class, uint8 [batch, H, W], and its probability, float32 [batch, H, W].
    """
    scores = jnp.einsum("bhwk,bWw->bhWk", scores, columns, precision="highest")

    def block(rows: Array) -> tuple[Array, Array]:
        x = jnp.einsum("bhWk,bHh->bHWk", scores, rows, precision="highest")
        best = jnp.max(x, axis=-1)
        if not probabilities:
            best = jnp.exp(best - jax.nn.logsumexp(x, axis=-1))
        return jnp.argmax(x, axis=-1).astype(jnp.uint8), best

    batch, height, _ = rows.shape
    blocks = rows.reshape(batch, height // _ROWS, _ROWS, -1).swapaxes(0, 1)
    labels, confidence = jax.lax.map(block, blocks)

    def joined(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(batch, height, -1)

    return joined(labels), joined(confidence)


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


# ---- Images in, label maps out ------------------------------------------------------------------


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
    """One network input on its way: an image, or a window of one."""

    key: Any
    image: np.ndarray  # normalised [height, width, 3]
    output: Size  # size of the result


class Predictor:
    """Segments images with fixed weights on the devices of one mesh.

    Compiled programs are kept, so one predictor should serve all images.

    Args:
        model: the segmentor.
        variables: params, batch_stats and memory; put onto the mesh here.
        evaluation: `config.eval`.
        mesh: devices of this process; a batch is split over them.

    Raises:
        UserError: a field of `config.eval` has an impossible value.
    """

    def __init__(
        self,
        model: Segmentor,
        variables: dict[str, Any],
        evaluation: ml_collections.ConfigDict,
        mesh: Mesh,
    ):
        check_evaluation(evaluation, model)
        self._model = model
        self._variables = jax.device_put(variables, replicated(mesh))
        self._evaluation = evaluation
        self._mesh = mesh
        self._batch = evaluation.batch_size * mesh.size
        # A backbone that cannot mask padding gets a program for every size.
        exact_sizes = evaluation.exact_sizes if model.backbone.supports_extent else sys.maxsize
        self._sizes = SizePolicy(exact_sizes, evaluation.size_multiple)
        self._programs: dict[Any, Any] = {}
        slide = evaluation.mode == "slide"
        softmax = evaluation.softmax_before_resize
        self._network = jax.jit(functools.partial(_network, model, softmax=softmax and not slide))
        self._window_scores = jax.jit(functools.partial(_window_scores, softmax=softmax and slide))
        self._accumulate = jax.jit(_accumulate, donate_argnums=0)
        self._label_maps = jax.jit(functools.partial(label_maps, probabilities=softmax))

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
        if self._evaluation.mode == "slide":
            for item in items:
                yield self._slide(item)
        else:
            for group, padded, exact in self._batches(items):
                scores = self._forward(group, padded, exact)
                rows, columns = self._matrices(group, scores.shape[1:3])
                yield from self._labels(group, scores, rows, columns)

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

    def _matrices(
        self, group: list[_Item], shape: Size, multiple: int = _OUTPUT_MULTIPLE
    ) -> tuple[Array, Array]:
        """Matrices that resize the real part of each item's scores to its output size."""
        stride = self._model.output_stride
        height, width = (
            _round_up(max(item.output[axis] for item in group), multiple) for axis in (0, 1)
        )
        rows = np.zeros((self._batch, height, shape[0]), np.float32)
        columns = np.zeros((self._batch, width, shape[1]), np.float32)
        for index, item in enumerate(group):
            h, w = (-(-n // stride) for n in item.image.shape[:2])
            rows[index] = resize_matrix(h, item.output[0], height, shape[0])
            columns[index] = resize_matrix(w, item.output[1], width, shape[1])
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

    def _slide(self, item: _Item) -> Prediction:
        """Adds up the windows' scores at the size of the network's input, then resizes."""
        size = item.image.shape[:2]
        evaluation = self._evaluation
        windows = windows_of(size, tuple(evaluation.window), tuple(evaluation.stride))
        window = (windows[0][0].stop - windows[0][0].start, windows[0][1].stop)
        padded, exact = self._sizes.padded(window)
        canvas = None
        for first in range(0, len(windows), self._batch):
            group = [
                _Item(place_, item.image[place_], window)
                for place_ in windows[first : first + self._batch]
            ]
            scores = self._forward(group, padded, exact)
            rows, columns = self._matrices(group, scores.shape[1:3], multiple=1)
            scores = self._compiled(
                "windows", self._window_scores, "window scores", scores, rows, columns
            )
            if canvas is None:
                shape = [max(_round_up(n, _OUTPUT_MULTIPLE), w) for n, w in zip(size, window)]
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
                jax.device_put(scores, jax.local_devices()[0]),
                jax.device_put(starts),
                jax.device_put(active),
            )
        # How many windows cover a pixel is a product of a count per row and one per column, so
        # dividing by it can be part of the resize.
        matrices = []
        for axis in (0, 1):
            cover = np.zeros(canvas.shape[axis], np.float32)
            for part in {w[axis].start: w[axis] for w in windows}.values():
                cover[part] += 1
            target = item.output[axis]
            matrix = resize_matrix(
                size[axis], target, _round_up(target, _OUTPUT_MULTIPLE), canvas.shape[axis]
            )
            matrices.append(jax.device_put((matrix / np.maximum(cover, 1))[None]))
        (prediction,) = self._labels([item], canvas[None], *matrices)
        return prediction


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
    scores = resize_scores(scores, rows, columns)
    return jax.nn.softmax(scores, axis=-1) if softmax else scores


def _accumulate(canvas: Array, scores: Array, starts: Array, active: Array) -> Array:
    """Adds windows to the canvas at their places.

    Args:
        canvas: [height, width, classes].
        scores: [batch, h, w, classes].
        starts: int32 [batch, 2].
        active: bool [batch]; the others are left out.
    """

    def add(canvas: Array, window: tuple[Array, Array, Array]) -> tuple[Array, None]:
        scores, start, active = window
        corner = (start[0], start[1], 0)
        old = jax.lax.dynamic_slice(canvas, corner, scores.shape)
        new = old + jnp.where(active, scores, 0)
        return jax.lax.dynamic_update_slice(canvas, new, corner), None

    return jax.lax.scan(add, canvas, (scores, starts, active))[0]


def check_evaluation(evaluation: ml_collections.ConfigDict, model: Segmentor) -> None:
    """Refuses values of `config.eval` that no image could be segmented with.

    Raises:
        UserError: names the field.
    """
    stride = model.output_stride
    if evaluation.mode not in ("whole", "slide"):
        raise UserError(f"config.eval.mode is {evaluation.mode!r}; expected 'whole' or 'slide'")
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
