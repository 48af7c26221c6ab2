"""List files: which images belong to a split, and which labels belong to them.

One sample a line; empty lines and those that start with # are skipped. A line names an image, or an
image and its label with a tab, a comma or a space between them. A CSV file may have a header, which
says in which columns they are.
"""

import codecs
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from memseg_jax.errors import UserError

# What the columns of a CSV file may be called.
IMAGE_COLUMNS = (
    "image",
    "image_path",
    "image_file",
    "img",
    "file_name",
    "filename",
    "file",
    "path",
)
LABEL_COLUMNS = (
    "label",
    "label_path",
    "label_file",
    "mask",
    "mask_path",
    "mask_file",
    "annotation",
)
_SEPARATORS = ("\t", ",", ";")


class Line(NamedTuple):
    """One sample of a list.

    Attributes:
        number: of the line, from 1.
        text: of the line, for messages.
        readings: what it can mean, in the order in which that is tried: an image and its label, or
            an image and "" where the label is found by its name.
    """

    number: int
    text: str
    readings: tuple[tuple[str, str], ...]


def read_list(path: Path, where: str, advice: str) -> list[tuple[int, str]]:
    """Reads a list of samples.

    Args:
        path: the list file: one sample a line; empty lines and those that start with # are skipped.
        where: for messages, what names the file.
        advice: for the message about a file that cannot be read.

    Returns:
        (line number from 1, text without spaces around it) of every sample.

    Raises:
        UserError: the file cannot be read or names no samples.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: the list file cannot be read ({error.strerror}; {where}). {advice}"
        ) from None
    # Windows writes UTF-16 with a byte-order mark where its shell redirects into a file.
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        lines = data.decode("utf-16" if wide else "utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: the list file is not UTF-8 text.") from None
    samples = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    samples = [(number, line) for number, line in samples if line and line[0] != "#"]
    if not samples:
        raise UserError(f"{path}: the list file names no samples ({where}). Expected one per line.")
    return samples


def read_lines(path: Path, where: str, advice: str) -> list[Line]:
    """Reads a list of samples, and what its lines can mean; see `read_list`.

    Raises:
        UserError: also if a CSV file with a header names no column of images.
    """
    samples = read_list(path, where, advice)
    columns = _columns(path, samples[0][1])
    if columns is None:
        return [Line(number, text, tuple(_readings(text))) for number, text in samples]
    separator, image, label = columns
    lines = []
    for number, text in samples[1:]:
        cells = _cells(text, separator)
        cells += [""] * (max(image, label) + 1 - len(cells))
        lines.append(Line(number, text, ((cells[image], cells[label] if label >= 0 else ""),)))
    if not lines:
        raise UserError(f"{path}: the list file has a header and names no samples ({where}).")
    return lines


def _columns(path: Path, first: str) -> tuple[str, int, int] | None:
    """Separator and columns of image and label (-1: none) by the header; None if there is none."""
    for separator in _SEPARATORS:
        names = [cell.lower() for cell in _cells(first, separator)]
        image = next((names.index(name) for name in IMAGE_COLUMNS if name in names), -1)
        label = next((names.index(name) for name in LABEL_COLUMNS if name in names), -1)
        # A stem may be called "image": a list without columns has a header only if it is a CSV.
        if image >= 0 and (label >= 0 or path.suffix.lower() == ".csv"):
            return separator, image, label
        if label >= 0 and len(names) > 1:
            raise UserError(
                f"{path}: the header {first!r} names no column of images. Expected one of "
                f"{', '.join(IMAGE_COLUMNS)}, and for labels one of {', '.join(LABEL_COLUMNS)}."
            )
    return None


def _cells(text: str, separator: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader([text], delimiter=separator))]


def _readings(text: str) -> Iterator[tuple[str, str]]:
    """What a line without a header can mean, in order; backslashes are tried as slashes."""
    forms = [text, text.replace("\\", "/")] if "\\" in text else [text]
    for form in forms:
        yield form, ""
        for separator in _SEPARATORS:
            if separator in form:
                cells = _cells(form, separator)
                if len(cells) == 2 and all(cells):
                    yield cells[0], cells[1]
        for position, character in enumerate(form):
            if character == " ":
                image, label = form[:position].strip(), form[position:].strip()
                yield image, label
