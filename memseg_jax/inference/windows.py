"""Sliding windows: where they are, and adding up their scores."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Size = tuple[int, int]
Window = tuple[slice, slice]


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """First positions of the windows that cover `size`; the last one is shifted back inside."""
    window = min(window, size)
    count = max(size - window + stride - 1, 0) // stride + 1
    return [min(i * stride, size - window) for i in range(count)]


def windows_of(size: Size, window: Size, stride: Size) -> list[Window]:
    """The windows that cover an image, row by row.

    Args:
        size: height and width of the image.
        window: height and width of a window; an image that is smaller is taken as it is.
        stride: vertical and horizontal step.
    """
    rows = window_starts(size[0], window[0], stride[0])
    columns = window_starts(size[1], window[1], stride[1])
    height, width = min(window[0], size[0]), min(window[1], size[1])
    return [(slice(y, y + height), slice(x, x + width)) for y in rows for x in columns]


def cover_counts(windows: list[Window], axis: int, size: int) -> np.ndarray:
    """How many windows cover each row (axis 0) or column (axis 1); at least 1.

    Windows form a grid, so the product of both counts is how many windows cover a pixel.

    Args:
        windows: from `windows_of`.
        axis: 0 or 1.
        size: length of the result.

    Returns:
        float32 [size].
    """
    counts = np.zeros(size, np.float32)
    for part in {window[axis].start: window[axis] for window in windows}.values():
        counts[part] += 1
    return np.maximum(counts, 1)


def accumulate(canvas: Array, scores: Array, starts: Array, active: Array, width: Array) -> Array:
    """Adds windows to the canvas at their places.

    Args:
        canvas: [pixels, classes], an image row by row, and room for one row of a window after it.
        scores: [batch, h, w, classes]; 0 where a window reaches beyond the image, which it only
            does where the image is smaller.
        starts: int32 [batch, 2].
        active: bool [batch]; the others are left out.
        width: int32, that of the image.
    """
    length = scores.shape[2]

    def add(canvas: Array, window: tuple[Array, Array, Array]) -> tuple[Array, None]:
        scores, start, active = window

        def add_row(row: Array, canvas: Array) -> Array:
            first = (start[0] + row) * width + start[1]
            new = jax.lax.dynamic_slice_in_dim(canvas, first, length)
            new += jnp.where(active, scores[row], 0)
            return jax.lax.dynamic_update_slice_in_dim(canvas, new, first, 0)

        return jax.lax.fori_loop(0, scores.shape[0], add_row, canvas), None

    return jax.lax.scan(add, canvas, (scores, starts, active))[0]
