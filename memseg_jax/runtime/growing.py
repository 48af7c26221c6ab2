"""A text file that grows by a few lines at a time, such as a table of metrics."""

import logging
import threading
from pathlib import Path
from typing import Protocol

from memseg_jax.errors import UserError
from memseg_jax.runtime import files

log = logging.getLogger(__name__)


class GrowingFile(Protocol):
    """A file that is open for appending."""

    def append(self, text: str) -> None:
        """Adds whole lines."""

    def flush(self) -> None:
        """Returns when all lines are in the file.

        Raises:
            UserError: they cannot be written.
        """

    def close(self) -> None:
        """As `flush`; nothing can be added any more. May be called twice."""


def grow(path: files.Place, text: str) -> GrowingFile:
    """Replaces a file by one with this text, to which lines can be added.

    On a disk, lines are in the file when `append` returns. In a bucket, where nothing can be added
    to an object, the whole file is written again in the background, every few seconds if there is
    something new: a kill loses what was added since, and never leaves half a file.

    Raises:
        UserError: the file cannot be written.
    """
    files.write_text(path, text)
    return _InBucket(path, text) if files.in_bucket(path) else _OnDisk(path)


class _OnDisk:
    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")

    def append(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _InBucket:
    def __init__(self, path: files.Place, text: str):
        self._path = path
        self._text = self._written = text
        self._writing = threading.Lock()
        self._changed, self._closed = threading.Event(), threading.Event()
        self._told = False  # that it cannot be written
        self._thread = threading.Thread(target=self._write_again, name=path.name, daemon=True)
        self._thread.start()

    def append(self, text: str) -> None:
        self._text += text
        self._changed.set()

    def flush(self) -> None:
        with self._writing:
            text = self._text
            if text != self._written:
                self._replace(text)
                self._written, self._told = text, False

    def close(self) -> None:
        self._closed.set()
        self._changed.set()
        self._thread.join()
        self.flush()

    def _replace(self, text: str) -> None:
        # A run that stood still for long may find that another one has the folder now.
        try:
            replaced = files.replace_if(self._path, self._written, text)
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error}") from error
        if not replaced:
            raise UserError(
                f"{self._path} was changed by another program, and is left as it is. Does another "
                "run use this folder?"
            )

    def _write_again(self) -> None:
        while not self._closed.is_set():
            self._changed.wait()
            self._closed.wait(files.seconds_between_looks(self._path))
            self._changed.clear()
            try:
                self.flush()
            except UserError as error:  # it is tried again with the next lines
                if not self._told:
                    self._told = True  # before: the warning may be a line of this very file
                    log.warning("%s", error)
