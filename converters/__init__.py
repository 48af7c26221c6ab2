"""Ways between PyTorch checkpoints of the reference and this project's checkpoints."""
