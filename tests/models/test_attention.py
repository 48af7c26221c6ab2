"""Attention against a plain NumPy softmax."""

import jax.numpy as jnp
import numpy as np

from memseg_jax.models.attention import attend


def plain_attention(query, key, value):
    scores = query @ key.T / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ value


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_attention_equals_plain_softmax():
    query, key, value = draw(2, 5, 8), draw(2, 7, 8, seed=1), draw(2, 7, 8, seed=2)
    actual = attend(query, key, value)
    for index in range(2):
        expected = plain_attention(*(x[index].astype(np.float64) for x in (query, key, value)))
        np.testing.assert_allclose(actual[index], expected, atol=1e-6)


def test_masked_keys_take_no_part():
    query, key, value = draw(2, 5, 8), draw(2, 7, 8, seed=1), draw(2, 7, 8, seed=2)
    mask = np.zeros((2, 7), bool)
    mask[0, :4] = mask[1, 2:3] = True
    actual = attend(query, key, value, key_mask=mask)
    for index in range(2):
        inside = mask[index]
        expected = plain_attention(query[index], key[index][inside], value[index][inside])
        np.testing.assert_allclose(actual[index], expected, atol=1e-6)


def test_large_scores_do_not_overflow():
    query, key, value = 1e4 * draw(1, 3, 4), 1e4 * draw(1, 6, 4, seed=1), draw(1, 6, 4, seed=2)
    best = np.argmax(query[0] @ key[0].T, axis=-1)
    np.testing.assert_allclose(attend(query, key, value)[0], value[0][best], atol=1e-6)


def test_bfloat16_scores_are_summed_in_float32():
    # Scores near 300 differ by less than a step of bfloat16 (2), which decides the weights.
    query = jnp.full((1, 1, 64), 6.0, jnp.bfloat16)
    key = jnp.stack([jnp.full((64,), 6.25), jnp.full((64,), 6.25).at[:8].set(6.28125)])
    value = jnp.eye(2, 64, dtype=jnp.bfloat16)[None]
    weights = attend(query, key[None].astype(jnp.bfloat16), value)[0, 0, :2]
    scores = 6.0 * np.asarray(key, np.float64).sum(-1) / 8
    expected = np.exp(scores - scores.max())
    np.testing.assert_allclose(weights, expected / expected.sum(), atol=5e-3)
