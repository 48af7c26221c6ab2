"""Copies of data in a bucket, on a disk of this machine: made once, shared, bounded in size.

    <config.data.stage>/<name>-<key>/files/        the copies; what is there is whole
                                    /parts/        what is being copied
                                    /origin.json   what they are copies of, and its size
                                    /in_use        locked by every process that reads them; its
                                                   time is that of the last one that began to
                                    /copying       locked by the one process that copies
    <config.data.stage>/.lock                      held while such folders are made or removed

The key is a hash of the place, the names, the sizes and the checksums of the files: if one of them
changes in the bucket, that is another folder. A file gets its name when its CRC-32C is that of the
bucket; what a kill leaves of it is continued. Locks are those of the operating system: they go with
the process that has them, however it ends. A process that does not copy needs no message from the
one that does: it looks for the files.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from memseg_jax.errors import UserError
from memseg_jax.runtime import files
from memseg_jax.runtime.text import format_bytes, format_duration

log = logging.getLogger(__name__)

AUTO, NONE = "auto", "none"  # values of config.data.stage that are no folders
_BELOW, _ORIGIN, _IN_USE = ("files", "parts"), "origin.json", "in_use"
_AUTO_FOLDER = "~/.cache/memseg_jax/data"
_FIELD = "config.data.stage"
PART = 8 << 20  # bytes that are asked for at a time
_AT_A_TIME = 8  # files
_KEPT_FREE = 1 << 30  # bytes of the disk, for others
_SECONDS_BETWEEN_LINES = 10
_SECONDS_BETWEEN_LOOKS = 0.5  # whether the process that copies is at the end of it, or of its life
_TRIES, _SECONDS_BETWEEN_TRIES = 3, 60  # the client has tried for a while before each of them fails

_one_after_the_other = threading.Lock()
_copies: dict[Path, "Copy"] = {}  # of this process, which uses them as long as it lives


def copy_in_background(
    origin: files.Place, wanted: Sequence[files.Content], data_config: Any, field: str
) -> Path | None:
    """Begins to copy files from a bucket; whoever needs one before it is there reads the bucket.

    What goes wrong later on is a warning in the log.

    Args:
        origin: their folder.
        wanted: the files.
        data_config: `config.data`, for `stage` and `stage_gb`.
        field: that names the folder, for messages.

    Returns:
        The folder in which the copies appear, each as a whole; None: nothing is copied.

    Raises:
        UserError: `stage` is a folder in which there is no room, or that cannot be written.
    """
    if data_config.stage == NONE:
        return None
    try:
        copy = _open(origin, wanted, data_config, field)
    except UserError as error:
        if data_config.stage != AUTO:
            raise
        log.info("%s is read from the bucket, and not copied first: %s", origin, error)
        return None
    copy.start()
    return copy.files


def copied_root(data_config: Any) -> Any:
    """Copies `config.data.root` from a bucket, all files of it.

    Args:
        data_config: `config.data`, with a root in a bucket.

    Returns:
        `config.data` with the copy as its root.

    Raises:
        UserError: the bucket cannot be read, or the copies not be written.
    """
    field = "config.data.root"
    origin = files.place(data_config.root, field)
    if data_config.stage == NONE:
        raise UserError(
            f"{field} is {origin}, and {_FIELD} is {NONE!r}: folders of images are copied to a "
            "disk before they are read. Give a folder, or pack the data (--mode pack)."
        )
    try:
        wanted = files.contents(origin)
    except OSError as error:
        raise UserError(f"{field}: {origin} cannot be listed: {error}.") from error
    if not wanted:
        raise UserError(f"{field}: there is nothing in {origin}. Give the folder of the data set.")
    copy = _open(origin, wanted, data_config, field)
    copy.finish()
    data_config = data_config.copy_and_resolve_references()
    data_config.root = str(copy.files)
    return data_config


def work_folder(target: files.Place, data_config: Any) -> Path:
    """Makes a folder in which to prepare, over several runs, what is then sent to a bucket.

    Args:
        target: what is prepared.
        data_config: `config.data`; the folder is in `stage`.

    Raises:
        UserError: it cannot be made, or `stage` says that there is none.
    """
    if data_config.stage == NONE:
        raise UserError(
            f"{_FIELD} is {NONE!r}: data for {target} are prepared on a disk of this machine. Give "
            f"a folder, or {AUTO!r}."
        )
    key = hashlib.sha256(str(target).encode()).hexdigest()[:16]
    return files.make_folder(_folder(data_config) / f"for-{target.name or 'bucket'}-{key}", _FIELD)


def _folder(data_config: Any) -> Path:
    """The folder that `config.data.stage` names."""
    text = _AUTO_FOLDER if data_config.stage == AUTO else data_config.stage
    if files.in_bucket(files.place(text, _FIELD)):
        raise UserError(
            f"{_FIELD} is {text}: what is copied from a bucket is kept on a disk. Give a folder, "
            f"{AUTO!r} or {NONE!r}."
        )
    return files.writable_folder(files.on_disk(text, _FIELD), "the folder for copies", _FIELD)


def _open(
    origin: files.Place, wanted: Sequence[files.Content], data_config: Any, field: str
) -> "Copy":
    """The copy of some files, with room for all of them."""
    for content in wanted:
        if {"", ".", ".."} & {*content.name.split("/")} or "\0" in content.name:
            raise UserError(f"{field}: {origin} holds {content.name!r}, which is no name of a file")
    folder = _folder(data_config)
    key = hashlib.sha256(json.dumps([str(origin), sorted(wanted)]).encode()).hexdigest()[:16]
    path = folder / f"{origin.name or 'bucket'}-{key}"
    if path not in _copies:
        try:
            with _locked(folder / ".lock", wait=True), contextlib.ExitStack() as undo:
                is_new = not path.exists()
                for below in _BELOW:
                    (path / below).mkdir(parents=True, exist_ok=True)
                if is_new:
                    undo.callback(shutil.rmtree, path, ignore_errors=True)
                in_use = _lock(path / _IN_USE, fcntl.LOCK_SH)
                os.utime(path / _IN_USE)
                copy = Copy(origin, path, list(wanted), in_use)
                files.write_text(
                    path / _ORIGIN, json.dumps({"origin": str(origin), "bytes": copy.size})
                )
                _make_room(folder, path, data_config.stage_gb * 1e9)
                undo.pop_all()
        except OSError as error:
            raise UserError(
                f"{_FIELD}: {folder} cannot be used ({error}). Give a folder of a local disk; "
                f"with {NONE!r}, packed data are read from the bucket without one."
            ) from error
        _copies[path] = copy
    return _copies[path]


def copies() -> list["Copy"]:
    """The copies that this process uses."""
    return list(_copies.values())


class Copy:
    """Files in a bucket, and their copies."""

    def __init__(self, origin: files.Place, folder: Path, wanted: list[files.Content], in_use: Any):
        """Copies nothing yet.

        Args:
            origin: the folder in the bucket.
            folder: of the copies, see the module's text.
            wanted: the files.
            in_use: the lock, which is held as long as this lives.
        """
        self.files = folder / "files"
        self.size = sum(content.size for content in wanted)
        self._origin, self._folder, self._wanted, self._in_use = origin, folder, wanted, in_use
        self._arrived = 0  # bytes, of this process
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Copies what is missing in the background; one set of files after the other."""
        if self._thread is None and self._missing():
            self._thread = threading.Thread(target=self._in_background, name="copy", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Waits until the background has done what it can."""
        if self._thread:
            self._thread.join()

    def finish(self) -> None:
        """Copies what is missing, or waits until another process has.

        Raises:
            UserError: a file cannot be read or written.
        """
        try:
            self._copy_missing()
        except OSError as error:
            raise UserError(
                f"{self._origin} cannot be copied to {self.files}: {error}. What is there is kept: "
                "start the same command again afterwards."
            ) from error

    def _in_background(self) -> None:
        for left in reversed(range(_TRIES)):
            try:
                with _one_after_the_other:
                    self._copy_missing()
                return
            except OSError as error:
                log.warning(
                    "%s is not completely copied to %s: %s. What is missing is read from the "
                    "bucket%s.",
                    *(self._origin, self.files, error),
                    f", and tried again in {_SECONDS_BETWEEN_TRIES} s" if left else "",
                )
            if left:
                time.sleep(_SECONDS_BETWEEN_TRIES)

    def _missing(self) -> list[files.Content]:
        return [one for one in self._wanted if _size(self.files / one.name) != one.size]

    def _copy_missing(self) -> None:
        told = False
        while self._missing():
            try:
                with _locked(self._folder / "copying", wait=False):
                    if missing := self._missing():  # another process may just have ended
                        self._copy(missing)
                    return
            except BlockingIOError:
                if not told:
                    log.info("another process copies %s to this machine", self._origin)
                told = True
                time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _copy(self, missing: list[files.Content]) -> None:
        size, start = sum(content.size for content in missing), time.monotonic()
        log.info(
            "copying %s (%d files, %s) to %s",
            *(self._origin, len(missing), format_bytes(size), self.files),
        )
        # All threads take the next file from one iterator, which is safe for that of a list.
        waiting, errors, self._arrived = iter(missing), [], 0

        def work() -> None:
            for content in waiting:
                if errors:
                    return
                try:
                    self._copy_file(content)
                except Exception as error:  # the first one is raised below
                    errors.append(error)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(_AT_A_TIME)]
        for thread in threads:
            thread.start()
        told = start
        while alive := [thread for thread in threads if thread.is_alive()]:
            alive[0].join(0.1)
            if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                log.info(
                    "copied %s of %s of %s, %s/s",
                    *(format_bytes(self._arrived), format_bytes(size), self._origin),
                    format_bytes(self._arrived / (told - start)),
                )
        if errors:
            raise errors[0]
        seconds = time.monotonic() - start
        log.info(
            "copied %s in %s, %s/s",
            *(self._origin, format_duration(seconds), format_bytes(self._arrived / seconds)),
        )

    def _copy_file(self, content: files.Content) -> None:
        target, part = self.files / content.name, self._folder / "parts" / content.name
        for path in (target, part):
            path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):  # what a kill or a loss of power left may not be what was written
            with open(part, "ab") as file:
                if file.tell() > content.size:
                    file.truncate(0)
                while (at := file.tell()) < content.size:
                    wanted = min(PART, content.size - at)
                    file.write(files.read_range(self._origin / content.name, at, wanted))
                    self._arrived += wanted
            if files.has_content(part, content):
                files.flush(part)
                os.replace(part, target)
                return
            part.unlink()
        raise OSError(
            f"{self._origin / content.name} arrived with another checksum than the bucket has "
            "for it, twice"
        )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


# ---- Room ---------------------------------------------------------------------------------------


class _Other(NamedTuple):
    """A folder of copies: its bytes when they are complete, and those that are on the disk."""

    path: Path
    size: int
    present: int


def _make_room(folder: Path, own: Path, most: float) -> None:
    """Removes copies that were not used for longest, unless that does not help.

    Args:
        folder: with all folders of copies, locked.
        own: the one that needs room.
        most: bytes that all may have together.

    Raises:
        UserError: there is not enough that can be removed.
    """
    others = [_measured(path) for path in sorted(folder.iterdir()) if (path / _IN_USE).is_file()]
    mine = next(other for other in others if other.path == own)
    others = [other for other in others if other.path != own]
    # What others have yet to copy needs room, too.
    missing = sum(max(one.size - one.present, 0) for one in (mine, *others))
    free = shutil.disk_usage(folder).free - _KEPT_FREE
    over = max(mine.size + sum(one.size for one in others) - most, missing - free)
    with contextlib.ExitStack() as held:
        removed = []
        for other in sorted(others, key=lambda one: (one.path / _IN_USE).stat().st_mtime):
            if over <= 0:
                break
            with contextlib.suppress(BlockingIOError):
                lock = _lock(other.path / _IN_USE, fcntl.LOCK_EX | fcntl.LOCK_NB)
                removed.append((held.enter_context(lock), other.path))
                over -= other.size
        if over > 0:
            theirs = format_bytes(sum(one.size for one in others))
            raise UserError(
                f"{_FIELD}: there is no room for {format_bytes(mine.size)} in {folder}: "
                f"{format_bytes(max(free, 0))} are free on the disk, config.data.stage_gb is "
                f"{most / 1e9:g}, and {theirs} are copies of other data. Free "
                "some of it, raise config.data.stage_gb, give a folder of another disk, or "
                f"{NONE!r} to read packed data from the bucket without copies."
            )
        for _, path in removed:
            log.info("removing %s, which was not used for longest", path)
            for below in _BELOW:  # first: what a kill leaves is still found by its lock
                shutil.rmtree(path / below, ignore_errors=True)
            shutil.rmtree(path)


def _measured(path: Path) -> _Other:
    present = sum(content.size for below in _BELOW for content in files.contents(path / below))
    try:
        size = int(json.loads((path / _ORIGIN).read_text(encoding="utf-8"))["bytes"])
    except (OSError, ValueError, TypeError, KeyError):  # a kill came before it was written
        size = present
    return _Other(path, size, min(present, size))


# ---- Locks --------------------------------------------------------------------------------------


def _lock(path: Path, how: int) -> Any:
    """Locks a file, until it is closed or the process ends.

    Raises:
        BlockingIOError: another one has it, and `how` says not to wait.
    """
    file = open(path, "a")  # noqa: SIM115
    try:
        fcntl.flock(file, how)
    except BaseException:
        file.close()
        raise
    return file


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[None]:
    with _lock(path, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)):
        yield
