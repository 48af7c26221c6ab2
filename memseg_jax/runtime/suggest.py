"""What was probably meant: answers to misspelt names."""

import difflib
from collections.abc import Iterable

from memseg_jax.runtime.text import first_few


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """Returns the names that were most likely meant, best first.

    Dotted names also match by their last part, so that `batch_size` finds `train.batch_size`.

    Args:
        name: what was found.
        candidates: the names that exist.
        count: the most names to return.

    Returns:
        At most `count` of the candidates; an empty list if none is similar.
    """
    found = {}
    for candidate in sorted(set(candidates)):
        whole = _similarity(name, candidate)
        # A match of the last part alone is weaker evidence than one of the whole name.
        last = 0.9 * _similarity(name.rsplit(".", 1)[-1], candidate.rsplit(".", 1)[-1])
        found[candidate] = max(whole, last)
    best = max(found.values(), default=0.0)
    ranked = sorted(found, key=lambda candidate: -found[candidate])
    return [name for name in ranked if found[name] >= max(0.6, best - 0.15)][:count]


def did_you_mean(name: str, candidates: Iterable[str], prefix: str = "", suffix: str = "") -> str:
    """Returns a sentence such as "Did you mean train or evaluate?", or the valid names.

    Args:
        name: what was found.
        candidates: the names that exist.
        prefix: written before every name, such as "--".
        suffix: written after it, such as ".py".

    Returns:
        One sentence; if nothing is similar it lists the valid names (the first 20 of them).
    """
    candidates = list(candidates)
    names = [prefix + match + suffix for match in nearest(name, candidates)]
    if names:
        return f"Did you mean {' or '.join(names)}?"
    names = [prefix + candidate + suffix for candidate in candidates]
    return f"There are: {', '.join(first_few(names, 20)) or 'none'}."


def _similarity(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()
