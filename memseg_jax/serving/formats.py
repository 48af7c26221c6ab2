"""The forms in which a result is sent: PNG files, and JSON with polygons or run lengths.

Polygons and run lengths describe a class's pixels exactly: `cv2.fillPoly` and COCO's tools give
them back.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image

from memseg_jax.inference import Prediction
from memseg_jax.scoring import visualize

FORMATS = ("png", "values", "polygons", "rle")
_QUICK = 3  # of zlib's levels: label maps are small at any of them


def label_png(prediction: Prediction, palette: np.ndarray) -> bytes:
    """A PNG file whose pixel values are the class ids, and that viewers show in colour.

    Args:
        prediction: of a picture.
        palette: uint8 [classes, 3].
    """
    picture = Image.fromarray(prediction.label)
    picture.putpalette(palette.tobytes())
    return _png(picture)


def values_png(prediction: Prediction) -> bytes:
    """A PNG file for programs: red is the class id, green the confidence times 255, blue is 0.

    Args:
        prediction: of a picture, with its confidence.
    """
    values = np.zeros((*prediction.label.shape, 3), np.uint8)
    values[..., 0] = prediction.label
    values[..., 1] = np.round(prediction.confidence * 255)
    return _png(Image.fromarray(values))


def polygons(prediction: Prediction, class_names: Sequence[str]) -> dict[str, Any]:
    """The outlines of the connected areas of every class.

    Args:
        prediction: of a picture, with its confidence.
        class_names: K names.

    Returns:
        "height", "width" and "segments": one per area of 8-connected pixels, with "class_id",
        "name", "pixels", "confidence" (the mean over its pixels), and "polygons": its outline and
        the outlines of its holes, lists of [x, y]. Corners are centres of pixels that belong to the
        area: pixels on the lines are inside, also those on the outline of a hole.
    """
    segments = []
    for k, name in _present(prediction.label, class_names):
        mask = (prediction.label == k).astype(np.uint8)
        left, top, width, height = cv2.boundingRect(mask)  # what is outside would take most time
        box = np.s_[top : top + height, left : left + width]
        mask = np.ascontiguousarray(mask[box])
        _, areas = cv2.connectedComponents(mask, connectivity=8)
        pixels = np.bincount(areas.ravel())
        sums = np.bincount(areas.ravel(), weights=prediction.confidence[box].ravel())
        found, tree = cv2.findContours(
            mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=(left, top)
        )
        for index, (_, _, hole, parent) in enumerate(tree[0]):
            if parent >= 0:  # itself a hole
                continue
            outlines = [found[index]]
            while hole >= 0:
                outlines.append(found[hole])
                hole = tree[0][hole][0]
            x, y = found[index][0, 0]
            area = areas[y - top, x - left]
            segments.append(
                {
                    "class_id": k,
                    "name": name,
                    "pixels": int(pixels[area]),
                    "confidence": round(float(sums[area] / pixels[area]), 4),
                    "polygons": [outline[:, 0].tolist() for outline in outlines],
                }
            )
    height, width = prediction.label.shape
    return {"height": height, "width": width, "segments": segments}


def run_lengths(prediction: Prediction, class_names: Sequence[str]) -> dict[str, Any]:
    """The pixels of every class as run lengths.

    Args:
        prediction: of a picture, with its confidence.
        class_names: K names.

    Returns:
        "height", "width" and "segments": one per class that occurs, with "class_id", "name",
        "pixels", "confidence" (the mean over its pixels), and "segmentation", COCO's uncompressed
        form: "size" [height, width] and "counts", lengths of runs down the columns from the left
        one on, alternately outside and inside, the first one outside.
    """
    height, width = prediction.label.shape
    flat = prediction.label.ravel(order="F")
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends = np.append(starts[1:], flat.size)
    segments = []
    for k, name in _present(prediction.label, class_names):
        inside = flat[starts] == k
        edges = np.stack([starts[inside], ends[inside]], axis=1).ravel()
        counts = np.diff(np.concatenate([[0], edges, [flat.size]]))
        if counts[-1] == 0:
            counts = counts[:-1]
        pixels = int(counts[1::2].sum())
        confidence = prediction.confidence[prediction.label == k].mean(dtype=np.float64)
        segments.append(
            {
                "class_id": k,
                "name": name,
                "pixels": pixels,
                "confidence": round(float(confidence), 4),
                "segmentation": {"size": [height, width], "counts": counts.tolist()},
            }
        )
    return {"height": height, "width": width, "segments": segments}


def _present(label: np.ndarray, class_names: Sequence[str]) -> Iterator[tuple[int, str]]:
    for k in np.flatnonzero(visualize.pixels_per_value(label)):
        yield int(k), class_names[k]


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG", compress_level=_QUICK)
    return file.getvalue()
