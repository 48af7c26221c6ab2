"""Objects in a bucket of Google Cloud Storage; used by `memseg_jax.runtime.files` alone.

An object is there as a whole or not at all: an upload that breaks off leaves nothing. There are no
folders, no lines to append, no new names for what is there, and no locks. Instead, every object has
a generation: a write can ask that the object is still the one that was read, or is not there.

Functions raise `FileNotFoundError` where an object is not there, and `Unreachable` where the way
to it is not open.
"""

import base64
import concurrent.futures
import contextlib
import importlib.util
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from memseg_jax.errors import Unreachable, UserError

SCHEME = "gs://"
# The library that writes checkpoints makes this object last in a folder that is complete.
MARKER = "commit_success.txt"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")  # of a bucket
_AT_A_TIME = 16  # requests, where there are many to make
_PART = 8 * 2**20  # bytes; larger objects are sent in parts, of which each can be tried again
# How TensorStore, which reads and writes the arrays of checkpoints, says what `Unreachable` says.
_TROUBLES = re.compile(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED)\b")


class NoBucket(FileNotFoundError, Unreachable):
    """There is no such bucket, or not any more."""


class Object(NamedTuple):
    """An object in a listing: its name in the bucket, its size in bytes and its checksum."""

    name: str
    size: int
    crc32c: str


def parse(text: str, named: str) -> epath.Path:
    """The path of an object, or of what could be a folder of objects.

    Args:
        text: "gs://BUCKET/..."
        named: where the text is from, such as "--workdir ".

    Raises:
        UserError: it is no such path, or what is needed to read from buckets is not installed.
    """
    bucket, *parts = text.removeprefix(SCHEME).split("/")
    if not _NAME.fullmatch(bucket):
        found = f"the bucket's name is {bucket!r}" if bucket else "there is no name of a bucket"
        raise UserError(
            f"{named}{text}: {found}. Expected gs://BUCKET/FOLDER; names of buckets have 3 or more "
            "of a-z, 0-9, '-', '_' and '.'."
        )
    parts = [part for part in parts if part not in ("", ".")]
    if ".." in parts:
        raise UserError(f"{named}{text}: '..' means nothing in a bucket; give the whole path")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(
            f"{named}{text}: paths in buckets need the package gcsfs, which is not installed: "
            'pip install "memseg_jax[gcs]"'
        )
    _file_system()
    return epath.Path(SCHEME + "/".join([bucket, *parts]))


# ---- One object ---------------------------------------------------------------------------------


def read(path: epath.Path) -> tuple[bytes, int]:
    """The content of an object and its generation."""
    bucket, name = _split(path)
    headers, content = _call(path, "get", "GET", "b/{}/o/{}", bucket, name, alt="media")
    return content, int(headers["X-Goog-Generation"])


def write(path: epath.Path, content: bytes, generation: int | None = None) -> None:
    """Writes a small object as a whole, in one request.

    Args:
        path: of the object.
        content: of the object.
        generation: that the object must have now; 0: it must not be there; None: anything.

    Raises:
        FileExistsError: it has another generation.
    """
    bucket, name = _split(path)
    border = f"=={secrets.token_hex(16)}=="
    body = (
        f"--{border}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n"
        f"{json.dumps({'name': name})}\r\n"
        f"--{border}\r\nContent-Type: application/octet-stream\r\n\r\n"
    ).encode()
    _call(
        path,
        "create",
        "POST",
        _file_system().base.replace("/storage/v1/", "/upload/storage/v1/") + "b/{}/o",
        bucket,
        uploadType="multipart",
        data=body + content + f"\r\n--{border}--\r\n".encode(),
        headers={"Content-Type": f'multipart/related; boundary="{border}"'},
        fields="generation",
        **({} if generation is None else {"ifGenerationMatch": generation}),
    )


def upload(source: Path, path: epath.Path) -> None:
    """Writes an object with the content of a file."""
    if source.stat().st_size < _PART:
        write(path, source.read_bytes())
        return
    # A part that was sent again because its answer was lost must not count twice.
    for _ in range(2):
        with _explained(path, "create"):
            _file_system().put_file(
                str(source), str(path), content_type="application/octet-stream", chunksize=_PART
            )
        bucket, name = _split(path)
        sent = _json(path, "get", "GET", "b/{}/o/{}", bucket, name, fields="crc32c")
        if sent["crc32c"] == crc32c(source):
            return
    raise Unreachable(f"{path} has not the content that was sent, twice; try again")


def download(path: epath.Path, target: Path) -> None:
    """Writes a file with the content of an object."""
    with _explained(path, "get"):
        _file_system().get_file(str(path), str(target))


def remove(path: epath.Path, generation: int | None = None) -> None:
    """Removes an object, if it has this generation."""
    bucket, name = _split(path)
    _remove(path, bucket, name, **({} if generation is None else {"ifGenerationMatch": generation}))


def replace_if(path: epath.Path, before: str | None, after: str) -> bool:
    """Writes an object only if its content is `before`; None: only if it is not there.

    Returns:
        Whether it was written. Of several at the same time, one is.
    """
    generation = 0
    if before is not None:
        try:
            content, generation = read(path)
        except FileNotFoundError:
            return False
        if content != before.encode():
            return False
    try:
        write(path, after.encode(), generation)
    except FileExistsError:
        # Also the answer to a request that was repeated because the first answer was lost.
        with contextlib.suppress(FileNotFoundError):
            return read(path)[0] == after.encode()
        return False
    return True


def remove_if(path: epath.Path, content: str) -> None:
    """Removes an object only if this is its content."""
    with contextlib.suppress(FileNotFoundError, FileExistsError):
        found, generation = read(path)
        if found == content.encode():
            remove(path, generation)


def read_range(path: epath.Path, start: int, size: int) -> bytes:
    """Some bytes of an object: one request."""
    bucket, name = _split(path)
    wanted = {"Range": f"bytes={start}-{start + size - 1}"}
    return _call(path, "get", "GET", "b/{}/o/{}", bucket, name, alt="media", headers=wanted)[1]


def crc32c(path: Path) -> str:
    """The checksum of a file on a disk, written as those of objects are."""
    import google_crc32c  # comes with the client

    checksum = google_crc32c.Checksum()
    with open(path, "rb") as file:
        while part := file.read(_PART):
            checksum.update(part)
    return base64.b64encode(checksum.digest()).decode()


def exists(path: epath.Path) -> bool:
    """Whether there is an object of this name: one request."""
    bucket, name = _split(path)
    try:
        _call(path, "get", "GET", "b/{}/o/{}", bucket, name, fields="name")
    except FileNotFoundError:
        return False
    return True


# ---- What lies below a path ---------------------------------------------------------------------


def below(folder: epath.Path) -> list[Object]:
    """All objects below a path; a request for every thousand of them."""
    fields = "items(name,size,crc32c),nextPageToken"
    return [
        Object(item["name"], int(item["size"]), item.get("crc32c", ""))
        for page in _pages(folder, fields=fields)
        for item in page.get("items", ())
    ]


def names(folder: epath.Path) -> tuple[list[str], list[str]]:
    """The names of the objects, and of the folders, that lie directly below a path.

    One request for every thousand, however much lies in the folders.
    """
    start, objects, folders = len(_prefix(folder)), [], []
    for page in _pages(folder, delimiter="/", fields="items(name),prefixes,nextPageToken"):
        objects += [item["name"][start:] for item in page.get("items", ())]
        folders += [prefix[start:-1] for prefix in page.get("prefixes", ())]
    return [name for name in objects if name], folders


def root(path: epath.Path) -> epath.Path:
    """The path of the bucket itself."""
    return epath.Path(SCHEME + _split(path)[0])


def is_folder(path: epath.Path) -> bool:
    """Whether there is anything below a path: one request."""
    bucket, _ = _split(path)
    parameters = {"prefix": _prefix(path), "maxResults": 1, "fields": "items(name)"}
    return bool(_json(path, "list", "GET", "b/{}/o", bucket, **parameters).get("items"))


def complete_folders(folder: epath.Path) -> tuple[list[str], list[str]]:
    """The names of the folders below a path that have their marker, and of those that have none.

    A request for the list and one for each of them.
    """
    _, folders = names(folder)
    marked = list(_each(lambda name: exists(folder / name / MARKER), folders))
    return (
        [name for name, found in zip(folders, marked) if found],
        [name for name, found in zip(folders, marked) if not found],
    )


def remove_folder(folder: epath.Path) -> None:
    """Removes all that lies below a path, markers first.

    What a kill leaves of it is not complete: nobody takes it for more than it is.
    """
    bucket, _ = _split(folder)
    marker = f"{_prefix(folder)}{MARKER}"
    found = [item.name for item in below(folder)]
    for part in ([x for x in found if x == marker], [x for x in found if x != marker]):
        list(_each(lambda name: _remove(folder, bucket, name), part))


def move_folder(folder: epath.Path, target: epath.Path) -> None:
    """Copies all that lies below a path, compares the copies, and removes what was copied.

    In this order: after a kill, either the old place or the new one has everything.

    Raises:
        OSError: a copy is not what it should be; nothing was removed.
    """
    start = len(_prefix(folder))
    (source_bucket, _), (target_bucket, _) = _split(folder), _split(target)

    def copy(name: str) -> None:
        to = f"{_prefix(target)}{name[start:]}"
        url, arguments = "b/{}/o/{}/rewriteTo/b/{}/o/{}", (source_bucket, name, target_bucket, to)
        fields, more = "done,rewriteToken", {}
        while True:  # large objects are copied in parts
            answer = _json(target, "create", "POST", url, *arguments, fields=fields, **more)
            if answer["done"]:
                return
            more = {"rewriteToken": answer["rewriteToken"]}

    def content(objects: list[Object], start: int) -> dict[str, tuple[int, str]]:
        return {item.name[start:]: (item.size, item.crc32c) for item in objects}

    before = below(folder)
    list(_each(copy, [item.name for item in before]))
    if content(below(target), len(_prefix(target))) != content(before, start):
        raise OSError(f"{target} is not a true copy of {folder}, which was left as it is")
    remove_folder(folder)


def probe(folder: epath.Path) -> None:
    """Writes, reads, lists and removes a small object, so that this does not fail hours later."""
    path, content = folder / f".probe-{os.getpid()}-{secrets.token_hex(4)}", b"test"
    write(path, content)
    if read(path)[0] != content or path.name not in names(folder)[0]:
        raise OSError(f"{path} was written, and is not there as it was written")
    remove(path)


# ---- Requests -----------------------------------------------------------------------------------


def _client():
    from memseg_jax.runtime import bucket_client  # not at the top: gcsfs may not be installed

    return bucket_client


def _file_system() -> Any:
    return _client().file_system()


def _account() -> str:
    return _client().account()


def _split(path: epath.Path) -> tuple[str, str]:
    bucket, _, name = str(path).removeprefix(SCHEME).partition("/")
    return bucket, name


def _prefix(folder: epath.Path) -> str:
    name = _split(folder)[1]
    return f"{name}/" if name else ""


def _pages(folder: epath.Path, **parameters: Any) -> Iterator[dict[str, Any]]:
    bucket, token = _split(folder)[0], {}
    while True:
        page = _json(
            folder, "list", "GET", "b/{}/o", bucket, prefix=_prefix(folder), **parameters, **token
        )
        yield page
        if not page.get("nextPageToken"):
            return
        token = {"pageToken": page["nextPageToken"]}


def _remove(path: epath.Path, bucket: str, name: str, **parameters: Any) -> None:
    # Gone already: a request that was repeated because its answer was lost.
    with contextlib.suppress(FileNotFoundError):
        _call(path, "delete", "DELETE", "b/{}/o/{}", bucket, name, **parameters)


def _each(function: Callable[[str], Any], names: Iterable[str]) -> Iterator[Any]:
    with concurrent.futures.ThreadPoolExecutor(_AT_A_TIME) as pool:
        yield from pool.map(function, names)


def _call(path: epath.Path, permission: str, method: str, url: str, *args: str, **kw: Any) -> Any:
    """Headers and content of the answer to a request."""
    try:
        with _explained(path, permission):
            return _file_system().call(method, url, *args, **kw)
    except FileNotFoundError:
        if url.endswith("b/{}/o"):  # to list, or to write
            raise no_bucket(path) from None
        raise


def _json(path: epath.Path, permission: str, method: str, url: str, *args: str, **kw: Any) -> Any:
    return json.loads(_call(path, permission, method, url, *args, **kw)[1])


@contextlib.contextmanager
def _explained(path: epath.Path, permission: str) -> Iterator[None]:
    """Turns the client's errors into `Unreachable`: what is missing where, and for whom."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there") from None
    except FileExistsError:
        raise  # a generation that was asked for
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        if getattr(error, "code", None) in (401, 403) or text.startswith("Forbidden"):
            raise Unreachable(
                f"{_account()} lacks the permission storage.objects.{permission} in the bucket "
                f"{SCHEME}{_split(path)[0]} ({text.splitlines()[-1]}). Grant it, for example with "
                "the role roles/storage.objectAdmin, or use another account"
            ) from error
        raise Unreachable(f"{path}: {text}") from error


def no_bucket(path: epath.Path) -> NoBucket:
    """The error that the bucket of a path is not there."""
    bucket = _split(path)[0]
    return NoBucket(
        f"there is no bucket {SCHEME}{bucket} that {_account()} can see. Make it with: "
        f"gcloud storage buckets create {SCHEME}{bucket}"
    )


def trouble(error: BaseException | None) -> str | None:
    """What an error says if it is about the way to a bucket, not about what is in it; else None.

    Args:
        error: of this module, or of the libraries that read and write checkpoints.
    """
    while error is not None:
        first, *more = str(error).strip().splitlines() or [type(error).__name__]
        if isinstance(error, (Unreachable, *_client().ERRORS)):
            return first
        if first.startswith("Forbidden"):  # gcsfs's word for 403; what the server says comes next
            return more[-1] if more else first
        if isinstance(error, ValueError) and _TROUBLES.search(first):
            return first.partition(" [")[0]  # details for its makers follow
        error = error.__cause__ or error.__context__
    return None
