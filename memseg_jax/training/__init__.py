"""One training step and everything it is made of: state, optimiser, losses, guards, progress."""
