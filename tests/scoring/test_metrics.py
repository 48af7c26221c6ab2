import csv
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from memseg_jax.errors import UserError
from memseg_jax.scoring.metrics import confusion_matrix, format_table, scores, write_results
from tests.goldens import golden_files, load

K = 4
NAMES = ("sky", "road", "tree", "car")


def golden_cases():
    files = golden_files("metrics")
    cases = [(f, c) for f in files for c in sorted({key.rpartition("__")[0] for key in load(f)})]
    if not cases:
        return [pytest.param("", "", marks=pytest.mark.skip(reason="no golden metrics files"))]
    return [pytest.param(f, c, id=f"{f}:{c}") for f, c in cases]


@pytest.mark.golden
@pytest.mark.parametrize(("file", "case"), golden_cases())
def test_golden_metrics(file, case):
    split = {key.rpartition("__"): value for key, value in load(file).items()}
    stored = {name: value for (owner, _, name), value in split.items() if owner == case}
    images = [k.removeprefix("gt_") for k in stored if k.startswith("gt_")]
    metrics = {k: v for k, v in stored.items() if not k.startswith(("gt_", "pred_"))}
    num_classes = len(metrics["iou"])
    matrix = sum(
        confusion_matrix(stored[f"pred_{i}"], stored[f"gt_{i}"], num_classes) for i in images
    )
    result = scores(matrix)
    means = {"miou": "mIoU", "mdice": "mDice", "mfscore": "mFscore", "all_accuracy": "aAcc"}
    means |= {"mprecision": "mPrecision", "mrecall": "mRecall", "maccuracy": "mAcc"}
    for name, expected in metrics.items():
        if name in means:
            actual = result[means[name]]
        else:
            actual = result["per_class"]["acc" if name == "accuracy" else name]
        assert np.shape(actual) == expected.shape, name
        np.testing.assert_allclose(actual, expected, rtol=1e-12, equal_nan=True, err_msg=name)


def label_maps(values=(0, 1, 2, 3, 255)):
    return hnp.arrays(np.uint8, (6, 7), elements=st.sampled_from(values))


pairs = st.tuples(label_maps((0, 1, 2, 3, 9)), label_maps())


@given(pairs, st.integers(1, 5))
@settings(deadline=None)
def test_matrices_of_parts_add_up(pair, cut):
    prediction, label = pair
    parts = [confusion_matrix(prediction[s], label[s], K) for s in (np.s_[:cut], np.s_[cut:])]
    whole = confusion_matrix(prediction, label, K)
    assert whole.dtype == np.int64
    assert whole.shape == (K, K + 1)
    np.testing.assert_array_equal(sum(parts), whole)


@given(pairs)
@settings(deadline=None)
def test_matrix_counts_every_pixel(pair):
    prediction, label = pair
    matrix = confusion_matrix(prediction, label, K)
    for truth in range(K):
        for guess in range(K):
            assert matrix[truth, guess] == np.sum((label == truth) & (prediction == guess))
        assert matrix[truth, K] == np.sum((label == truth) & (prediction == 9))


@given(pairs, st.permutations(range(K)))
@settings(deadline=None)
def test_permuting_classes_permutes_scores(pair, order):
    prediction, label = pair
    table = np.arange(256, dtype=np.uint8)
    table[:K] = order
    before = scores(confusion_matrix(prediction, label, K))
    after = scores(confusion_matrix(table[prediction], table[label], K))
    for name, values in before["per_class"].items():
        np.testing.assert_array_equal(after["per_class"][name][order], values)
    np.testing.assert_allclose(after["mIoU"], before["mIoU"], rtol=1e-12)


@given(label_maps((0, 2, 255)))
@settings(deadline=None)
def test_perfect_prediction_scores_one(label):
    result = scores(confusion_matrix(np.where(label == 255, 1, label), label, K))
    present = [np.any(label == k) for k in range(K)]
    for name in ("iou", "acc", "dice", "fscore", "precision", "recall"):
        np.testing.assert_array_equal(result["per_class"][name], np.where(present, 1, np.nan))
    assert math.isnan(result["mIoU"]) if not any(present) else result["mIoU"] == 1


@given(pairs, label_maps((0, 1, 2, 3, 9)))
@settings(deadline=None)
def test_ignored_pixels_change_nothing(pair, other):
    prediction, label = pair
    changed = np.where(label == 255, other, prediction)
    np.testing.assert_array_equal(
        confusion_matrix(changed, label, K), confusion_matrix(prediction, label, K)
    )


def test_ignored_label_may_be_a_class():
    label = np.array([[0, 1, 1]])
    assert confusion_matrix(label, label, 2, ignore=0).tolist() == [[0, 0, 0], [0, 2, 0]]


def test_labels_of_other_range_and_type():
    label = np.array([[-1, 0, 1, 300]], np.int32)
    prediction = np.array([[0, -5, 1, 1]], np.int64)
    assert confusion_matrix(prediction, label, 2).tolist() == [[0, 0, 1], [0, 1, 0]]


def test_absent_and_only_predicted_classes():
    label = np.array([[0, 0, 1, 1]])
    prediction = np.array([[0, 2, 1, 1]])
    result = scores(confusion_matrix(prediction, label, K))
    np.testing.assert_array_equal(result["per_class"]["iou"], [0.5, 1, 0, np.nan])
    np.testing.assert_array_equal(result["per_class"]["acc"], [0.5, 1, np.nan, np.nan])
    np.testing.assert_array_equal(result["per_class"]["share"], [0.5, 0.5, 0, 0])
    assert result["mIoU"] == 0.5
    assert result["mAcc"] == 0.75
    assert result["aAcc"] == 0.75


def test_no_valid_pixel_gives_nan_without_warnings(recwarn):
    result = scores(np.zeros((K, K + 1), np.int64))
    assert math.isnan(result["mIoU"])
    assert math.isnan(result["aAcc"])
    assert "absent" in format_table(result, NAMES)
    assert not recwarn.list


def test_wrong_input():
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(2, 3\)"):
        confusion_matrix(np.zeros((2, 2), int), np.zeros((2, 3), int), K)
    with pytest.raises(ValueError, match="label must have an integer type"):
        confusion_matrix(np.zeros((2, 2), int), np.zeros((2, 2)), K)


@pytest.fixture
def example():
    label = np.array([[0, 0, 1, 1]])
    matrix = confusion_matrix(np.array([[0, 2, 1, 1]]), label, K)
    return scores(matrix), matrix


def test_table(example):
    lines = format_table(example[0], NAMES).splitlines()
    assert lines[0].split() == ["class", "IoU", "accuracy", "Dice", "precision", "share"]
    assert lines[2].split() == ["sky", "0.5000", "0.5000", "0.6667", "1.0000", "50.00%"]
    assert lines[4].split() == ["tree", "0.0000", "-", "0.0000", "0.0000", "0.00%"]
    assert lines[5].split() == ["car", "absent"]
    assert lines[-1] == "mIoU 0.5000  mAcc 0.7500  aAcc 0.7500  mDice 0.5556"
    assert len({len(line) for line in lines[:5]}) == 1


def test_result_files(tmp_path, example):
    write_results(tmp_path, *example, NAMES, {"step": 7, "loss": math.nan})
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["step"] == 7
    assert result["loss"] is None
    assert result["mIoU"] == 0.5
    assert result["pixels"] == 4
    assert result["per_class"][3]["iou"] is None
    with (tmp_path / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == list(NAMES)
    assert [row["state"] for row in rows] == ["scored", "scored", "predicted only", "absent"]
    assert [row["iou"] for row in rows] == ["0.5", "1.0", "0.0", ""]
    assert [row["true_pixels"] for row in rows] == ["2", "2", "0", "0"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.json", "per_class.csv"]


def test_result_files_in_a_missing_folder(tmp_path, example):
    with pytest.raises(UserError, match="cannot write"):
        write_results(tmp_path / "gone", *example, NAMES, {})


def test_a_class_that_is_predicted_too_often_is_scored(tmp_path):
    matrix = np.array([[1, 0, 0], [2, 0, 0]])
    write_results(tmp_path, scores(matrix), matrix, ("sky", "road"), {})
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["state"] for row in result["per_class"]] == ["scored", "scored"]
