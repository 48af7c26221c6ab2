"""Confusion matrices of single images, and the error bars that are made of them."""

import csv
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memseg_jax.scoring import bootstrap, metrics, per_image
from memseg_jax.scoring.per_image import PerImage

K = 4


def split(seed: int, images: int = 12, right: float = 0.7) -> PerImage:
    """Images of 3 or 4 classes; some of their pixels are right, some predictions outside 0..K-1."""
    rng = np.random.default_rng(seed)
    result = PerImage(K)
    for index in range(images):
        label = rng.integers(0, 3 + index % 2, (9, 7)).astype(np.uint8)
        wrong = rng.integers(0, K + 1, label.shape).astype(np.uint8)
        prediction = np.where(rng.random(label.shape) < right, label, wrong).astype(np.uint8)
        label[rng.random(label.shape) < 0.1] = 255
        matrix = metrics.confusion_matrix(prediction, label, K)
        result.add(index, f"ä{index}", label.shape, matrix)
    return result


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.integers(0, 9))
def test_the_images_sum_to_the_whole(seed, images):
    found = split(seed, images)
    whole = sum((found.matrix(i) for i in found.indices), np.zeros((K, K + 1), np.int64))
    np.testing.assert_array_equal(found.total(), whole)
    counts = found.counts().sum(axis=1)
    np.testing.assert_array_equal(
        counts, [np.diagonal(whole), whole.sum(axis=1), whole[:, :K].sum(axis=0)]
    )
    for index, score in zip(found.indices, found.scores()):
        assert score == pytest.approx(metrics.scores(found.matrix(index))["mIoU"])
        assert score == pytest.approx(per_image.image_miou(found.matrix(index)))
    for true, predicted in ((0, 1), (2, 2), (1, K - 1)):
        assert sum(found.confused(true, predicted).values()) == whole[true, predicted]


def test_images_of_two_processes_are_those_of_one():
    whole = split(3)
    parts = [PerImage(K), PerImage(K)]
    for index, name, size in zip(whole.indices, whole.names, whole.sizes):
        parts[index % 2].add(index, name, size, whole.matrix(index))
    merged = PerImage(K)
    for part in reversed(parts):
        merged.update(part.arrays())
    assert (merged.indices, merged.names, merged.sizes) == (whole.indices, whole.names, whole.sizes)
    np.testing.assert_array_equal(merged.counts(), whole.counts())


def test_the_table_of_images(tmp_path):
    found = split(1, images=3)
    found.add(3, 'no,"label"', (2, 2), np.zeros((K, K + 1), np.int64))
    per_image.write_csv(tmp_path, found, ("a", "b", "c", "d"))
    with open(tmp_path / "per_image.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["ä0", "ä1", "ä2", 'no,"label"']
    for row, index in zip(rows[:3], found.indices):
        matrix = found.matrix(index)
        scores = metrics.scores(matrix)
        assert int(row["pixels"]) == matrix.sum()
        assert float(row["mIoU"]) == pytest.approx(scores["mIoU"], abs=1e-6)
        assert float(row["aAcc"]) == pytest.approx(scores["aAcc"], abs=1e-6)
        iou = scores["per_class"]["iou"]
        assert row["worst_class"] == "abcd"[np.nanargmin(iou)]
        assert float(row["worst_iou"]) == pytest.approx(np.nanmin(iou), abs=1e-6)
    assert (rows[3]["pixels"], rows[3]["mIoU"], rows[3]["worst_class"]) == ("0", "", "")
    assert math.isnan(found.scores()[3])


# ---- Error bars ---------------------------------------------------------------------------------


def test_identical_models_do_not_differ():
    counts = split(5).counts()
    found = bootstrap.difference(counts, counts, draws=200)
    assert found.miou == (0, 0, 0)
    assert all(interval == (0, 0, 0) for interval in found.per_class)


def test_a_better_model_is_told_from_a_worse_one():
    good, bad = (split(5, 40, right).counts() for right in (0.9, 0.5))
    found = bootstrap.difference(good, bad, draws=300)
    assert 0 < found.miou.low < found.miou.value < found.miou.high
    turned = bootstrap.difference(bad, good, draws=300)
    np.testing.assert_allclose(turned.miou, -np.array(found.miou)[[0, 2, 1]])
    expected = _miou(good.sum(axis=1)) - _miou(bad.sum(axis=1))
    assert found.miou.value == pytest.approx(expected)


def test_models_of_the_same_quality_are_not_told_apart():
    one, two = (split(seed, 40).counts() for seed in (7, 8))
    interval = bootstrap.difference(one, two, draws=300).miou
    assert interval.low < 0 < interval.high


def test_a_class_that_is_never_seen_has_no_difference():
    counts = np.concatenate([split(2).counts(), np.zeros((3, 12, 1), np.int64)], axis=2)
    found = bootstrap.difference(counts, counts, draws=20)
    assert np.isnan(found.per_class[K]).all()
    assert found.miou.value == 0


def test_the_interval_is_that_of_drawing_images_by_hand():
    one, two = split(11, 30, 0.8).counts(), split(12, 30, 0.6).counts()
    rng = np.random.default_rng(9)
    draws = []
    for _ in range(1000):
        rows = rng.integers(0, 30, 30)
        draws.append(_miou(one[:, rows].sum(axis=1)) - _miou(two[:, rows].sum(axis=1)))
    interval = bootstrap.difference(one, two, draws=1000).miou
    width = interval.high - interval.low
    np.testing.assert_allclose(interval[1:], np.quantile(draws, [0.025, 0.975]), atol=0.15 * width)


def test_other_images_are_refused():
    with pytest.raises(ValueError, match="same images"):
        bootstrap.difference(split(1, 3).counts(), split(1, 4).counts())


def _miou(counts: np.ndarray) -> float:
    found, true, predicted = counts
    return float(np.nanmean(found / (true + predicted - found)))
