"""Similarities, their order, and whether alike classes are the ones that get confused."""

import numpy as np
import pytest

from memseg_jax.inspection import similarity
from memseg_jax.inspection.course import course_of
from memseg_jax.inspection.maps import maps_of, principal_axes
from memseg_jax.inspection.worth import frequency_groups, other_memories
from memseg_jax.scoring.memory_history import MemoryRecord


def rows(seed=0, shape=(6, 2, 8)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_similarity_is_the_cosine_of_the_mean_rows():
    given = rows()
    given[4] = 0
    given[5, 1] = 0  # a row that is not used yet
    vectors = similarity.class_vectors(given)
    found = similarity.cosine(vectors)
    for i in range(6):
        for j in range(6):
            if 4 in (i, j):
                assert found[i, j] == 0
                continue
            a, b = (given[k][np.any(given[k] != 0, axis=1)].mean(axis=0) for k in (i, j))
            expected = a @ b / np.sqrt((a @ a) * (b @ b))
            assert found[i, j] == pytest.approx(expected, abs=1e-6)


def test_alike_classes_are_neighbours_and_unseen_ones_last():
    directions = np.eye(3)[[0, 1, 0, 2, 1, 0]] + 0.05 * rows(1, (6, 3))
    seen = np.array([True, True, True, False, True, True])
    order = similarity.order_of(similarity.cosine(directions), seen).tolist()
    assert sorted(order) == list(range(6))
    assert order[-1] == 3
    places = [order.index(k) for k in (0, 2, 5)]
    assert max(places) - min(places) == 2
    assert abs(order.index(1) - order.index(4)) == 1
    assert similarity.order_of(np.ones((2, 2)), np.array([False, True])).tolist() == [1, 0]


def matrix_of(confusions, classes=5):
    """100 pixels a class, of which some are taken for another one."""
    matrix = np.zeros((classes, classes + 1), np.int64)
    np.fill_diagonal(matrix, 100)
    for (true, taken), count in confusions.items():
        matrix[true, taken] += count
        matrix[true, true] -= count
    return matrix


def test_confusion_of_pairs_counts_both_directions():
    matrix = matrix_of({(0, 1): 30, (1, 0): 10, (2, 3): 5})
    matrix[4] = 0
    found = similarity.confusion_of_pairs(matrix)
    assert found[0, 1] == found[1, 0] == pytest.approx(40 / 200)
    assert found[2, 3] == pytest.approx(5 / 200)
    assert found[0, 2] == found[0, 0] == 0
    assert np.isnan(found[4, 4])


def test_alike_classes_that_are_confused():
    """Similarity falls with the distance of the classes, and so does their confusion."""
    distance = abs(np.subtract.outer(np.arange(5), np.arange(5)))
    confusions = {(i, j): 16 >> distance[i, j] for i in range(5) for j in range(5) if i != j}
    alike = 1 - distance / 10
    seen = np.ones(5, bool)
    found = similarity.agreement(alike, matrix_of(confusions), seen)
    assert found.correlation == pytest.approx(1)
    assert found.chance < 0.05
    assert found.pairs == 10
    assert {pair.classes for pair in found.confused[:4]} == {(0, 1), (1, 2), (2, 3), (3, 4)}
    assert found.confused[0].similarity == pytest.approx(0.9)
    opposite = similarity.agreement(-alike, matrix_of(confusions), seen)
    assert opposite.correlation == pytest.approx(-1)
    assert opposite.chance > 0.9


def test_nothing_to_correlate():
    perfect = similarity.agreement(np.eye(5), matrix_of({}), np.ones(5, bool))
    assert np.isnan(perfect.correlation)
    assert perfect.confused == []
    unseen = similarity.agreement(np.eye(5), matrix_of({(0, 1): 3}), np.zeros(5, bool))
    assert (unseen.pairs, unseen.confused, unseen.alike) == (0, [], [])


# ---- Course, maps, other memories ---------------------------------------------------------------


def test_the_course_of_the_rows():
    def record(step, *first):
        memory = np.zeros((3, 1, 2), np.float32)
        memory[:, 0] = first
        zero = np.zeros(3, np.int64)
        return MemoryRecord(step, memory, zero, zero, zero, 0)

    records = [
        record(1, (3, 4), (0, 0), (0, 0)),
        record(2, (6, 8), (1, 0), (0, 0)),
        record(5, (0, 5), (1, 0), (0, 0)),
    ]

    def vectors_of(memory):
        return memory[:, 0].astype(np.float64), np.any(memory != 0, axis=(1, 2))

    course = course_of(records, vectors_of)
    assert course.steps.tolist() == [1, 2, 5]
    np.testing.assert_allclose(course.norms, [[5, 0, 0], [10, 1, 0], [5, 1, 0]])
    moved = [[np.nan] * 3, [0.5, np.nan, np.nan], [np.hypot(6, 3) / 5, 0, np.nan]]
    np.testing.assert_allclose(course.moved, moved)
    likeness = [[0.8, np.nan, np.nan], [0.8, 1, np.nan], [1, 1, np.nan]]
    np.testing.assert_allclose(course.likeness, likeness)
    assert course_of([], vectors_of).steps.size == 0


def test_principal_axes_are_those_of_most_variance():
    rng = np.random.default_rng(0)
    points = rng.standard_normal((200, 5)) * [1, 10, 0.1, 5, 0.1] + 3
    places, shares = principal_axes(points)
    centred = points - points.mean(axis=0)
    values = np.linalg.eigvalsh(centred.T @ centred)[::-1]
    np.testing.assert_allclose(shares, values[:2] / values.sum())
    np.testing.assert_allclose((places**2).sum(axis=0), values[:2])
    assert abs(np.corrcoef(places[:, 0], points[:, 1])[0, 1]) > 0.99
    one, nothing = principal_axes(np.ones((1, 5)))
    assert (one.tolist(), nothing.tolist()) == ([[0, 0]], [0, 0])


def test_a_memory_of_two_numbers_is_its_own_map():
    (own,) = maps_of(rows(0, (3, 2)), rows(1, (5, 2)))
    np.testing.assert_array_equal(own.rows, rows(0, (3, 2)))
    np.testing.assert_array_equal(own.pixels, rows(1, (5, 2)))


def test_without_scikit_learn_there_is_the_map_by_pca(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.manifold", None)
    (only,) = maps_of(rows(0, (3, 8)), rows(1, (20, 8)))
    assert (only.name, only.rows.shape, only.pixels.shape) == ("PCA", (3, 2), (20, 2))


@pytest.mark.slow
def test_neighbours_stay_neighbours_on_the_map_by_tsne():
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    directions = np.repeat(np.eye(3, 8), 12, axis=0)
    points = directions * rng.uniform(1, 9, (36, 1)) + 0.05 * rng.standard_normal((36, 8))
    _, flat = maps_of(points[::12], np.delete(points, [0, 12, 24], axis=0))
    assert flat.name == "t-SNE"
    pixels = flat.pixels.reshape(3, 11, 2)
    distances = np.linalg.norm(flat.rows[:, None, None] - pixels, axis=-1).max(axis=2)
    assert distances.argmin(axis=1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_permuted_rows_are_all_of_other_classes(classes):
    memory = np.arange(classes * 2, dtype=np.float32).reshape(classes, 2) + 1
    other = other_memories(memory)
    permuted, zeros = other["rows permuted"], other["zeros"]
    assert sorted(permuted.tolist()) == memory.tolist()
    assert np.all(permuted != memory)
    assert not zeros.any()


def test_groups_of_classes_by_how_much_was_seen():
    groups = frequency_groups(np.array([50, 1, 9, 2, 100, 0, 30]))
    assert [members.tolist() for members in groups.values()] == [[5, 1, 3], [2, 6], [0, 4]]
    assert frequency_groups(np.array([1, 2])) == {}
