"""Records of files in a bucket, beside what the library reads of the same files on a disk."""

import concurrent.futures
import gc
import threading
import types

import numpy as np
import pytest
from array_record.python import array_record_module

from memseg_jax.data.records import BucketFile, BucketRecords, open_records
from memseg_jax.runtime import files


def write(path, records, options="group_size:1,uncompressed"):
    writer = array_record_module.ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return BucketFile(path, path.stat().st_size, len(records))


@pytest.fixture(scope="module")
def records():
    """Of all sizes: shorter than their header, longer than blocks, ending beside their borders."""
    rng = np.random.default_rng(0)
    sizes = [1, 30, 2**16, 3 * 2**16 + 5, *range(2**16 - 140, 2**16 - 20, 7), *[9] * 400, 2**18]
    return [rng.bytes(size) for size in sizes]


def test_every_record_is_the_one_that_the_library_reads(tmp_path, records):
    file = write(tmp_path / "a", records)
    theirs = open_records([(tmp_path / "a", len(records))])
    for position, record in enumerate(records):
        assert file[position] == theirs[position] == record


def test_an_index_that_is_longer_than_the_end_of_the_file_that_is_read_first(tmp_path, monkeypatch):
    records = [str(number).encode() for number in range(9000)]
    file = write(tmp_path / "a", records)
    asked = []
    read = files.read_range
    monkeypatch.setattr(files, "read_range", lambda *what: asked.append(what[1:]) or read(*what))
    assert [file[position] for position in (0, 8999, 4500)] == [b"0", b"8999", b"4500"]
    assert len(asked) == 5
    assert asked[1][1] > 2**16


@pytest.mark.parametrize("options", ["group_size:2,uncompressed", "group_size:1,zstd"])
def test_what_mode_pack_does_not_write(tmp_path, records, options):
    file = write(tmp_path / "a", records, options)
    with pytest.raises(RuntimeError):
        file[0]


def test_damage_of_the_index_is_one_error(tmp_path, records):
    write(tmp_path / "a", records[4:20])
    good = (tmp_path / "a").read_bytes()
    last = len(good) - 2**16
    index = good.rfind(records[19][-100:]) + 100
    places = [*range(index, index + 250), *range(last, last + 100)]
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(300):
        content = bytearray(good)
        for place in rng.choice(places, 5):
            content[place] = rng.integers(256)
        (tmp_path / "a").write_bytes(content)
        try:
            BucketFile(tmp_path / "a", len(content), 16)[15]
        except (RuntimeError, OSError):
            found += 1
    assert found > 100


def test_of_a_bucket(bucket, tmp_path, records):
    write(tmp_path / "a", records)
    files.copy_folder(tmp_path, bucket)
    file = BucketFile(bucket / "a", (tmp_path / "a").stat().st_size, len(records))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(file.__getitem__, range(len(records)))) == records
    with pytest.raises(FileNotFoundError, match="b is not there"):
        BucketFile(bucket / "b", 10**6, 3)[0]


def test_threads_that_read_ahead_end_with_what_they_read_for(tmp_path):
    write(tmp_path / "a", [b"one", b"two"])
    shard = types.SimpleNamespace(file="a", size=(tmp_path / "a").stat().st_size, count=2)
    before = set(threading.enumerate())
    records = BucketRecords(tmp_path, [shard], None)
    records.expect([1, 0])
    threads = set(threading.enumerate()) - before
    assert all(thread.daemon for thread in threads)
    assert (records[0], records[1]) == (b"one", b"two")
    del records
    gc.collect()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
