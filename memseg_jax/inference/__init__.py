"""From an image to its label map: scales, mirror images, windows, padding, averaging."""

from memseg_jax.inference.checks import check_evaluation
from memseg_jax.inference.predictor import Prediction, Predictor

__all__ = ["Prediction", "Predictor", "check_evaluation"]
