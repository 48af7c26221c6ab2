"""Processes, devices and compiled programs; stopping and hangs. Knows nothing of models."""
