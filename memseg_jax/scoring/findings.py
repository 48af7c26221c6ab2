"""What an evaluation finds besides its scores: all that a report is made of."""

from collections.abc import Mapping

import numpy as np

from memseg_jax.inference.predictor import Prediction
from memseg_jax.scoring.boundary import BoundaryScore
from memseg_jax.scoring.calibration import Reliability
from memseg_jax.scoring.gallery import Gallery, Picture
from memseg_jax.scoring.per_image import PerImage, image_miou


class Findings:
    """Collects, image by image.

    Args:
        num_classes: K.
        thorough: whether confidences and outlines are looked at, too.

    Attributes:
        per_image: the confusion matrices.
        gallery: the pictures of a few images.
        reliability: of the confidences; None if not `thorough`.
        boundary: of the outlines; None if not `thorough`.
    """

    def __init__(self, num_classes: int, thorough: bool = False):
        self.per_image = PerImage(num_classes)
        self.gallery = Gallery()
        self.reliability = Reliability() if thorough else None
        self.boundary = BoundaryScore(num_classes) if thorough else None

    def add(self, prediction: Prediction, sample: Mapping, matrix: np.ndarray) -> None:
        """Looks at an image.

        Args:
            prediction: for the image; its key is the image's number in the split. It has a
                confidence if this is thorough.
            sample: with image, label and name, see `memseg_jax.data`.
            matrix: the confusion matrix, int64 [K, K + 1].
        """
        label, truth = prediction.label, sample["label"]
        self.per_image.add(prediction.key, sample["name"], label.shape, matrix)
        if self.reliability:
            self.reliability.add(prediction.confidence, label, truth, len(matrix))
        if self.boundary:
            self.boundary.add(label, truth)
        arrays = sample["image"], truth, label, prediction.confidence
        self.gallery.offer(
            prediction.key, image_miou(matrix), matrix, lambda: Picture.make(*arrays)
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it as arrays without Python objects, for a file or another process."""
        arrays = self.per_image.arrays()
        for index, picture in self.gallery.pictures.items():
            for name, value in vars(picture).items():
                array = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else value
                arrays[f"picture/{index}/{name}"] = array
        if self.reliability:
            arrays["reliability"] = self.reliability.bins
        if self.boundary:
            arrays["boundary"] = self.boundary.counts
        return arrays

    def update(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Adds what another one found, of other images.

        Args:
            arrays: of the other one; thorough if this one is.
        """
        self.per_image.update(arrays)
        for name in arrays:
            if name.startswith("picture/") and name.endswith("/image"):
                stem = name.removesuffix("image")
                maps = (arrays[stem + part] for part in ("truth", "prediction", "confidence"))
                index = int(stem.split("/")[1])
                self.gallery.pictures[index] = Picture(arrays[name].tobytes(), *maps)
        if self.reliability:
            self.reliability.bins += arrays["reliability"]
        if self.boundary:
            self.boundary.counts += arrays["boundary"]
