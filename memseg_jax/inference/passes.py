"""The passes over one image: it is segmented at several scales and mirrored, then averaged.

As the PyTorch reference does it. At scale s the network's input is resized bilinearly to
floor(s * height) x floor(s * width), the source positions following from 1/s and not from the
ratio of the sizes. A mirrored pass is mirrored back, and the scores of classes that mirroring
swaps, such as left arm and right arm, are swapped. Every pass is resized to the size of the
result, and the plain mean of all is the prediction.
"""

import math
from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from memseg_jax.errors import UserError
from memseg_jax.models.layers import bilinear_matrix


def scaled(image: np.ndarray, scale: float) -> np.ndarray:
    """Resizes an image bilinearly by a factor.

    Args:
        image: float32 [height, width, 3].
        scale: the factor.

    Returns:
        float32 [floor(scale * height), floor(scale * width), 3], at least one pixel; the image
        itself at scale 1.
    """
    if scale == 1:
        return image
    sides = image.shape[:2]
    height, width = (max(math.floor(side * scale), 1) for side in sides)
    rounded = tuple(round(side * scale) for side in sides)
    if rounded == sides or min(rounded) < 1:  # OpenCV would copy, or refuse
        rows = bilinear_matrix(sides[0], height, scale).astype(np.float32)
        columns = bilinear_matrix(sides[1], width, scale).astype(np.float32)
        return np.einsum("hwc,Hh,Ww->HWc", image, rows, columns, optimize=True)
    # Asked by factor, OpenCV takes the positions from the factor, too. It rounds the size where
    # the reference truncates: at most one row and column too many.
    return cv2.resize(image, None, fx=scale, fy=scale)[:height, :width]


def passes(
    image: np.ndarray, scales: Sequence[float], flip: bool
) -> Iterator[tuple[np.ndarray, bool]]:
    """The inputs of all passes over one image.

    Args:
        image: float32 [height, width, 3].
        scales: factors.
        flip: whether every scale is also done on the mirrored image, right after it.

    Yields:
        The network's input and whether it is mirrored.
    """
    for scale in scales:
        at_scale = scaled(image, scale)
        yield at_scale, False
        if flip:
            yield at_scale[:, ::-1], True


def mirrored_classes(pairs: Sequence[Sequence[int]], num_classes: int) -> np.ndarray | None:
    """Which class of a mirrored image each class is.

    Args:
        pairs: classes that mirroring swaps.
        num_classes: number of classes.

    Returns:
        int32 [num_classes]; None if mirroring swaps nothing.

    Raises:
        UserError: there is no such class: a checkpoint may have fewer than the config.
    """
    members = [int(k) for pair in pairs for k in pair]
    if members and max(members) >= num_classes:
        raise UserError(
            f"config.augment.flip_pairs is {tuple(map(tuple, pairs))}, but the classes are "
            f"0..{num_classes - 1}"
        )
    if not members:
        return None
    classes = np.arange(num_classes, dtype=np.int32)
    for a, b in pairs:
        classes[[a, b]] = b, a
    return classes
