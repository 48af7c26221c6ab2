"""One thread that has the devices: jobs that wait while it works are joined into one call."""

import collections
import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

log = logging.getLogger(__name__)


class _Job(NamedTuple):
    kind: Hashable
    item: Any
    future: Future


class Batcher:
    """Answers jobs in the order in which they came, like ones together.

    While nothing waits, a job begins at once; those that come in the meantime are what the next
    call may join. There is no time of waiting for company.

    A call that raises is made again for each of its jobs alone, so that only those fail that
    cannot be done. Nothing that a call raises ends the thread.

    Args:
        run: takes a kind and 1 to `most` items of it; returns as many results.
        most: jobs per call.
    """

    def __init__(self, run: Callable[[Hashable, Sequence[Any]], Sequence[Any]], most: int):
        self._run, self._most = run, most
        self._waiting: collections.deque[_Job] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are answered."""
        return self._thread.is_alive() and not self._closed

    def submit(self, kind: Hashable, item: Any) -> Future:
        """Puts a job at the end of the queue.

        Args:
            kind: jobs of equal kinds may be joined; those of kind None are done alone.
            item: what `run` gets.

        Returns:
            The result to come. Cancelling it takes the job out of the queue, if it has not begun.

        Raises:
            RuntimeError: the batcher is closed.
        """
        job = _Job(kind, item, Future())
        with self._changed:
            if not self.alive:
                raise RuntimeError("the batcher is closed")
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Answers what was submitted, and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while jobs := self._next():
            self._answer(jobs)

    def _next(self) -> list[_Job]:
        """Waits for jobs, and takes the oldest and those like it; empty: there will be none."""
        with self._changed:
            while True:
                taken: list[_Job] = []
                others: collections.deque[_Job] = collections.deque()
                for job in self._waiting:
                    joins = not taken or (job.kind is not None and job.kind == taken[0].kind)
                    if len(taken) == self._most or not joins:
                        others.append(job)
                    elif job.future.set_running_or_notify_cancel():
                        taken.append(job)
                self._waiting = others
                if taken or self._closed:
                    return taken
                self._changed.wait()

    def _answer(self, jobs: list[_Job]) -> None:
        try:
            results = self._run(jobs[0].kind, [job.item for job in jobs])
            for job, result in zip(jobs, results, strict=True):
                job.future.set_result(result)
        except BaseException as error:  # whatever it is, the others are waiting
            waiting = [job for job in jobs if not job.future.done()]
            if len(jobs) == 1:
                log.exception("a request could not be answered")
                jobs[0].future.set_exception(error)
                return
            log.warning("%d requests failed together, so each is tried alone", len(jobs))
            for job in waiting:
                self._answer([job])
