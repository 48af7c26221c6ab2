"""The weights of an exported network: one flat table of arrays that NumPy alone can read.

Kernels may take fewer bits than they were trained with: "bfloat16" keeps 8 significant bits of each
number; "int8" keeps whole multiples, from -127 to 127, of a step of each output channel. They are
float32 again before anything is computed. All else (biases, layer normalisations, the memory) is a
small share of the file and stays float32.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util

FORMS = ("float32", "bfloat16", "int8")
_STEP = ":step"  # ends the name of the steps of an int8 kernel
_LEVELS = 127


def pack(tree: Mapping[str, Any], form: str) -> dict[str, np.ndarray]:
    """The table of a tree of float32 arrays.

    Args:
        tree: nested dicts, whose paths ("params/stem_0/conv/kernel") become the names; arrays that
            are called "kernel" get the form.
        form: one of `FORMS`.

    Returns:
        Arrays by name; bfloat16 as the uint16 of the same bits, because NumPy has no such type.
    """
    table = {}
    for name, value in traverse_util.flatten_dict(tree, sep="/").items():
        value = np.asarray(value, np.float32)
        kernel = name.rsplit("/", 1)[-1] == "kernel"
        if kernel and form == "bfloat16":
            value = value.astype(ml_dtypes.bfloat16).view(np.uint16)
        elif kernel and form == "int8":
            largest = np.max(np.abs(value), axis=tuple(range(value.ndim - 1)))
            step = np.where(largest > 0, largest / _LEVELS, 1).astype(np.float32)
            value = np.clip(np.rint(value / step), -_LEVELS, _LEVELS).astype(np.int8)
            table[name + _STEP] = step
        table[name] = value
    return table


def unpack(table: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of float32 arrays that a table stands for; inside of a program, too."""
    flat = {}
    for name, value in table.items():
        if name.endswith(_STEP):
            continue
        if value.dtype == np.uint16:
            value = jax.lax.bitcast_convert_type(value, jnp.bfloat16).astype(jnp.float32)
        elif value.dtype == np.int8:
            value = value.astype(jnp.float32) * table[name + _STEP]
        flat[name] = value
    return traverse_util.unflatten_dict(flat, sep="/")
