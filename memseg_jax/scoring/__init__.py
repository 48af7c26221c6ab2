"""What predictions are worth, and how they are shown: scores, pictures, files, memory health."""
