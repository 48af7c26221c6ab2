"""A trace of some steps of a run, for TensorBoard or Perfetto: `config.train.profile_steps`."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from memseg_jax.errors import UserError
from memseg_jax.runtime import distributed, files

log = logging.getLogger(__name__)

_PASSED_OVER = 3  # first steps after a start, which are slower and not traced
_NAME = "train"


class StepProfiler:
    """Traces some steps, as a context manager; with 0 steps it does nothing.

    Args:
        folder: of the run; the trace goes into its folder `profile`, one folder per process if
            there are several.
        first_step: completed steps when the run starts.
        count: steps to trace.
    """

    def __init__(self, folder: files.Place, first_step: int, count: int):
        self._folder = folder / "profile"
        if distributed.process_count() > 1:
            self._folder /= f"process_{distributed.process_index()}"
        self._first = first_step + _PASSED_OVER + 1
        self._last = self._first + count - 1
        self._running = False
        self._local: tempfile.TemporaryDirectory | None = None  # where the profiler can write

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """The block is step `number`, counted from 1.

        Raises:
            UserError: the folder cannot be made.
        """
        if not self._first <= number <= self._last:
            yield
            return
        if not self._running:
            files.make_folder(self._folder)
            local = self._folder
            if files.in_bucket(self._folder):
                self._local = tempfile.TemporaryDirectory(prefix="memseg_jax_")
                local = self._local.name
            jax.profiler.start_trace(local)
            self._running = True
        with jax.profiler.StepTraceAnnotation(_NAME, step_num=number):
            yield

    def end_of_step(self, number: int, results: Any) -> None:
        """Ends the trace after its last step, when `results` of the step are there."""
        if self._running and number >= self._last:
            jax.block_until_ready(results)
            if self._stop():
                what = "wrote the trace of steps %d to %d to %s"
                log.info(what, self._first, number, self._folder)

    def _stop(self) -> bool:
        """Ends the trace, if there is one; returns whether it could be written."""
        if not self._running:
            return False
        self._running = False
        jax.profiler.stop_trace()
        if self._local:
            with self._local as local:
                try:
                    files.copy_folder(Path(local), self._folder)
                except UserError as error:  # no reason to end the run that it shows
                    log.warning("the trace could not be written: %s", error)
                    return False
        return True
