"""Boundary F-score: how well outlines are hit, which IoU of large areas hardly shows.

For each class, of the pixels on the outline of its predicted area, the share that is within a
tolerance of the outline of its true area (precision), and the other way round (recall); the score
is their harmonic mean. This is the measure of Csurka et al., "What is a good evaluation measure for
semantic segmentation?" (BMVC 2013), except that pixels are summed over all images first, as for
IoU.

Where there is no label, there is no outline to hit, but many data sets leave a band without labels
just along outlines. So pixels without a label take the class of the nearest one that has one, which
puts the outline in the middle of a band, and only what is within the tolerance of a labelled pixel
counts.
"""

import cv2
import numpy as np

TOLERANCE = 0.0075  # of the image's diagonal; at least one pixel
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


class BoundaryScore:
    """Counts the pixels of outlines.

    Attributes:
        counts: int64 [K, 4]: predicted outlines' pixels, those of them that are near a true one,
            true outlines' pixels, those of them that are near a predicted one.
    """

    def __init__(self, num_classes: int, counts: np.ndarray | None = None):
        self.counts = np.zeros((num_classes, 4), np.int64) if counts is None else counts.copy()

    def add(self, prediction: np.ndarray, label: np.ndarray) -> None:
        """Adds an image.

        Args:
            prediction: uint8 [height, width].
            label: uint8 [height, width]; values of K or more mean that there is no label.
        """
        valid = label < len(self.counts)
        if not valid.any():
            return
        tolerance = max(TOLERANCE * float(np.hypot(*label.shape)), 1.0)
        counted = _near(valid, tolerance)
        truth = label if valid.all() else _filled(label, valid)
        for k in np.unique([*np.unique(truth), *np.unique(prediction[counted])]):
            areas = prediction == k, truth == k
            part = _part_around(areas[0] | areas[1])  # most classes cover little
            predicted, true = (_outline(area[part]) for area in areas)
            wanted = counted[part]
            self.counts[k] += [
                (predicted & wanted).sum(),
                (predicted & wanted & _near(true, tolerance)).sum(),
                (true & wanted).sum(),
                (true & wanted & _near(predicted, tolerance)).sum(),
            ]

    def scores(self) -> np.ndarray:
        """The F-score of every class, float64 [K], 0..1; NaN: it has no outline in any image."""
        predicted, predicted_near, true, true_near = self.counts.T.astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            precision, recall = predicted_near / predicted, true_near / true
            score = 2 * precision * recall / (precision + recall)
        # A class that one of the two lacks, or whose outlines nowhere meet, scores 0.
        return np.where(predicted + true == 0, np.nan, np.nan_to_num(score))


def _filled(label: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The label map in which every pixel has the label of the nearest one that has one."""
    _, nearest = cv2.distanceTransformWithLabels(
        (~valid).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    labels = np.zeros(nearest.max() + 1, label.dtype)
    labels[nearest[valid]] = label[valid]
    return labels[nearest]


def _part_around(area: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns that hold an area and the pixels beside it."""
    left, top, width, height = cv2.boundingRect(area.astype(np.uint8))
    return slice(max(top - 1, 0), top + height + 1), slice(max(left - 1, 0), left + width + 1)


def _outline(area: np.ndarray) -> np.ndarray:
    """The pixels of an area that touch one outside; bool [height, width]."""
    return area & (cv2.dilate((~area).astype(np.uint8), _CROSS) > 0)


def _near(mask: np.ndarray, tolerance: float) -> np.ndarray:
    """The pixels whose distance to one of a mask is at most `tolerance`; bool [height, width]."""
    if not mask.any():
        return np.zeros_like(mask)
    away = (~mask).astype(np.uint8)
    return cv2.distanceTransform(away, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= tolerance
