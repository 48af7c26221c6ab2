"""Whether confidences are what they say: of the pixels with confidence 0.8, are 80 % right?

The measure is the expected calibration error of Guo et al., "On Calibration of Modern Neural
Networks" (ICML 2017), over pixels instead of images.
"""

import math

import numpy as np

BINS = 20


class Reliability:
    """Counts pixels by their confidence.

    Attributes:
        bins: float64 [BINS, 3]: pixels, those that are right, and the sum of their confidences, for
            confidences in equal parts of 0..1.
    """

    def __init__(self, bins: np.ndarray | None = None):
        self.bins = np.zeros((BINS, 3)) if bins is None else np.array(bins, np.float64)

    def add(
        self, confidence: np.ndarray, prediction: np.ndarray, label: np.ndarray, num_classes: int
    ) -> None:
        """Adds an image.

        Args:
            confidence: float32 [height, width], 0..1, the probability of the predicted class.
            prediction: uint8 [height, width].
            label: uint8 [height, width]; only values below `num_classes` count.
            num_classes: K.
        """
        valid = label < num_classes
        confidence = confidence[valid].astype(np.float64)
        right = (prediction == label)[valid]
        number = np.clip((confidence * BINS).astype(np.int64), 0, BINS - 1)
        for column, weights in enumerate((None, right, confidence)):
            self.bins[:, column] += np.bincount(number, weights, minlength=BINS)

    def error(self) -> float:
        """ECE, 0..1: the mean over all pixels of |share of right ones - confidence| of their bin.

        NaN if there are no pixels.
        """
        pixels, right, confidence = self.bins.T
        return float(np.abs(right - confidence).sum() / pixels.sum()) if pixels.any() else math.nan
