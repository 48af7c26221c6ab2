"""Layers against independent formulas: resize, convolution, dropout, pooling, padding."""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memseg_jax.models.aspp import ASPP
from memseg_jax.models.attention import SelfAttention
from memseg_jax.models.layers import (
    Classifier,
    Conv,
    ConvNorm,
    ValidSize,
    activation,
    bilinear_matrix,
    bilinear_taps,
    convolve,
    mask_padding,
    max_pool,
    resize_bilinear,
    resize_valid,
    spatial_mean,
    valid_bilinear_matrix,
)
from tests.small_models import fast_jit, random_tree

SIZES = [(1, 1), (1, 5), (5, 1), (2, 3), (7, 7), (7, 3), (4, 13), (13, 4), (3, 24), (60, 119)]


# ---- bilinear resize -------------------------------------------------------------------------


def plain_resize(row, target, step):
    """One output value at a time: half-pixel centres, edge clamp, no antialias."""
    result = []
    for index in range(target):
        position = max((index + 0.5) * step - 0.5, 0.0)
        lower = min(math.floor(position), len(row) - 1)
        upper = min(lower + 1, len(row) - 1)
        share = min(position - lower, 1.0)
        result.append((1 - share) * row[lower] + share * row[upper])
    return result


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_bilinear_matrix_equals_plain_formula(source, target):
    row = np.random.default_rng(source).standard_normal(source)
    expected = plain_resize(list(row), target, source / target)
    np.testing.assert_allclose(bilinear_matrix(source, target) @ row, expected, atol=1e-12)


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_bilinear_matrix_is_a_partition_of_unity(source, target):
    matrix = bilinear_matrix(source, target)
    assert matrix.shape == (target, source)
    assert (matrix >= 0).all()
    assert ((matrix > 0).sum(axis=1) <= 2).all()
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)


# Computed by PyTorch's `interpolate` in float32, by factor and by size.
SQUARES = [0.0, 1.0, 4.0, 9.0, 16.0, 25.0, 36.0]
BY_FACTOR = {
    0.5: ([0.5, 6.5, 20.5], [0.66666663, 9.0, 28.666664]),
    0.75: (
        [0.16666669, 2.5, 8.166668, 17.500004, 30.5],
        [0.19999999, 2.7999997, 9.0, 19.6, 33.799995],
    ),
    1.25: (
        [0.0, 0.70000005, 2.5, 5.5, 9.700001, 15.300001, 22.300003, 30.5],
        [0.0, 0.8125, 3.0625, 6.8125, 12.0625, 18.8125, 27.0625, 36.0],
    ),
    1.5: (
        [0.0, 0.5, 1.5000002, 3.5, 6.5, 10.166667, 14.833334, 20.5, 26.833336, 34.166668],
        [0.0, 0.54999995, 1.75, 3.8499999, 7.25, 11.45, 16.449997, 22.75, 29.949997, 36.0],
    ),
}


@pytest.mark.parametrize("factor", sorted(BY_FACTOR))
def test_bilinear_matrix_by_factor_and_by_size(factor):
    by_factor, by_size = BY_FACTOR[factor]
    target = len(by_factor)
    matrix = bilinear_matrix(len(SQUARES), target, scale=factor)
    np.testing.assert_allclose(matrix @ SQUARES, by_factor, rtol=1e-6, atol=1e-6)
    matrix = bilinear_matrix(len(SQUARES), target)
    np.testing.assert_allclose(matrix @ SQUARES, by_size, rtol=1e-6, atol=1e-6)


def test_resize_equals_plain_formula_on_both_axes():
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 4))
    size = (7, 8)
    rows = [[plain_resize(list(x[b, :, i, c]), 7, 5 / 7) for i in range(3)]
            for b in range(2) for c in range(4)]  # fmt: skip
    rows = np.array(rows).reshape(2, 4, 3, 7)
    expected = [[plain_resize(list(rows[b, c, :, j]), 8, 3 / 8) for j in range(7)]
                for b in range(2) for c in range(4)]  # fmt: skip
    expected = np.array(expected).reshape(2, 4, 7, 8).transpose(0, 2, 3, 1)
    actual = resize_bilinear(x.astype(np.float32), size)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_resize_to_the_same_size_is_the_identity():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 5, 2)), jnp.bfloat16)
    assert resize_bilinear(x, (6, 5)) is x


def test_resize_keeps_the_type_and_works_in_float32():
    x = jnp.asarray(np.random.default_rng(0).uniform(100, 101, (1, 3, 3, 2)), jnp.bfloat16)
    y = resize_bilinear(x, (8, 8))
    assert y.dtype == jnp.bfloat16
    exact = resize_bilinear(x.astype(jnp.float32), (8, 8))
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def test_resize_gradient_is_the_transpose():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 4, 6, 2)).astype(np.float32)
    _, pull_back = jax.vjp(lambda x: resize_bilinear(x, (9, 5)), x)
    y = rng.standard_normal((1, 9, 5, 2)).astype(np.float32)
    rows, columns = bilinear_matrix(4, 9), bilinear_matrix(6, 5)
    expected = np.einsum("bHWc,Hh,Ww->bhwc", y, rows, columns)
    np.testing.assert_allclose(pull_back(y)[0], expected, atol=1e-5)


# ---- convolution and pooling -----------------------------------------------------------------


def plain_convolution(x, kernel, stride, dilation, groups):
    """Loops over output positions and kernel taps, float64, zeros outside the image."""
    batch, height, width, channels = x.shape
    k, _, inside, features = kernel.shape
    reach = dilation * (k - 1) // 2
    out = [(size + 2 * reach - dilation * (k - 1) - 1) // stride + 1 for size in (height, width)]
    y = np.zeros((batch, *out, features))
    for i, j in np.ndindex(*out):
        for di, dj in np.ndindex(k, k):
            row, column = i * stride + di * dilation - reach, j * stride + dj * dilation - reach
            if not (0 <= row < height and 0 <= column < width):
                continue
            for group in range(groups):
                ins = slice(group * inside, (group + 1) * inside)
                outs = slice(group * features // groups, (group + 1) * features // groups)
                y[:, i, j, outs] += x[:, row, column, ins] @ kernel[di, dj, :, outs]
    assert channels == inside * groups
    return y


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 7), (6, 5)])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "groups"),
    [(1, 1, 1, 1), (1, 2, 1, 1), (3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 4, 1), (3, 2, 2, 2)],
)
def test_convolution_equals_loops(size, kernel, stride, dilation, groups):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *size, 4)).astype(np.float32)
    w = rng.standard_normal((kernel, kernel, 4 // groups, 6)).astype(np.float32)
    y = convolve(x, w, stride=stride, dilation=dilation, groups=groups)
    assert y.shape[1:3] == tuple(-(-side // stride) for side in size)
    expected = plain_convolution(x.astype(np.float64), w, stride, dilation, groups)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_conv_starts_as_in_pytorch_and_stays_float32():
    layer = Conv(32, 3, use_bias=True, dtype=jnp.bfloat16)
    params = layer.init(jax.random.key(0), jnp.zeros((1, 4, 4, 16)))["params"]
    bound = 1 / np.sqrt(3 * 3 * 16)
    for name in ("kernel", "bias"):
        assert params[name].dtype == jnp.float32
        assert np.abs(params[name]).max() <= bound
        assert np.abs(params[name]).max() > 0.8 * bound
    assert params["kernel"].std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
    assert layer.apply({"params": params}, jnp.ones((1, 4, 4, 16))).dtype == jnp.bfloat16


@pytest.mark.parametrize("size", [(1, 1), (4, 5), (7, 6)])
def test_max_pool_pads_with_minus_infinity(size):
    x = np.random.default_rng(0).standard_normal((1, *size, 3)).astype(np.float32) - 10
    out = [-(-side // 2) for side in size]
    expected = np.empty((1, *out, 3), np.float32)
    for i, j in np.ndindex(*out):
        window = x[:, max(2 * i - 1, 0) : 2 * i + 2, max(2 * j - 1, 0) : 2 * j + 2]
        expected[:, i, j] = window.max(axis=(1, 2))
    np.testing.assert_array_equal(max_pool(x), expected)


def test_activations():
    x = jnp.array([-2.0, 0.0, 3.0])
    np.testing.assert_allclose(activation("relu")(x), [0, 0, 3])
    np.testing.assert_allclose(activation("leaky_relu")(x), [-0.02, 0, 3], rtol=1e-6)
    np.testing.assert_allclose(activation("none")(x), x)
    with pytest.raises(ValueError, match=r"'swish'.*leaky_relu"):
        activation("swish")


# ---- dropout ----------------------------------------------------------------------------------


def test_dropout_removes_whole_channels_of_a_sample():
    channels = 64
    layer = Classifier(channels, dropout=0.25)
    params = {
        "conv": {"kernel": np.eye(channels, dtype=np.float32)[None, None],
                 "bias": np.zeros(channels, np.float32)}
    }  # fmt: skip
    x = np.random.default_rng(0).uniform(1, 2, (4, 3, 3, channels)).astype(np.float32)
    rngs = {"dropout": jax.random.key(0)}
    ratio = np.asarray(layer.apply({"params": params}, x, train=True, rngs=rngs)) / x
    kept = ratio[:, 0, 0] > 0
    expected = np.broadcast_to(kept[:, None, None] / 0.75, ratio.shape)
    np.testing.assert_allclose(ratio, expected, rtol=1e-5)
    assert 0.6 < kept.mean() < 0.9
    assert (kept[0] != kept[1]).any()
    np.testing.assert_allclose(layer.apply({"params": params}, x, train=False), x, rtol=1e-6)


def test_class_logits_are_float32_whatever_the_compute_type():
    layer = Classifier(3, dropout=0.0, dtype=jnp.bfloat16)
    x = jnp.ones((1, 2, 2, 4), jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x, train=False)
    assert layer.apply(variables, x, train=False).dtype == jnp.float32


# ---- padded images ---------------------------------------------------------------------------


class Network(nn.Module):
    """Strides, dilation, pooling, a global mean and attention, at output stride 8."""

    @nn.compact
    def __call__(self, x, valid_size=None):
        on = {"train": False, "valid_size": valid_size}
        x = ConvNorm(4, 3, 2)(x, **on)
        # The first padded position of a pooled map has seen real ones.
        x = mask_padding(max_pool(ConvNorm(5, 3)(x, **on)), valid_size)
        x = ConvNorm(5, 3)(x, **on)
        x = ConvNorm(6, 3, 2, activation="leaky_relu")(x, **on)
        x = ConvNorm(6, 3, dilation=2)(x, **on)
        context = ASPP(6, (1, 2, 3))(x, **on)
        attended = SelfAttention(4, 5)(x, context, **on)
        return ConvNorm(4, 3)(jnp.concatenate([x, attended], axis=-1), **on)


def test_padding_changes_no_number():
    network, padded = Network(), (32, 40)
    sizes = [(32, 40), (1, 1), (1, 40), (17, 15), (31, 33)]
    rng = np.random.default_rng(0)
    images = [rng.standard_normal((1, *size, 3)).astype(np.float32) for size in sizes]
    batch = np.zeros((len(sizes), *padded, 3), np.float32)
    for index, image in enumerate(images):
        batch[index, : image.shape[1], : image.shape[2]] = image[0]
    variables = random_tree(
        jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.asarray(batch))), 0
    )
    valid_size = ValidSize(jnp.asarray(sizes, jnp.int32), padded)
    forward = fast_jit(network.apply)
    together = np.asarray(forward(variables, batch, valid_size))
    mask = np.asarray(valid_size.mask(together))
    for index, image in enumerate(images):
        alone = np.asarray(forward(variables, image))
        height, width = alone.shape[1:3]
        assert mask[index, ..., 0].sum() == height * width
        np.testing.assert_allclose(
            together[index, :height, :width], alone[0], atol=2e-6, err_msg=str(sizes[index])
        )
    np.testing.assert_array_equal(np.where(mask, 0, together), 0)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=2, max_size=4),
    st.integers(0, 9),
)
def test_resize_of_the_real_part(chain, seed):
    """Any number of resizes, one after the other, of one map among others in its batch."""
    x = np.random.default_rng(seed).standard_normal((1, *chain[0], 2)).astype(np.float32)
    padded = np.full((2, 12, 12, 2), 7.0, np.float32)
    padded[:1, : chain[0][0], : chain[0][1]] = x
    sizes = [jnp.array([size, (12, 12)]) for size in chain]
    found = resize_valid(jnp.asarray(padded), sizes, (12, 12))
    for source, target in itertools.pairwise(chain):
        rows, columns = (bilinear_matrix(*pair) for pair in zip(source, target))
        x = np.einsum("bhwc,Hh,Ww->bHWc", x, rows, columns)
    height, width = chain[-1]
    np.testing.assert_allclose(found[0, :height, :width], x[0], atol=1e-5)
    np.testing.assert_allclose(found[1], padded[1], atol=1e-6)
    assert not np.asarray(found)[0, height:].any()
    assert not np.asarray(found)[0, :, width:].any()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_fractions_of_long_sides_are_exact(source, target):
    lower, upper, fraction = bilinear_taps(source, target)
    matrix = np.asarray(
        valid_bilinear_matrix(jnp.array([source]), jnp.array([target]), (5000, 1))[0, :, 0]
    )
    expected = np.where(lower == 0, 1 - fraction, 0) + np.where(upper == 0, fraction, 0)
    np.testing.assert_allclose(matrix[:target], expected, atol=1e-6)
    assert not matrix[target:].any()


def test_padding_of_an_exact_size_is_the_plain_network():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 5, 3)), jnp.float32)
    valid_size = ValidSize(jnp.full((2, 2), jnp.array([32, 40])), (32, 40))
    assert valid_size.mask(x).all()
    np.testing.assert_array_equal(mask_padding(x, valid_size), x)
    assert mask_padding(x, None) is x


def test_spatial_mean_counts_real_positions_only():
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
    valid_size = ValidSize(jnp.array([[9, 17], [32, 1]]), (32, 32))
    mean = spatial_mean(x, valid_size)
    assert mean.shape == (2, 1, 1, 3)
    np.testing.assert_allclose(mean[0, 0, 0], x[0, :2, :3].mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(mean[1, 0, 0], x[1, :4, :1].mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(spatial_mean(x)[:, 0, 0], x.mean((1, 2)), atol=1e-6)
