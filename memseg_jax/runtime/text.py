"""How messages show numbers of bytes, times, and long lists."""

import math
from collections.abc import Sequence

_SHOWN = 5  # entries of a list that a message names


def first_few(entries: Sequence[str]) -> list[str]:
    """The first entries, and then how many more there are: a message stays short."""
    more = [f"and {len(entries) - _SHOWN} more"] if len(entries) > _SHOWN else []
    return [*entries[:_SHOWN], *more]


def format_duration(seconds: float) -> str:
    """Returns a time in two units at most: "45s", "4m10s", "3h05m", "2d04h"; "?" for NaN."""
    if not math.isfinite(seconds):
        return "?"
    seconds = max(round(seconds), 0)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    minutes = seconds // 60
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = minutes // 60
    return f"{hours // 24}d{hours % 24:02d}h"


def format_bytes(count: float) -> str:
    """Returns "512 B", "3.2 KiB", "4.0 GiB"."""
    if count < 1024:
        return f"{count:.0f} B"
    power = min(int(math.log(count, 1024)), 4)
    return f"{count / 1024**power:.1f} {' KMGT'[power]}iB"
