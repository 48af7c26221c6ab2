"""Losses against float64 NumPy versions, and what ignored pixels must not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memseg_jax.models.layers import bilinear_matrix
from memseg_jax.training.losses import consistency_loss, cross_entropy
from tests.small_models import fast_jit

CLASSES = 5
IGNORED = [5, 6, 200, 255]  # 5 is the first value that is no class


STATIC = ("groups", "block_bytes")
entropy = fast_jit(cross_entropy, static_argnames=STATIC)
value_and_gradient = fast_jit(jax.value_and_grad(cross_entropy), static_argnames=STATIC)


def draw(batch=4, size=(3, 4), label_size=(6, 7), ignored=0.3, seed=0, classes=CLASSES):
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((batch, *size, classes)).astype(np.float32)
    labels = rng.integers(0, classes, (batch, *label_size)).astype(np.uint8)
    outside = rng.random(labels.shape) < ignored
    labels[outside] = rng.choice(IGNORED if classes == CLASSES else [255], outside.sum())
    return logits, labels


def resize_matrices(logits, labels):
    return (bilinear_matrix(logits.shape[i], labels.shape[i]) for i in (1, 2))


def plain_value_and_gradient(logits, labels, groups=1, class_weights=None):
    """Everything at label size: the resized logits, their softmax, and the gradient of both."""
    logits, classes = np.asarray(logits, np.float64), logits.shape[-1]
    rows, columns = resize_matrices(logits, labels)
    pixels = np.einsum("bhwk,Hh,Ww->bHWk", logits, rows, columns, optimize=True)
    pixels -= pixels.max(axis=-1, keepdims=True)
    log_probabilities = pixels - np.log(np.exp(pixels).sum(-1, keepdims=True))
    valid = (labels >= 0) & (labels < classes)
    own = np.eye(classes)[np.where(valid, labels, 0)]
    weight = valid * (own @ (np.ones(classes) if class_weights is None else class_weights))
    total = weight.reshape(groups, -1).sum(axis=1)
    share = np.where(total > 0, 1 / np.where(total > 0, total, 1), 0) / groups
    share = weight * np.repeat(share, len(labels) // groups)[:, None, None]
    loss = -np.sum(share * np.sum(own * log_probabilities, axis=-1))
    slope = share[..., None] * (np.exp(log_probabilities) - own)
    return loss, np.einsum("bHWk,Hh,Ww->bhwk", slope, rows, columns, optimize=True)


def plain_cross_entropy(*args, **kw):
    return plain_value_and_gradient(*args, **kw)[0]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("label_size", [(3, 4), (6, 7), (2, 9)])
def test_cross_entropy_equals_float64(label_size, groups):
    logits, labels = draw(label_size=label_size)
    actual = entropy(logits, labels, groups=groups)
    assert actual.shape == ()
    assert float(actual) == pytest.approx(plain_cross_entropy(logits, labels, groups), rel=1e-6)


sizes = st.tuples(st.integers(1, 12), st.integers(1, 12))


@settings(max_examples=20, deadline=None)
@given(
    size=sizes,
    label_size=sizes,
    classes=st.sampled_from([2, 19, 254]),
    groups=st.sampled_from([1, 2]),
    weighted=st.booleans(),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    block_rows=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_blocks_give_the_numbers_of_the_whole(
    size, label_size, classes, groups, weighted, ignored, block_rows, seed
):
    logits, labels = draw(2, size, label_size, ignored, seed, classes)
    labels[0, : label_size[0] // 2] = 255
    weights = np.random.default_rng(seed).uniform(0, 2, classes) if weighted else None
    expected, expected_gradient = plain_value_and_gradient(logits, labels, groups, weights)
    scale = max(np.abs(expected_gradient).max(), 1e-30)
    for dtype, limit in ((np.float32, 2e-6), (np.float64, 1e-12)):
        block_bytes = block_rows * label_size[1] * classes * dtype().itemsize
        with jax.enable_x64(True):
            loss, gradient = value_and_gradient(
                logits.astype(dtype),
                labels,
                groups=groups,
                class_weights=weights,
                block_bytes=block_bytes,
            )
        assert loss.dtype == gradient.dtype == dtype
        assert loss == pytest.approx(expected, rel=limit, abs=limit)
        np.testing.assert_allclose(gradient, expected_gradient, atol=limit * scale, rtol=0)


@pytest.mark.parametrize(
    ("size", "label_size"),
    [((8, 8), (64, 64)), ((9, 5), (70, 33)), ((64, 40), (64, 40)), ((70, 33), (9, 20))],
)
def test_size_of_the_blocks_changes_nothing(size, label_size):
    logits, labels = draw(2, size, label_size)
    whole = value_and_gradient(logits, labels, block_bytes=2**30)
    for rows in (0, 3, 8):  # not even one row fits: one row is taken
        block_bytes = rows * label_size[1] * CLASSES * 4
        loss, gradient = value_and_gradient(logits, labels, block_bytes=block_bytes)
        assert float(loss) == pytest.approx(float(whole[0]), rel=1e-6)
        np.testing.assert_allclose(gradient, whole[1], atol=1e-6 * np.abs(whole[1]).max())


def test_bfloat16_logits_are_resized_and_summed_in_float32():
    logits, labels = draw(2, (4, 4), (32, 32))
    rough = jnp.asarray(logits, jnp.bfloat16)
    loss, gradient = value_and_gradient(rough, labels, block_bytes=32 * CLASSES * 4)
    expected, expected_gradient = plain_value_and_gradient(np.asarray(rough), labels)
    assert loss.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    two_roundings = 2 * 2**-8
    np.testing.assert_allclose(np.float64(gradient), expected_gradient, two_roundings, atol=1e-8)


def test_gradient_scales_with_what_comes_from_above():
    logits, labels = draw()
    _, gradient = value_and_gradient(logits, labels)
    scaled = jax.grad(lambda x: 0.25 * cross_entropy(x, labels) + jnp.sum(x))(logits)
    np.testing.assert_allclose(scaled, 0.25 * gradient + 1, atol=1e-6)


def test_groups_are_not_a_mean_over_all_pixels():
    logits, labels = draw()
    labels[:2, 1:] = 255  # the first group has few labelled pixels, which then count more
    by_group = float(entropy(logits, labels, groups=2))
    halves = [float(entropy(logits[i : i + 2], labels[i : i + 2])) for i in (0, 2)]
    assert by_group == pytest.approx(np.mean(halves), rel=1e-6)
    assert by_group != pytest.approx(float(entropy(logits, labels)), rel=1e-3)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64])
def test_any_integer_type_of_labels(dtype):
    logits, labels = draw()
    actual = entropy(logits, labels.astype(dtype))
    assert float(actual) == pytest.approx(plain_cross_entropy(logits, labels), rel=1e-6)


def test_negative_labels_are_ignored():
    logits, labels = draw()
    signed = np.where(labels < CLASSES, labels, -1).astype(np.int32)
    assert float(entropy(logits, signed)) == float(entropy(logits, labels))


def test_ignored_pixels_change_neither_loss_nor_gradient():
    logits, labels = draw(label_size=(3, 4))
    ignored = labels >= CLASSES
    loss, gradient = value_and_gradient(logits, labels, groups=2)
    assert ignored.any()
    np.testing.assert_array_equal(np.asarray(gradient)[ignored], 0)
    assert (np.asarray(gradient)[~ignored] != 0).all()
    for value in (1e4, -1e30):
        changed = logits.copy()
        changed[ignored] = value
        other_loss, other_gradient = value_and_gradient(changed, labels, groups=2)
        assert float(other_loss) == float(loss)
        np.testing.assert_array_equal(other_gradient, gradient)
    other_labels = np.where(ignored, 255, labels).astype(np.uint8)
    assert float(entropy(logits, other_labels, groups=2)) == float(loss)


def test_gradient_is_softmax_minus_one_hot():
    logits, labels = draw(batch=2, label_size=(3, 4))
    _, gradient = value_and_gradient(logits, labels)
    valid = labels < CLASSES
    exponent = np.exp(logits.astype(np.float64))
    expected = exponent / exponent.sum(-1, keepdims=True) - np.eye(256)[labels][..., :CLASSES]
    expected = np.where(valid[..., None], expected, 0) / valid.sum()
    np.testing.assert_allclose(gradient, expected, atol=1e-7)


def test_group_without_labels_counts_as_zero():
    logits, labels = draw()
    labels[:2] = 255
    loss, gradient = value_and_gradient(logits, labels, groups=2)
    second_half = float(entropy(logits[2:], labels[2:]))
    assert float(loss) == pytest.approx(second_half / 2, rel=1e-6)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[:2], 0)


def test_nothing_labelled_gives_zero_and_no_gradient():
    logits, labels = draw()
    labels[:] = 255
    weights = jnp.ones(CLASSES)
    for kw in ({}, {"groups": 4}, {"class_weights": weights}):
        loss, gradient = value_and_gradient(logits, labels, **kw)
        assert float(loss) == 0
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("groups", [1, 2])
def test_class_weights_are_those_of_a_weighted_mean(groups):
    logits, labels = draw()
    weights = np.array([0.5, 2.0, 0.0, 1.0, 7.0], np.float32)
    actual = entropy(logits, labels, groups=groups, class_weights=jnp.asarray(weights))
    expected = plain_cross_entropy(logits, labels, groups, weights)
    assert float(actual) == pytest.approx(expected, rel=1e-6)
    scaled = entropy(logits, labels, groups=groups, class_weights=jnp.asarray(3 * weights))
    assert float(scaled) == pytest.approx(expected, rel=1e-6)
    equal = entropy(logits, labels, groups=groups, class_weights=jnp.full(CLASSES, 2.5))
    unweighted = entropy(logits, labels, groups=groups)
    assert float(equal) == pytest.approx(float(unweighted), rel=1e-6)


def test_only_weightless_classes_give_zero():
    logits, labels = draw()
    labels[:] = 2
    weights = jnp.array([1.0, 1.0, 0.0, 1.0, 1.0])
    loss, gradient = value_and_gradient(logits, labels, class_weights=weights)
    assert float(loss) == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("shift", [-300.0, 5.0, 1e4])
def test_adding_a_constant_to_all_logits_changes_nothing(shift):
    logits, labels = draw()
    step = float(np.spacing(np.float32(abs(shift))))  # what the addition itself rounds away
    expected = float(entropy(logits, labels))
    actual = float(entropy(logits + np.float32(shift), labels))
    assert actual == pytest.approx(expected, rel=1e-6, abs=8 * step)
    rows = logits[:, :, :CLASSES]  # any array [groups, at most K classes, slots, K]
    shifted = float(consistency_loss(rows + np.float32(shift)))
    assert shifted == pytest.approx(float(consistency_loss(rows)), rel=1e-6, abs=8 * step)


def test_large_logits_stay_finite():
    logits, labels = draw(label_size=(3, 4))
    loss, gradient = value_and_gradient(1e4 * logits, labels)
    expected = plain_cross_entropy(1e4 * logits.astype(np.float64), labels)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("slots", [1, 3])
def test_consistency_loss_wants_every_row_in_its_own_class(slots):
    groups = 2
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((groups, CLASSES, slots, CLASSES)).astype(np.float32)
    rows = logits.reshape(-1, 1, 1, CLASSES)
    own = np.tile(np.repeat(np.arange(CLASSES), slots), groups)
    expected = plain_cross_entropy(rows, own.reshape(-1, 1, 1))
    assert float(consistency_loss(logits)) == pytest.approx(expected, rel=1e-6)


def test_consistency_loss_of_perfect_and_of_undecided_rows():
    perfect = 50 * np.eye(CLASSES, dtype=np.float32)[None, :, None]
    assert float(consistency_loss(perfect)) == pytest.approx(0, abs=1e-6)
    undecided = np.zeros_like(perfect)
    assert float(consistency_loss(undecided)) == pytest.approx(np.log(CLASSES), rel=1e-6)
