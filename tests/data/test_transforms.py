"""Transforms: stored results of the PyTorch reference, and properties for any image."""

import re
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memseg_jax.data import IGNORE_LABEL, transforms
from tests.goldens import goldens_dir

GOLDEN_FILE = "data/pixel_ops.npz"


def load_goldens():
    path = goldens_dir() / GOLDEN_FILE
    if not path.is_file():
        return {}
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


GOLDENS = load_goldens()


def golden_cases(pattern):
    """Parametrises over the names of stored arrays that match; skips if there is none."""
    matches = [match for name in GOLDENS if (match := re.fullmatch(pattern, name))]
    if not matches:
        skip = pytest.mark.skip(reason=f"no array {pattern!r} in {goldens_dir() / GOLDEN_FILE}")
        params = [pytest.param(None, id=GOLDEN_FILE, marks=skip)]
    else:
        params = [pytest.param(match, id=f"{GOLDEN_FILE}:{match.string}") for match in matches]

    def decorate(function):
        return pytest.mark.golden(pytest.mark.parametrize("case", params)(function))

    return decorate


# The reference keeps images in BGR (results after normalisation are RGB, channels first) and
# labels as float32 with -100 for pixels that do not count.
def source_image():
    return np.ascontiguousarray(GOLDENS["image"][..., ::-1])


def source_label():
    return from_reference_label(GOLDENS["seg"])


def from_reference_label(label):
    return np.where(label < 0, IGNORE_LABEL, label).astype(np.uint8)


def assert_grey_levels(actual, expected_bgr, tolerance=0):
    assert actual.dtype == np.uint8
    difference = actual.astype(int) - expected_bgr[..., ::-1].astype(int)
    assert np.abs(difference).max() <= tolerance


def assert_label(actual, expected):
    assert actual.dtype == np.uint8
    np.testing.assert_array_equal(actual, from_reference_label(expected))


@golden_cases(r"(resize_\w+?)__image")
def test_golden_resize(case):
    name = case[1]
    image, label = source_image(), source_label()
    size = transforms.resized_size(
        *label.shape, GOLDENS[f"{name}__output_size"], bool(GOLDENS[f"{name}__keep_ratio"])
    )
    assert_grey_levels(transforms.resize_image(image, size), GOLDENS[f"{name}__image"], 1)
    assert_label(transforms.resize_label(label, size), GOLDENS[f"{name}__seg"])


@golden_cases(r"normalize__image")
def test_golden_normalise(case):
    np.testing.assert_array_equal(transforms.normalise(source_image()), GOLDENS[case[0]])


@golden_cases(r"totensor__image")
def test_golden_channels_first(case):
    actual = transforms.normalise(source_image()).transpose(2, 0, 1)
    np.testing.assert_array_equal(actual, GOLDENS[case[0]])


@golden_cases(r"(pad_\w+?)__image")
def test_golden_pad(case):
    name = case[1]
    size = tuple(int(side) for side in GOLDENS[f"{name}__output_size"])
    label = source_label()
    if (size[0] - size[1]) * (label.shape[0] - label.shape[1]) < 0:
        size = size[::-1]  # the reference turns the target; see `pad_to`
    image, label = transforms.pad_to(transforms.normalise(source_image()), label, size)
    np.testing.assert_array_equal(image.transpose(2, 0, 1), GOLDENS[f"{name}__image"])
    assert_label(label, GOLDENS[f"{name}__seg"])


@golden_cases(r"flip_(lip|plain)__(image|seg)")
def test_golden_flip(case):
    pairs = ((14, 15), (16, 17), (18, 19)) if case[1] == "lip" else ()
    image, label = transforms.flip(source_image(), source_label(), pairs)
    if case[2] == "image":
        assert_grey_levels(image, GOLDENS[case[0]])
    else:
        assert_label(label, GOLDENS[case[0]])


@golden_cases(r"pmd_(brightness|contrast|saturation|hue|hsv)(?:_(.+))?")
def test_golden_photometric(case):
    parameter = float((case[2] or "0").replace("p", "").replace("m", "-"))
    actual = {
        "brightness": lambda image: transforms.adjust_brightness(image, parameter),
        "contrast": lambda image: transforms.adjust_contrast(image, parameter),
        "saturation": lambda image: transforms.adjust_saturation(image, parameter),
        "hue": lambda image: transforms.adjust_hue(image, int(parameter)),
        # Hue, saturation and value have no colour order: undo the exchange of the comparison.
        "hsv": lambda image: transforms.to_hsv(image)[..., ::-1],
    }[case[1]](source_image())
    assert_grey_levels(actual, GOLDENS[case[0]])


@golden_cases(r"(rotate_(-?\d+))__image")
def test_golden_rotate(case):
    name, degrees = case[1], int(case[2])
    image, label = source_image(), source_label()
    matrix = transforms.rotation_matrix(*label.shape, degrees)
    np.testing.assert_allclose(matrix, GOLDENS[f"{name}__matrix"], atol=1e-12)
    image, label = transforms.rotate(image, label, degrees)
    assert_grey_levels(image, GOLDENS[f"{name}__image"], 1)
    assert_label(label, GOLDENS[f"{name}__seg"])


class LegacyDraws:
    """NumPy's legacy generator with the method names of the new one."""

    def __init__(self, seed):
        legacy = np.random.RandomState(seed)
        self.random = legacy.random_sample
        self.uniform = legacy.uniform
        self.integers = legacy.randint


def reference_augment(chain, crop):
    """The parameters of the two stored chains; the crop size is the size of the result."""
    if chain == "ade":
        return make_augment(base_size=(120, 40), crop=crop)
    return make_augment(
        base_size=(52, 52),
        keep_ratio=False,
        scale_range=(0.75, 1.25),
        crop=crop,
        flip_pairs=((14, 15), (16, 17), (18, 19)),
        rotation=0.6,
    )


@golden_cases(r"(pipeline_(ade|lip)_seed(\d+))__image")
def test_golden_training_chain(case):
    name, chain, seed = case.groups()
    expected = GOLDENS[f"{name}__image"].transpose(1, 2, 0)
    sample = {"image": source_image(), "label": source_label()}
    actual = transforms.train_transform(
        sample, LegacyDraws(int(seed)), reference_augment(chain, expected.shape[:2])
    )
    # One grey level of resize or rotation can differ between builds of OpenCV, and the photometric
    # operations after it can double that.
    grey_levels = np.abs(actual["image"] - expected) * np.array(transforms.STD)
    assert grey_levels.max() <= 3.01
    assert grey_levels.mean() < 0.05
    assert_label(actual["label"], GOLDENS[f"{name}__seg"])


def make_augment(**changes):
    augment = {
        "base_size": (),
        "keep_ratio": True,
        "scale_range": (0.5, 2.0),
        "crop": (32, 32),
        "max_category_share": 0.75,
        "flip": 0.5,
        "flip_pairs": (),
        "rotation": 0.0,
        "rotation_degrees": 30,
        "photometric": True,
    }
    return SimpleNamespace(**(augment | changes))


def make_sample(height, width, classes=5, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        "label": rng.integers(0, classes, (height, width), dtype=np.uint8),
    }


sides = st.integers(1, 70)
sizes = st.tuples(sides, sides)


@settings(max_examples=60, deadline=None)
@given(
    size=sizes,
    crop=sizes,
    base_size=st.sampled_from([(), (60, 20), (33, 33)]),
    keep_ratio=st.booleans(),
    rotation=st.sampled_from([0.0, 1.0]),
    ignored=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_result_has_the_crop_size(size, crop, base_size, keep_ratio, rotation, ignored, seed):
    sample = make_sample(*size)
    if ignored:
        sample["label"][:] = IGNORE_LABEL
    before = {name: array.copy() for name, array in sample.items()}
    augment = make_augment(base_size=base_size, keep_ratio=keep_ratio, crop=crop, rotation=rotation)
    result = transforms.train_transform(sample, np.random.default_rng(seed), augment)
    assert result["image"].shape == (*crop, 3)
    assert result["image"].dtype == np.float32
    assert result["label"].shape == crop
    assert result["label"].dtype == np.uint8
    assert set(np.unique(result["label"])) <= set(np.unique(sample["label"])) | {IGNORE_LABEL}
    for name, array in before.items():
        np.testing.assert_array_equal(sample[name], array)  # arguments are left alone

    again = transforms.train_transform(sample, np.random.default_rng(seed), augment)
    np.testing.assert_array_equal(result["image"], again["image"])
    np.testing.assert_array_equal(result["label"], again["label"])


def test_image_and_label_stay_aligned():
    # The image shows its label as a grey level, so every geometric step can be read back.
    label = np.kron(np.arange(12, dtype=np.uint8).reshape(3, 4), np.ones((16, 16), np.uint8))
    sample = {"image": np.repeat(label[..., None] * 20, 3, axis=2), "label": label}
    for seed in range(20):
        augment = make_augment(crop=(40, 40), rotation=0.5, photometric=False, scale_range=(1, 1))
        result = transforms.train_transform(sample, np.random.default_rng(seed), augment)
        inside = result["label"] != IGNORE_LABEL
        shown = transforms.denormalise(result["image"])[..., 0]
        wrong = np.abs(shown[inside] / 20.0 - result["label"][inside]) > 0.5
        assert wrong.mean() < 0.15  # bicubic against nearest at the cells' borders if rotated


@pytest.mark.parametrize(
    ("size", "base_size", "keep_ratio", "expected"),
    [
        ((480, 640), (2048, 512), True, (512, 683)),
        ((640, 480), (2048, 512), True, (683, 512)),
        ((100, 1000), (2048, 512), True, (205, 2048)),
        ((1024, 2048), (2048, 1024), True, (1024, 2048)),
        ((640, 480), (473, 520), False, (520, 473)),
        ((480, 640), (473, 520), False, (473, 520)),
        ((480, 640), (), True, (480, 640)),
        ((1, 9000), (2048, 512), True, (1, 2048)),
        ((9000, 1), (2048, 512), True, (2048, 1)),
    ],
)
def test_resized_size(size, base_size, keep_ratio, expected):
    assert transforms.resized_size(*size, base_size, keep_ratio) == expected


def test_scale_truncates_the_target_first():
    # int(71 * 0.33) = 23 and int(47 * 0.33) = 15, so the ratio is 15 / 37, not 0.33 * 47 / 37.
    assert transforms.resized_size(37, 53, (71, 47), True, 0.33) == (15, int(53 * 15 / 37 + 0.5))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_one_pixel_wide_images_pass(size):
    sample = make_sample(*size)
    for base_size in [(), (2048, 512), (120, 40)]:
        evaluation = SimpleNamespace(base_size=base_size, keep_ratio=True)
        result = transforms.evaluation_transform(sample["image"], evaluation)
        assert result.dtype == np.float32
        assert result.ndim == 3
    result = transforms.train_transform(sample, np.random.default_rng(0), make_augment())
    assert result["image"].shape == (32, 32, 3)


def test_evaluation_transform_only_normalises_at_the_same_size():
    image = make_sample(20, 30)["image"]
    result = transforms.evaluation_transform(image, SimpleNamespace(base_size=(), keep_ratio=True))
    expected = (image - np.array(transforms.MEAN)) / np.array(transforms.STD)
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_denormalise_inverts_normalise():
    image = make_sample(16, 16)["image"]
    np.testing.assert_array_equal(transforms.denormalise(transforms.normalise(image)), image)


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ({0: 3, 1: 1}, 0.75, False),  # exactly the limit is too much
        ({0: 2, 1: 1}, 0.75, True),
        ({0: 4}, 0.75, False),
        ({0: 1, 1: 1, IGNORE_LABEL: 98}, 0.75, True),  # what is ignored does not count
        ({IGNORE_LABEL: 4}, 0.75, False),
        ({0: 4}, 1.0, True),  # no limit
    ],
)
def test_acceptable_crop(counts, share, expected):
    label = np.concatenate([np.full((n, 1), value, np.uint8) for value, n in counts.items()])
    assert transforms.acceptable_crop(label, share) == expected


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75, 0.9])
def test_share_is_exact(share):
    # Just below, at, and just above the limit, in a crop of the published size.
    pixels = 512 * 512
    for most in (int(share * pixels) + d for d in (-1, 0, 1)):
        label = np.arange(pixels, dtype=np.int64).reshape(512, 512)
        label = np.where(label < most, 7, 8 + label % 4).astype(np.uint8)
        commonest = np.bincount(label.ravel()).max()
        assert transforms.acceptable_crop(label, share) == (commonest / pixels < share)
        part = label[1:, 2:]  # a view, as crops are
        expected = transforms.acceptable_crop(part.copy(), share)
        assert transforms.acceptable_crop(part, share) == expected


class CountedDraws:
    """Draws `values` in turn, then zeros."""

    def __init__(self, values=()):
        self.values = list(values)
        self.calls = 0

    def integers(self, low, high):
        value = self.values[self.calls] if self.calls < len(self.values) else 0
        self.calls += 1
        assert low <= value < high
        return value


def test_crop_takes_the_first_acceptable_window():
    sample = make_sample(8, 12)
    sample["label"][:, :8] = 0
    sample["label"][:, 8:] = 1
    draws = CountedDraws([0, 0, 2, 6, 1, 1])
    image, label = transforms.random_crop(sample["image"], sample["label"], (4, 4), 0.75, draws)
    assert draws.calls == 4  # top and left of two attempts
    np.testing.assert_array_equal(label, sample["label"][2:6, 6:10])
    np.testing.assert_array_equal(image, sample["image"][2:6, 6:10])


def test_crop_uses_the_tenth_window_after_ten_failures():
    sample = make_sample(8, 8, classes=1)
    draws = CountedDraws([0] * 18 + [3, 2])
    image, _ = transforms.random_crop(sample["image"], sample["label"], (4, 4), 0.75, draws)
    assert draws.calls == 20
    np.testing.assert_array_equal(image, sample["image"][3:7, 2:6])


def test_crop_without_valid_pixels_returns_the_whole_sample():
    sample = make_sample(9, 8, classes=1)
    sample["label"][:4, :4] = IGNORE_LABEL
    image, label = transforms.random_crop(
        sample["image"], sample["label"], (4, 4), 0.75, CountedDraws()
    )
    assert image is sample["image"]
    # The padding then trims it around the centre: an odd excess costs the top one row more.
    image, label = transforms.pad_to(transforms.normalise(image), label, (4, 4))
    np.testing.assert_array_equal(image, transforms.normalise(sample["image"][3:7, 2:6]))
    np.testing.assert_array_equal(label, sample["label"][3:7, 2:6])


def test_crop_never_leaves_the_image_and_reaches_every_place():
    sample = make_sample(6, 7)
    rng = np.random.default_rng(0)
    places = set()
    for _ in range(300):
        image, _ = transforms.random_crop(sample["image"], sample["label"], (4, 5), 1.0, rng)
        assert image.shape == (4, 5, 3)
        offset = image.__array_interface__["data"][0] - sample["image"].ctypes.data
        places.add(divmod(offset // 3, 7))
    assert places == {(top, left) for top in range(3) for left in range(3)}


@given(have=sizes, want=sizes)
@settings(max_examples=50, deadline=None)
def test_pad_places_the_centre(have, want):
    sample = make_sample(*have)
    image, label = transforms.pad_to(sample["image"].astype(np.float32), sample["label"], want)
    assert image.shape == (*want, 3)
    top, left = (want[0] - have[0]) // 2, (want[1] - have[1]) // 2
    for row in range(want[0]):
        for column in (0, want[1] // 2, want[1] - 1):
            y, x = row - top, column - left
            if 0 <= y < have[0] and 0 <= x < have[1]:
                assert label[row, column] == sample["label"][y, x]
            else:
                assert label[row, column] == IGNORE_LABEL
                assert not image[row, column].any()


def test_flip_twice_is_the_identity():
    sample = make_sample(9, 14)
    pairs = ((0, 1), (2, 4))
    once = transforms.flip(sample["image"], sample["label"], pairs)
    assert not np.array_equal(once[1], sample["label"][:, ::-1])
    twice = transforms.flip(*once, pairs)
    np.testing.assert_array_equal(twice[0], sample["image"])
    np.testing.assert_array_equal(twice[1], sample["label"])


def test_opencv_uses_no_threads_of_its_own():
    assert cv2.getNumThreads() <= 1
