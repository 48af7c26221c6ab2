"""Pixel features of every class, sampled from a split."""

from typing import Any

import numpy as np

from memseg_jax.inspection.looking import Looker
from memseg_jax.runtime import bars

IMAGES = 64
PER_CLASS = 30


def sample_features(
    looker: Looker, variables: dict[str, Any], source: Any, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Features of some pixels of every class, as the memory would store them.

    Args:
        looker: of the model.
        variables: params, batch_stats and memory.
        source: images and labels, see `memseg_jax.data`; `IMAGES` of them, spread over it, are
            looked at.
        classes: their number.

    Returns:
        float32 [pixels, channels] and int64 [pixels], their classes, in order: at most `PER_CLASS`
        of each. The class of a feature is that of the pixel at its centre.
    """
    rng = np.random.default_rng(0)
    found: list[list[np.ndarray]] = [[] for _ in range(classes)]
    chosen = np.unique(np.linspace(0, len(source) - 1, min(IMAGES, len(source))).astype(int))
    # As many of each image that the classes of the first ones leave room for those of the others.
    share = -(-4 * PER_CLASS // len(chosen))
    with bars.bar(len(chosen), "sampling features", "image") as bar:
        for index in chosen.tolist():
            sample = source[index]
            features = looker.look(variables, sample["image"]).features
            label = sample["label"][
                np.ix_(*map(_centres, features.shape[:2], sample["label"].shape))
            ]
            for k in np.unique(label[label < classes]).tolist():
                places = np.argwhere(label == k)
                places = rng.permutation(places)[:share]
                found[k] += list(features[places[:, 0], places[:, 1]])
            bar.update()
    kept = [[pixels[i] for i in rng.permutation(len(pixels))[:PER_CLASS]] for pixels in found]
    labels = np.repeat(np.arange(classes), [len(pixels) for pixels in kept])
    flat = [feature for pixels in kept for feature in pixels]
    channels = flat[0].shape[0] if flat else 0
    return np.array(flat, np.float32).reshape(len(flat), channels), labels


def _centres(positions: int, pixels: int) -> np.ndarray:
    """The pixels in the middle of the positions of a map, along one axis."""
    return np.minimum(((np.arange(positions) + 0.5) * pixels / positions).astype(int), pixels - 1)
