"""The log of a run, as a file of its folder: `log.txt`.

What process 0 shows goes there, too, each line with its time: in a bucket it is what one sees of a
run on machines that one does not look at, and it is still there when they are gone.
"""

import logging
import shlex
import sys
import time
import traceback
from types import TracebackType

from memseg_jax.errors import Stopped, UserError
from memseg_jax.runtime import distributed, files, growing

log = logging.getLogger(__name__)

FILE = "log.txt"
# Characters that are kept of earlier starts: in a bucket each writing is of the whole file.
_KEPT = 2**20


def say(text: str) -> None:
    """Prints what a program is started for, its results and progress, and adds it to its log."""
    print(text, flush=True)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Handler):
            handler.add(text)


class LogFile:
    """Keeps what a run shows in `<folder>/log.txt`, as a context manager; in process 0 only.

    Of a run that goes on, the file is continued. The last entry says why the run ended. Trouble
    with the file ends no run.

    Args:
        folder: of the run, which holds its lock.
    """

    def __init__(self, folder: files.Place):
        self._path = folder / FILE
        self._handler: _Handler | None = None

    def __enter__(self) -> "LogFile":
        if distributed.is_primary():
            try:
                earlier = files.read_text(self._path) or ""
                if len(earlier) > _KEPT:
                    earlier = earlier[-_KEPT:].partition("\n")[2]
                self._handler = _Handler(growing.grow(self._path, earlier))
            except (OSError, UserError) as error:
                log.warning("no log is kept in %s: %s", self._path, error)
                return self
            logging.getLogger().addHandler(self._handler)
            self._handler.add(f"---- started: {shlex.join(sys.argv)}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handler is None:
            return
        logging.getLogger().removeHandler(self._handler)
        try:
            self._handler.add(f"---- {_end(error)}")
            self._handler.close()
        except (OSError, UserError) as failure:
            log.warning("%s", failure)


class _Handler(logging.Handler):
    """Takes what the program shows: our own messages, and the warnings of libraries."""

    def __init__(self, file: growing.GrowingFile):
        super().__init__()
        self._file = file
        self._open = True

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING or record.name.partition(".")[0] == "memseg_jax":
            try:
                self.add(self.format(record))
            except Exception:  # a full disk, for example
                self.handleError(record)

    def add(self, text: str) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with self.lock:
            if self._open:  # other threads may have something to say when the program has ended
                self._file.append("".join(f"{now} {line}\n" for line in text.splitlines()))

    def flush(self) -> None:
        if self._open:
            self._file.flush()

    def close(self) -> None:
        super().close()
        with self.lock:
            was_open, self._open = self._open, False
        if was_open:  # without the lock: the file may have to wait for its writer, who may log
            self._file.close()


def _end(error: BaseException | None) -> str:
    """Why a run ended, in words."""
    if error is None:
        return "ended"
    if isinstance(error, UserError | Stopped):
        return f"{'stopped' if isinstance(error, Stopped) else 'error'}: {error}"
    return "failed: " + "".join(traceback.format_exception(error))
