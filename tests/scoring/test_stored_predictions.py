"""Scores of real label maps that another network made, computed by other code."""

import json
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from memseg_jax.scoring import metrics

CLASSES = 11
FOLDER = pathlib.Path(os.environ.get("MEMSEG_DATA", "")) / "camvid"

pytestmark = pytest.mark.skipif(
    not os.environ.get("MEMSEG_DATA") or not (FOLDER / "espnet_reference").is_dir(),
    reason="needs MEMSEG_DATA with camvid/espnet_reference",
)


def labels(path):
    with Image.open(path) as image:
        return np.array(image)


def known(name):
    """The stored confusion matrix of all test images, int64 [11, 12], and its scores."""
    stored = json.loads((FOLDER / f"espnet_reference/{name}.json").read_text())
    return np.array(stored["confusion_rows_gt_cols_pred"], np.int64)[:CLASSES], stored


def test_scores_of_stored_label_maps():
    stems = (FOLDER / "test.txt").read_text().split()[::10]
    total = np.zeros((CLASSES, CLASSES + 1), np.int64)
    truths, guesses = [], []
    for stem in stems:
        guess = labels(FOLDER / "espnet_reference/pred" / f"{stem}.png")
        truth = labels(FOLDER / "testannot" / f"{stem}.png")
        total += metrics.confusion_matrix(guess, truth, CLASSES, ignore=11)
        truths.append(truth.ravel())
        guesses.append(guess.ravel())
    # They are a tenth of what the known scores are of.
    assert (total <= known("test_jpg")[0]).all()
    # The plain way: sets of pixels.
    truth, guess = np.concatenate(truths), np.concatenate(guesses)
    counts = truth != 11
    for k, iou in enumerate(metrics.scores(total)["per_class"]["iou"]):
        both = counts & (truth == k) & (guess == k)
        either = counts & ((truth == k) | (guess == k))
        assert iou == pytest.approx(both.sum() / either.sum(), rel=1e-12)


@pytest.mark.parametrize("name", ["test_jpg", "test_png"])
def test_known_scores_of_the_whole_split(name):
    matrix, expected = known(name)
    found = metrics.scores(matrix)
    np.testing.assert_allclose(found["per_class"]["iou"], expected["iou"], rtol=1e-12)
    names = {"mIoU": "miou11", "aAcc": "pixel_acc", "mAcc": "class_acc"}
    for ours, theirs in names.items():
        assert found[ours] == pytest.approx(expected[theirs], rel=1e-12)
