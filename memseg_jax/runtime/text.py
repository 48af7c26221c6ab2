"""How messages show numbers of bytes, times, and long lists."""

import math
from collections.abc import Sequence


def first_few(entries: Sequence[str], shown: int = 5) -> list[str]:
    """The first entries, and then how many more there are: a message stays short."""
    more = [f"and {len(entries) - shown} more"] if len(entries) > shown else []
    return [*entries[:shown], *more]


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


def format_bytes(count: float | None) -> str:
    """Returns "812 MB", "14.6 GB", or "?" for None; decimal units, as makers of chips use them."""
    if count is None:
        return "?"
    power = min(len(str(round(count))) - 1, 12) // 3
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
