"""Points of many dimensions on a sheet of paper: the rows of the memory and pixels around them."""

import dataclasses

import numpy as np

_PERPLEXITY = 30


@dataclasses.dataclass(frozen=True)
class FlatMap:
    """Points in two dimensions.

    Attributes:
        name: how it was made: "PCA", "t-SNE", or "the memory's own numbers".
        axes: names of the two axes.
        rows: float64 [rows, 2].
        pixels: float64 [pixels, 2].
    """

    name: str
    axes: tuple[str, str]
    rows: np.ndarray
    pixels: np.ndarray


def principal_axes(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two directions in which points differ most.

    Args:
        points: [points, numbers].

    Returns:
        float64 [points, 2], centred; and the shares of the variance along both.
    """
    centred = points.astype(np.float64) - points.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    # The sign of a direction is arbitrary: the largest coordinate is made positive.
    places = left[:, :2] * sizes[:2]
    largest = np.abs(places).argmax(axis=0)
    places = places * np.where(places[largest, np.arange(places.shape[1])] < 0, -1, 1)
    total = np.sum(sizes**2)
    shares = sizes[:2] ** 2 / total if total > 0 else np.zeros(len(sizes[:2]))
    missing = 2 - places.shape[1]
    return np.pad(places, ((0, 0), (0, missing))), np.pad(shares, (0, missing))


def maps_of(rows: np.ndarray, pixels: np.ndarray) -> list[FlatMap]:
    """Maps of rows and pixels together.

    Numbers that are two already are shown as they are. Otherwise there is a map by PCA, and one by
    t-SNE where scikit-learn is installed and there are points enough.

    Args:
        rows: [rows, numbers], as the memory keeps them.
        pixels: [pixels, numbers], see `Segmentor.in_memory`.
    """
    if rows.shape[1] == 2:
        axes = ("mean of the features", "standard deviation of the features")
        return [FlatMap("the memory's own numbers", axes, rows, pixels)]
    points = np.concatenate([rows, pixels]).astype(np.float64)
    places, shares = principal_axes(points)
    axes = tuple(f"axis {i}: {share:.0%} of the variance" for i, share in enumerate(shares, 1))
    found = [("PCA", axes, places)]
    places = _neighbours(points)
    if places is not None:
        found.append(("t-SNE", ("no unit: only who is near whom counts", ""), places))
    split = len(rows)
    return [FlatMap(name, axes, p[:split], p[split:]) for name, axes, p in found]


def has_neighbour_maps() -> bool:
    """Whether scikit-learn is installed, which makes maps by t-SNE."""
    try:
        import sklearn.manifold  # noqa: F401 - here, as it is slow, and not everybody's
    except ImportError:
        return False
    return True


def _neighbours(points: np.ndarray) -> np.ndarray | None:
    """[points, 2] by t-SNE on directions, as the method compares features by their cosine."""
    if len(points) < 10 or not has_neighbour_maps():
        return None
    from sklearn.manifold import TSNE

    norms = np.linalg.norm(points, axis=-1, keepdims=True)
    unit = np.divide(points, norms, out=np.zeros_like(points), where=norms > 0)
    perplexity = min(_PERPLEXITY, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(unit)
