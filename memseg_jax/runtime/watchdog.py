"""Says where a run hangs: all stacks are printed when nothing has been finished for a long time."""

import faulthandler
import logging
import os
import threading
import time
from typing import Any

from memseg_jax.runtime.text import format_duration

log = logging.getLogger(__name__)


class Watchdog:
    """A thread that warns, as a context manager; it never ends anything.

    What counts as finished is a step, an image of an evaluation, a save, a compilation. A
    compilation is one piece: if it takes longer than the limit, it is reported like everything
    else, which does no harm. There is a report every time the limit has passed once more.

    Args:
        minutes: the limit; 0: there is no watchdog.
        stream: where the stacks go; it must have a file number. None: stderr.
    """

    def __init__(self, minutes: float, stream: Any = None):
        self._limit = 60 * minutes
        self._stream = stream
        self._what = "starting"
        self._since = self._reported = time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, what: str) -> None:
        """Something was finished.

        Args:
            what: is under way now, for the message: "step 7 or one before it".
        """
        self._what = what
        self._since = self._reported = time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self._limit > 0:
            self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(min(self._limit / 4, 10)):
            now = time.monotonic()
            if now - self._reported < self._limit:
                continue
            self._reported = now
            log.warning(
                "nothing was finished for %s; under way: %s (process %d). The program goes on "
                "waiting. Where each thread is:",
                format_duration(now - self._since),
                self._what,
                os.getpid(),
            )
            if self._stream is None:
                faulthandler.dump_traceback()
            else:
                faulthandler.dump_traceback(self._stream)
