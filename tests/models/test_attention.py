"""Attention, whole and in blocks, against a plain NumPy softmax in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memseg_jax.models import attention
from memseg_jax.models.attention import attend, attend_in_blocks
from tests.small_models import fast_jit

in_blocks = fast_jit(attend_in_blocks, static_argnums=4)


@functools.partial(fast_jit, static_argnums=5)
def value_and_gradients(query, key, value, key_mask, cotangent, block):
    """Returns the result and the gradients for query, key and value."""
    value, pull = jax.vjp(lambda *args: attend_in_blocks(*args, key_mask, block), query, key, value)
    return value, *pull(cotangent)


def plain_attention(query, key, value, mask=None):
    """[batch, queries, dim]; every image takes only the keys inside its mask."""
    results = []
    for index in range(len(query)):
        inside = slice(None) if mask is None else mask[index]
        scores = query[index] @ key[index][inside].T / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        results.append(weights / weights.sum(axis=-1, keepdims=True) @ value[index][inside])
    return np.stack(results)


def plain_gradients(query, key, value, cotangent, mask):
    """The gradients for query, key and value, from the definition."""
    scale = query.shape[-1] ** -0.5
    scores = np.where(mask[:, None], scale * query @ key.swapaxes(1, 2), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    slope = cotangent @ value.swapaxes(1, 2)
    slope = scale * weights * (slope - np.sum(weights * slope, axis=-1, keepdims=True))
    return slope @ key, slope.swapaxes(1, 2) @ query, weights.swapaxes(1, 2) @ cotangent


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def draw(queries, keys, dim=8, batch=2, seed=0):
    """Returns float32 query, key and value."""
    tokens = (queries, keys, keys)
    return [normal(batch, count, dim, seed=3 * seed + k) for k, count in enumerate(tokens)]


def double(arrays):
    return [np.asarray(x, np.float64) for x in arrays]


def draw_mask(keys, masked, seed, batch=2):
    """At least one key takes part; with `masked` near 1, whole blocks do not."""
    rng = np.random.default_rng(seed)
    mask = rng.random((batch, keys)) >= masked
    mask[np.arange(batch), rng.integers(0, keys, batch)] = True
    return mask


def test_attention_equals_plain_softmax():
    arrays = draw(5, 7)
    np.testing.assert_allclose(attend(*arrays), plain_attention(*double(arrays)), atol=1e-6)


def test_masked_keys_take_no_part():
    arrays = draw(5, 7)
    mask = np.zeros((2, 7), bool)
    mask[0, :4] = mask[1, 2:3] = True
    expected = plain_attention(*double(arrays), mask)
    np.testing.assert_allclose(attend(*arrays, key_mask=mask), expected, atol=1e-6)
    query, *others = arrays
    others = [np.where(mask[..., None], x, 1e6) for x in others]
    np.testing.assert_array_equal(attend(query, *others, key_mask=mask), attend(*arrays, mask))


@settings(max_examples=20, deadline=None)
@given(
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    block=st.integers(1, 50),
    masked=st.sampled_from([None, 0.0, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 9),
)
def test_blocks_equal_plain_softmax(queries, keys, block, masked, seed):
    arrays = draw(queries, keys, seed=seed)
    mask = None if masked is None else draw_mask(keys, masked, seed)
    cotangent = normal(2, queries, 8, seed=seed + 100)
    expected = plain_attention(*double(arrays), mask)
    expected_gradients = plain_gradients(
        *double(arrays), cotangent, np.ones((2, keys), bool) if mask is None else mask
    )
    for dtype, limit in ((np.float32, 3e-6), (np.float64, 1e-12)):
        with jax.enable_x64(True):
            args = [x.astype(dtype) for x in (*arrays, cotangent)]
            actual = value_and_gradients(*args[:3], mask, args[3], block)
        for x, y in zip(actual, (expected, *expected_gradients)):
            assert x.dtype == dtype
            np.testing.assert_allclose(x, y, rtol=0, atol=limit * max(1, np.abs(y).max()))


@pytest.mark.parametrize("block", [1, 3, 4, 100])
def test_large_scores_do_not_overflow(block):
    query, key, value = draw(3, 12, dim=4, batch=1)
    query, key = 1e4 * query, 1e4 * key
    # In ascending order every block brings a new highest score; in descending order none does.
    for ordered in (key, np.sort(key, axis=1), -np.sort(-key, axis=1)):
        best = np.argmax(query[0] @ ordered[0].T, axis=-1)
        results = value_and_gradients(query, ordered, value, None, np.ones_like(query), block)
        for result in (attend(query, ordered, value), results[0]):
            np.testing.assert_allclose(result[0], value[0][best], atol=1e-6)
        assert all(np.isfinite(x).all() for x in results)


def test_bfloat16_scores_are_summed_in_float32():
    # Scores near 300 differ by less than a step of bfloat16 (2), which decides the weights.
    query = jnp.full((1, 1, 64), 6.0, jnp.bfloat16)
    key = jnp.stack([jnp.full((64,), 6.25), jnp.full((64,), 6.25).at[:8].set(6.28125)])
    value = jnp.eye(2, 64, dtype=jnp.bfloat16)[None]
    args = (query, key[None].astype(jnp.bfloat16), value)
    scores = 6.0 * np.asarray(key, np.float64).sum(-1) / 8
    expected = np.exp(scores - scores.max())
    for result in (attend(*args), in_blocks(*args, None, 1)):
        np.testing.assert_allclose(result[0, 0, :2], expected / expected.sum(), atol=5e-3)


def test_bfloat16_sums_over_blocks_are_kept_in_float32():
    """Many blocks lose no more digits than one: 2**-8 is a step of bfloat16 at 1."""
    exact = draw(300, 300, seed=5)
    rough = [jnp.asarray(x, jnp.bfloat16) for x in exact]
    cotangent = jnp.ones((2, 300, 8), jnp.bfloat16)
    expected = plain_attention(*double(rough))
    expected_gradients = plain_gradients(
        *double(rough), np.ones(cotangent.shape), np.ones((2, 300), bool)
    )
    actual = value_and_gradients(*rough, None, cotangent, 10)
    for x, y in zip(actual, (expected, *expected_gradients)):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float64(x), y, atol=2**-7 * np.abs(y).max(), rtol=0)


@pytest.mark.parametrize(("queries", "keys"), [(17, 16), (16, 17), (40, 33)])
def test_more_tokens_than_a_block_go_in_blocks(queries, keys, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 16)
    arrays = draw(queries, keys)
    for mask in (None, draw_mask(keys, 0.5, 0)):
        program = str(jax.make_jaxpr(lambda *args, mask=mask: attend(*args, mask))(*arrays))
        assert f"{queries},{keys}" not in program
        expected = plain_attention(*double(arrays), mask)
        np.testing.assert_allclose(attend(*arrays, mask), expected, atol=1e-6)


# ---- cuDNN: there is none here, what can be tested is who would call it -------------------------


def lowered(function, arrays, platform):
    gradient = jax.grad(lambda *args: function(*args).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    return jax.jit(gradient).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_without_cudnn_every_platform_gets_blocks(platform, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 16)
    arrays = [x.astype(jnp.bfloat16) for x in draw(20, 20)]
    assert "stablehlo.while" in lowered(attend, arrays, platform)


def test_cudnn_is_used_where_the_program_is_compiled_for_it(monkeypatch):
    def fake(query, key, value):
        if query.dtype != jnp.bfloat16:
            raise NotImplementedError
        return jnp.tan(query + key) * value

    monkeypatch.setattr(attention, "BLOCK", 16)
    monkeypatch.setattr(attention, "_attend_cudnn", fake)
    arrays = draw(20, 20)
    rough = [x.astype(jnp.bfloat16) for x in arrays]
    used = re.compile("tan ")
    assert used.search(lowered(attend, rough, "cuda"))
    assert not used.search(lowered(attend, rough, "cpu"))
    assert not used.search(lowered(attend, rough, "tpu"))
    assert not used.search(lowered(attend, arrays, "cuda"))
    masked = lambda *args: attend(*args, key_mask=jnp.ones((2, 20), bool))  # noqa: E731
    assert not used.search(lowered(masked, rough, "cuda"))
    np.testing.assert_allclose(
        np.float64(attend(*rough)), plain_attention(*double(rough)), atol=2**-6
    )


@pytest.mark.parametrize(("queries", "keys"), [(6, 8), (5, 8), (6, 7), (7, 7)])
def test_what_cudnn_gets_is_padded_to_even_numbers(queries, keys, monkeypatch):
    plain = jax.nn.dot_product_attention
    seen = []

    def stand_in(query, key, value, *, implementation, **kw):
        seen.append((implementation, query.shape[1] % 2, key.shape[1] % 2))
        return plain(query, key, value, implementation="xla", **kw)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    arrays = draw(queries, keys)
    actual = attention._attend_cudnn(*arrays)
    assert seen == [("cudnn", 0, 0)]
    np.testing.assert_allclose(actual, plain_attention(*double(arrays)), atol=1e-6)
