"""Images much larger than the training crops: overlapping windows whose scores are blended.

A network that was trained on crops has never attended to a whole photograph, and attention costs
the square of an image's area. Windows of the crop's size are what it knows. Near the borders of a
window it sees little around a pixel, so that windows weigh less there: the weights fall linearly
from the middle to the borders, along both axes, and no seam is seen where windows meet.

Windows begin at multiples of the network's stride. The cells of their score maps then lie on the
cells of all others, and blending is done at the network's stride, before the resize. It goes from
the top down, one row of windows after the other: what is held is a few rows of windows at that
stride, however tall the image is.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

import cv2
import numpy as np

from memseg_jax.inference.score_maps import Resize, plan_of_taps
from memseg_jax.inference.sizes import Size, round_up
from memseg_jax.inference.windows import window_starts
from memseg_jax.models.layers import bilinear_taps

# Images of up to so many times the area of a training crop are one network input. The published
# tests of Cityscapes, 1024x2048 images and 512x1024 crops, are at this limit.
WHOLE_AREA = 4
# Pixels of results that are made at a time.
BAND = 2**18

Score = Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]


def is_large(size: Size, crop: Size) -> bool:
    """Whether an image is segmented in windows: its network input is more than `WHOLE_AREA` crops.

    Args:
        size: height and width of the network's input.
        crop: height and width of the training crops.
    """
    return size[0] * size[1] > WHOLE_AREA * crop[0] * crop[1]


def bands(output: Size) -> Iterator[tuple[int, int]]:
    """The first row and the end of every band of a result of this height and width."""
    count = -(-output[0] // max(BAND // output[1], 1))
    edges = [output[0] * n // count for n in range(count + 1)]  # of equal size: they share programs
    yield from itertools.pairwise(edges)


class BlendedMap:
    """The scores of one pass over a large image, made from the top down as they are asked for.

    Args:
        image: uint8 [height, width, 3], the input of the pass.
        mirrored: whether the image is mirrored; the scores are mirrored back.
        output: height and width of the result.
        crop: height and width of the training crops.
        overlap: share of a window's side that the next one overlaps, `config.eval.overlap`.
        strides: the network's output stride and its coarsest stride, a multiple of it.
        score: gives the scores [height / output stride, width / output stride, classes] of each of
            some windows, uint8 [height, width, 3], all of the same size.
    """

    def __init__(
        self,
        image: np.ndarray,
        mirrored: bool,
        output: Size,
        crop: Size,
        overlap: float,
        strides: tuple[int, int],
        score: Score,
    ):
        self._image = image
        self._stride, coarsest = strides
        padded = [round_up(side, coarsest) for side in image.shape[:2]]
        self._side = [min(round_up(c, coarsest), p) for c, p in zip(crop, padded)]
        steps = [max(round(side * (1 - overlap) / coarsest), 1) * coarsest for side in self._side]
        self._starts = [window_starts(*x) for x in zip(padded, self._side, steps)]
        self._weights = [_falling(side // self._stride) for side in self._side]
        self._cells = [side // self._stride for side in padded]
        self._taps = [
            bilinear_taps(cells, pixels, side / pixels / self._stride)
            for cells, side, pixels in zip(self._cells, image.shape, output)
        ]
        if mirrored:
            self._taps[1] = tuple(x[::-1] for x in self._taps[1])
        # One stream of all windows: while a row is blended, those of the next are computed.
        places = itertools.product(*self._starts)
        self._scores = score(self._cut(top, left) for top, left in places)
        self._next = 0  # row of windows
        self._done: list[tuple[int, np.ndarray]] = []  # those still needed, and their first cell

    @property
    def windows(self) -> int:
        """How many windows there are."""
        return len(self._starts[0]) * len(self._starts[1])

    def band(self, first: int, end: int) -> tuple[np.ndarray, Resize]:
        """The scores for some rows of the result; bands have to be asked for from the top down.

        Args:
            first: first row.
            end: row after the last.

        Returns:
            The scores, float32 [rows, columns, classes], and how the band follows from them.
        """
        lower, upper, fraction = (x[first:end] for x in self._taps[0])
        top = int(lower[0])
        scores = self._rows(top, int(upper[-1]) + 1)
        taps = (lower - top, upper - top, fraction)
        return scores, plan_of_taps(taps, self._taps[1], scores.shape[1])

    def _rows(self, first: int, end: int) -> np.ndarray:
        """Blends rows of windows; they are divided by the sum of their weights already."""
        height = len(self._weights[0])
        self._done = [(top, row) for top, row in self._done if top + height > first]
        while self._next < len(self._starts[0]):
            top = self._starts[0][self._next] // self._stride
            if top >= end:
                break
            self._done.append((top, self._row_of_windows()))
            self._next += 1
        total = np.zeros((end - first, *self._done[0][1].shape[1:]), np.float32)
        weight = np.zeros(end - first, np.float32)
        for top, row in self._done:
            a, b = max(first, top), min(end, top + height)
            weights = self._weights[0][a - top : b - top]
            total[a - first : b - first] += weights[:, None, None] * row[a - top : b - top]
            weight[a - first : b - first] += weights
        return total / weight[:, None, None]

    def _row_of_windows(self) -> np.ndarray:
        """Blends the next windows beside each other: float32 [rows, columns, classes]."""
        total = None
        cover = np.zeros(self._cells[1], np.float32)
        for left in self._starts[1]:
            scores = next(self._scores)
            if total is None:
                shape = (scores.shape[0], self._cells[1], scores.shape[2])
                total = np.zeros(shape, np.float32)
            first = left // self._stride
            place = slice(first, first + scores.shape[1])
            total[:, place] += self._weights[1][:, None] * scores
            cover[place] += self._weights[1]
        return total / cover[:, None]

    def _cut(self, top: int, left: int) -> np.ndarray:
        """A window; pixels are repeated where it reaches (a few of them) beyond the image."""
        height, width = self._side
        part = self._image[top : top + height, left : left + width]
        missing = height - part.shape[0], width - part.shape[1]
        if not any(missing):
            return np.ascontiguousarray(part)
        return cv2.copyMakeBorder(part, 0, missing[0], 0, missing[1], cv2.BORDER_REPLICATE)


def _falling(count: int) -> np.ndarray:
    """Weights of the cells of a window along one axis: at most 1, falling towards both ends."""
    distance = np.arange(count) + 0.5
    return (np.minimum(distance, count - distance) / (count / 2)).astype(np.float32)
