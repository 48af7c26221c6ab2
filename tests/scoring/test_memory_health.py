"""Norms, ages and never seen classes of the memory."""

import jax.numpy as jnp
import numpy as np
import pytest

from memseg_jax.scoring.memory_health import MemoryHealth

NAMES = ("sky", "road", "car")


def memory(*rows):
    """One slot; a row is given by its first channel."""
    filled = np.zeros((3, 1, 4), np.float32)
    filled[:, 0, 0] = rows
    return jnp.asarray(filled)


def test_an_empty_memory():
    values, line = MemoryHealth(NAMES, 0, memory(0, 0, 0)).look(5, memory(0, 0, 0))
    assert values["memory_never_seen"] == 1
    assert set(values.values()) == {0.0, 1.0}
    assert line.endswith("3 of 3 classes never seen: sky, road, car")
    assert "longest" not in line


def test_norms_and_ages():
    health = MemoryHealth(NAMES, 0, memory(0, 0, 0))
    health.look(10, memory(3, 4, 0))
    values, line = health.look(20, memory(3, 5, 0))
    assert values == {
        "memory_norm_min": 3,
        "memory_norm_mean": 4,
        "memory_norm_max": 5,
        "memory_never_seen": pytest.approx(1 / 3),
        "memory_age_mean": 5,
        "memory_age_max": 10,
    }
    assert "rows 3 to 5, mean 4; longest without a change: sky, 10 steps; 1 of 3" in line
    assert line.endswith("never seen: car")
    assert health.ages == [10, 0, 20]


def test_the_smallest_change_counts():
    before = memory(3, 4, 5)
    health = MemoryHealth(NAMES, 0, before)
    health.look(10, before.at[1, 0, 0].set(jnp.nextafter(jnp.float32(4), jnp.float32(5))))
    assert health.ages == [10, 0, 10]


def test_ages_go_on_after_a_stop():
    health = MemoryHealth(NAMES, 0, memory(1, 2, 3))
    health.look(7, memory(1, 2, 4))
    again = MemoryHealth(NAMES, 7, memory(1, 2, 4), health.ages)
    for one in (health, again):
        one.look(9, memory(1, 3, 4))
        assert one.ages == [9, 0, 2]
    assert MemoryHealth(NAMES, 7, memory(1, 2, 4)).ages == [0, 0, 0]


def test_pixels_and_steps_go_on_after_a_stop_and_go_back():
    health = MemoryHealth(NAMES, 4, memory(1, 2, 0))
    assert health.updates == {"since": 4, "pixels": [0, 0, 0], "steps": [0, 0, 0]}
    health.count([np.float32([10, 0, 0]), np.float32([5, 1, 0])])
    kept = health.updates
    assert kept == {"since": 4, "pixels": [15, 1, 0], "steps": [2, 1, 0]}
    again = MemoryHealth(NAMES, 6, memory(1, 2, 0), updates=kept)
    for one in (health, again):
        one.count([np.float32([0, 7, 0])])
        assert one.updates == {"since": 4, "pixels": [15, 8, 0], "steps": [2, 2, 0]}
    health.go_back(6, kept)
    assert health.updates == kept
    health.look(9, memory(1, 3, 0))
    record = health.record(9, memory(1, 3, 0))
    np.testing.assert_array_equal(record["memory"], memory(1, 3, 0))
    assert record["ages"].tolist() == [5, 0, 5]
    assert (record["pixels"].tolist(), record["steps"].tolist()) == ([15, 1, 0], [2, 1, 0])


def test_a_memory_of_statistics():
    """Rows are what is drawn from it; a class is unseen as long as it has what it began with."""
    initial = np.tile(np.array([0, 1], np.float32), (3, 1))
    before = jnp.asarray(initial)

    def rows_of(memory):
        return memory[:, :1, None] + memory[:, 1:, None] * jnp.array([3.0, 4.0])

    health = MemoryHealth(NAMES, 0, before, None, initial, rows_of)
    values, line = health.look(5, before.at[1].set(jnp.array([0.0, 2.0])))
    assert values["memory_never_seen"] == pytest.approx(2 / 3)
    assert values["memory_norm_min"] == values["memory_norm_max"] == pytest.approx(10)
    assert line.endswith("never seen: sky, car")
    assert health.ages == [5, 0, 5]
