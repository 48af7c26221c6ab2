"""How often and how far training samples are changed: what the published recipes say."""

import importlib

import numpy as np
import pytest

from memseg_jax.data import transforms
from tests.data.test_transforms import make_augment, make_sample

# What the four published recipes say: range of the scale, probability of a rotation.
PUBLISHED = {
    "ade20k": ((0.5, 2.0), 0.0),
    "cityscapes": ((0.5, 2.0), 0.0),
    "cocostuff10k": ((0.5, 2.0), 0.0),
    "lip": ((0.75, 1.25), 0.6),
}
SAMPLES = 2000


@pytest.fixture(scope="module", params=PUBLISHED)
def recorded(request):
    """(range, rotation, calls): what the published recipe draws for many samples."""
    augment = importlib.import_module(f"configs.{request.param}_resnet50").get_config().augment
    augment.base_size, augment.crop = (12, 12), (8, 8)
    names = ("resized_size", "flip", "rotate", "adjust_brightness", "adjust_contrast")
    names += ("adjust_saturation", "adjust_hue")
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            function = getattr(transforms, name)

            def record(*args, name=name, function=function):
                calls[-1].append((name, args[-1]))
                return function(*args)

            patch.setattr(transforms, name, record)
        rng = np.random.default_rng(3)
        for _ in range(SAMPLES):
            calls.append([])
            transforms.train_transform(make_sample(10, 12), rng, augment)
    return *PUBLISHED[request.param], calls


def values_of(calls, name):
    return np.array([value for of_sample in calls for called, value in of_sample if called == name])


def assert_share(found, expected):
    """A share of all samples, within four standard deviations."""
    assert abs(found / SAMPLES - expected) <= 4 * (expected * (1 - expected) / SAMPLES) ** 0.5


def assert_uniform(values, low, high):
    """Kolmogorov's distance to the uniform distribution; one sample in a thousand would fail."""
    values = np.sort(values)
    assert low <= values[0]
    assert values[-1] < high
    expected = (values - low) / (high - low)
    steps = np.arange(len(values) + 1) / len(values)
    distance = max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())
    assert distance * len(values) ** 0.5 < 1.95


def assert_all_equally_often(values, expected):
    found, counts = np.unique(values, return_counts=True)
    assert found.tolist() == list(expected)
    mean = len(values) / len(found)
    assert np.abs(counts - mean).max() < 4.5 * mean**0.5


def test_every_scale_is_as_likely(recorded):
    (low, high), _, calls = recorded
    scales = values_of(calls, "resized_size")
    assert len(scales) == SAMPLES
    assert_uniform(scales, low, high)


def test_half_are_mirrored(recorded):
    assert_share(len(values_of(recorded[2], "flip")), 0.5)


def test_rotation(recorded):
    _, probability, calls = recorded
    degrees = values_of(calls, "rotate")
    assert_share(len(degrees), probability)
    if probability:
        assert_all_equally_often(degrees, range(-30, 30))


@pytest.mark.parametrize(
    ("operation", "low", "high"),
    [
        ("adjust_brightness", -32, 32),
        ("adjust_contrast", 0.5, 1.5),
        ("adjust_saturation", 0.5, 1.5),
        ("adjust_hue", None, None),
    ],
)
def test_photometric_operation(recorded, operation, low, high):
    values = values_of(recorded[2], operation)
    assert_share(len(values), 0.5)
    if operation == "adjust_hue":
        assert_all_equally_often(values, range(-18, 18))
    else:
        assert_uniform(values, low, high)


def test_operations_are_independent_and_in_order(recorded):
    _, _, calls = recorded
    order = ["resized_size", "flip", "rotate", "adjust_brightness", "adjust_contrast"]
    order += ["adjust_saturation", "adjust_hue", "adjust_contrast"]
    names = [[name for name, _ in of_sample] for of_sample in calls]
    for of_sample in names:
        rest = iter(order)
        assert all(name in rest for name in of_sample)  # a subsequence
    # With brightness and hue, contrast is as often between them as after both.
    both = [
        x.index("adjust_contrast") < x.index("adjust_hue")
        for x in names
        if {"adjust_contrast", "adjust_hue"} <= set(x)
    ]
    assert_share(len(both), 0.25)
    assert_share(sum(both), 0.125)
    pairs = [("flip", "adjust_brightness"), ("adjust_brightness", "adjust_saturation")]
    for pair in [*pairs, ("adjust_saturation", "adjust_hue")]:
        assert_share(sum(set(pair) <= set(x) for x in names), 0.25)


def test_crops_are_accepted_by_the_share_of_classes():
    # A class covers the left columns: windows that show too much or too little of it are redrawn.
    sample = make_sample(40, 40, classes=1)
    sample["label"][:, 20:] = 1
    rng = np.random.default_rng(5)
    lefts = []
    for _ in range(SAMPLES):
        _, label = transforms.random_crop(sample["image"], sample["label"], (8, 8), 0.75, rng)
        lefts.append(20 - int((label[0] == 0).sum()) if label.any() and not label.all() else -1)
    lefts = np.array(lefts)
    # 3 to 5 of 8 columns show the class: 3 of 33 places. Ten draws fail with (30 / 33)**10 = 0.386,
    # and the tenth is then taken as it is.
    accepted = np.isin(lefts, (15, 16, 17))
    assert_share(accepted.sum(), 1 - (30 / 33) ** 10)
    assert_all_equally_often(lefts[accepted], (15, 16, 17))


def test_probabilities():
    sample = {"image": np.arange(4, dtype=np.uint8).reshape(1, 4, 1).repeat(3, 2)}
    sample["label"] = np.arange(4, dtype=np.uint8).reshape(1, 4)
    rng = np.random.default_rng(0)
    for probability, least, most in [(0.0, 0, 0), (0.25, 80, 125), (1.0, 400, 400)]:
        augment = make_augment(crop=(1, 4), scale_range=(1, 1), photometric=False, flip=probability)
        flipped = sum(
            transforms.train_transform(sample, rng, augment)["label"][0, 0] == 3 for _ in range(400)
        )
        assert least <= flipped <= most


def test_photometric_changes_half_the_time_and_keeps_the_type():
    image = make_sample(8, 8)["image"]
    rng = np.random.default_rng(0)
    results = [transforms.random_photometric(image, rng) for _ in range(320)]
    assert all(result.dtype == np.uint8 for result in results)
    unchanged = sum(np.array_equal(result, image) for result in results)
    assert 8 <= unchanged <= 36  # all four are left out once in 16 times
