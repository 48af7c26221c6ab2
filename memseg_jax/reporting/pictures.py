"""Pictures of a gallery as text that a page can hold."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from memseg_jax.scoring.gallery import Picture


def for_page(picture: Picture) -> dict[str, Any]:
    """What the script of a page draws.

    Args:
        picture: with label maps of at most 256 values.

    Returns:
        width, height, image and confidence ("" if it is not known) as data URLs, truth and
        prediction as `run_lengths`.
    """
    height, width = picture.truth.shape
    return {
        "width": width,
        "height": height,
        "image": _url(picture.image),
        "confidence": _url(_jpeg(picture.confidence)) if picture.confidence.size else "",
        "truth": run_lengths(picture.truth),
        "prediction": run_lengths(picture.prediction),
    }


def run_lengths(label: np.ndarray) -> str:
    """A label map in a few kilobytes, exact: unlike pixels that a browser hands out.

    Browsers may change the colours of pictures (profiles) or what scripts read of them (privacy).

    Args:
        label: uint8 [height, width].

    Returns:
        Base64 of three bytes a run, line after line: its value, and its length, low byte first;
        longer runs are several.
    """
    flat = label.ravel()
    ends = np.append(np.flatnonzero(np.diff(flat)) + 1, flat.size)
    starts = np.concatenate([[0], ends[:-1]])
    runs = bytearray()
    for value, length in zip(flat[starts].tolist(), (ends - starts).tolist()):
        while length:
            part = min(length, 65535)
            runs += bytes((value, part & 255, part >> 8))
            length -= part
    return base64.b64encode(runs).decode()


def _jpeg(shades: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(shades).save(file, format="JPEG", quality=80)
    return file.getvalue()


def _url(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
