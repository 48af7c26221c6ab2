"""The few images of a split that are worth a look: the worst, the middle, the best, the confused.

Which these are is known only at the end, when the predictions of the others are gone. So a picture
is kept as long as it may be one of them: the worst and best so far are exact in the end. For the
middle and for the largest confusions, those nearest to what is wanted are kept, and of these the
nearest is shown; that is exact for up to a handful of images, and close for many.
"""

import bisect
import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence

import cv2
import numpy as np
from PIL import Image

from memseg_jax.scoring.per_image import PerImage

SHOWN = 3  # images of each kind
CONFUSIONS = 6  # pairs of classes
_MIDDLE_KEPT = 9
_LONGEST_SIDE = 480  # of a picture; larger images are shrunk


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image of a gallery, small enough for a page.

    Attributes:
        image: a JPEG file.
        truth: uint8 [height, width], of the same size as the image.
        prediction: uint8 [height, width].
        confidence: uint8 [height, width], 255 for certainty; empty: it is not known.
    """

    image: bytes
    truth: np.ndarray
    prediction: np.ndarray
    confidence: np.ndarray

    @classmethod
    def make(
        cls,
        image: np.ndarray,
        truth: np.ndarray,
        prediction: np.ndarray,
        confidence: np.ndarray | None = None,
    ) -> "Picture":
        """Shrinks an image and what belongs to it.

        Args:
            image: uint8 [height, width, 3] RGB.
            truth: uint8 [height, width].
            prediction: uint8 [height, width].
            confidence: float32 [height, width], 0..1.
        """
        height, width = truth.shape
        factor = min(1.0, _LONGEST_SIDE / max(height, width))
        size = max(round(width * factor), 1), max(round(height * factor), 1)
        if factor < 1:
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            truth = cv2.resize(truth, size, interpolation=cv2.INTER_NEAREST)
            prediction = cv2.resize(prediction, size, interpolation=cv2.INTER_NEAREST)
        shades = np.zeros(0, np.uint8)
        if confidence is not None:
            confidence = cv2.resize(confidence, size, interpolation=cv2.INTER_AREA)
            shades = np.round(np.clip(confidence, 0, 1) * 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=85)
        return cls(file.getvalue(), truth, prediction, shades)


@dataclasses.dataclass(frozen=True)
class Confusion:
    """Two classes that are mixed up.

    Attributes:
        true: the class of the pixels.
        predicted: the class that they were taken for.
        pixels: their number in the split.
        share: of the pixels of the true class, 0..1.
        index: of the image in the split that shows it best, among those kept; None: none does.
    """

    true: int
    predicted: int
    pixels: int
    share: float
    index: int | None = None


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Which images of a split are shown, by their numbers in it."""

    worst: list[int]
    middle: list[int]
    best: list[int]
    confusions: list[Confusion]


class Gallery:
    """Keeps the pictures that may be shown in the end."""

    def __init__(self):
        self.pictures: dict[int, Picture] = {}
        self._ranked: list[tuple[float, int]] = []  # score and number of all images so far
        self._scores: dict[int, float] = {}  # of those kept
        self._wrong: dict[int, np.ndarray] = {}  # their confusion matrices
        self._total: np.ndarray | int = 0

    def offer(
        self, index: int, score: float, matrix: np.ndarray, make: Callable[[], Picture]
    ) -> None:
        """Keeps an image if it may be shown, and forgets those that no longer may.

        Args:
            index: of the image in the split.
            score: its mIoU; an image whose score is NaN is never kept.
            matrix: its confusion matrix, int64 [K, K + 1].
            make: returns its picture.
        """
        if math.isnan(score):
            return
        self._total = self._total + matrix
        bisect.insort(self._ranked, (score, index))
        self._scores[index], self._wrong[index] = score, matrix
        wanted = self._wanted()
        if index in wanted:
            self.pictures[index] = make()
        for other in [*self._scores]:
            if other not in wanted:
                del self._scores[other], self._wrong[other]
                self.pictures.pop(other, None)

    def _wanted(self) -> set[int]:
        wanted = {index for _, index in self._ranked[:SHOWN] + self._ranked[-SHOWN:]}
        wanted |= set(_nearest_to_middle(self._scores, self._ranked, _MIDDLE_KEPT))
        for pair in largest_confusions(self._total):
            counts = {i: x[pair.true, pair.predicted] for i, x in self._wrong.items()}
            best = max(counts, key=lambda i: counts[i])
            wanted |= {best} if counts[best] else set()
        return wanted


def largest_confusions(matrix: np.ndarray, number: int = CONFUSIONS) -> list[Confusion]:
    """The pairs of classes that most pixels are mixed up of, the largest first.

    Args:
        matrix: int64 [K, K + 1], see `metrics.confusion_matrix`.
        number: of pairs at most.
    """
    classes = len(matrix)
    wrong = matrix[:, :classes].copy()
    np.fill_diagonal(wrong, 0)
    flat = wrong.ravel()
    number = min(number, flat.size)
    largest = np.argpartition(-flat, number - 1)[:number]
    largest = largest[np.lexsort((largest, -flat[largest]))]
    return [
        Confusion(int(i // classes), int(i % classes), int(flat[i]), float(flat[i] / row))
        for i in largest
        if flat[i] and (row := matrix[i // classes].sum())
    ]


def choose(per_image: PerImage, kept: Sequence[int]) -> Chosen:
    """Which images to show.

    Args:
        per_image: of the whole split.
        kept: numbers of the images of which there are pictures.

    Returns:
        The images; none twice among worst, middle and best.
    """
    scores = dict(zip(per_image.indices, per_image.scores()))
    ranked = sorted((score, i) for i, score in scores.items() if not math.isnan(score))
    kept = [i for i in kept if i in scores and not math.isnan(scores[i])]
    order = sorted(kept, key=lambda i: (scores[i], i))
    # Of few images, each kind gets its share.
    number = min(SHOWN, max(len(order) // 3, 1))
    worst = order[:number]
    best = [i for i in order[::-1][:number] if i not in worst]
    rest = {i: scores[i] for i in order if i not in worst + best}
    middle = sorted(_nearest_to_middle(rest, ranked, number), key=lambda i: (scores[i], i))
    confusions = []
    for pair in largest_confusions(per_image.total()):
        counts = per_image.confused(pair.true, pair.predicted)
        shown = max((i for i in kept if i in counts), key=lambda i: counts[i], default=None)
        confusions.append(dataclasses.replace(pair, index=shown))
    return Chosen(worst, middle, best, confusions)


def _nearest_to_middle(
    candidates: Mapping[int, float], ranked: Sequence[tuple[float, int]], number: int
) -> list[int]:
    if not ranked:
        return []
    median = ranked[len(ranked) // 2][0]
    return sorted(candidates, key=lambda i: (abs(candidates[i] - median), i))[:number]
