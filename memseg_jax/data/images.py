"""Reads image and label files of any common kind into arrays, or says by name why it cannot.

Pillow decodes everything: it raises on damaged files where OpenCV returns grey bars, and it keeps
the indices of palette PNGs where OpenCV turns them into colours.
"""

import contextlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping

import cv2
import numpy as np
from PIL import Image, ImageOps

from memseg_jax.data import IGNORE_LABEL
from memseg_jax.errors import PROCESS_ERRORS, UserError
from memseg_jax.runtime import files
from memseg_jax.runtime.text import first_few

_NOT_ALLOWED = 254
# Only these decoders may run: some others of Pillow's start external programs.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
Image.init()  # now, and not in the threads that read: it imports the decoders
_ORIENTATION_TAG = 0x0112
_COLOUR_EXAMPLES = 3
_KEPT_VALUES = 1000  # of a label's distinct values in an error


class LabelValueError(UserError):
    """A label file holds values that the config does not allow.

    Attributes:
        values: pixels per value in the file, allowed ones too (the first 1000 values at most).
    """

    def __init__(self, message: str, values: Mapping[int, int] | None = None):
        super().__init__(message)
        self.values = dict(values or {})


class TooLargeError(UserError):
    """An image has more pixels than are allowed; see `allow_megapixels`."""


def allow_megapixels(limit: float) -> None:
    """Sets how large an image this process reads; by default, Pillow's limit of 179 megapixels.

    A small file may claim to hold more pixels than there is memory for.

    Args:
        limit: in millions of pixels.
    """
    Image.MAX_IMAGE_PIXELS = int(limit * 1e6 / 2)  # Pillow warns there, and refuses at twice that
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_image(path: str | os.PathLike, data: bytes | None = None) -> np.ndarray:
    """Reads an image as 8-bit RGB, the way a viewer shows it.

    The EXIF orientation is applied. Greyscale gives three equal channels, palette and CMYK are
    converted, 16-bit values are divided by 256, transparency is dropped (not composited), and of a
    file with several frames only the first is read.

    Args:
        path: the file.
        data: what is in the file, if it was read already; the path is for messages then.

    Returns:
        uint8 `[height, width, 3]`, RGB.

    Raises:
        UserError: the file is missing, empty, damaged, far too large (`TooLargeError`), or of an
            unsuitable kind.
    """
    with _opened(path, data) as image:
        return _rgb(_upright(image), image.format, path)


def rgb_of(picture: Image.Image) -> np.ndarray:
    """Converts a picture that Pillow has opened as `read_image` does; it stays as it is.

    Returns:
        uint8 `[height, width, 3]`, RGB.

    Raises:
        UserError: it has 32-bit values.
        OSError: its file turns out to be damaged.
    """
    upright = picture if _orientation(picture) == 1 else ImageOps.exif_transpose(picture)
    return _rgb(upright, picture.format, getattr(picture, "filename", "") or "the picture")


def _rgb(image: Image.Image, kind: str | None, path: str | os.PathLike) -> np.ndarray:
    """An upright image as `read_image` gives it; `kind` is the format of its file."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and kind in ("PNG", "PPM")):
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if mode in ("I", "F"):
        raise UserError(
            f"{path}: the image has 32-bit values (Pillow mode {mode}), whose range is not "
            "known. Expected 8 or 16 bits per channel: convert the file."
        )
    # `convert` copies the pixels even if there is nothing to convert.
    return np.array(image if mode == "RGB" else image.convert("RGB"))


def read_label(path: str | os.PathLike) -> np.ndarray:
    """Reads the values that are stored in a label file, unchanged.

    Palette files give the indices, never the colours; bilevel, 2-bit and 4-bit greyscale files
    give the stored numbers 0, 1, 2, ... and not their brightness. An EXIF orientation is applied
    as it is to images.

    Args:
        path: the file: one channel of integers (greyscale or palette; 1 to 32 bits).

    Returns:
        uint8, uint16 or int32 `[height, width]`.

    Raises:
        UserError: the file is missing, damaged, lossy, or holds colours instead of class ids.
    """
    with _opened(path) as image:
        if image.format in ("JPEG", "MPO"):
            raise UserError(
                f"{path}: the label is a JPEG file. JPEG changes pixel values, and with them the "
                "class ids. Expected a PNG file whose pixel values are class ids."
            )
        image = _upright(image)
        mode = image.mode
        if mode == "1":
            return np.array(image).astype(np.uint8)
        if mode == "L":
            # Pillow stretches 2- and 4-bit greyscale to 0..255; class ids must not be stretched.
            levels = 2 ** _png_bit_depth(path) if image.format == "PNG" else 256
            label = np.array(image)
            return label if levels == 256 else label // (255 // (levels - 1))
        if mode == "P":
            return np.array(image)
        if mode.startswith("I;16"):
            return np.asarray(image).astype(np.uint16)
        if mode == "I":
            return np.array(image)
        raise UserError(_not_an_index_image(path, image))


def read_colors(path: str | os.PathLike) -> np.ndarray:
    """Reads the colours of a label file, as a viewer shows them.

    A palette file gives its colours, a greyscale or bilevel file three equal channels; transparency
    is dropped. An EXIF orientation is applied as it is to images.

    Args:
        path: the file: 8 bits per channel, in a format that keeps every value.

    Returns:
        uint8 `[height, width, 3]`, RGB.

    Raises:
        UserError: the file is missing, damaged, lossy, or not of 8 bits per channel.
    """
    with _opened(path) as image:
        if image.format in ("JPEG", "MPO"):
            raise UserError(
                f"{path}: the label is a JPEG file. JPEG changes the colours of pixels, most "
                "of all where classes meet. Export the masks as PNG files; a copy of this file as "
                "PNG would keep the damage."
            )
        image = _upright(image)
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
            raise UserError(
                f"{path}: the label has mode {image.mode}, not 8 bits for each of red, green and "
                "blue. Expected a colour mask (config.data.label_colors is set): save it as an RGB "
                "PNG file, or leave config.data.label_colors empty if the file holds class ids."
            )
        return np.array(image.convert("RGB"))


def image_size(path: str | os.PathLike, data: bytes | None = None) -> tuple[int, int]:
    """Returns (height, width) in pixels as `read_image` would give, from the header alone.

    Args:
        path: the file.
        data: what is in the file, if it was read already; the path is for messages then.

    Raises:
        UserError: the file is missing, empty, far too large (`TooLargeError`), or its header
            cannot be read.
    """
    with _opened(path, data) as image:
        width, height = image.size
        # Pillow's TIFF reader has swapped the sides already.
        if image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8):
            width, height = height, width
        return height, width


def image_mode(path: str | os.PathLike) -> str:
    """Returns Pillow's name for what the pixels of a file are, such as "RGB", from its header.

    Args:
        path: the file.

    Raises:
        UserError: the file is missing, empty, or its header cannot be read.
    """
    with _opened(path) as image:
        return image.mode


def exif_orientation(path: str | os.PathLike) -> int:
    """Returns the EXIF orientation of an image file, 1 (upright) to 8; 1 if it has none.

    Args:
        path: the file.

    Raises:
        UserError: the file is missing, empty, or its header cannot be read.
    """
    with _opened(path) as image:
        return _orientation(image)


def map_ids(
    label: np.ndarray, num_classes: int, ignore_label: int, path: str | os.PathLike
) -> np.ndarray:
    """Checks the values of a label file and maps its ignore value to `IGNORE_LABEL`.

    Args:
        label: integers `[height, width]` as `read_label` gives them.
        num_classes: K, at most 254; 0..K-1 are allowed.
        ignore_label: the value in the file that means "not labelled" (it wins over a class of the
            same id); -1 if there is none.
        path: the label file, for the message.

    Returns:
        uint8 `[height, width]`: 0..K-1 or `IGNORE_LABEL`.

    Raises:
        LabelValueError: other values occur; the message names them.
    """
    if label.dtype == np.uint8:
        table = np.full(256, _NOT_ALLOWED, np.uint8)
        table[:num_classes] = np.arange(num_classes)
        if 0 <= ignore_label < 256:
            table[ignore_label] = IGNORE_LABEL
        mapped = cv2.LUT(label, table)  # five times as fast as table[label]
    else:
        inside = (label >= 0) & (label < num_classes)
        mapped = np.where(inside, label, _NOT_ALLOWED).astype(np.uint8)
        if ignore_label >= 0:
            mapped[label == ignore_label] = IGNORE_LABEL
    if (mapped == _NOT_ALLOWED).any():
        raise _label_value_error(label, num_classes, ignore_label, path)
    return mapped


def value_advice(values: Mapping[int, int], num_classes: int, ignore_label: int) -> str:
    """Says what is probably wrong with label files that hold values which are not allowed.

    Args:
        values: pixels per value in the file or files, allowed and not allowed ones.
        num_classes: K of the config.
        ignore_label: ignore value of the config, or -1.

    Returns:
        One or two sentences: the likely cause and what to do.
    """
    seen = sorted(values)
    bad = _values_not_allowed(seen, num_classes, ignore_label)
    if 255 in bad and set(seen) <= {0, 255}:
        return (
            "The files hold 0 and 255 only, like masks of one object: name 2 classes, and set "
            "config.data.label_map = ((0, 'background'), (255, 'object')), with their names; or "
            "set config.data.ignore_label=255 if 255 means 'not labelled'."
        )
    if bad == [255]:
        return "If 255 means 'not labelled', set config.data.ignore_label=255."
    if bad == [num_classes]:
        if ignore_label == 0 or 0 not in seen:
            return (
                "The class ids of the files seem to count from 1. Say with config.data.label_map "
                "what each is, such as ((0, 'ignore'), (1, 'road')); or put a name for id 0 first "
                "in config.data.class_names (and set config.data.ignore_label=0 if 0 means "
                "'not labelled')."
            )
        return (
            f"If {num_classes} means 'not labelled', set config.data.ignore_label={num_classes}; "
            f"if it is a class, add its name to config.data.class_names, which has {num_classes}."
        )
    if bad and bad[-1] > 255:
        return (
            "Values above 255 are often instance ids or class id times 1000: save plain class ids, "
            "or say with config.data.label_map what each of them is."
        )
    if len(bad) > 20:
        return (
            "So many different values look like a grey picture of a colour mask, or like a label "
            "that was resized with interpolation: save class ids, and resize with nearest "
            "neighbour only."
        )
    return (
        "Correct the files, name every class in config.data.class_names, or set "
        "config.data.ignore_label to the value that means 'not labelled'."
    )


@contextlib.contextmanager
def _opened(path: str | os.PathLike, data: bytes | None = None) -> Iterator[Image.Image]:
    """Opens a file with Pillow and turns everything its decoders raise into a UserError.

    Errors that say nothing about the file pass as they are: those of Python itself, and what is
    raised outside Pillow, such as by a module that another thread is importing.
    """
    try:
        if data is None and files.in_bucket(path):
            data = _downloaded(path)
        if data is None and os.path.isfile(path) and os.path.getsize(path) == 0:
            raise UserError(f"{path}: the file is empty (0 bytes). Replace or remove it.")
        with Image.open(path if data is None else io.BytesIO(data), formats=_FORMATS) as image:
            yield image
    except (UserError, *PROCESS_ERRORS):
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file.") from None
    except Image.UnidentifiedImageError:
        raise UserError(
            f"{path}: not an image file, or damaged at its start. Expected one of "
            f"{', '.join(_FORMATS)}. Replace or remove it."
        ) from None
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"{path}: refused as far too large ({error}). Scale it down.") from None
    except Exception as error:
        # Decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and others.
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not Pillow's
            raise UserError(f"{path}: the file cannot be read ({error.strerror}).") from None
        if not _raised_in_decoder(error):
            raise
        raise UserError(
            f"{path}: the image cannot be decoded ({error}). The file is truncated or damaged: "
            "replace or remove it."
        ) from error


def _downloaded(path: files.Place) -> bytes:
    try:
        return files.read_bytes(path)
    except OSError as error:
        raise UserError(f"{path}: the file cannot be read ({error}).") from error


def _raised_in_decoder(error: Exception) -> bool:
    """Whether an error comes from Pillow, what it uses of the standard library, or this module."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    name = frame.f_globals.get("__name__", "")
    return name == __name__ or name.partition(".")[0] in {"PIL", *sys.stdlib_module_names}


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation in the header of an opened file that has not been decoded yet."""
    # For a PNG without EXIF, Pillow would decode the pixels to look behind them.
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    return orientation if orientation in range(1, 9) else 1


def _upright(image: Image.Image) -> Image.Image:
    """Decodes and applies the EXIF orientation, in place."""
    turned = _orientation(image) != 1
    image.load()
    if turned:
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _png_bit_depth(path: str | os.PathLike) -> int:
    """Bits per sample, from the header of a PNG file (byte 24 by the PNG specification)."""
    with open(path, "rb") as file:
        return file.read(25)[24]


def _not_an_index_image(path: str | os.PathLike, image: Image.Image) -> str:
    """The message for a label file with several channels."""
    expected = (
        "Expected one channel (greyscale or palette PNG) whose pixel values are class ids 0, 1, "
        "2, ..."
    )
    if image.mode == "F":
        return f"{path}: the label holds floating-point values. {expected}"
    colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    if (colours == colours[:, :1]).all():
        return (
            f"{path}: the label has mode {image.mode} instead of one channel; its colour channels "
            f"are equal. {expected} Save one of the channels alone."
        )
    distinct = np.unique(colours, axis=0)
    examples = ", ".join(str(tuple(c.tolist())) for c in distinct[:_COLOUR_EXAMPLES])
    return (
        f"{path}: the label is a colour mask (mode {image.mode}, {len(distinct)} colours such as "
        f"{examples}). {expected} Or name the colours of every class in config.data.label_colors, "
        "such as ((0, 0, 0), (128, 64, 128)); --mode init finds them."
    )


def _values_not_allowed(values: list[int], num_classes: int, ignore_label: int) -> list[int]:
    return [v for v in values if not 0 <= v < num_classes and (v != ignore_label or v < 0)]


def _label_value_error(
    label: np.ndarray, num_classes: int, ignore_label: int, path: str | os.PathLike
) -> LabelValueError:
    """The error for a label with values that are not allowed."""
    unique, pixels = np.unique(label, return_counts=True)
    values = dict(zip(unique.tolist(), pixels.tolist()))
    bad = _values_not_allowed(list(values), num_classes, ignore_label)
    found = ", ".join(first_few([f"{v} ({values[v]} pixels)" for v in bad]))
    allowed = f"0..{num_classes - 1} ({num_classes} classes)"
    allowed += f" and {ignore_label} (not labelled)" if ignore_label >= 0 else ", no ignore value"
    return LabelValueError(
        f"{path}: label values that are not allowed: {found}. Allowed: {allowed}. "
        + value_advice(values, num_classes, ignore_label),
        dict(list(values.items())[:_KEPT_VALUES]),
    )
