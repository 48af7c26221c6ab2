"""Conversion between the reference's PyTorch checkpoints and this project's checkpoints."""
