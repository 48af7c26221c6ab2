"""Checksums: the same wherever an array lies, and different after any change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from memseg_jax.checkpoint.checksums import _program, checksums

TYPES = (np.float32, jnp.bfloat16, np.float16, np.int32, np.uint8, np.int8, np.bool_, np.uint16)


def of(array):
    return checksums({"x": array})["x"]


def on_device(array):
    """By the program for accelerators, also on CPU."""
    first, second = np.asarray(_program(None)(array))
    return f"{first:08x}{second:08x}"


def draw(shape, dtype=np.float32, seed=0):
    raw = np.random.default_rng(seed).bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    if dtype == np.bool_:
        return (np.frombuffer(raw, np.uint8) % 2).astype(bool).reshape(shape)
    return np.frombuffer(raw, dtype).reshape(shape).copy()


def flip(array, byte, bit=0):
    changed = array.copy()
    changed.reshape(-1).view(np.uint8)[byte] ^= 1 << bit
    return changed


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 2), (70001,)])
def test_host_and_device_agree(dtype, shape):
    array = draw(shape, dtype)
    assert of(array).split()[1] == on_device(jnp.asarray(array))
    assert of(array) == of(jnp.asarray(array))


def test_64_bits_agree(double_precision):
    for dtype in (np.float64, np.int64):
        array = draw((9, 5), dtype)
        assert of(array).split()[1] == on_device(jnp.asarray(array))


def test_the_definition():
    # Written once more, as slowly as it reads: sum of word times multiplier.
    def mixed(x, seed):
        x = (x + seed) % 2**32
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16) | 1

    seeds = ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344))
    array = draw((40000,))
    sums = [
        sum(
            int(word) * mixed(p % 65536, low) * mixed(p // 65536, high)
            for p, word in enumerate(array.view(np.uint16))
        )
        % 2**32
        for low, high in seeds
    ]
    assert of(array) == f"float32[40000] {sums[0]:08x}{sums[1]:08x}"


def test_type_and_shape_are_part_of_it():
    array = np.zeros((2, 3), np.float32)
    assert of(array) == "float32[2,3] " + 16 * "0"
    assert len({of(array), of(array.T), of(array.view(np.int32)), of(array[:1])}) == 4


def test_shardings_agree():
    array = draw((16, 24, 3))
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    for spec in (jax.P(), jax.P("data"), jax.P("fsdp", "data"), jax.P(("data", "fsdp"))):
        placed = jax.device_put(array, jax.NamedSharding(mesh, spec))
        assert of(placed) == of(array)
        first, second = np.asarray(_program(mesh)(placed))
        assert of(array).endswith(f"{first:08x}{second:08x}")


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_changed_byte_changes_it(data):
    array = data.draw(arrays.arrays(st.sampled_from((np.uint32, np.uint8, np.uint16)), (11,)))
    byte = data.draw(st.integers(0, array.nbytes - 1))
    bit = data.draw(st.integers(0, 7))
    assert of(flip(array, byte, bit)) != of(array)


def test_all_bits_of_a_large_array():
    # Beyond one block of positions, every bit of a word, first and last included.
    array = draw((40000,))
    sums = {of(array)}
    for word in (0, 1, 32767, 32768, 39999):
        sums |= {of(flip(array, 4 * word + bit // 8, bit % 8)) for bit in range(32)}
    assert len(sums) == 1 + 5 * 32


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_changes_that_plain_sums_miss(dtype):
    array = np.arange(1, 201).astype(dtype)
    sums = {of(array), of(array[::-1]), of(np.roll(array, 1))}
    for last in range(1, 200):
        negated = array.copy()  # two changed signs: two highest bits
        negated[[0, last]] *= -1
        moved = array.copy()  # the sum of the words stays
        moved[[0, last]] = moved[last] + 1, 0
        sums |= {of(negated), of(moved)}
    assert len(sums) == 3 + 2 * 199
