"""What the processes of one run of the tests share: a folder, programs, what is made once."""

import atexit
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

_VARIABLE = "MEMSEG_TEST_SESSION"


@functools.cache
def folder() -> Path:
    """Returns a folder that lives as long as the tests; the first process to ask makes it.

    Processes that are started later, those of `pytest -n` among them, find its name in the
    environment.
    """
    if _VARIABLE not in os.environ:
        os.environ[_VARIABLE] = made = tempfile.mkdtemp(prefix="memseg_jax_tests_")
        atexit.register(_remove, made, os.getpid())
    return Path(os.environ[_VARIABLE])


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:  # and not a fork of it
        shutil.rmtree(path, ignore_errors=True)


def cache() -> str:
    """Returns the folder of compiled programs, for this process and those that tests start."""
    return os.environ.get("MEMSEG_CACHE") or str(folder() / "cache")


def once(name: str, make: Callable[[Path], None]) -> Path:
    """Returns a path in the session's folder that `make` fills, in whichever process comes first.

    Args:
        name: of the file or folder.
        make: gets the path; if it fails, the next process that asks tries again.

    Returns:
        The path, to be read only.
    """
    path, done = folder() / name, folder() / f"{name}.done"
    with open(folder() / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(path)
            done.touch()
    return path
