"""Which classes look alike to the memory, and whether those are the ones that get confused."""

import dataclasses

import numpy as np
from scipy import stats
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

_SHUFFLES = 999
_PAIRS = 10


def class_vectors(rows: np.ndarray) -> np.ndarray:
    """One vector a class: the mean of those of its rows that are not zero.

    Args:
        rows: [classes, rows of a class, channels], of `Segmentor.rows_of`.

    Returns:
        float64 [classes, channels]; zero for a class without any.
    """
    used = np.any(rows != 0, axis=-1, keepdims=True)
    return rows.astype(np.float64).sum(axis=1) / np.maximum(used.sum(axis=1), 1)


def cosine(vectors: np.ndarray) -> np.ndarray:
    """Cosine similarities of all pairs.

    Args:
        vectors: [n, channels].

    Returns:
        float64 [n, n] in -1..1; with a zero vector 0, also with itself.
    """
    vectors = vectors.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return np.clip(unit @ unit.T, -1, 1)


def order_of(similarity: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """An order in which alike classes are neighbours, by average-linkage clustering.

    Args:
        similarity: [classes, classes].
        seen: bool [classes]; the others come last.

    Returns:
        int [classes], the classes in their order.
    """
    members, others = np.flatnonzero(seen), np.flatnonzero(~seen)
    if len(members) > 2:
        distance = 1 - similarity[np.ix_(members, members)]
        distance = (distance + distance.T) / 2
        np.fill_diagonal(distance, 0)
        tree = hierarchy.linkage(squareform(distance), "average", optimal_ordering=True)
        members = members[hierarchy.leaves_list(tree)]
    return np.concatenate([members, others])


def confusion_of_pairs(matrix: np.ndarray) -> np.ndarray:
    """The share of two classes' true pixels that is taken for the other one of the two.

    Args:
        matrix: int64 [classes, classes or one more], see `metrics.confusion_matrix`.

    Returns:
        float64 [classes, classes], symmetric, 0 on the diagonal; NaN where neither has a pixel.
    """
    classes = len(matrix)
    truth = matrix.sum(axis=1).astype(np.float64)
    between = matrix[:, :classes].astype(np.float64)
    between = between + between.T
    np.fill_diagonal(between, 0)
    both = truth[:, None] + truth
    return np.divide(between, both, out=np.full_like(between, np.nan), where=both > 0)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two classes.

    Attributes:
        classes: the two.
        similarity: of their rows, -1..1.
        confusion: share of their pixels that is taken for the other one.
    """

    classes: tuple[int, int]
    similarity: float
    confusion: float


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Whether alike classes are the ones that get confused.

    Attributes:
        correlation: Spearman's, over all pairs of seen classes that have pixels; NaN: not defined.
        chance: the share of shuffles of the classes whose correlation is at least as high (Mantel's
            test); NaN: not defined.
        pairs: how many pairs there are.
        confused: those with the most confusion, most first.
        alike: those with the highest similarity, highest first.
    """

    correlation: float
    chance: float
    pairs: int
    confused: list[Pair]
    alike: list[Pair]


def agreement(similarity: np.ndarray, matrix: np.ndarray, seen: np.ndarray) -> Agreement:
    """Compares similarities with confusions.

    Pairs that share a class are not independent, so the chance is not that of a plain correlation:
    the classes are shuffled as a whole (Mantel, "The detection of disease clustering", 1967).

    Args:
        similarity: [classes, classes].
        matrix: see `confusion_of_pairs`.
        seen: bool [classes], whether the memory has seen the class.
    """
    confusion = confusion_of_pairs(matrix)
    members = np.flatnonzero(seen & (matrix.sum(axis=1) > 0))
    one, two = np.triu_indices(len(members), 1)
    of_members = np.ix_(members, members)
    alike, confused = similarity[of_members], confusion[of_members]
    found = [
        Pair((int(members[i]), int(members[j])), float(alike[i, j]), float(confused[i, j]))
        for i, j in zip(one, two)
    ]
    correlation = chance = np.nan
    if len(found) > 2 and np.ptp(alike[one, two]) > 0 and np.ptp(confused[one, two]) > 0:
        ranks = np.zeros_like(alike)
        ranks[one, two] = stats.rankdata(alike[one, two])
        ranks = ranks + ranks.T
        of_confusion = stats.rankdata(confused[one, two])
        correlation = np.corrcoef(ranks[one, two], of_confusion)[0, 1]
        rng = np.random.default_rng(0)
        shuffles = (rng.permutation(len(members)) for _ in range(_SHUFFLES))
        shuffled = [np.corrcoef(ranks[s[one], s[two]], of_confusion)[0, 1] for s in shuffles]
        as_high = np.sum(np.array(shuffled) >= correlation - 1e-12)
        chance = (1 + as_high) / (1 + _SHUFFLES)
    return Agreement(
        float(correlation),
        float(chance),
        len(found),
        [x for x in sorted(found, key=lambda x: -x.confusion)[:_PAIRS] if x.confusion > 0],
        sorted(found, key=lambda x: -x.similarity)[:_PAIRS],
    )
