"""Losses against float64 NumPy versions, and what ignored pixels must not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseg_jax.losses import consistency_loss, cross_entropy
from memseg_jax.models.layers import bilinear_matrix
from tests.small_models import fast_jit

CLASSES = 5
IGNORED = [5, 6, 200, 255]  # 5 is the first value that is no class


entropy = fast_jit(cross_entropy, static_argnames="groups")
value_and_gradient = fast_jit(jax.value_and_grad(cross_entropy), static_argnames="groups")


def draw(batch=4, size=(3, 4), label_size=(6, 7), ignored=0.3, seed=0):
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((batch, *size, CLASSES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, (batch, *label_size)).astype(np.uint8)
    outside = rng.random(labels.shape) < ignored
    labels[outside] = rng.choice(IGNORED, outside.sum())
    return logits, labels


def pixel_losses(logits, labels):
    """-log softmax of the labelled class, and which pixels are labelled; labels >= K are not."""
    logits = np.asarray(logits, np.float64)
    if logits.shape[1:3] != labels.shape[1:]:
        rows, columns = (bilinear_matrix(logits.shape[i], labels.shape[i]) for i in (1, 2))
        logits = np.einsum("bhwk,Hh,Ww->bHWk", logits, rows, columns)
    top = logits.max(axis=-1, keepdims=True)
    log_probabilities = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    valid = labels < CLASSES
    index = np.where(valid, labels, 0).astype(np.int64)[..., None]
    return -np.take_along_axis(log_probabilities, index, axis=-1)[..., 0], valid


def plain_cross_entropy(logits, labels, groups=1, class_weights=None):
    loss, valid = pixel_losses(logits, labels)
    weight = valid.astype(np.float64)
    if class_weights is not None:
        weight *= np.asarray(class_weights)[np.where(valid, labels, 0)]
    loss, weight = loss.reshape(groups, -1), weight.reshape(groups, -1)
    total = weight.sum(axis=1)
    sums = (loss * weight).sum(axis=1)
    return np.mean([s / t if t else 0.0 for s, t in zip(sums, total)])


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("label_size", [(3, 4), (6, 7), (2, 9)])
def test_cross_entropy_equals_float64(label_size, groups):
    logits, labels = draw(label_size=label_size)
    actual = entropy(logits, labels, groups=groups)
    assert actual.shape == ()
    assert float(actual) == pytest.approx(plain_cross_entropy(logits, labels, groups), rel=1e-6)


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
