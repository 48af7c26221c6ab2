"""Scores of predictions, pictures and files of them, and the health of the memory."""
