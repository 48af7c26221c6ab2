"""What is kept of the memory at evaluations, on a disk and in a bucket."""

import logging

import numpy as np

from memseg_jax.runtime import files
from memseg_jax.scoring import memory_history


def arrays(number):
    return {
        "memory": np.full((3, 1, 4), number, np.float32),
        "ages": np.array([0, 1, number]),
        "pixels": np.array([10, 20, 30]) * number,
        "steps": np.array([1, 2, 3]) * number,
        "since": np.int64(0),
    }


def test_what_was_written_is_read_by_step(place):
    assert memory_history.read(place) == []
    for step in (10, 9, 100):
        memory_history.write(place, step, arrays(step))
    memory_history.write(place, 9, arrays(9))  # again, after a kill
    records = memory_history.read(place)
    assert [record.step for record in records] == [9, 10, 100]
    for record in records:
        assert record.since == 0
        for name in ("memory", "ages", "pixels", "steps"):
            np.testing.assert_array_equal(getattr(record, name), arrays(record.step)[name])
    assert [record.step for record in memory_history.read(place, 10)] == [9, 10]


def test_a_damaged_file_is_passed_over(tmp_path, caplog):
    for step in (1, 2, 3):
        memory_history.write(tmp_path, step, arrays(step))
    folder = tmp_path / memory_history.FOLDER
    content = (folder / "2.npz").read_bytes()
    (folder / "2.npz").write_bytes(content[: len(content) // 2])
    (folder / "3.npz").write_bytes(b"")
    files.write_text(folder / "notes.txt", "mine")
    with caplog.at_level(logging.WARNING):
        assert [record.step for record in memory_history.read(tmp_path)] == [1]
    assert "2.npz is passed over" in caplog.text
    assert "3.npz is passed over" in caplog.text
