"""What looks after a run: bad numbers, a poor memory, hangs, and the end of a machine's time."""
