"""Checksums of arrays, the same wherever and however the array lies.

An array is taken as its 16-bit words w_0, w_1, ... in C order (little endian; an array of bytes:
its bytes). Its checksum is two sums

    sum_p w_p * m(p)  modulo 2^32

with odd multipliers m(p) that depend on the position p in a random-looking way, differently in the
two sums. Addition modulo 2^32 has no order, so every process and device sums what it holds, and
nothing is gathered. An odd number times a difference of less than 2^16 is never 0 modulo 2^32, so a
change within one word is always found; other changes, which are not made on purpose to escape,
escape with a probability of 2^-64, and of 2^-32 in the worst case (two words that differ in their
highest bit only, such as two changed signs). It is no protection against intent.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 65536  # positions with one factor of the multiplier in common
_SEEDS = ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344))  # digits of pi


def checksums(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Computes the checksums of arrays.

    Args:
        arrays: {name: NumPy or JAX array}; one that is sharded over processes has to be given by
            all of them.

    Returns:
        {name: type, shape and checksum}, such as "float32[3,3,64,64] 0123456789abcdef".
    """
    # Accelerators work on all arrays while the first results are on their way.
    sums = {
        name: _sums_on_host(np.asarray(array)) if _on_host(array) else _sums_on_device(array)
        for name, array in arrays.items()
    }
    sums = jax.device_get(sums)
    return {
        name: f"{describe(arrays[name])} {int(first):08x}{int(second):08x}"
        for name, (first, second) in sums.items()
    }


def describe(array: Any) -> str:
    """Type and shape of an array, or of anything that has both, such as "float32[3,64]"."""
    return f"{np.dtype(array.dtype).name}[{','.join(map(str, array.shape))}]"


def _on_host(array: Any) -> bool:
    if not isinstance(array, jax.Array):
        return True
    # On CPU, NumPy sees the array without a copy, and nothing needs to be compiled.
    in_reach = array.is_fully_addressable or array.is_fully_replicated
    return in_reach and next(iter(array.devices())).platform == "cpu"


def _mixed(x: Any, seed: int) -> Any:
    """A random-looking odd number for every uint32 of a NumPy or JAX array."""
    kind = np.uint32 if isinstance(x, np.ndarray) else jnp.uint32
    x = x + kind(seed)
    x = (x ^ (x >> kind(16))) * kind(0x7FEB352D)
    x = (x ^ (x >> kind(15))) * kind(0x846CA68B)
    return (x ^ (x >> kind(16))) | kind(1)


@functools.cache
def _table() -> np.ndarray:
    """The multipliers of the positions within a block, uint32 [2, _BLOCK]."""
    positions = np.arange(_BLOCK, dtype=np.uint32)
    return np.stack([_mixed(positions, seed) for seed, _ in _SEEDS])


def _sums_on_host(array: np.ndarray) -> np.ndarray:
    """The two sums of a NumPy array, uint32 [2]."""
    flat = np.ascontiguousarray(array).reshape(-1)
    words = flat.view(np.uint8 if flat.dtype.itemsize == 1 else np.dtype("<u2"))
    whole = words.size // _BLOCK * _BLOCK
    sums = np.zeros(2, np.uint32)
    for first, rows in ((0, words[:whole].reshape(-1, _BLOCK)), (whole, words[None, whole:])):
        if rows.size:
            # Each number of a block in turn, without an array of all products.
            block = np.einsum(
                "bw,kw->kb", rows, _table()[:, : rows.shape[1]], dtype=np.uint32, casting="unsafe"
            )
            numbers = np.arange(first // _BLOCK, first // _BLOCK + len(rows), dtype=np.uint32)
            factors = np.stack([_mixed(numbers, seed) for _, seed in _SEEDS])
            sums += np.sum(block * factors, axis=1, dtype=np.uint32)
    return sums


def _sums_on_device(array: jax.Array) -> jax.Array:
    """The two sums of a JAX array, uint32 [2], on every device."""
    mesh = getattr(array.sharding, "mesh", None)
    return _program(mesh)(array)


@functools.cache
def _program(mesh: Any) -> Any:
    everywhere = None if mesh is None else jax.NamedSharding(mesh, jax.P())
    return jax.jit(_sums, out_shardings=everywhere)


def _sums(x: jax.Array) -> jax.Array:
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    size = x.dtype.itemsize
    kind = {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)
    words = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
    if size >= 4:  # the lower half of a word comes first
        words = jnp.stack([words & jnp.uint32(0xFFFF), words >> jnp.uint32(16)], axis=-1)
    position = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position += index * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    within, number = position % jnp.uint32(_BLOCK), position // jnp.uint32(_BLOCK)
    return jnp.stack(
        [
            jnp.sum(words * _mixed(within, low) * _mixed(number, high), dtype=jnp.uint32)
            for low, high in _SEEDS
        ]
    )
