"""How the rows of the memory moved over a run, from what was kept at its evaluations."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from memseg_jax.scoring.memory_history import MemoryRecord


@dataclasses.dataclass(frozen=True)
class Course:
    """The rows of every class at the evaluations of a run.

    Attributes:
        steps: int64 [records].
        norms: float64 [records, classes], of the mean row of the class.
        moved: float64 [records, classes], how far that row is from where it was at the record
            before, as a share of its norm now; NaN where it is new or was never seen.
        likeness: float64 [records, classes], cosine similarity with the row of the last record; NaN
            where one of the two was never seen.
    """

    steps: np.ndarray
    norms: np.ndarray
    moved: np.ndarray
    likeness: np.ndarray


def course_of(
    records: Sequence[MemoryRecord], vectors_of: Callable[[np.ndarray], tuple[np.ndarray, ...]]
) -> Course:
    """The course of a run.

    Args:
        records: by step; may be empty.
        vectors_of: makes a memory one vector a class [classes, channels], and says which classes
            were seen, bool [classes].
    """
    if not records:
        nothing = np.zeros((0, 0))
        return Course(np.zeros(0, np.int64), nothing, nothing, nothing)
    vectors, seen = map(np.stack, zip(*(vectors_of(record.memory) for record in records)))
    norms = np.linalg.norm(vectors, axis=-1)
    before = np.concatenate([vectors[:1], vectors[:-1]])
    known = seen & np.concatenate([np.zeros_like(seen[:1]), seen[:-1]])
    with np.errstate(divide="ignore", invalid="ignore"):
        moved = np.linalg.norm(vectors - before, axis=-1) / norms
        likeness = np.einsum("nkc,kc->nk", vectors, vectors[-1]) / (norms * norms[-1])
    return Course(
        np.array([record.step for record in records]),
        norms,
        np.where(known, moved, np.nan),
        np.where(seen & seen[-1] & (norms > 0) & (norms[-1] > 0), likeness, np.nan),
    )
