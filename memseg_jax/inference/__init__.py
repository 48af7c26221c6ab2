"""From an image to its label map: scales, mirror images, windows, padding, averaging."""

from memseg_jax.inference.predictor import Prediction, Predictor, check_evaluation

__all__ = ["Prediction", "Predictor", "check_evaluation"]
