"""The table of segmented pictures, `summary.csv`: the share of every class, and what is done."""

import csv
import io
import threading
from collections.abc import Iterable, Sequence

import numpy as np

from memseg_jax.runtime import files, growing

FILE = "summary.csv"
_FIRST = ("input", "result", "made_by", "frames", "height", "width")


class Summary:
    """A line for every picture and video whose results are in a folder.

    The file has the columns input (the path), result (the name of its results), made_by (which
    checkpoint and settings), frames (1 for a picture), height, width, and one per class with its
    share of all pixels. A line is added when all files of a result are written.

    Args:
        folder: of the results.
        class_names: K names.
        made_by: names the checkpoint and the settings of this run.
    """

    def __init__(self, folder: files.Place, class_names: Sequence[str], made_by: str):
        self._path = folder / FILE
        self._header = [*_FIRST, *class_names]
        self._made_by = made_by
        self._lock = threading.Lock()
        self._file: growing.GrowingFile | None = None
        self._rows: dict[str, list[str]] = {}  # by the name of the result
        try:
            text = files.read_text(self._path) or ""
        except OSError:  # writing it will fail, too, and say why
            text = ""
        header, *rows = csv.reader(io.StringIO(text or "\n"))
        if header == self._header:
            # A line that a kill has cut off has too few columns.
            self._rows = {row[1]: row for row in rows if len(row) == len(header)}

    def has(self, source: str, result: str) -> bool:
        """Whether this result was made of this file, by the same checkpoint and settings."""
        return self._rows.get(result, [])[:3] == [source, result, self._made_by]

    def begin(self, results: Iterable[str]) -> None:
        """Takes out the lines of results that are about to be made, and opens the file.

        Raises:
            UserError: it cannot be written.
        """
        for result in results:
            self._rows.pop(result, None)
        lines = [_line(row) for row in (self._header, *self._rows.values())]
        self._file = growing.grow(self._path, "".join(lines))

    def add(
        self, source: str, result: str, size: tuple[int, int], pixels: np.ndarray, frames: int = 1
    ) -> str:
        """Adds a line; threads may.

        Args:
            source: the picture or video.
            result: the name of its results.
            size: height and width.
            pixels: number of pixels of every class and of further values, all frames together.
            frames: their number.

        Returns:
            The largest classes and their shares, for a log.
        """
        names = self._header[len(_FIRST) :]
        shares = pixels[: len(names)] / max(pixels.sum(), 1)
        numbers = [frames, *size, *(f"{share:.6f}" for share in shares)]
        with self._lock:
            self._file.append(_line([source, result, self._made_by, *numbers]))
        largest = [k for k in np.argsort(-shares)[:4] if shares[k]]
        return ", ".join(f"{names[k]} {shares[k]:.0%}" for k in largest)

    def close(self) -> None:
        """Returns when all lines are in the file."""
        self._file.close()


def _line(row: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(row)
    return text.getvalue()
