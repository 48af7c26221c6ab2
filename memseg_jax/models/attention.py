"""Attention between the positions of one image, in memory that grows linearly with their number."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memseg_jax.models.layers import Array, ConvNorm, ValidSize, record
from memseg_jax.models.symbolic import is_symbolic
from memseg_jax.runtime import rows

# Tokens in a block of queries or keys: the largest matrix that `attend` makes is BLOCK x BLOCK.
# Measured on a CPU: up to here blocks gain nothing, beyond they are faster as well as smaller.
BLOCK = 1024


def attend(query: Array, key: Array, value: Array, key_mask: Array | None = None) -> Array:
    """Softmax attention, scaled by 1/sqrt(dim), with the softmax in at least float32.

    Args:
        query: [batch, queries, dim]. Heads are passed as separate images.
        key: [batch, keys, dim].
        value: [batch, keys, dim].
        key_mask: bool [batch, keys]; keys where it is False take no part; at least one must. None:
            all do.

    Returns:
        [batch, queries, dim].
    """
    if rows.parts() == 1:
        return _attend(query, key, value, key_mask)

    def attend_part(query: Array, context: Array, key_mask: Array | None) -> Array:
        # Queries stay where they are; what they look at is gathered in one message.
        context, key_mask = lax.all_gather((context, key_mask), rows.AXIS, axis=1, tiled=True)
        key, value = jnp.split(context, [dim], axis=-1)
        return _attend(query, key, value, key_mask)

    tokens, keys, dim = query.shape[1], *key.shape[1:]
    query = rows.pad(query)
    context = rows.pad(jnp.concatenate([key, value], axis=-1))
    if key_mask is None and context.shape[1] > keys:
        key_mask = jnp.ones((len(key), keys), bool)
    if key_mask is not None:
        key_mask = rows.pad(key_mask)
    part = rows.by_rows(attend_part, rows.MAPS, rows.MAPS)
    return part(query, context, key_mask)[:, :tokens]


def _attend(query: Array, key: Array, value: Array, key_mask: Array | None) -> Array:
    """`attend` where the device has all keys."""
    if is_symbolic((query.shape[1], key.shape[1])):
        return attend_in_blocks(query, key, value, key_mask, BLOCK)
    if query.shape[1] <= BLOCK and key.shape[1] <= BLOCK:
        return attend_at_once(query, key, value, key_mask)
    blocks = functools.partial(attend_in_blocks, key_mask=key_mask, block=BLOCK)
    if key_mask is None and _cudnn_accepts(query, key, value):
        # What counts is the platform that the program is compiled for, not this process's.
        return lax.platform_dependent(query, key, value, cuda=_attend_cudnn, default=blocks)
    return blocks(query, key, value)


def attend_at_once(query: Array, key: Array, value: Array, key_mask: Array | None) -> Array:
    """`attend` with the whole matrix of queries by keys."""
    scores = _scores(query, key, key_mask)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bqk,bkd->bqd", weights, value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_in_blocks(
    query: Array, key: Array, value: Array, key_mask: Array | None, block: int
) -> Array:
    """`attend` by an online softmax: one block of queries and one of keys at a time.

    A block of queries goes through the blocks of keys and keeps, for every query, the highest score
    so far, the sum of exp(score - highest) and the sum of the values with these weights; a new
    highest score rescales both sums. The backward pass computes each block's weights again, from
    the logarithm of the softmax's denominator. (Rabe and Staats, "Self-attention does not need
    O(n^2) memory"; Dao et al., "FlashAttention", section 3 and appendix B.)

    Args:
        query: [batch, queries, dim].
        key: [batch, keys, dim].
        value: [batch, keys, dim].
        key_mask: bool [batch, keys] or None.
        block: tokens in a block, at most.

    Returns:
        [batch, queries, dim].
    """
    return _blocks_forward(query, key, value, key_mask, block)[0]


def _blocks_forward(
    query: Array, key: Array, value: Array, key_mask: Array | None, block: int
) -> tuple[Array, tuple]:
    """Returns the result, and what the backward pass needs: only per-token arrays."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    contexts = _context_blocks(key, value, key_mask, block)

    def attend_block(query: Array) -> tuple[Array, Array]:
        def add_context(carry: tuple, context: tuple) -> tuple[tuple, None]:
            highest, total, gathered = carry
            key, value, mask = context
            scores = _scores(query, key, mask)
            previous, highest = highest, jnp.maximum(highest, jnp.max(scores, axis=-1))
            rescale = jnp.exp(previous - highest)
            weights = jnp.exp(scores - highest[..., None])
            total = rescale * total + jnp.sum(weights, axis=-1)
            gathered = rescale[..., None] * gathered + jnp.einsum(
                "bqk,bkd->bqd", weights.astype(value.dtype), value, preferred_element_type=dtype
            )
            return (highest, total, gathered), None

        # Lower than any score, but finite: a block may be masked as a whole.
        lowest = jnp.full(query.shape[:2], jnp.finfo(dtype).min)
        start = (lowest, jnp.zeros_like(lowest), jnp.zeros(query.shape, dtype))
        (highest, total, gathered), _ = lax.scan(add_context, start, contexts)
        gathered = (gathered / total[..., None]).astype(value.dtype)
        return gathered, highest + jnp.log(total)

    gathered, log_total = lax.map(attend_block, _split(query, block))
    gathered = _join(gathered, query.shape[1])
    return gathered, (query, key, value, key_mask, gathered, log_total)


def _blocks_backward(block: int, saved: tuple, cotangent: Array) -> tuple:
    """The gradients for query, key, value and (none) mask.

    With the weights P, the result O and its cotangent dO, and ' for transposed:
    dV = P' dO, dS = P * (dO V' - sum(dO * O)), dQ = dS K, dK = dS' Q.
    """
    query, key, value, key_mask, gathered, log_total = saved
    dtype = log_total.dtype
    scale = query.shape[-1] ** -0.5
    shared = jnp.sum(cotangent.astype(dtype) * gathered.astype(dtype), axis=-1)
    queries, cotangents, shared = (_split(x, block) for x in (query, cotangent, shared))

    def product(subscripts: str, x: Array, y: Array) -> Array:
        return jnp.einsum(subscripts, x.astype(y.dtype), y, preferred_element_type=dtype)

    def add_context(query_gradients: Array, context: tuple) -> tuple[Array, tuple[Array, Array]]:
        key, value, mask = context

        def add_queries(carry: tuple[Array, Array], queries: tuple) -> tuple[tuple, Array]:
            key_gradient, value_gradient = carry
            query, query_gradient, cotangent, shared, log_total = queries
            weights = jnp.exp(_scores(query, key, mask) - log_total[..., None])
            slope = product("bqd,bkd->bqk", cotangent, value) - shared[..., None]
            slope = scale * weights * slope
            value_gradient += product("bqk,bqd->bkd", weights, cotangent)
            key_gradient += product("bqk,bqd->bkd", slope, query)
            query_gradient += product("bqk,bkd->bqd", slope, key)
            return (key_gradient, value_gradient), query_gradient

        start = (jnp.zeros(key.shape, dtype), jnp.zeros(value.shape, dtype))
        over = (queries, query_gradients, cotangents, shared, log_total)
        gradients, query_gradients = lax.scan(add_queries, start, over)
        return query_gradients, gradients

    start = jnp.zeros(queries.shape, dtype)
    contexts = _context_blocks(key, value, key_mask, block)
    query_gradients, (key_gradients, value_gradients) = lax.scan(add_context, start, contexts)
    gradients = zip((query_gradients, key_gradients, value_gradients), (query, key, value))
    return *(_join(gradient, x.shape[1]).astype(x.dtype) for gradient, x in gradients), None


attend_in_blocks.defvjp(_blocks_forward, _blocks_backward)


def _scores(query: Array, key: Array, key_mask: Array | None) -> Array:
    """Scaled products [batch, queries, keys]; the lowest finite number outside of the mask."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("bqd,bkd->bqk", query, key, preferred_element_type=dtype)
    scores = scores * query.shape[-1] ** -0.5
    if key_mask is None:
        return scores
    return jnp.where(key_mask[:, None, :], scores, jnp.finfo(dtype).min)


def _context_blocks(
    key: Array, value: Array, key_mask: Array | None, block: int
) -> tuple[Array, Array, Array]:
    """Blocks of keys, values and mask; the padding of the last block is masked."""
    if key_mask is None:
        key_mask = jnp.ones(key.shape[:2], bool)
    return _split(key, block), _split(value, block), _split(key_mask, block)


def _split(x: Array, block: int) -> Array:
    """[batch, tokens, ...] -> [blocks, batch, tokens of a block, ...], padded with zeros."""
    blocks = -(-x.shape[1] // block)
    size = block if is_symbolic(x.shape) else -(-x.shape[1] // blocks)
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, blocks * size - x.shape[1])
    x = jnp.pad(x, padding).reshape(x.shape[0], blocks, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def _join(blocks: Array, tokens: int) -> Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(blocks, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :tokens]


def _attend_cudnn(query: Array, key: Array, value: Array) -> Array:
    """`attend` by cuDNN's fused kernel, which takes [batch, tokens, heads, dim]."""

    def even(x: Array) -> Array:
        # jax refuses to differentiate odd numbers of tokens, such as those of a ViT.
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0)))[:, :, None]

    batch, keys, _ = key.shape
    lengths = jnp.full(batch, keys, jnp.int32) if keys % 2 else None
    gathered = jax.nn.dot_product_attention(
        *map(even, (query, key, value)), key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return gathered[:, : query.shape[1], 0]


def _cudnn_accepts(query: Array, key: Array, value: Array) -> bool:
    """Whether cuDNN is here and takes these types and sizes; jax knows, and refuses otherwise."""
    try:
        jax.eval_shape(lambda *args: jax.vjp(_attend_cudnn, *args)[0], query, key, value)
    except (NotImplementedError, RuntimeError):
        return False
    return True


class SelfAttention(nn.Module):
    """Every position of one map gathers from all positions of another map of the same image.

    No residual, no positional term, no heads; normalisation and activation also follow the value
    and the output projections.

    Attributes:
        attention_dim: channels of queries, keys and values.
        features: channels of the result.
        activation: name, see `layers.activation`.
        dtype: compute type.
    """

    attention_dim: int
    features: int
    activation: str = "relu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, queries: Array, context: Array, *, train: bool, valid_size: ValidSize | None = None
    ) -> Array:
        """Returns [batch, height, width, features].

        Args:
            queries: [batch, height, width, channels], the positions that ask.
            context: [batch, height, width, channels'], the positions that answer.
            train: use and update batch statistics.
            valid_size: the valid part of padded images.
        """

        def project(x: Array, name: str, features: int = self.attention_dim) -> Array:
            layer = ConvNorm(features, activation=self.activation, dtype=self.dtype, name=name)
            return layer(x, train=train, valid_size=valid_size)

        query = project(project(queries, "query_project_0"), "query_project_1")
        key = project(project(context, "key_project_0"), "key_project_1")
        value = project(context, "value_project")
        # Who wants to see where a position looks computes its weights from these.
        record(self, "query", query, "attention")
        record(self, "key", key, "attention")
        batch, height, width, dim = query.shape
        mask = None if valid_size is None else valid_size.mask(key).reshape(batch, height * width)
        flat = [x.reshape(batch, height * width, dim) for x in (query, key, value)]
        gathered = attend(*flat, key_mask=mask).reshape(batch, height, width, dim)
        return project(gathered, "out_project", self.features)
