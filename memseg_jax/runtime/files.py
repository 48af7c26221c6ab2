"""Files and folders that a run writes: whole or not at all, and on the disk when that is said.

The one place that makes folders and replaces files. A file counts as written when its content and
the folder's entry have been flushed to the disk: a machine that loses its power keeps one or the
other content, never an empty file.
"""

import contextlib
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from memseg_jax.errors import UserError

# How long a process may take to replace a file by `replace_if` before others think it dead.
_REPLACING_SECONDS = 30


def make_folder(path: str | os.PathLike, option: str = "") -> Path:
    """Makes a folder, and those above it, unless it is there.

    Args:
        path: the folder.
        option: the flag or field with which another one can be chosen, for the message.

    Returns:
        Its absolute path.

    Raises:
        UserError: it cannot be made.
    """
    path = Path(path).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        advice = f" Choose another one with {option}." if option else ""
        raise UserError(
            f"cannot make the folder {path}: {error.strerror or error}.{advice}"
        ) from error
    return path


def writable_folder(path: str | os.PathLike, what: str, flag: str) -> Path:
    """Makes a folder and tries to write in it, so that this does not fail hours later.

    Args:
        path: the folder.
        what: it is, for the message: "the workdir".
        flag: with which another one can be chosen: "--workdir".

    Returns:
        Its absolute path.

    Raises:
        UserError: it cannot be made or written.
    """
    path = Path(path).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"test")
            file.flush()
    except OSError as error:
        raise UserError(
            f"cannot write to {what} {path}: {error.strerror or error}. Choose another "
            f"folder with {flag}, or make this one writable."
        ) from error
    return path


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path that takes the place of `path` when the block ends without error.

    Whoever opens `path` sees the old file or the complete new one, also after a kill or a loss of
    power.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error}. Check that the folder exists, that you may write "
            "there, and that the disk is not full."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replaces a file by one with this text; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def flush(path: str | os.PathLike) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not os.path.isdir(path):  # some network file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)


def read_text(path: str | os.PathLike) -> str | None:
    """The text of a small file, or None if there is none.

    Raises:
        OSError: it is there and cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def replace_if(path: str | os.PathLike, before: str | None, after: str) -> bool:
    """Writes a small file only if its content is the expected one: of several, one process wins.

    Args:
        path: the file.
        before: its expected content; None: it must not be there.
        after: the new content.

    Returns:
        Whether it was written. It is not if another process has written, or writes just now.

    Raises:
        OSError: the folder cannot be written.
    """
    path = Path(path)
    temporary, guard = _temporary(path), path.with_name(f".{path.name}.changing")
    try:
        temporary.write_text(after, encoding="utf-8")
        flush(temporary)
        if before is None:
            return _appear(temporary, path)
        if not _appear(temporary, guard):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - guard.stat().st_mtime > _REPLACING_SECONDS:
                    guard.unlink()  # of a process that died here; who asks again finds it gone
            return False
        try:
            if read_text(path) != before:
                return False
            os.replace(temporary, path)
            flush(path.parent)
            return True
        finally:
            guard.unlink(missing_ok=True)
    finally:
        temporary.unlink(missing_ok=True)


def _appear(source: Path, target: Path) -> bool:
    """Gives a file a second name with its whole content, unless the name is taken."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    flush(target.parent)
    return True


def _temporary(path: Path) -> Path:
    # Threads and processes, also of other hosts, may write the same file.
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
