"""Batch normalisation: its numbers, their digits, groups of images, messages between devices."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memseg_jax.hlo import hlo_text
from memseg_jax.models import rematerialise
from memseg_jax.models.batch_norm import batch_moments, normalise_batch
from memseg_jax.models.layers import BatchNorm, ConvNorm
from memseg_jax.training.norm_groups import normalised_in_groups
from tests.small_models import FAST_COMPILE, fast_jit

# ---- Numbers ------------------------------------------------------------------------------------


def normalise(x, train=True, stats=None, params=None, dtype=jnp.float32, groups=1):
    channels = x.shape[-1]
    zeros, ones = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    variables = {
        "params": params or {"scale": ones, "bias": zeros},
        "batch_stats": stats or {"mean": zeros, "var": ones},
    }
    y, mutated = BatchNorm(dtype).apply(
        variables, x, train=train, groups=groups, mutable=["batch_stats"]
    )
    return y, mutated["batch_stats"]


def test_batch_norm_in_training():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2, 3, 4, 5)) * 3 + 2).astype(np.float32)
    params = {"scale": np.arange(1, 6, dtype=np.float32), "bias": np.ones(5, np.float32)}
    stats = {"mean": np.full(5, 7, np.float32), "var": np.full(5, 4, np.float32)}
    y, after = normalise(x, stats=stats, params=params)
    flat = x.reshape(-1, 5).astype(np.float64)
    mean, var = flat.mean(0), flat.var(0)
    expected = (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + 1
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(after["mean"], 0.9 * 7 + 0.1 * mean, rtol=1e-6)
    unbiased = flat.var(0, ddof=1)
    np.testing.assert_allclose(after["var"], 0.9 * 4 + 0.1 * unbiased, rtol=1e-6)


def test_batch_norm_in_evaluation_uses_and_keeps_the_running_values():
    x = np.random.default_rng(0).standard_normal((2, 3, 3, 2)).astype(np.float32)
    stats = {"mean": np.array([1, -1], np.float32), "var": np.array([4, 0.25], np.float32)}
    y, after = normalise(x, train=False, stats=stats)
    np.testing.assert_allclose(y, (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5), atol=1e-6)
    for name, value in stats.items():
        np.testing.assert_array_equal(after[name], value)


def test_batch_norm_keeps_digits_at_a_large_mean():
    x = (1000 + np.random.default_rng(0).standard_normal((4, 16, 16, 3))).astype(np.float32)
    y, after = normalise(x)
    flat = x.reshape(-1, 3).astype(np.float64)
    expected = (x - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
    np.testing.assert_allclose(y, expected, atol=5e-4)
    np.testing.assert_allclose((after["var"] - 0.9) / 0.1, flat.var(0, ddof=1), rtol=1e-4)


def test_batch_norm_statistics_are_float32_for_bfloat16_input():
    # In bfloat16 sums over 2048 values near 8 stop growing; in float32 they are exact enough.
    x = jnp.asarray(np.random.default_rng(0).uniform(7, 9, (2, 32, 32, 2)), jnp.bfloat16)
    y, after = normalise(x, dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    flat = np.asarray(x, np.float64).reshape(-1, 2)
    assert after["mean"].dtype == after["var"].dtype == jnp.float32
    np.testing.assert_allclose(after["mean"], 0.1 * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose((after["var"] - 0.9) / 0.1, flat.var(0, ddof=1), rtol=1e-4)


def test_batch_norm_of_a_single_value_is_its_bias():
    y, after = normalise(np.full((1, 1, 1, 2), 5, np.float32))
    np.testing.assert_array_equal(y, np.zeros((1, 1, 1, 2)))
    assert np.isfinite(after["var"]).all()


def test_initialising_in_training_mode_leaves_the_statistics_neutral():
    x = jnp.full((2, 3, 3, 2), 7.0)
    variables = BatchNorm().init(jax.random.key(0), x, train=True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], [0, 0])
    np.testing.assert_array_equal(variables["batch_stats"]["var"], [1, 1])


# ---- One pass and two ---------------------------------------------------------------------------


def positions(mean):
    """Random positions [1, images, height, width, channels] of variance 1, in double precision."""
    return np.random.default_rng(0).standard_normal((1, 4, 16, 16, 64)) + mean


def moments(x, near, in_one_pass):
    x = jnp.asarray(x, jnp.float32)
    near = jnp.full(x.shape[-1], near, jnp.float32)
    return [np.float64(value).ravel() for value in compiled(x, near, in_one_pass)]


compiled = fast_jit(batch_moments, static_argnums=2)


@pytest.mark.parametrize("mean", [0, 1, 30, 1000])
def test_digits_in_float32(mean):
    """All distances are in standard deviations."""
    x = np.float32(positions(mean)).astype(np.float64)
    exact = x.mean((0, 1, 2, 3)), x.var((0, 1, 2, 3))
    for near, in_one_pass in [(0, False), (0, True), (mean - 1, True), (mean, True)]:
        found = moments(x, near, in_one_pass)
        np.testing.assert_allclose(found[0], exact[0], rtol=1e-6, atol=1e-6)
        distance = abs(mean - near) if in_one_pass else 0
        np.testing.assert_allclose(found[1], exact[1], rtol=1e-6 * (1 + distance**2))


@pytest.mark.parametrize("mean", [2, 30, 1000, 30000])
def test_one_pass_loses_less_than_bfloat16_has_lost(mean):
    x = np.asarray(jnp.asarray(positions(mean), jnp.bfloat16), np.float64)
    # Around a running mean that has not moved yet: the worst case.
    _, var = moments(x, 0, in_one_pass=True)
    # What rounding adds to a variance: that of numbers evenly spread over the 8th bit.
    spacing = 2.0 ** (np.floor(np.log2(mean)) - 7)
    assert np.abs(var - x.var((0, 1, 2, 3))).max() < spacing**2 / 12


def test_a_variance_is_never_negative():
    x = np.float32(0.1) * np.arange(1, 65)  # no variance at all, far away
    _, var = moments(np.broadcast_to(x, (1, 2, 8, 8, 64)), -50, in_one_pass=True)
    assert var.min() >= 0
    assert var.max() < 1e-6 * (x.max() + 50) ** 2


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_those_of_finite_differences(groups, double_precision):
    rng = np.random.default_rng(0)
    shape = (groups, 2, 2, 3, 2)
    x, direction, weight = rng.standard_normal((3, *shape))
    scale, bias, along_scale, along_bias = rng.standard_normal((4, 2))

    def loss(x, scale, bias):
        y, _, _ = normalise_batch(x, scale, bias, jnp.full(2, 0.7), 1e-5, jnp.float64)
        return jnp.sum(weight * jnp.sin(y))

    function = fast_jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    point, step = (x, scale, bias), [1e-5 * d for d in (direction, along_scale, along_bias)]
    difference = (
        function(*map(np.add, point, step))[0] - function(*map(np.subtract, point, step))[0]
    )
    gradients = function(*point)[1]
    expected = [np.sum(gradient * 2 * d) for gradient, d in zip(gradients, step)]
    assert min(map(abs, expected)) > 1e-7
    np.testing.assert_allclose(difference, sum(expected), rtol=1e-7)


def test_the_backward_pass_keeps_no_wide_copy():
    """Of bfloat16 it keeps what it was given, and statistics."""
    x = jax.ShapeDtypeStruct((1, 4, 16, 16, 8), jnp.bfloat16)
    channels = jax.ShapeDtypeStruct((8,), jnp.float32)

    def saved(x, scale, bias, near):
        return jax.vjp(
            lambda *args: normalise_batch(*args, near, 1e-5, jnp.bfloat16)[0], x, scale, bias
        )[1]

    kept = jax.tree.leaves(jax.eval_shape(saved, x, channels, channels, channels))
    assert sorted(leaf.size for leaf in kept)[-2:] == [8, x.size]
    assert next(leaf.dtype for leaf in kept if leaf.size == x.size) == jnp.bfloat16


# ---- Groups of images ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_groups_are_batches_of_their_own(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((6, 3, 5, 4)) + np.arange(6)[:, None, None, None], dtype)
    stats = {"mean": np.full(4, 2, np.float32), "var": np.full(4, 3, np.float32)}
    y, after = normalise(x, stats=stats, dtype=dtype, groups=3)
    parts = [normalise(part, stats=stats, dtype=dtype) for part in jnp.split(x, 3)]
    np.testing.assert_array_equal(y, jnp.concatenate([part for part, _ in parts]))
    for name in stats:
        means = np.mean([moved[name] for _, moved in parts], axis=0)
        np.testing.assert_allclose(after[name], means, rtol=1e-6)
    assert np.abs(np.float32(y) - np.float32(normalise(x, dtype=dtype)[0])).max() > 0.5


class Blocks(nn.Module):
    """A convolution that is kept, and one that is computed again."""

    @nn.compact
    def __call__(self, x, *, train):
        x = ConvNorm(4)(x, train=train)
        return rematerialise.call(ConvNorm(4), x, remat=True, train=train)


def test_the_context_reaches_every_normalisation_in_training():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 3, 2)), jnp.float32)
    variables = fast_jit(lambda x: Blocks().init(jax.random.key(0), x, train=False))(x)

    @functools.partial(fast_jit, static_argnums=(1, 2))
    def apply(x, images, train):
        with normalised_in_groups(images):
            return Blocks().apply(variables, x, train=train, mutable=["batch_stats"])[0]

    whole, halves = apply(x, 0, True), apply(x, 2, True)
    expected = [apply(half, 0, True) for half in jnp.split(x, 2)]
    np.testing.assert_allclose(halves, jnp.concatenate(expected), atol=1e-6)
    np.testing.assert_array_equal(apply(x, 2, False), apply(x, 0, False))
    assert jnp.abs(halves - whole).max() > 0.1


# ---- Messages -----------------------------------------------------------------------------------


def messages(dtype, groups=1, backward=False):
    """[(sizes of its groups, how many)] of the messages of one normalisation of 16 images."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))

    def forward(x):
        return normalise(x, dtype=dtype, groups=groups)

    def both(x, cotangent):
        y, pullback, stats = jax.vjp(forward, x, has_aux=True)
        return (y, *pullback(cotangent)), stats

    x = jax.ShapeDtypeStruct((16, 4, 4, 8), dtype, sharding=split)
    function, arguments = (both, (x, x)) if backward else (forward, (x,))
    compiled = jax.jit(function, out_shardings=(split, whole)).lower(*arguments)
    text = compiled.compile(compiler_options=FAST_COMPILE).as_text()
    found = hlo_text.collectives(text, mesh.size)
    assert {c.kind for c in found} <= {"all-reduce"}
    return sorted((c.group, c.count) for c in found)


@pytest.mark.parametrize(("dtype", "forward", "both"), [(jnp.bfloat16, 1, 2), (jnp.float32, 2, 3)])
def test_messages_of_a_normalisation(dtype, forward, both):
    assert sum(count for _, count in messages(dtype)) == forward
    assert sum(count for _, count in messages(dtype, backward=True)) == both


def test_messages_of_groups_stay_among_their_devices():
    # Besides, one goes to all groups, with what the running statistics receive: none waits for it.
    assert messages(jnp.bfloat16, groups=4, backward=True) == [(2, 2), (4, 1)]
    assert messages(jnp.bfloat16, groups=8, backward=True) == [(8, 1)]
