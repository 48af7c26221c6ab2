"""Recomputing the inside of a module instead of keeping it for the backward pass."""

from typing import Any

import flax.linen as nn

from memseg_jax.models.layers import Array


def call(module: nn.Module, *arrays: Array, remat: bool, train: bool, **kw: Any) -> Array:
    """Calls `module(*arrays, train=train, **kw)`.

    The names of the parameters and all numbers are the same with and without `remat`; the running
    statistics move once.

    Args:
        module: the module.
        arrays: all of its arguments that have a gradient.
        remat: in training, keep nothing but the arguments for the backward pass.
        train: in training or not.
        kw: its other arguments.
    """
    kw["train"] = train
    if not (remat and train):
        return module(*arrays, **kw)
    return nn.remat(lambda module, *arrays: module(*arrays, **kw))(module, *arrays)
