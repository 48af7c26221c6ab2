"""The models of `memseg_jax.models` in PyTorch, with the names and numbers of the reference."""

from converters.torch_model.segmentor import build_torch_model
from converters.torch_model.taps import taps_of

__all__ = ["build_torch_model", "taps_of"]
