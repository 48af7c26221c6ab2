"""Sizes that are symbols: a program for pictures of any size is traced with them.

`memseg_jax.exporting` makes such programs. What is chosen by size in a model cannot be chosen then;
whatever suits every size is taken.
"""

from collections.abc import Iterable
from typing import Any

from jax import export


def is_symbolic(shape: Iterable[Any]) -> bool:
    """Whether some side of a shape is a symbol rather than a number."""
    return any(map(export.is_symbolic_dim, shape))
