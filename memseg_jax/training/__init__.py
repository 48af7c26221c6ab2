"""One training step and all its parts: state, optimiser, losses, guards, progress."""
