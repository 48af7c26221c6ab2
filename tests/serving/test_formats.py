"""Every form of a result gives the classes of all pixels back."""

import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from memseg_jax.inference import Prediction
from memseg_jax.serving import formats

NAMES = ("ground", "box", "disc")
SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))
LABELS = arrays.arrays(np.uint8, SIZES, elements=st.integers(0, 2))


def prediction(label):
    confidence = np.random.default_rng(0).random(label.shape, np.float32)
    return Prediction(None, label, confidence)


def check_segments(made, found, painted):
    """What is said about the segments is true of the pixels that they are painted at."""
    label, confidence = made.label, made.confidence
    assert (found["height"], found["width"]) == label.shape
    seen = np.zeros(label.shape, int)
    for segment, mask in zip(found["segments"], painted, strict=True):
        assert segment["name"] == NAMES[segment["class_id"]]
        assert (label[mask] == segment["class_id"]).all()
        assert segment["pixels"] == mask.sum()
        assert segment["confidence"] == pytest.approx(confidence[mask].mean(), abs=1e-4)
        seen += mask
    np.testing.assert_array_equal(seen, 1)  # every pixel belongs to one segment


@given(LABELS)
@settings(deadline=None, max_examples=150)
def test_polygons_painted_by_opencv_are_the_label_map(label):
    made = prediction(label)
    found = formats.polygons(made, NAMES)
    painted = []
    for segment in found["segments"]:
        outline, *holes = (np.array(x, np.int32) for x in segment["polygons"])
        mask = cv2.fillPoly(np.zeros(label.shape, np.uint8), [outline], 1)
        for hole in holes:  # their lines are inside the segment
            inside = cv2.fillPoly(np.zeros(label.shape, np.uint8), [hole], 1)
            mask &= 1 - (inside - cv2.polylines(np.zeros_like(inside), [hole], True, 1))
        painted.append(mask.astype(bool))
    check_segments(made, found, painted)


def test_an_island_in_a_hole_is_a_segment_of_its_own():
    label = np.zeros((9, 9), np.uint8)
    label[1:8, 1:8], label[2:7, 2:7], label[4, 4] = 1, 0, 1
    found = formats.polygons(prediction(label), NAMES)["segments"]
    shapes = [(x["class_id"], len(x["polygons"]), x["pixels"]) for x in found]
    assert sorted(shapes) == [(0, 2, 24), (0, 2, 32), (1, 1, 1), (1, 2, 24)]


@given(LABELS)
@settings(deadline=None, max_examples=100)
def test_run_lengths_are_those_of_coco(label):
    made = prediction(label)
    found = formats.run_lengths(made, NAMES)
    painted = []
    for segment in found["segments"]:
        counts = segment["segmentation"]["counts"]
        assert segment["segmentation"]["size"] == list(label.shape)
        assert all(counts[1:])
        flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        painted.append(flat.reshape(label.shape, order="F"))
    check_segments(made, found, painted)


def test_the_tools_of_coco_read_the_run_lengths():
    tools = pytest.importorskip("pycocotools.mask")
    label = np.random.default_rng(1).integers(0, 3, (7, 5)).astype(np.uint8)
    for segment in formats.run_lengths(prediction(label), NAMES)["segments"]:
        decoded = tools.decode(tools.frPyObjects(segment["segmentation"], 7, 5))
        np.testing.assert_array_equal(decoded, label == segment["class_id"])


def test_the_png_files():
    made = prediction(np.array([[0, 1, 2], [2, 2, 0]], np.uint8))
    palette = np.array([[9, 8, 7], [6, 5, 4], [3, 2, 1]], np.uint8)
    with Image.open(io.BytesIO(formats.label_png(made, palette))) as picture:
        np.testing.assert_array_equal(np.array(picture), made.label)
        np.testing.assert_array_equal(np.array(picture.convert("RGB")), palette[made.label])
    with Image.open(io.BytesIO(formats.values_png(made))) as picture:
        red, green, blue = np.moveaxis(np.array(picture), -1, 0)
    np.testing.assert_array_equal(red, made.label)
    np.testing.assert_allclose(green / 255, made.confidence, atol=0.5 / 255 + 1e-6)
    assert not blue.any()
