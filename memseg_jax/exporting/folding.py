"""Batch normalisations folded into the convolutions before them, for inference.

With running statistics, a normalisation multiplies each channel by a constant and adds another. The
factor goes into the convolution's kernel; the sum stays in the normalisation's place, as its only
parameter: a bias.
"""

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memseg_jax.models.layers import BATCH_NORM_EPSILON, BatchNorm

# The name of every normalisation in its module, and of the convolution whose result it takes.
_CONVOLUTION_OF = {"norm": "conv", "bn0": "conv", "bn1": "fc1"}


def _normalisations(stats: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all batch normalisations."""
    if "mean" in stats:
        yield path
        return
    for name, inner in stats.items():
        yield from _normalisations(inner, (*path, name))


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def fold(variables: dict[str, Any]) -> dict[str, Any]:
    """Folds every normalisation; computed in float64, once.

    Args:
        variables: params, batch_stats and memory.

    Returns:
        Parameters for a network under `without_normalisations`: float32 arrays of NumPy. Of a
        normalisation there is only "bias".
    """
    params = jax.tree.map(np.asarray, variables["params"])
    for path in _normalisations(variables["batch_stats"]):
        module, norm = _at(params, path[:-1]), path[-1]
        stats = _at(variables["batch_stats"], path)
        mean, variance = (np.asarray(stats[name], np.float64) for name in ("mean", "var"))
        factor = module[norm]["scale"] / np.sqrt(variance + BATCH_NORM_EPSILON)
        convolution = module[_CONVOLUTION_OF[norm]]
        convolution["kernel"] = (convolution["kernel"] * factor).astype(np.float32)
        if "bias" in convolution:
            convolution["bias"] = (convolution["bias"] * factor).astype(np.float32)
        module[norm] = {"bias": (module[norm]["bias"] - mean * factor).astype(np.float32)}
    return params


def unfold(params: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
    """Variables of the usual network that compute what folded parameters do, rounding aside.

    Args:
        params: from `fold`, perhaps changed since.
        variables: what was folded; its memory is taken.

    Returns:
        params, batch_stats and memory; the normalisations only add their bias.
    """
    # Copies of the dicts, not of the arrays.
    params, stats = jax.tree.map(lambda x: x, (params, variables["batch_stats"]))
    for path in _normalisations(variables["batch_stats"]):
        norm = _at(params, path)
        norm["scale"] = np.ones_like(norm["bias"])
        _at(stats, path[:-1])[path[-1]] = {
            "mean": np.zeros_like(norm["bias"]),
            "var": np.full_like(norm["bias"], 1 - BATCH_NORM_EPSILON),
        }
    return {"params": params, "batch_stats": stats, "memory": variables["memory"]}


def without_normalisations(function: Callable) -> Callable:
    """`function` of a network whose normalisations were folded: each only adds its bias."""

    def add_bias(next_function: Callable, args: Any, kw: Any, context: Any) -> Any:
        module = context.module
        if not isinstance(module, BatchNorm) or context.method_name != "__call__":
            return next_function(*args, **kw)
        (x,) = args
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return (wide + module.get_variable("params", "bias")).astype(module.dtype)

    def folded(*args: Any, **kw: Any) -> Any:
        with nn.intercept_methods(add_bias):
            return function(*args, **kw)

    return folded
