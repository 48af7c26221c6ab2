"""Files and folders that a user names, on a disk or in a bucket: whole or not at all.

The one place that knows the difference. A user's text becomes a path by `place`: a `pathlib.Path`,
or an `etils.epath.Path` of "gs://...", which have `/`, `name`, `parent` and `with_name` in common.
What is done with such a path is done by the functions here.

On a disk, a file counts as written when its content and the folder's entry have been flushed: a
machine that loses its power keeps one or the other content, never an empty file. In a bucket, an
object appears as a whole (`memseg_jax.runtime.bucket`).
"""

import contextlib
import fnmatch
import glob
import itertools
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Union

from memseg_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

Place = Union[Path, "epath.Path"]

# How long a process may take to replace a file by `replace_if` before others think it dead.
_REPLACING_SECONDS = 30
# In the names of folders on a disk that are being written, or removed.
UNFINISHED = ".orbax-checkpoint-tmp"
_SECONDS_BETWEEN_LOOKS = 5  # at the same object of a bucket
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/+|(gs):", re.IGNORECASE)
# What people call the same thing: how browsers and other programs write it.
_SAME_AS_GS = re.compile(
    r"(?:gs|gcs):/*(?!/)|https?://storage\.(?:googleapis|cloud\.google)\.com/", re.IGNORECASE
)


# ---- Paths --------------------------------------------------------------------------------------


def place(text: str | os.PathLike, field: str = "") -> Place:
    """Turns what a user wrote into a path.

    Args:
        text: a path, "~/..." included, or "gs://BUCKET/...".
        field: where it is from, such as "--workdir" or "config.init.backbone", for the message.

    Returns:
        The path; on a disk, a relative one stays relative.

    Raises:
        UserError: it looks like another kind of URL, or buckets cannot be read from here.
    """
    text = os.fspath(text)
    named = f"{field} " if field else ""
    if text.startswith("gs://"):
        from memseg_jax.runtime import bucket

        return bucket.parse(text, named)
    if _URL.match(text):
        meant = _SAME_AS_GS.sub("gs://", text, count=1)
        raise UserError(
            f"{named}{text}: paths are those of this machine, or gs://BUCKET/...; "
            + (f"did you mean {meant}?" if meant != text else "nothing else is supported.")
        )
    return Path(text).expanduser()


def absolute(text: str | os.PathLike, field: str = "") -> Place:
    """As `place`, and independent of the working directory."""
    path = place(text, field)
    return path if in_bucket(path) else path.absolute()


def on_disk(text: str | os.PathLike, field: str) -> Path:
    """As `place`, for what cannot be in a bucket; without ".." and the like.

    Raises:
        UserError: it is in a bucket, or as `place`.
    """
    path = place(text, field)
    if in_bucket(path):
        raise UserError(
            f"{field} is {path}, and has to be on a disk of this machine. Copy it there: "
            f"gcloud storage cp --recursive {path} FOLDER"
        )
    return Path(os.path.abspath(path))


def is_inside(path: Place, folder: Place) -> bool:
    """Whether a path is that of a folder, or of something in it, by their names."""
    if in_bucket(path) or in_bucket(folder):
        return path == folder or folder in path.parents
    path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    return path == folder or folder in path.parents


def in_bucket(path: Place) -> bool:
    """Whether a path is of a bucket: reading and writing are requests over the network there."""
    return isinstance(path, os.PathLike) and not isinstance(path, Path)


def trouble(path: Place, error: BaseException) -> str | None:
    """What an error says, if it is about the way to a bucket and not about what is in it.

    Such an error means that nothing is known about a file: it may be there, whole and good.

    Args:
        path: that was read or written; of what is on a disk, no error is of this kind.
        error: of this module, or of the libraries that read and write checkpoints.
    """
    return _bucket().trouble(error) if in_bucket(path) else None


def seconds_between_looks(path: Place) -> float:
    """How long one may go without looking at a file that others change: 0 on a disk."""
    return _SECONDS_BETWEEN_LOOKS if in_bucket(path) else 0.0


# ---- Folders ------------------------------------------------------------------------------------


def make_folder(path: str | os.PathLike, option: str = "") -> Place:
    """Makes a folder, and those above it, unless it is there; a bucket needs none.

    Args:
        path: the folder.
        option: the flag or field with which another one can be chosen, for the message.

    Returns:
        Its absolute path.

    Raises:
        UserError: it cannot be made.
    """
    path = absolute(path, option)
    if in_bucket(path):
        return path
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        advice = f" Choose another one with {option}." if option else ""
        raise UserError(
            f"cannot make the folder {path}: {error.strerror or error}.{advice}"
        ) from error
    return path


def writable_folder(path: str | os.PathLike, what: str, flag: str) -> Place:
    """Makes a folder and tries to write in it, so that this does not fail hours later.

    In a bucket, also whether what was written can be read, listed and removed.

    Args:
        path: the folder.
        what: it is, for the message: "the workdir".
        flag: with which another one can be chosen: "--workdir".

    Returns:
        Its absolute path.

    Raises:
        UserError: it cannot be made or written.
    """
    path = absolute(path, flag)
    try:
        if in_bucket(path):
            _bucket().probe(path)
            return path
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


def exists(path: Place) -> bool:
    """Whether there is a file, or something below a folder."""
    if in_bucket(path):
        return _bucket().exists(path) or _bucket().is_folder(path)
    return path.exists()


def is_file(path: Place) -> bool:
    """Whether there is a file."""
    return _bucket().exists(path) if in_bucket(path) else path.is_file()


def names(folder: Place) -> list[str]:
    """The names of all that is in a folder, in order; none if it is not there."""
    if in_bucket(folder):
        objects, folders = _bucket().names(folder)
        return sorted({*objects, *folders})
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def files_below(folder: Place) -> list[Place]:
    """The paths of all files in a folder and the folders in it, in order."""
    if in_bucket(folder):
        root = _bucket().root(folder)
        return [root / item.name for item in _bucket().below(folder) if item.name[-1:] != "/"]
    return sorted(path for path in folder.rglob("*") if path.is_file())


class Content(NamedTuple):
    """A file: its name in a folder ("/" between parts), its bytes, its checksum ("": unknown)."""

    name: str
    size: int
    checksum: str = ""


def contents(folder: Place) -> list[Content]:
    """What is in a folder and the folders in it, in order; none if it is not there.

    In a bucket, a request for every thousand files, and the checksums are known.

    Raises:
        OSError: it cannot be listed.
    """
    if in_bucket(folder):
        start = len(str(folder)) - len(str(_bucket().root(folder)))  # names are the bucket's
        found = [(item.name[start:], item.size, item.crc32c) for item in _bucket().below(folder)]
        return sorted(Content(*item) for item in found if item[0] and item[0][-1] != "/")
    return [
        Content(path.relative_to(folder).as_posix(), path.stat().st_size)
        for path in files_below(folder)
    ]


def has_content(path: Path, content: Content) -> bool:
    """Whether a file on a disk is a true copy of a file in a bucket."""
    if path.stat().st_size != content.size:
        return False
    return not content.checksum or _bucket().crc32c(path) == content.checksum


def matching(pattern: Place) -> list[Place]:
    """The paths of the files that a pattern names, in order; "**" stands for any folders."""
    if not in_bucket(pattern):
        found = map(Path, sorted(glob.glob(str(pattern), recursive=True)))
        return [path for path in found if path.is_file()]
    wanted = pattern.as_posix().split("/")
    plain = list(itertools.takewhile(lambda part: not glob.has_magic(part), wanted[:-1]))
    found = files_below(place("/".join(plain)))
    return [path for path in found if _matches(path.as_posix().split("/"), wanted)]


def _matches(parts: list[str], wanted: list[str]) -> bool:
    if not parts or not wanted:
        return not parts and not wanted
    if wanted[0] == "**":
        return any(_matches(parts[skipped:], wanted[1:]) for skipped in range(len(parts)))
    return fnmatch.fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])


def complete_folders(folder: Place) -> list[str]:
    """The names of the folders in a folder that were written to their end.

    On a disk, a folder gets its name then; in a bucket, a marker.
    """
    if in_bucket(folder):
        return _bucket().complete_folders(folder)[0]
    return [name for name in names(folder) if UNFINISHED not in name]


def remove_unfinished(folder: Place) -> None:
    """Removes the folders in a folder that were not written to their end."""
    if in_bucket(folder):
        for name in _bucket().complete_folders(folder)[1]:
            _bucket().remove_folder(folder / name)
        return
    for name in names(folder):
        if UNFINISHED in name:
            for _ in range(20):  # writes that are still under way make files in the meantime
                shutil.rmtree(folder / name, ignore_errors=True)
                if not (folder / name).exists():
                    break
                time.sleep(0.05)


def flush_unfinished(folder: Place, name: str) -> None:
    """Waits until the content of a folder that has no name yet is on the disk."""
    if not in_bucket(folder):
        for unfinished in folder.glob(f"{name}{UNFINISHED}*"):
            for path in [*unfinished.rglob("*"), unfinished]:
                flush(path)


def remove_folders(folder: Place, unwanted: list[str]) -> None:
    """Removes complete folders of a folder; what a kill leaves of one counts as unfinished."""
    if in_bucket(folder):
        for name in unwanted:
            _bucket().remove_folder(folder / name)
        return
    flush(folder)  # the new ones are there for good before the old ones go
    for name in unwanted:
        going = folder / f"{name}{UNFINISHED}-removed"
        with contextlib.suppress(OSError):
            (folder / name).rename(going)
            shutil.rmtree(going, ignore_errors=True)


def move_folder(folder: Place, target: Place) -> None:
    """Gives a folder another place, of the same kind.

    In a bucket, everything is copied, the copies are compared, and only then is it removed.

    Raises:
        OSError: the new place cannot be written.
    """
    if in_bucket(folder):
        _bucket().move_folder(folder, target)
        return
    target.parent.mkdir(exist_ok=True)
    shutil.move(folder, target)


def copy_folder(source: Path, target: Place) -> None:
    """Copies all files of a folder on this machine; their folders are made.

    Raises:
        UserError: they cannot be written.
    """
    for path in files_below(source):
        to = target / path.relative_to(source).as_posix()
        make_folder(to.parent)
        copy_file(path, to)


# ---- Files --------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path, on a disk, that takes the place of `path` when the block ends.

    If it ends with an error, nothing is replaced. Whoever opens `path` sees the old file or the
    complete new one, also after a kill or a loss of power.

    Raises:
        UserError: the file cannot be written.
    """
    path = place(path)
    if in_bucket(path):
        with tempfile.TemporaryDirectory(prefix="memseg_jax_") as folder, _not_written(path):
            yield (temporary := Path(folder, path.name))
            _bucket().upload(temporary, path)
        return
    temporary = _temporary(path)
    try:
        with _not_written(path):
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
            flush(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _not_written(path: Place) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if in_bucket(path):
            raise UserError(f"cannot write {path}: {error}.") from error
        raise UserError(
            f"cannot write {path}: {error}. Check that the folder exists, that you may write "
            "there, and that the disk is not full."
        ) from error


def copy_file(source: Path, target: Place) -> None:
    """Replaces a file by one with the content of a file on this machine.

    Raises:
        UserError: it cannot be written.
    """
    if in_bucket(target):
        with _not_written(target):
            _bucket().upload(source, target)
        return
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


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


def read_bytes(path: Place) -> bytes:
    """The content of a file.

    Raises:
        OSError: it cannot be read; `FileNotFoundError` if there is none, `Unreachable` if the
            bucket gives no answer or refuses.
    """
    return _bucket().read(path)[0] if in_bucket(path) else path.read_bytes()


def read_range(path: Place, start: int, size: int) -> bytes:
    """Some bytes of a file.

    Args:
        path: the file.
        start: of the first byte.
        size: their number, at least 1; the file must have as many.

    Raises:
        OSError: they cannot be read; `FileNotFoundError` if there is no file.
    """
    if in_bucket(path):
        content = _bucket().read_range(path, start, size)
    else:
        with open(path, "rb") as file:
            file.seek(start)
            content = file.read(size)
    if len(content) != size:
        raise OSError(f"{path}: {len(content)} bytes from {start} on instead of {size}")
    return content


@contextlib.contextmanager
def readable(path: Place) -> Iterator[Path]:
    """Yields a path on a disk with the content of a file, for the time of the block.

    Raises:
        OSError: it cannot be read.
    """
    if not in_bucket(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="memseg_jax_") as folder:
        _bucket().download(path, copy := Path(folder, path.name))
        yield copy


def read_text(path: Place) -> str | None:
    """The text of a small file, or None if there is none.

    Raises:
        OSError: it is there and cannot be read.
    """
    try:
        return read_bytes(path).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return None


def replace_if(path: Place, before: str | None, after: str) -> bool:
    """Writes a small file only if its content is the expected one: of several, one process wins.

    Args:
        path: the file.
        before: its expected content; None: it must not be there.
        after: the new content, which no other process writes.

    Returns:
        Whether it was written. It is not if another process has written, or writes just now.

    Raises:
        OSError: the folder cannot be written.
    """
    if in_bucket(path):
        return _bucket().replace_if(path, before, after)
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


def remove_if(path: Place, content: str) -> None:
    """Removes a small file if it has this content."""
    if in_bucket(path):
        _bucket().remove_if(path, content)
    elif read_text(path) == content:
        path.unlink(missing_ok=True)


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


def _bucket():
    from memseg_jax.runtime import bucket  # not at the top: it is slow, and not everybody's

    return bucket
