"""Single-head attention between the positions of one image."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseg_jax.models.layers import Array, ConvNorm, Extent


def attend(query: Array, key: Array, value: Array, key_mask: Array | None = None) -> Array:
    """Softmax attention, scaled by 1/sqrt(dim), with the softmax in at least float32.

    Args:
        query: [batch, queries, dim].
        key: [batch, keys, dim].
        value: [batch, keys, dim].
        key_mask: bool [batch, keys]; keys outside take no part. None: all take part.

    Returns:
        [batch, queries, dim].
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("bqd,bkd->bqk", query, key, preferred_element_type=dtype)
    scores = scores * query.shape[-1] ** -0.5
    if key_mask is not None:
        scores = jnp.where(key_mask[:, None, :], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bqk,bkd->bqd", weights, value)


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
        self, queries: Array, context: Array, *, train: bool, extent: Extent | None = None
    ) -> Array:
        """Returns [batch, height, width, features].

        Args:
            queries: [batch, height, width, channels], the positions that ask.
            context: [batch, height, width, channels'], the positions that answer.
            train: use and update batch statistics.
            extent: the real part of padded images.
        """

        def project(x: Array, name: str, features: int = self.attention_dim) -> Array:
            layer = ConvNorm(features, activation=self.activation, dtype=self.dtype, name=name)
            return layer(x, train=train, extent=extent)

        query = project(project(queries, "query_project_0"), "query_project_1")
        key = project(project(context, "key_project_0"), "key_project_1")
        value = project(context, "value_project")
        batch, height, width, dim = query.shape
        mask = None if extent is None else extent.mask(key).reshape(batch, height * width)
        flat = [x.reshape(batch, height * width, dim) for x in (query, key, value)]
        gathered = attend(*flat, key_mask=mask).reshape(batch, height, width, dim)
        return project(gathered, "out_project", self.features)
