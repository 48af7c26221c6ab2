"""Confusion matrices of single images: which images are bad, and how far the scores would scatter.

A matrix of an image is nearly empty: it shows a few of the classes. So only the counts above 0 are
kept, some hundreds of bytes an image, whatever the number of classes.
"""

import csv
import io
import math
from collections.abc import Mapping

import numpy as np

from memseg_jax.runtime import files

FILE = "per_image.csv"


class PerImage:
    """The confusion matrices of a split's images, in the order of the split.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self._images: dict[int, tuple[str, tuple[int, int], np.ndarray, np.ndarray]] = {}

    def add(self, index: int, name: str, size: tuple[int, int], matrix: np.ndarray) -> None:
        """Adds an image.

        Args:
            index: of the image in the split.
            name: of the image.
            size: height and width.
            matrix: int64 [K, K + 1], see `metrics.confusion_matrix`.
        """
        cells = np.flatnonzero(matrix)
        counts = matrix.ravel()[cells].astype(np.int64)
        self._images[index] = (name, tuple(size), cells.astype(np.int32), counts)

    def __len__(self) -> int:
        return len(self._images)

    @property
    def indices(self) -> list[int]:
        """The numbers of the images in the split, rising."""
        return sorted(self._images)

    @property
    def names(self) -> list[str]:
        """The names of the images."""
        return [self._images[index][0] for index in self.indices]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of the images."""
        return [self._images[index][1] for index in self.indices]

    def matrix(self, index: int) -> np.ndarray:
        """The confusion matrix of one image, int64 [K, K + 1]."""
        _, _, cells, counts = self._images[index]
        matrix = np.zeros(self.num_classes * (self.num_classes + 1), np.int64)
        matrix[cells] = counts
        return matrix.reshape(self.num_classes, -1)

    def total(self) -> np.ndarray:
        """The sum of all matrices, int64 [K, K + 1]."""
        total = np.zeros(self.num_classes * (self.num_classes + 1), np.int64)
        for _, _, cells, counts in self._images.values():
            total[cells] += counts
        return total.reshape(self.num_classes, -1)

    def counts(self) -> np.ndarray:
        """What IoU is made of, int64 [3, images, K]: pixels found, true, and predicted."""
        result = np.zeros((3, len(self), self.num_classes), np.int64)
        for row, index in enumerate(self.indices):
            _, _, cells, counts = self._images[index]
            true, predicted = np.divmod(cells, self.num_classes + 1)
            inside = predicted < self.num_classes
            np.add.at(result[0, row], true[true == predicted], counts[true == predicted])
            np.add.at(result[1, row], true, counts)
            np.add.at(result[2, row], predicted[inside], counts[inside])
        return result

    def images_of_class(self) -> np.ndarray:
        """In how many images each class is true, int64 [K]."""
        return (self.counts()[1] > 0).sum(axis=0)

    def scores(self) -> list[float]:
        """The mIoU of every image, see `image_miou`; NaN: it has no labelled pixel."""
        found, true, predicted = self.counts()
        union = true + predicted - found
        with np.errstate(divide="ignore", invalid="ignore"):
            return (np.nansum(found / union, axis=1) / (union > 0).sum(axis=1)).tolist()

    def confused(self, true: int, predicted: int) -> dict[int, int]:
        """The images in which pixels of one class were taken for another, and their number."""
        wanted = true * (self.num_classes + 1) + predicted
        found = {}
        for index, (_, _, cells, counts) in self._images.items():
            at = np.searchsorted(cells, wanted)
            if at < len(cells) and cells[at] == wanted:
                found[index] = int(counts[at])
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it as a few arrays without Python objects, for a file or another process."""
        images = [self._images[index] for index in self.indices]
        empty = np.zeros(0, np.int64)
        return {
            "per_image/index": np.array(self.indices, np.int64),
            "per_image/name": np.array([image[0] for image in images], np.str_),
            "per_image/size": np.array([image[1] for image in images], np.int64).reshape(-1, 2),
            "per_image/length": np.array([len(image[2]) for image in images], np.int64),
            "per_image/cell": np.concatenate([empty, *(x[2] for x in images)]).astype(np.int32),
            "per_image/count": np.concatenate([empty, *(image[3] for image in images)]),
        }

    def update(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Adds the images of another one's `arrays`."""
        names, sizes = arrays["per_image/name"].tolist(), arrays["per_image/size"].tolist()
        ends = np.cumsum(arrays["per_image/length"])[:-1]
        cells = np.split(arrays["per_image/cell"], ends)
        counts = np.split(arrays["per_image/count"], ends)
        indices = arrays["per_image/index"].tolist()
        for index, name, size, *rest in zip(indices, names, sizes, cells, counts):
            self._images[index] = (name, tuple(size), *rest)


def image_miou(matrix: np.ndarray) -> float:
    """The mIoU of one image, over the classes that are in its truth or in its prediction.

    It says how good this image is. The mean over images is not the mIoU of the split, which sums
    the pixels of all images first.

    Args:
        matrix: int64 [K, K + 1], see `metrics.confusion_matrix`.

    Returns:
        0..1; NaN: no pixel is labelled.
    """
    found = np.diagonal(matrix)
    union = matrix.sum(axis=1) + matrix[:, : len(matrix)].sum(axis=0) - found
    present = union > 0
    return float((found[present] / union[present]).mean()) if present.any() else math.nan


def write_csv(workdir: files.Place, per_image: PerImage, class_names: tuple[str, ...]) -> None:
    """Writes `per_image.csv`: the scores of every image, in the order of the split.

    The columns are name, height, width, pixels (labelled ones), mIoU, aAcc, worst_class (the class
    with the lowest IoU of this image) and worst_iou; empty where an image has no labelled pixel.

    Raises:
        UserError: it cannot be written.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    header = "name", "height", "width", "pixels", "mIoU", "aAcc", "worst_class", "worst_iou"
    writer.writerow(header)
    found, true, predicted = per_image.counts()
    union = true + predicted - found
    for row, (name, size) in enumerate(zip(per_image.names, per_image.sizes)):
        pixels, cells = int(true[row].sum()), [""] * 4
        if pixels:
            present = np.flatnonzero(union[row])
            iou = found[row, present] / union[row, present]
            worst = int(np.argmin(iou))
            accuracy = found[row].sum() / pixels
            cells = [iou.mean(), accuracy, class_names[present[worst]], iou[worst]]
            cells = [x if isinstance(x, str) else f"{x:.6f}" for x in cells]
        writer.writerow([name, *size, pixels, *cells])
    files.write_text(workdir / FILE, table.getvalue())
