"""What an evaluation finds besides its scores: confidences, outlines, pictures; and its file."""

import numpy as np
import pytest

from memseg_jax.errors import UserError
from memseg_jax.inference import Prediction
from memseg_jax.scoring import evaluation_file, gallery, metrics
from memseg_jax.scoring.boundary import BoundaryScore
from memseg_jax.scoring.calibration import BINS, Reliability
from memseg_jax.scoring.findings import Findings

# ---- Confidences --------------------------------------------------------------------------------


def test_confidences_that_are_what_they_say():
    rng = np.random.default_rng(0)
    confidence = rng.random((400, 400)).astype(np.float32)
    right = rng.random(confidence.shape) < confidence
    label = np.zeros(confidence.shape, np.uint8)
    found = Reliability()
    found.add(confidence, np.where(right, 0, 1).astype(np.uint8), label, 2)
    assert found.error() < 0.01
    assert found.bins[:, 0].sum() == label.size


def test_the_calibration_error_by_hand():
    label = np.array([[0, 0, 0, 1, 255]], np.uint8)
    prediction = np.array([[0, 1, 0, 1, 1]], np.uint8)
    confidence = np.array([[0.62, 0.64, 0.93, 1.0, 0.1]], np.float32)  # the last one is not counted
    found = Reliability()
    assert np.isnan(found.error())
    found.add(confidence, prediction, label, 2)
    # Bin 0.60 to 0.65: one of two is right; the others are right.
    expected = (abs(1 - 1.26) + abs(1 - 0.93) + 0) / 4
    assert found.error() == pytest.approx(expected, abs=1e-6)
    assert found.bins[BINS - 1, 0] == 1


# ---- Outlines -----------------------------------------------------------------------------------


def disc(radius, shift=0, side=64):
    y, x = np.ogrid[:side, :side]
    return ((y - side / 2) ** 2 + (x - side / 2 - shift) ** 2 < radius**2).astype(np.uint8)


def boundary(prediction, label, classes=2):
    found = BoundaryScore(classes)
    found.add(prediction, label)
    return found.scores()


def test_outlines():
    label = disc(20)
    np.testing.assert_array_equal(boundary(label, label), [1, 1])
    # IoU hardly sees it; the outline is more than a pixel off at most places.
    assert (boundary(disc(23), label) < 0.2).all()
    near, far = (boundary(disc(20, shift), label)[1] for shift in (1, 5))
    assert far < 0.5 < near
    # A class that one of the two lacks scores 0; one that both lack has no score.
    scores = boundary(np.where(disc(5), 2, label).astype(np.uint8), label, classes=4)
    assert scores[2] == 0
    assert np.isnan(scores[3])


def test_outlines_within_a_band_without_labels():
    label = disc(20)
    banded = label.copy()
    banded[(disc(21) - disc(19)).astype(bool)] = 255
    np.testing.assert_array_equal(boundary(label, banded), [1, 1])
    assert (boundary(disc(25), banded) < 0.1).all()
    # In a large area without labels nothing is asked.
    hidden = label.copy()
    hidden[:, :40] = 255
    found = BoundaryScore(2)
    found.add(np.where(np.arange(64) < 30, 1 - label, label).astype(np.uint8), hidden)
    np.testing.assert_array_equal(found.scores(), [1, 1])
    empty = BoundaryScore(2)
    empty.add(label, np.full_like(label, 255))
    assert empty.counts.sum() == 0


# ---- Pictures -----------------------------------------------------------------------------------

NAMES = ("ground", "box")


def find(order, share_wrong, thorough=False):
    """Findings of images of which a share of the pixels is wrong, in an order of arrival."""
    found = Findings(len(NAMES), thorough)
    for index in order:
        label = np.zeros((10, 10), np.uint8)
        label[5:] = 1
        prediction = label.copy()
        prediction.ravel()[: round(100 * share_wrong[index])] ^= 1
        image = np.full((10, 10, 3), index, np.uint8)
        confidence = np.full((10, 10), 0.75, np.float32) if thorough else None
        sample = {"image": image, "label": label, "name": f"{index:03d}"}
        matrix = metrics.confusion_matrix(prediction, label, len(NAMES))
        found.add(Prediction(index, prediction, confidence), sample, matrix)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_worst_and_best_are_exact_and_the_middle_is_near(seed):
    rng = np.random.default_rng(seed)
    wrong = rng.permutation(50) / 100
    found = find(rng.permutation(50), wrong)
    assert len(found.gallery.pictures) < 25
    chosen = gallery.choose(found.per_image, list(found.gallery.pictures))
    by_score = np.argsort(-wrong).tolist()
    assert chosen.worst == by_score[:3]
    assert chosen.best == by_score[:-4:-1]
    assert all(abs(wrong[i] - np.median(wrong)) < 0.1 for i in chosen.middle)
    assert len({*chosen.worst, *chosen.middle, *chosen.best}) == 9
    (pair,) = chosen.confusions  # only the upper half, ground, is ever wrong
    assert (pair.true, pair.predicted, pair.index) == (0, 1, by_score[0])
    assert pair.pixels == round(wrong.sum() * 100)


@pytest.mark.parametrize("images", range(5))
def test_few_images_are_each_shown_once(images):
    found = find(range(images), np.linspace(0.4, 0, 5))
    chosen = gallery.choose(found.per_image, list(found.gallery.pictures))
    shown = [*chosen.worst, *chosen.middle, *chosen.best]
    assert len(shown) == len(set(shown)) == min(images, 3)
    assert sorted(found.gallery.pictures) == list(range(images))


def test_large_images_are_shrunk():
    image = np.zeros((1000, 500, 3), np.uint8)
    label = np.zeros((1000, 500), np.uint8)
    picture = gallery.Picture.make(image, label, label, label.astype(np.float32))
    assert picture.truth.shape == picture.prediction.shape == picture.confidence.shape == (480, 240)


# ---- The file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("thorough", [False, True])
def test_what_is_written_is_read(place_of_run, thorough):
    found = find(range(7), np.linspace(0, 0.4, 7), thorough)
    evaluation_file.write(place_of_run, {"class_names": NAMES, "step": 3}, found)
    about, again = evaluation_file.read(place_of_run)
    assert (about["step"], about["class_names"]) == (3, list(NAMES))
    assert again.per_image.names == found.per_image.names
    arrays, expected = again.arrays(), found.arrays()
    assert sorted(arrays) == sorted(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array)


def test_a_file_that_is_not_there_damaged_or_of_another_version(tmp_path):
    assert evaluation_file.read(tmp_path) is None
    path = tmp_path / evaluation_file.FILE
    evaluation_file.write(tmp_path, {"class_names": NAMES}, find(range(2), [0, 0.1]))
    whole = path.read_bytes()
    for content in (b"", b"PK", whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"evaluation\.npz cannot be read"):
            evaluation_file.read(tmp_path)
    evaluation_file.write(tmp_path, {"class_names": NAMES, "format": 9}, Findings(2))
    with pytest.raises(UserError, match="has format 9"):
        evaluation_file.read(tmp_path)


def test_two_processes_find_what_one_finds():
    wrong = np.linspace(0, 0.4, 12)
    whole = find(range(12), wrong, thorough=True)
    merged = Findings(len(NAMES), thorough=True)
    for first in (1, 0):
        merged.update(find(range(first, 12, 2), wrong, thorough=True).arrays())
    np.testing.assert_array_equal(merged.per_image.counts(), whole.per_image.counts())
    np.testing.assert_allclose(merged.reliability.bins, whole.reliability.bins)
    np.testing.assert_array_equal(merged.boundary.counts, whole.boundary.counts)
    chosen, expected = (
        gallery.choose(x.per_image, list(x.gallery.pictures)) for x in (merged, whole)
    )
    assert (chosen.worst, chosen.best) == (expected.worst, expected.best)
