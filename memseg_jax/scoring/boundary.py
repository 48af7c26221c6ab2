"""Boundary F-score: how well outlines are hit, which IoU of large areas hardly shows.

For each class, of the pixels on the outline of its predicted area, the share that is within a
tolerance of the outline of its true area (precision), and the other way round (recall); the score
is their harmonic mean. This is the measure of Csurka et al., "What is a good evaluation measure for
semantic segmentation?" (BMVC 2013), except that pixels are summed over all images first, as for
IoU, and that outlines of neighbouring classes are those of both.
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

        Pixels without a label have no class in either map: no outline is counted within them.

        Args:
            prediction: uint8 [height, width].
            label: uint8 [height, width].
        """
        num_classes = len(self.counts)
        valid = label < num_classes
        tolerance = max(TOLERANCE * float(np.hypot(*label.shape)), 1.0)
        present = np.flatnonzero(
            np.bincount(label[valid], minlength=num_classes)
            + np.bincount(prediction[valid], minlength=256)[:num_classes]
        )
        for k in present:
            predicted = _outline((prediction == k) & valid, valid)
            true = _outline((label == k) & valid, valid)
            self.counts[k] += [
                predicted.sum(),
                (predicted & _near(true, tolerance)).sum(),
                true.sum(),
                (true & _near(predicted, tolerance)).sum(),
            ]

    def scores(self) -> np.ndarray:
        """The F-score of every class, float64 [K], 0..1; NaN: it has no outline in any image."""
        predicted, predicted_near, true, true_near = self.counts.T.astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            precision, recall = predicted_near / predicted, true_near / true
            score = 2 * precision * recall / (precision + recall)
        # A class that one of the two lacks, or whose outlines nowhere meet, scores 0.
        return np.where(predicted + true == 0, np.nan, np.nan_to_num(score))


def _outline(area: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The pixels of an area that touch a labelled pixel outside; bool [height, width]."""
    outside = (valid & ~area).astype(np.uint8)
    return area & (cv2.dilate(outside, _CROSS) > 0)


def _near(outline: np.ndarray, tolerance: float) -> np.ndarray:
    """The pixels whose distance to an outline is at most `tolerance`."""
    if not outline.any():
        return np.zeros_like(outline)
    away = (~outline).astype(np.uint8)
    return cv2.distanceTransform(away, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= tolerance
