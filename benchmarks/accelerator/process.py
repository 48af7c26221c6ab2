"""A program with a time limit, which ends it and all that it has started."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_GRACE = 10.0  # seconds between the request to end and the end by force
_POLL = 0.05


def run(
    command: Sequence[str],
    log: IO[bytes],
    limit: float,
    folder: Path,
    environment: Mapping[str, str],
) -> int | None:
    """Runs a program until it ends or its time is over.

    Whatever it started and left behind is ended, too, unless that has left its process group.

    Args:
        command: the program and its arguments.
        log: gets what it writes on either output.
        limit: seconds.
        folder: in which it runs.
        environment: all of its variables.

    Returns:
        Its exit status; None: its time was over.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=folder,
        env=dict(environment),
        start_new_session=True,  # a process group of its own
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:  # also when this process is interrupted
        _end_group(process)


def _end_group(process: subprocess.Popen) -> None:
    """Ends a process and its group: by request, and what is left of it by force."""
    _signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE
    while time.monotonic() < deadline and _is_there(process):
        time.sleep(_POLL)
    _signal_group(process, signal.SIGKILL)
    process.wait()


def _is_there(process: subprocess.Popen) -> bool:
    """Whether any process of the group is left."""
    process.poll()  # else it would stay in the group as a zombie
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _signal_group(process: subprocess.Popen, number: int) -> None:
    # macOS refuses signals to groups of which only zombies are left.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
