"""Whether an exported network still says what the predictor says."""

import dataclasses
import logging
from typing import Any

import ml_collections
import numpy as np

from memseg_jax.errors import UserError
from memseg_jax.inference import Prediction, Predictor
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import sharding

log = logging.getLogger(__name__)

# How far an exported program may be from the predictor with the same weights: the share of pixels
# with another class (where two are as likely, rounding decides), and the largest difference of a
# probability. By the type that layers compute in.
TOLERANCE = {
    "float32": {"labels": 1e-3, "confidence": 1e-3},
    "bfloat16": {"labels": 0.03, "confidence": 0.1},
}


class Reference:
    """The predictor of whole pictures at their own size, in one pass.

    Args:
        config: the whole config.
        variables: params, batch_stats and memory.
    """

    def __init__(self, config: ml_collections.ConfigDict, variables: dict[str, Any]):
        config = config.copy_and_resolve_references()
        evaluation: Any = config.eval
        with config.unlocked():
            evaluation.mode, evaluation.scales, evaluation.flip = "whole", (1.0,), False
            evaluation.base_size, evaluation.rows, evaluation.batch_size = (), 1, 1
            evaluation.exact_sizes = 10**6
        self._variables = variables
        mesh = sharding.local_mesh(1)
        self._predictor = Predictor(build_segmentor(config), evaluation, mesh, confidence=True)

    def predict(self, image: np.ndarray) -> Prediction:
        """Segments RGB uint8 [height, width, 3]."""
        (prediction,) = self._predictor.predict(self._variables, [(None, image)])
        return prediction


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far a program is from the predictor.

    Attributes:
        program: name of its file.
        size: height and width of the picture.
        labels: share of pixels with another class.
        confidence: largest difference of a probability.
    """

    program: str
    size: tuple[int, int]
    labels: float
    confidence: float

    def __str__(self) -> str:
        height, width = self.size
        return (
            f"{self.program} at {height}x{width}: labels differ from the predictor's at "
            f"{self.labels:.3%} of pixels, confidences by {self.confidence:.1e} at most"
        )


def compare(
    program: str,
    found: tuple[np.ndarray, np.ndarray],
    expected: Prediction,
    tolerance: dict[str, float],
) -> Difference:
    """Compares labels and confidences.

    Args:
        program: name of its file.
        found: labels and confidences [height, width].
        expected: from `Reference.predict`.
        tolerance: an entry of `TOLERANCE`.

    Raises:
        UserError: they differ by more than the tolerance.
    """
    labels, confidence = found
    difference = Difference(
        program,
        labels.shape,
        float(np.mean(labels != expected.label)),
        float(np.max(np.abs(confidence - expected.confidence))),
    )
    # Not the other way round: nothing is below a limit that is not a number.
    if all(getattr(difference, name) <= limit for name, limit in tolerance.items()):
        log.info("%s: ok", difference)
        return difference
    raise UserError(
        f"{difference}; allowed are {tolerance['labels']:.1%} and {tolerance['confidence']:.0e}. "
        "Nothing was written. JAX_PLATFORMS=cpu shows whether it is this device's rounding; "
        "--config.model.precision=highest computes in full float32."
    )
