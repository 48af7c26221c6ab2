"""One training run per workdir: the file `run.lock` says whose it is.

The holder writes its host, process, start and a random id into the file and renews it while it
lives. Who finds the file there looks whether the holder is alive: on the same host by its process,
from elsewhere by its last renewal. What is dead is taken over.

The file is made if it is absent and replaced if it is unchanged, and nothing else: this is what
object stores offer, too, and there is no lock of the operating system that network file systems
would have to honour.
"""

import json
import logging
import os
import platform
import secrets
import threading
import time
from pathlib import Path
from typing import Any

from memseg_jax.errors import Unreachable, UserError
from memseg_jax.runtime import distributed, files

log = logging.getLogger(__name__)

FILE = "run.lock"
_RENEWALS = 10  # within the time after which a holder counts as dead
_TRIES = 5  # when other processes change the file at the same moment


class RunLock:
    """Holds a workdir for the training run of this process and its companions.

    Use it as a context manager. Process 0 holds the lock for all processes of a run; the others
    only wait until it has it.

    Args:
        folder: the workdir.
        minutes: without renewal after which a holder on another host counts as dead.

    Raises:
        UserError: on entering: another run holds the folder; the message says which, since when.
    """

    def __init__(self, folder: files.Place, minutes: float):
        self._path = folder / FILE
        self._seconds = 60 * minutes
        self._own = _describe_self()
        # The folder is not taken from a run that was seen to hold it a moment ago.
        self._pause = min(files.seconds_between_looks(folder), self._seconds / _RENEWALS)
        self._seen = 0.0
        self._renewed_at = 0.0  # when the file last said so
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "RunLock":
        if distributed.is_primary():
            self._take()
            self._thread = threading.Thread(target=self._renew, name="run.lock", daemon=True)
            self._thread.start()
        distributed.wait_for_all("run.lock")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        try:
            text = files.read_text(self._path)
            if self._is_own(text):
                files.remove_if(self._path, text)
        except Unreachable as error:  # what ended the run, if something did, matters more
            log.warning("cannot remove %s: %s", self._path, error)

    def check(self) -> None:
        """Refuses to go on if the folder is not this run's any more; to be called before it writes.

        A bucket that gives no answer takes the folder from nobody: others respect a lock for some
        minutes after its last renewal.

        Raises:
            UserError: another run has taken the folder, the file was removed, or for so long that
                another run may have taken it, nothing could be known.
        """
        if self._thread is None or 0 <= time.time() - self._seen < self._pause:
            return
        try:
            found = _parse(files.read_text(self._path))
            if found is None:
                files.names(self._path.parent)  # whose bucket may be gone
        except Unreachable as error:
            gone = isinstance(error, FileNotFoundError)
            if gone or not 0 <= time.time() - self._renewed_at < self._seconds:
                raise
            log.warning("cannot look at %s, which is this run's still: %s", self._path, error)
            return
        if found and found["id"] == self._own["id"]:
            self._seen = time.time()
            return
        raise UserError(
            f"{self._path} is no longer this run's: "
            + (f"{_name(found)} has taken the folder" if found else "it was removed")
            + ". Nothing more is written. This happens if the run stood still for more than "
            "config.checkpoint.lock_minutes, or if somebody removed the file."
        )

    def _take(self) -> None:
        for _ in range(_TRIES):
            text = files.read_text(self._path)
            if text is not None:
                self._check_dead(text)
            try:
                if self._replace(text):
                    return
            except OSError as error:
                raise UserError(f"cannot write {self._path}: {error.strerror or error}") from error
            time.sleep(0.2)  # somebody else was quicker: look who
        self._check_dead(files.read_text(self._path) or "")
        raise UserError(f"{self._path} is being changed by other processes all the time; try again")

    def _check_dead(self, text: str) -> None:
        """Refuses if the holder that wrote `text` is alive."""
        holder = _parse(text)
        if holder is None:
            log.warning("%s is not readable and is taken over", self._path)
            return
        silent = time.time() - holder["renewed"]
        same_machine = holder["machine"] == self._own["machine"]
        alive = _is_running(holder) if same_machine else silent < self._seconds
        if alive:
            raise UserError(
                f"the workdir {self._path.parent} is in use by {_name(holder)}. Two runs in one "
                "folder would overwrite each other's checkpoints: wait for the other one, stop it, "
                "or choose another --workdir."
                + (
                    ""
                    if same_machine
                    else f" Its last sign of life was {max(silent, 0):.0f} s ago; after "
                    f"{self._seconds:.0f} s (config.checkpoint.lock_minutes) without one it counts "
                    f"as dead. If you know that it is dead, remove {self._path}."
                )
            )
        log.warning("taking over the workdir from %s, which has ended", _name(holder))

    def _replace(self, before: str | None) -> bool:
        """Writes a file that says that this process lives now; returns whether it did."""
        now = time.time()
        done = files.replace_if(self._path, before, json.dumps(self._own | {"renewed": now}))
        if done:
            self._renewed_at = now
        return done

    def _is_own(self, text: str | None) -> bool:
        return (_parse(text) or {}).get("id") == self._own["id"]

    def _renew(self) -> None:
        while not self._ended.wait(self._seconds / _RENEWALS):
            try:
                # Not what was written last: that may have been done though its answer was lost.
                text = files.read_text(self._path)
                if self._is_own(text):
                    self._replace(text)
            except OSError as error:  # the disk's trouble is reported where the run writes
                log.warning("cannot renew %s: %s", self._path, error)


def _describe_self() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "machine": _machine(),
        "process": os.getpid(),
        "process_started": _started(os.getpid()),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "id": secrets.token_hex(16),
    }


def _machine() -> str:
    """What has to be equal for process numbers to mean the same: host, boot, and container."""
    parts = [platform.node()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        try:
            parts.append(read())
        except OSError:
            parts.append("")
    return " ".join(parts)


def _started(process: int) -> str:
    """When a process started, as the system counts: numbers of processes are used again."""
    try:
        # The name, in brackets, may hold anything; the start is the 20th field after it.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_running(holder: dict[str, Any]) -> bool:
    try:
        os.kill(holder["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # there, and of another user
    return _started(holder["process"]) == holder["process_started"]


def _parse(text: str | None) -> dict[str, Any] | None:
    """What a lock file says; None if it is absent or says nothing that can be read."""
    try:
        holder = json.loads(text or "")
        known = {"host", "machine", "process", "process_started", "started", "id", "renewed"}
        return holder if known <= set(holder) else None
    except (ValueError, TypeError):
        return None


def _name(holder: dict[str, Any]) -> str:
    return (
        f"process {holder['process']} on {holder['host']}, which has trained there since "
        f"{holder['started']}"
    )
