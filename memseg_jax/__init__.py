"""Semantic segmentation in JAX: DeepLabV3 with a dataset-level feature memory."""

__version__ = "0.1.0"
