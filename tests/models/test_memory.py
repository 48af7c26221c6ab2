"""The memory update against a plain full-resolution version of the rule, in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memseg_jax.models.memory import read_memory
from memseg_jax.models.memory_update import memory_momentum, update_memory, update_memory_groups
from tests.small_models import fast_jit

CHANNELS = 6

update = fast_jit(update_memory, static_argnames="strategy")
update_groups = fast_jit(update_memory_groups, static_argnames=("strategy", "groups"))


# ---- the rule, written plainly ---------------------------------------------------------------


def interpolate(values, size):
    """Bilinear resize of [height, width, channels], one axis after the other."""
    for axis in (0, 1):
        values = np.moveaxis(values, axis, 0)
        source, target = len(values), size[axis]
        lines = []
        for index in range(target):
            position = max((index + 0.5) * source / target - 0.5, 0.0)
            lower = min(int(position), source - 1)
            upper = min(lower + 1, source - 1)
            share = position - lower if upper > lower else 0.0
            lines.append((1 - share) * values[lower] + share * values[upper])
        values = np.moveaxis(np.stack(lines), 0, axis)
    return values


def cosine(features, row):
    norms = [np.maximum(np.linalg.norm(x, axis=-1), 1e-8) for x in (features, row)]
    return features @ row / (norms[0] * norms[1])


def plain_update(memory, features, labels, momentum, strategy="cosine"):
    """Loops over classes and slots at the size of the labels."""
    memory, features = np.array(memory, np.float64), np.asarray(features, np.float64)
    pixels = np.stack([interpolate(image, labels.shape[1:]) for image in features])
    for k, rows in enumerate(memory):
        own = pixels[np.asarray(labels) == k]
        if not len(own):
            continue
        empty = [t for t, row in enumerate(rows) if not row.any()]
        if empty:
            rows[empty[0]] = own.mean(axis=0)
            continue
        similarity = np.stack([cosine(own, row) for row in rows], axis=1)
        slot = similarity.argmax(axis=1)
        for t in range(len(rows)):
            members = own[slot == t]
            if not len(members):
                rows[t] *= 1 - momentum
                continue
            weights = np.ones(len(members))
            if strategy == "cosine":
                weights = 1 - similarity[slot == t, t]
                if weights.mean() <= 1e-6:
                    continue  # all are parallel to the row: nothing to learn
            mean = weights @ members / weights.sum()
            rows[t] = (1 - momentum) * rows[t] + momentum * mean
    return memory


def assert_close(actual, expected):
    limit = 2e-5 * max(np.abs(expected).max(), 1e-30)
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=limit)


# ---- random cases ----------------------------------------------------------------------------

# Images, feature map, labels, classes, slots. Few shapes, so that their programs are reused.
SHAPES = [
    (1, (1, 1), (1, 1), 2, 1),
    (2, (1, 1), (5, 4), 3, 2),
    (2, (3, 4), (3, 4), 4, 1),
    (2, (3, 4), (7, 9), 4, 2),
    (2, (4, 3), (16, 11), 5, 1),
    (1, (5, 2), (3, 7), 3, 3),
    (3, (2, 2), (9, 5), 6, 1),
    (1, (1, 5), (13, 1), 2, 2),
]


def draw_case(shape, labelling, storage, rectified, seed):
    """Returns memory, features and labels."""
    images, size, label_size, classes, slots = shape
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((images, *size, CHANNELS))
    features = np.maximum(features + 0.3, 0) if rectified else features
    labels = rng.choice([*range(classes), 200, 255], (images, *label_size)).astype(np.uint8)
    if labelling == "one class":
        labels[:] = rng.integers(classes)
    elif labelling == "all ignored":
        labels[:] = 255
    elif labelling == "single pixels":
        keep = np.zeros(labels.size, bool)
        keep[rng.choice(labels.size, min(labels.size, classes), replace=False)] = True
        labels[~keep.reshape(labels.shape)] = 255
    elif labelling == "class absent":
        labels[labels == 0] = 1
    memory = rng.standard_normal((classes, slots, CHANNELS))
    if storage == "some empty":
        memory[rng.random((classes, slots)) < 0.5] = 0
    elif storage == "nothing yet":
        memory[:] = 0
    return memory.astype(np.float32), features.astype(np.float32), labels


cases = st.builds(
    draw_case,
    st.sampled_from(SHAPES),
    st.sampled_from(["dense", "single pixels", "class absent", "one class", "all ignored"]),
    st.sampled_from(["full", "some empty", "nothing yet"]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
momenta = st.sampled_from([0.0, 0.3, 0.9, 1.0])
# The same examples in every run: float32 against float64 is no place for chance.
relaxed = functools.partial(settings, deadline=None, derandomize=True)


@relaxed(max_examples=60)
@given(case=cases, momentum=momenta)
def test_update_equals_plain_rule(case, momentum):
    memory, features, labels = case
    actual = update(memory, features, labels, momentum)
    assert actual.dtype == jnp.float32
    assert_close(actual, plain_update(memory, features, labels, momentum))


@relaxed(max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    storage=st.sampled_from(["full", "some empty"]),
    momentum=momenta,
)
def test_mean_strategy_equals_plain_rule(seed, storage, momentum):
    memory, features, labels = draw_case(SHAPES[3], "dense", storage, False, seed)
    actual = update(memory, features, labels, momentum, strategy="mean")
    assert_close(actual, plain_update(memory, features, labels, momentum, "mean"))


@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_features_are_used_in_float32(seed):
    memory, features, labels = draw_case(SHAPES[3], "dense", "some empty", True, seed)
    rounded = jnp.asarray(features, jnp.bfloat16)
    actual = update(memory, rounded, labels, 0.9)
    assert actual.dtype == jnp.float32
    assert_close(actual, plain_update(memory, rounded, labels, 0.9))


def test_unknown_strategy():
    memory, features, labels = draw_case(SHAPES[0], "dense", "full", False, 0)
    with pytest.raises(ValueError, match=r"'median'.*'cosine' or 'mean'"):
        update_memory(memory, features, labels, 0.9, strategy="median")


# ---- worked numbers --------------------------------------------------------------------------

# Channels of a map of 2 x 3 positions; the numbers after it are the PyTorch reference's.
WORKED = np.array(
    [[[1, 2, 0], [0.5, 1, 3]], [[0, 1, 1], [2, 0, 1]],
     [[1, 0, 2], [1, 1, 0]], [[0, 0, 1], [1, 2, 2]]], np.float32,
).transpose(1, 2, 0)[None]  # fmt: skip


def test_worked_example():
    memory = np.zeros((3, 1, 4), np.float32)
    memory = update(memory, WORKED, np.array([[[0, 0, 1], [1, 255, 0]]]), 0.9)
    expected = [[2, 2 / 3, 1 / 3, 2 / 3], [0.25, 1.5, 1.5, 1], [0, 0, 0, 0]]
    np.testing.assert_allclose(memory[:, 0], expected, rtol=1e-6)
    memory = update(memory, WORKED, np.array([[[0, 1, 1], [2, 2, 0]]]), 0.45)
    expected = [
        [1.67889394, 0.43111364, 0.56888636, 0.49556061],
        [0.97294455, 1.275, 0.88955545, 0.58227767],
        [0.75, 1, 1, 1.5],
    ]
    np.testing.assert_allclose(memory[:, 0], expected, rtol=2e-6)


def test_worked_example_of_two_slots():
    expected = [
        [[[2, 0.6666667, 0.33333334, 0.6666667], [0, 0, 0, 0]],
         [[0.5, 1, 1.3333334, 1.3333334], [0, 0, 0, 0]]],
        [[[2, 0.6666667, 0.33333334, 0.6666667], [2, 0.6, 0.36666667, 0.8]],
         [[0.5, 1, 1.3333334, 1.3333334], [0.5, 0.9, 1.4666667, 1.6]]],
        [[[2, 0.7311666, 0.18333334, 0.36666667], [1.74115658, 0.40741843, 0.63051689, 0.71526563]],
         [[0.5, 1.27899992, 1.27783334, 1.38133335],
          [0.57241285, 0.61859554, 1.53579712, 1.95627451]]],
        [[[2, 0.73019159, 0.10083333, 0.20166667],
          [1.75662780, 0.35128760, 0.71348035, 0.99645376]],
         [[0.5, 1.35954988, 1.30175841, 1.53733349],
          [0.53236759, 0.50969046, 1.75304210, 2.22946119]]],
    ]  # fmt: skip
    memory, features = np.zeros((2, 2, 4), np.float32), WORKED
    labels = np.array([[[0, 0, 1], [1, 1, 0]]])
    for momentum, after in zip((0.9, 0.9, 0.45, 0.45), expected):
        memory = update(memory, features, labels, momentum)
        np.testing.assert_allclose(memory, after, rtol=5e-6)
        features = features * np.array([1, 0.9, 1.1, 1.2], np.float32)


# ---- edges of the rule -----------------------------------------------------------------------


def test_ignored_values_change_nothing():
    memory, features, labels = draw_case(SHAPES[3], "dense", "some empty", False, 0)
    expected = update(memory, features, np.where(labels >= 200, 255, labels).astype(np.int32), 0.9)
    for value in (-1, 4, 200, 254):  # 4 is the first number that is no class
        other = np.where(labels >= 200, value, labels).astype(np.int32)
        np.testing.assert_array_equal(update(memory, features, other, 0.9), expected)


def test_nothing_labelled_changes_nothing():
    memory, features, labels = draw_case(SHAPES[4], "all ignored", "some empty", False, 0)
    np.testing.assert_array_equal(update(memory, features, labels, 0.9), memory)


def test_absent_class_keeps_its_row_to_the_bit():
    memory, features, labels = draw_case(SHAPES[4], "class absent", "full", False, 0)
    after = np.asarray(update(memory, features, labels, 0.9))
    np.testing.assert_array_equal(after[0], memory[0])
    assert (after[1] != memory[1]).all()


@pytest.mark.parametrize("scale", [1.0, 1e-3, 37.0])
def test_pixels_parallel_to_their_row_leave_it_alone(scale):
    rng = np.random.default_rng(0)
    memory = rng.standard_normal((4, 1, CHANNELS)).astype(np.float32)
    features = np.broadcast_to(scale * memory[2, 0], (2, 3, 4, CHANNELS))
    labels = np.full((2, 7, 9), 2, np.int32)
    after = update(memory, np.ascontiguousarray(features), labels, 0.9)
    np.testing.assert_array_equal(after, memory)


def test_one_deviating_pixel_takes_all_the_weight():
    rng = np.random.default_rng(0)
    memory = rng.standard_normal((4, 1, CHANNELS)).astype(np.float32)
    features = np.broadcast_to(2 * memory[2, 0], (2, 3, 4, CHANNELS)).copy()
    features[1, 2, 3] = rng.standard_normal(CHANNELS)
    labels = np.full((2, 3, 4), 2, np.int32)
    after = update(memory, features, labels, 0.5)
    expected = 0.5 * memory[2, 0] + 0.5 * features[1, 2, 3]
    np.testing.assert_allclose(after[2, 0], expected, rtol=1e-4, atol=1e-5)


def test_slot_without_pixels_shrinks():
    rng = np.random.default_rng(0)
    memory = rng.standard_normal((2, 2, CHANNELS)).astype(np.float32)
    features = memory[0, 0] + 0.1 * rng.standard_normal((1, 1, 5, CHANNELS)).astype(np.float32)
    labels = np.zeros((1, 13, 1), np.int32)
    after = np.asarray(update(memory, features, labels, 0.25))
    np.testing.assert_allclose(after[0, 1], 0.75 * memory[0, 1], rtol=1e-6)
    np.testing.assert_array_equal(after[1], memory[1])


def test_zero_features_are_finite():
    memory, features, labels = draw_case(SHAPES[3], "dense", "full", False, 0)
    after = update(memory, np.zeros_like(features), labels, 0.9)
    expected = plain_update(memory, np.zeros_like(features), labels, 0.9)
    assert_close(after, expected)


def test_pixel_that_cancels_to_zero_weighs_no_more_than_any_other():
    # Between opposite features the second of four pixels is 0. Rounding decides its cosine, so
    # its weight may be anything from 0 to 2 instead of 1, beside a weight of about 3 of the rest.
    for seed in range(50):
        rng = np.random.default_rng(seed)
        feature = 100 * rng.standard_normal(CHANNELS).astype(np.float32)
        memory = rng.standard_normal((1, 1, CHANNELS)).astype(np.float32)
        features = np.stack([feature, -3 * feature])[None, None]
        labels = np.zeros((1, 1, 4), np.int32)
        after = np.asarray(update(memory, features, labels, 1.0))
        expected = plain_update(memory, features, labels, 1.0)
        assert 0.5 < np.linalg.norm(after) / np.linalg.norm(expected) < 2, seed


def test_momentum_follows_the_learning_rate():
    assert float(memory_momentum(0.01, 0.9, 0.01)) == pytest.approx(0.9)
    assert float(memory_momentum(1e-4, 0.9, 0.01)) == pytest.approx(0.009)
    assert float(memory_momentum(0.01, 0.9, 0.009)) == pytest.approx(1.0)
    assert float(memory_momentum(1e-4, 0.9, 0)) == pytest.approx(0.9)


# ---- replica groups --------------------------------------------------------------------------

PAIR = (4, (3, 4), (7, 9), 4, 2)  # four images: two groups of two


@relaxed(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), storage=st.sampled_from(["full", "some empty"]))
def test_groups_are_the_average_of_local_updates(seed, storage):
    memory, features, labels = draw_case(PAIR, "dense", storage, True, seed)
    after, local = update_groups(memory, features, labels, 0.9, groups=2)
    parts = [plain_update(memory, features[i : i + 2], labels[i : i + 2], 0.9) for i in (0, 2)]
    assert_close(local, np.stack(parts))
    assert_close(after, np.mean(parts, axis=0))


def test_one_group_is_the_plain_update():
    memory, features, labels = draw_case(PAIR, "dense", "some empty", True, 0)
    after, local = update_groups(memory, features, labels, 0.9, groups=1)
    assert_close(after, plain_update(memory, features, labels, 0.9))
    np.testing.assert_array_equal(local[0], after)


def test_class_seen_by_one_group_of_two_is_damped():
    memory, features, labels = draw_case(PAIR, "dense", "full", True, 0)
    memory[3] = 0
    labels[2:][labels[2:] < 4] = 0  # the second group sees class 0 only
    after, local = update_groups(memory, features, labels, 0.9, groups=2)
    after, local = np.asarray(after), np.asarray(local)
    for k in (1, 2, 3):
        np.testing.assert_array_equal(local[1, k], memory[k])
        halfway = memory[k] + (local[0, k] - memory[k]) / 2
        np.testing.assert_allclose(after[k], halfway, rtol=1e-5, atol=1e-6)
    first = plain_update(memory, features[:2], labels[:2], 0.9)[3, 0]
    np.testing.assert_allclose(after[3, 0], first / 2, rtol=1e-5)


def test_order_of_images_inside_a_group_does_not_matter():
    memory, features, labels = draw_case(PAIR, "dense", "some empty", True, 0)
    order = [1, 0, 3, 2]
    expected, _ = update_groups(memory, features, labels, 0.9, groups=2)
    actual, _ = update_groups(memory, features[order], labels[order], 0.9, groups=2)
    assert_close(actual, np.asarray(expected))


# ---- reading ---------------------------------------------------------------------------------


def test_read_sees_the_old_rows_and_its_gradient_each_groups_new_ones():
    rng = np.random.default_rng(0)
    groups, images, classes = 2, 3, 4
    probabilities = rng.random((groups * images, 2, 5, classes)).astype(np.float32)
    memory = rng.standard_normal((classes, CHANNELS)).astype(np.float32)
    new = rng.standard_normal((groups, classes, CHANNELS)).astype(np.float32)
    value, pull_back = jax.vjp(read_memory, probabilities, memory, new)
    np.testing.assert_allclose(value, probabilities @ memory, atol=1e-5)
    above = rng.standard_normal(value.shape).astype(np.float32)
    gradient, *constants = pull_back(above)
    for group in range(groups):
        own = slice(group * images, (group + 1) * images)
        np.testing.assert_allclose(gradient[own], above[own] @ new[group].T, atol=1e-5)
    for constant in constants:
        np.testing.assert_array_equal(constant, 0)


def test_read_with_one_memory_has_the_plain_gradient():
    rng = np.random.default_rng(0)
    probabilities = rng.random((2, 2, 3, 4)).astype(np.float32)
    memory = rng.standard_normal((4, CHANNELS)).astype(np.float32)
    _, pull_back = jax.vjp(lambda p: read_memory(p, memory, memory[None]), probabilities)
    _, plain = jax.vjp(lambda p: p @ memory, probabilities)
    above = rng.standard_normal((2, 2, 3, CHANNELS)).astype(np.float32)
    np.testing.assert_allclose(pull_back(above)[0], plain(above)[0], atol=1e-5)
