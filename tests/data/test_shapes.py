"""The generated data set: deterministic, valid, and told apart by outline and surface only."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memseg_jax import data
from memseg_jax.data import IGNORE_LABEL, shapes
from memseg_jax.errors import UserError

NUM_CLASSES = len(shapes.CLASS_NAMES)
# Of image 25 of "train" at 96x96: the mean colour, and the pixels of each class and ignored ones.
EXPECTED_MEAN = [142.2, 132.8, 135.9]
EXPECTED = [4197, 0, 2104, 965, 1215, 0, 735]


def make_config(**changes):
    fields = {
        "name": "shapes",
        "root": "",
        "packed": "",
        "train_split": "train",
        "eval_split": "val",
        "image_size": (48, 64),
        "num_train": 20,
        "num_val": 10,
        "class_names": shapes.CLASS_NAMES,
    }
    return SimpleNamespace(**(fields | changes))


def test_opens_by_name():
    source = data.open_split(make_config(), "train")
    assert len(source) == 20
    assert len(data.open_split(make_config(), "val")) == 10
    assert source[3]["name"] == "train_000003"
    assert "3" in source.describe(3)


@settings(max_examples=25, deadline=None)
@given(height=st.integers(16, 100), width=st.integers(16, 100), index=st.integers(0, 10**6))
def test_samples_are_valid_at_any_size(height, width, index):
    sample = shapes.Shapes("train", 10**6 + 1, (height, width))[index]
    assert sample["image"].shape == (height, width, 3)
    assert sample["image"].dtype == np.uint8
    assert sample["label"].shape == (height, width)
    assert sample["label"].dtype == np.uint8
    values = set(np.unique(sample["label"]))
    assert values <= {*range(NUM_CLASSES), IGNORE_LABEL}


def test_is_a_pure_function_of_split_and_index():
    source = shapes.Shapes("train", 20, (48, 48))
    forward = [source[index]["image"] for index in range(20)]
    backward = [pickle.loads(pickle.dumps(source))[index]["image"] for index in reversed(range(20))]
    np.testing.assert_array_equal(forward, backward[::-1])
    assert len({image.tobytes() for image in forward}) == 20
    other = shapes.Shapes("val", 20, (48, 48))
    assert not np.array_equal(source[0]["image"], other[0]["image"])
    # A longer set starts with the same images.
    np.testing.assert_array_equal(shapes.Shapes("train", 30, (48, 48))[7]["image"], forward[7])


def test_pixels_do_not_drift():
    # Coarse means, because the last bit of a cosine may differ between platforms. If this fails
    # because the drawing was changed on purpose, change `_VERSION` with it.
    sample = shapes.Shapes("train", 30, (96, 96))[25]
    coarse = sample["image"].astype(float).mean((0, 1))
    counts = np.bincount(sample["label"].ravel(), minlength=256)
    np.testing.assert_allclose(coarse, EXPECTED_MEAN, atol=0.5)
    np.testing.assert_allclose(counts[[*range(NUM_CLASSES), IGNORE_LABEL]], EXPECTED, atol=4)


def test_every_class_occurs_and_the_ignored_line_is_thin():
    source = shapes.Shapes("train", 150, (64, 64))
    counts = sum(np.bincount(source[i]["label"].ravel(), minlength=256) for i in range(150))
    share = counts / counts.sum()
    assert set(np.flatnonzero(counts)) == {*range(NUM_CLASSES), IGNORE_LABEL}
    assert share[0] < 0.7
    assert share[1:NUM_CLASSES].min() > 0.03
    assert share[IGNORE_LABEL] < 0.12


@pytest.mark.parametrize("kind", range(1, NUM_CLASSES))
def test_outlines_have_the_right_area(kind):
    y, x = np.mgrid[-60:61, -60:61].astype(np.float32)
    radius = 50.0
    side, star = 2 * 0.78 * radius, 5 * radius * 0.46 * radius * np.sin(np.pi / 5)
    expected = {
        "circle": np.pi * (0.92 * radius) ** 2,
        "square": side**2,
        "triangle": 3 * np.sqrt(3) / 4 * radius**2,
        "star": star,
        "ring": np.pi * (radius**2 - (0.56 * radius) ** 2),
    }[shapes.CLASS_NAMES[kind]]
    for angle in (0.1, 0.7, 3.0):
        inside = shapes._outline_distance(kind, y, x, radius, angle) < 0
        assert abs(inside.sum() - expected) < 0.02 * expected + 20


@pytest.mark.parametrize("kind", range(1, NUM_CLASSES))
def test_surfaces_use_both_colours(kind):
    y, x = np.mgrid[-40:41, -40:41].astype(np.float32)
    radius, light = 40.0, (0.6, 0.8)
    inside = shapes._outline_distance(kind, y, x, radius, 0.3) < 0
    drawn = [
        shapes._surface(np.random.default_rng(seed), kind, y, x, radius, 0.3, light)
        for seed in (1, 2)
    ]
    for mix in drawn:
        assert mix.dtype == np.float32
        assert mix.min() >= 0
        assert mix.max() <= 1
        assert 0.1 < mix[inside].mean() < 0.7
        assert mix[inside].std() > 0.2
    # Rings and stars take their texture from light and outline, the others draw theirs.
    fixed = shapes.CLASS_NAMES[kind] in ("ring", "star")
    assert np.array_equal(*drawn) == fixed


def test_every_outline_with_every_surface():
    """25 classes and the background, and no image of them is one of the six classes."""
    source = shapes.Shapes("train", 400, (48, 48), pairs=True)
    classes = len(shapes.PAIR_NAMES)
    counts = sum(np.bincount(source[i]["label"].ravel(), minlength=256) for i in range(400))
    assert set(np.flatnonzero(counts)) == {*range(classes), IGNORE_LABEL}
    assert counts[1:classes].min() > 0.005 * counts.sum()
    assert shapes.PAIR_NAMES[1] == "dotted circle"
    assert shapes.PAIR_NAMES[classes - 1] == "tubular ring"
    plain = shapes.Shapes("train", 400, (48, 48))
    assert plain.fingerprint() != source.fingerprint()
    assert not np.array_equal(plain[0]["image"], source[0]["image"])
    names = shapes.PAIR_NAMES
    assert data.open_split(make_config(class_names=names), "train").fingerprint() == (
        shapes.Shapes("train", 20, (48, 64), pairs=True).fingerprint()
    )


@pytest.mark.parametrize("outline", range(1, NUM_CLASSES))
@pytest.mark.parametrize("surface", range(1, NUM_CLASSES))
def test_a_pair_is_drawn_as_its_name_says(outline, surface):
    """The shape of a pair lies where its outline says, with the texture that its surface says."""
    kind = shapes._Kind(outline, surface, 5 * (outline - 1) + surface)
    image, label = np.zeros((80, 80, 3), np.float32), np.zeros((80, 80), np.uint8)
    rng, again = np.random.default_rng(3), np.random.default_rng(3)
    shapes._draw(rng, image, label, kind, (40, 40), 30.0, (0.6, 0.8), np.zeros(3))
    angle = again.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-40:40, -40:40].astype(np.float32)
    inside = shapes._outline_distance(outline, y, x, 30.0, angle) < -2
    assert set(label[inside]) == {kind.label}
    mix = shapes._surface(again, surface, y, x, 30.0, angle, (0.6, 0.8))
    grey = image.mean(-1)
    shade = 1 + (0.6 * y + 0.8 * x) * 0.22 / 30  # but for the darker rim, which a tube feels most
    assert abs(np.corrcoef((grey / shade)[inside], mix[inside])[0, 1]) > 0.8
    words = shapes.PAIR_NAMES[kind.label].split()
    assert words == [shapes._SURFACES[surface - 1], shapes.CLASS_NAMES[outline]]


def test_colour_does_not_tell_the_class():
    source = shapes.Shapes("train", 300, (48, 48))
    means = [[] for _ in range(NUM_CLASSES)]
    for index in range(300):
        sample = source[index]
        for kind in range(1, NUM_CLASSES):
            inside = sample["label"] == kind
            if inside.sum() > 20:
                means[kind].append(sample["image"][inside].mean(0))
    for kind in range(1, NUM_CLASSES):
        others = np.concatenate([means[k] for k in range(1, NUM_CLASSES) if k != kind])
        shift = np.abs(np.mean(means[kind], 0) - others.mean(0))
        assert shift.max() < 0.6 * others.std(0).min()


def test_fingerprint_tells_sets_apart():
    prints = {
        shapes.Shapes(split, length, size).fingerprint()
        for split in ("train", "val")
        for length in (10, 11)
        for size in ((48, 48), (48, 64))
    }
    assert len(prints) == 8
    tuple_size, list_size = (shapes.Shapes("a", 1, size) for size in [(48, 64), [48, 64]])
    assert tuple_size.fingerprint() == list_size.fingerprint()


@pytest.mark.parametrize(
    ("changes", "split", "message"),
    [
        ({}, "test", "'train', 'val', not 'test'"),
        ({"class_names": ("one", "two")}, "train", "config.data.class_names has 2"),
    ],
)
def test_refuses_what_does_not_fit(changes, split, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        shapes.open_split(make_config(**changes), split)


@pytest.mark.parametrize("index", [-1, 20])
def test_index_out_of_range(index):
    with pytest.raises(IndexError):
        shapes.Shapes("train", 20, (48, 48))[index]


def test_palette_has_a_distinct_colour_for_each_class():
    assert len(shapes.PALETTE) == len(set(shapes.PALETTE)) == NUM_CLASSES
