"""Error bars for the difference of two models that segmented the same images.

A paired bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993): images are
drawn with replacement, the same for both models, and the scores of the split are computed anew from
the summed pixels of the images drawn. The intervals tell what another sample of images might have
given. What another seed of the training might have given, they do not tell.
"""

from typing import NamedTuple

import numpy as np

DRAWS = 2000
_LEVEL = 0.95
_AT_A_TIME = 100  # draws; bounds the memory


class Interval(NamedTuple):
    """A difference and where 95 % of its draws lie.

    Attributes:
        value: of the split itself.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """How a model differs from another one.

    Attributes:
        miou: of mIoU.
        per_class: of IoU, one per class; NaN: the class is not scored.
    """

    miou: Interval
    per_class: list[Interval]


def difference(counts: np.ndarray, baseline: np.ndarray, draws: int = DRAWS) -> Difference:
    """The difference "model - baseline" with its intervals.

    Args:
        counts: int64 [3, images, K], of the model: `PerImage.counts`.
        baseline: the same of the other one, for the same images in the same order.
        draws: how often images are drawn.

    Returns:
        The differences; the same for the same counts.

    Raises:
        ValueError: the shapes differ, or there are no images.
    """
    if counts.shape != baseline.shape or not counts.shape[1]:
        raise ValueError(f"counts of the same images expected: {counts.shape}, {baseline.shape}")
    images = counts.shape[1]
    once = np.ones((1, images))
    value = _iou(once, counts)[0] - _iou(once, baseline)[0]
    whole = _means(_iou(once, counts))[0] - _means(_iou(once, baseline))[0]
    rng = np.random.default_rng(0)
    means, ious = [], []
    for first in range(0, draws, _AT_A_TIME):
        number = min(_AT_A_TIME, draws - first)
        drawn = rng.multinomial(images, np.full(images, 1 / images), size=number)
        one, two = _iou(drawn, counts), _iou(drawn, baseline)
        means.append(_means(one) - _means(two))
        ious.append(one - two)
    low, high = _interval(np.concatenate(means)[:, None])
    lows, highs = _interval(np.concatenate(ious))
    per_class = [Interval(*map(float, x)) for x in zip(value, lows, highs)]
    return Difference(Interval(float(whole), float(low[0]), float(high[0])), per_class)


def _iou(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """IoU of every class if each image counts so often, float64 [draws, K]."""
    found, true, predicted = (weights.astype(np.float64) @ x.astype(np.float64) for x in counts)
    with np.errstate(divide="ignore", invalid="ignore"):
        return found / (true + predicted - found)


def _means(iou: np.ndarray) -> np.ndarray:
    defined = ~np.isnan(iou)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(defined, iou, 0).sum(axis=1) / defined.sum(axis=1)


def _interval(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the interval of every column; a class that is in no image of a draw is left out."""
    ends = np.full((2, draws.shape[1]), np.nan)
    for column, values in enumerate(draws.T):
        if (defined := values[~np.isnan(values)]).size:
            ends[:, column] = np.quantile(defined, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return ends[0], ends[1]
