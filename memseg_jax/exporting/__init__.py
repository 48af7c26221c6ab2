"""A trained network as a folder that runs without this package: programs, weights, a loader."""
