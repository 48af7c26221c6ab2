"""Differences between trainings that share their seeds, with error bars."""

import math
import statistics
from collections.abc import Mapping

from scipy import stats


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[float, float, float]:
    """Mean of `b - a` over the keys of both, between the limits of its 95 % interval."""
    differences = [b[key] - a[key] for key in a.keys() & b.keys()]
    if not differences:
        return math.nan, math.nan, math.nan
    mean, count = statistics.fmean(differences), len(differences)
    if count == 1:
        return math.nan, mean, math.nan
    spread = stats.t.ppf(0.975, count - 1) * statistics.stdev(differences) / math.sqrt(count)
    return mean - spread, mean, mean + spread
