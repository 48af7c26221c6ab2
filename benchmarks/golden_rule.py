"""The rule that makes the weights and inputs of golden numbers, which are not stored.

Each is one draw of a generator that is seeded with the set's seed string and the name of what is
drawn. Layouts are PyTorch's (NCHW; out, in, kh, kw).
"""

import zlib
from collections.abc import Sequence

import numpy as np


def generator(seed: str, name: str) -> np.random.Generator:
    """The generator of what is drawn under a name.

    Args:
        seed: the set's seed string.
        name: a complete state-dict key, or that of an input, such as "image:<case>".
    """
    return np.random.Generator(np.random.PCG64(zlib.crc32((seed + name).encode("utf-8"))))


def array(key: str, shape: Sequence[int], seed: str) -> np.ndarray:
    """The value of one entry of the state dict of MCIBI, float32 (int64 for counters).

    Args:
        key: the complete state-dict key in the reference's naming.
        shape: its shape in PyTorch's layout.
        seed: the set's seed string.
    """
    gain = 8.0 if key == "decoder_stage1.4.weight" else 1.0
    if ".query_project." in key or ".key_project." in key:
        gain = 2.5
    return value(key, shape, generator(seed, key), gain)


def value(key: str, shape: Sequence[int], rng: np.random.Generator, gain: float) -> np.ndarray:
    """What `array` returns, from the generator of the key and the gain of its matrix."""
    shape = tuple(int(n) for n in shape)
    last = key.split(".")[-1]
    if last == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if last in ("cls_token", "pos_embed", "memory"):
        drawn = 0.5 * rng.standard_normal(shape)
    elif last == "running_mean":
        drawn = 0.1 * rng.standard_normal(shape)
    elif last == "running_var":
        drawn = rng.uniform(0.5, 1.5, shape)
    elif "bias" in last and last != "relative_position_bias_table":
        drawn = 0.1 * rng.standard_normal(shape)
    elif len(shape) >= 2:
        fan_in = int(np.prod(shape[1:]))
        drawn = gain * rng.standard_normal(shape) * (1.0 / fan_in) ** 0.5
    elif any(part in key for part in (".bn2.", ".bn3.", ".fuse_layers.")):
        drawn = rng.uniform(0.25, 0.5, shape)
    else:
        drawn = rng.uniform(0.5, 1.5, shape)
    return np.asarray(drawn).astype(np.float32)
