"""Records of ArrayRecord files, by random access: on a disk, or in a bucket.

The library reads files on a disk alone. In a bucket, the place of a record in its file is taken
from the index that the library writes at the file's end, and the record is asked for by its range.

A file is a row of chunks, https://github.com/google/riegeli/blob/master/doc/
riegeli_records_file_format.md: a header, and records with their sizes before them. Each block of
64 KiB begins with a header of its own, wherever in a chunk that is. The last chunk, alone in the
last block, says where the index is; the index is a chunk with a record for each chunk before it.
Mode pack writes one record to a chunk, without compression; nothing else is read here.
"""

import concurrent.futures
import functools
import queue
import struct
import threading
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from array_record.python.array_record_data_source import ArrayRecordDataSource

from memseg_jax.runtime import files

_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
_SIMPLE_CHUNK = ord("r")
_TAIL = 2 * _BLOCK  # holds the last block and an index of a few thousand records
_AT_A_TIME = 16  # requests
_MOST_AHEAD = 64  # records that are read before they are asked for


class _File(NamedTuple):
    """Tells array_record of a file without opening it, in the form that it expects."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def open_records(files: Sequence[tuple[Path, int]]) -> Sequence[bytes]:
    """Opens files on a disk as one sequence of records, by random access and from several threads.

    Args:
        files: path and number of records of each; they are opened when first needed.

    Returns:
        The records.
    """
    return ArrayRecordDataSource([_File(str(path), 0, count, count) for path, count in files])


class BucketFile:
    """The records of one file in a bucket, each by one request, and two or three for the index.

    Errors are `OSError`, if the file cannot be read, or `RuntimeError`, if it is damaged.
    """

    def __init__(self, path: files.Place, size: int, count: int):
        """Reads nothing yet.

        Args:
            path: the file.
            size: its bytes.
            count: its records.
        """
        self._path, self._size, self._count = path, size, count
        self._lock = threading.Lock()  # the index is read by one thread

    def __getitem__(self, position: int) -> bytes:
        with self._lock:
            bounds = self._bounds
        start, end = bounds[position : position + 2]
        return _only(_records(files.read_range(self._path, start, end - start), start))

    @functools.cached_property
    def _bounds(self) -> list[int]:
        """Where the chunks of the records begin, and where the last one ends."""
        start = max(self._size - _TAIL, 0)
        tail = files.read_range(self._path, start, self._size - start)
        last = self._size - _BLOCK
        index = _first_number(_records(tail[last - start :], last)[0])
        if index >= start:
            chunk = tail[index - start : last - start]
        else:
            chunk = files.read_range(self._path, index, last - index)
        # The first record says how many there are, which is known.
        bounds = [_first_number(record) for record in _records(chunk, index)[1:]]
        bounds.append(index)
        if len(bounds) != self._count + 1 or sorted(set(bounds)) != bounds:
            raise RuntimeError(f"its index is not one of {self._count} records")
        return bounds


def _only(records: list[bytes]) -> bytes:
    if len(records) != 1:
        raise RuntimeError(f"{len(records)} records where there should be one")
    return records[0]


def _records(content: bytes, start: int) -> list[bytes]:
    """The records of a chunk; `start` is its place in the file."""
    view = memoryview(content)
    # Without the headers of blocks.
    edges = range(-start % _BLOCK, len(view), _BLOCK)
    begins, ends = [0, *(edge + _BLOCK_HEADER for edge in edges)], [*edges, len(view)]
    chunk = b"".join(view[begin:end] for begin, end in zip(begins, ends))
    try:
        _, size, _, kind, _ = struct.unpack_from("<5Q", chunk)
        data = memoryview(chunk)[_CHUNK_HEADER : _CHUNK_HEADER + size]
        if len(data) != size or kind & 0xFF != _SIMPLE_CHUNK or data[0]:
            raise RuntimeError("there is no chunk of uncompressed records where there should be")
        length, at = _varint(data, 1)
        sizes, values = data[at : at + length], at + length
        records, at = [], 0
        for _ in range(kind >> 8):
            size, at = _varint(sizes, at)
            records.append(bytes(data[values : values + size]))
            values += size
    except (struct.error, IndexError) as error:
        raise RuntimeError(f"a chunk of records is not one ({error})") from None
    return records


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of as many bytes as it needs, and the place after it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _first_number(message: bytes) -> int:
    """The number in a protocol buffer's field 1, which comes first: a place in the file."""
    if not message or message[0] != 1 << 3:
        raise RuntimeError("its index is not one")
    return _varint(message, 1)[0]


class BucketRecords:
    """The records of several files in a bucket as one sequence, from several threads.

    As soon as there is a copy of a file on this machine, its records are read from that.
    """

    def __init__(self, folder: files.Place, shards: Sequence, copies: Path | None):
        """Reads nothing yet.

        Args:
            folder: where the files are.
            shards: `file`, `count` and `size` of each.
            copies: the folder in which copies of them appear as they are made; None: in none.
        """
        self._files = [BucketFile(folder / one.file, one.size, one.count) for one in shards]
        self._copies = [copies / one.file for one in shards] if copies else []
        self._records: Sequence[bytes] = ()
        if copies:
            self._records = open_records([(copies / one.file, one.count) for one in shards])
        self._where = [(k, p) for k, one in enumerate(shards) for p in range(one.count)]
        self._is_copied: dict[int, bool] = {}
        self._ahead: dict[int, concurrent.futures.Future] = {}

    def __getitem__(self, index: int) -> bytes:
        ahead = self._ahead.pop(index, None)
        return self._read(index) if ahead is None else ahead.result()

    def expect(self, indices: Iterable[int]) -> None:
        """Begins to read records that will be asked for soon, as far as they are not copied."""
        for index in indices:
            if not self._has_copy(self._where[index][0]) and index not in self._ahead:
                self._ahead[index] = future = concurrent.futures.Future()
                self._waiting.put((future, functools.partial(self._read, index)))
        for index in list(self._ahead)[:-_MOST_AHEAD]:  # nobody came for them
            self._ahead.pop(index, None)

    def read_again(self, index: int) -> bytes:
        """Reads a damaged record in the bucket; a copy of its file is not used any more."""
        number, position = self._where[index]
        if self._is_copied.get(number):
            self._copies[number].unlink(missing_ok=True)
        self._is_copied[number] = False
        return self._files[number][position]

    def _read(self, index: int) -> bytes:
        number, position = self._where[index]
        return self._records[index] if self._has_copy(number) else self._files[number][position]

    def _has_copy(self, number: int) -> bool:
        if number not in self._is_copied:
            if not self._copies or not self._copies[number].exists():
                return False
            self._is_copied[number] = True
        return self._is_copied[number]

    @functools.cached_property
    def _waiting(self) -> queue.SimpleQueue:
        """What threads read; they end with this object, and do not keep the program from ending."""
        waiting = queue.SimpleQueue()
        for _ in range(_AT_A_TIME):
            threading.Thread(target=_work, args=(waiting,), name="ahead", daemon=True).start()
            weakref.finalize(self, waiting.put, None)
        return waiting


def _work(waiting: queue.SimpleQueue) -> None:
    while task := waiting.get():
        future, read = task
        try:
            future.set_result(read())
        except BaseException as error:  # is raised where the record is asked for
            future.set_exception(error)
        del task, future, read  # or they would live until the next one
