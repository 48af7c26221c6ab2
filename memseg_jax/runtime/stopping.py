"""Stopping a training when it is asked to, without losing a step.

SIGTERM (clusters that take a machine back), SIGUSR1 (Slurm's `--signal`) and SIGINT (Ctrl-C) ask
for a stop: the steps that are under way are finished, the state saved, and the program exits with
`Stopped.EXIT_STATUS`. A second Ctrl-C ends it at once.

Several processes stop at the same step, whichever of them got the signal: each gives its flag to
the training step along with its part of the batch, the step returns the largest of all flags, and
every process sees it when it looks at that step.
"""

import os
import signal
import sys
import threading
from typing import Any

import numpy as np

from memseg_jax.errors import Stopped
from memseg_jax.runtime import distributed

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)


class StopRequests:
    """Listens for requests to stop, as a context manager; use it in the main thread.

    A thread does the listening, so that it works while the main thread waits for a compilation or a
    device. In other threads than the main one, where signals cannot be caught, nothing changes.

    Args:
        ends_process: whether this is the program. If it is one call of another one, such as a
            notebook, requests that end the training at once are raised as exceptions there.

    Attributes:
        unsaved: whether there is anything to save. Until the loop sets it, the first request ends
            the program at once: what is on disk is all there is.
    """

    def __init__(self, ends_process: bool = True) -> None:
        self.unsaved = False
        self._ends_process = ends_process
        self._received = 0
        self._name: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is not threading.main_thread():
            return self
        distributed.stop_requested().clear()
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._pipe = (read, write)
        self._before_wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._before_wakeup)
        self._before = {}
        os.close(self._pipe[1])  # ends the thread
        self._listener.join()
        os.close(self._pipe[0])

    def _handle(self, number: int, frame: Any) -> None:
        """Called in the main thread, as soon as it runs Python; the listener knows before."""
        self._received += 1
        again = self._received > 1 and number == signal.SIGINT
        if not self._ends_process and (again or not self.unsaved):
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def _listen(self) -> None:
        while received := os.read(self._pipe[0], 1):
            number = received[0]
            if number not in SIGNALS:
                continue
            if self._name is not None:
                if number == signal.SIGINT and self._ends_process:
                    print("interrupted a second time: stopped at once", file=sys.stderr, flush=True)
                    os._exit(130)
                continue
            if not self.unsaved and not self._ends_process:
                continue
            self._name = signal.Signals(number).name
            if self.unsaved:
                print(
                    f"{self._name}: finishing the step and saving; Ctrl-C stops at once",
                    file=sys.stderr,
                    flush=True,
                )
            if not self.unsaved:
                distributed.end_all(
                    Stopped(
                        f"stopped by {self._name}, there was nothing new to save. Start the same "
                        "command again to go on."
                    )
                )
            distributed.request_stop(number)

    def flags(self, devices: int) -> np.ndarray:
        """This process's part of the training step's `batch["stop"]`, int32 [devices]."""
        return np.full(devices, self.wanted(), np.int32)

    def reached(self, seen: bool) -> bool:
        """Whether to save and stop after this step; all processes get the same answer.

        Args:
            seen: whether a step has returned a flag. A process that is alone need not wait for it.
        """
        return self.wanted() if distributed.process_count() == 1 else seen

    def wanted(self) -> bool:
        """Whether some process was asked to stop; the answers differ between processes."""
        return distributed.stop_requested().is_set()

    def stopped(self, step: int, total_steps: int) -> Stopped:
        """Returns the exception that ends the program after the state of `step` is saved."""
        reason = self._name or "another process's signal"
        return Stopped(
            f"stopped by {reason} after step {step} of {total_steps}, which is saved. Start the "
            "same command again to go on."
        )
