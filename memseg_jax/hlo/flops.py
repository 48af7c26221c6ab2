"""Counting the arithmetic of a function from its trace: no compiling, the same on every device."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memseg_jax.models.segmentor import Segmentor
from memseg_jax.training.state import abstract_variables


def count_flops(function: Callable, *args: Any) -> int:
    """Floating-point operations of the matrix products and convolutions in `function`.

    A multiplication and its addition count as two, positions in the padding count too (both as is
    usual for "FLOPs of a model"), and elementwise operations do not. What is computed on parts of
    arrays counts for all devices. Loops count as often as they run; of the branches of a condition
    the most expensive one counts. A loop of unknown length counts once.

    Args:
        function: anything that can be traced.
        *args: arrays, or `jax.ShapeDtypeStruct`.
    """
    return flops_of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def flops_of_jaxpr(jaxpr: Any) -> int:
    """The same for a function that is traced already."""
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def network_flops(model: Segmentor, size: tuple[int, int], *, train: bool) -> int:
    """Operations for one image of `size` in the forward pass; three times that in training.

    The gradients for the inputs and for the kernels of a layer cost as much as its forward pass
    each; what is computed a second time to save memory is not counted.
    """
    variables = abstract_variables(model)
    rest = {"params": variables["params"], "batch_stats": variables["batch_stats"]}

    def forward(variables: Any, image: jax.Array, memory: jax.Array, key: jax.Array) -> Any:
        kw = {"mutable": ["batch_stats"], "rngs": {"dropout": key}} if train else {}
        out = model.apply(variables, image, memory, train=train, **kw)
        return out if train else out["logits"]

    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    count = count_flops(forward, rest, image, variables["memory"], key)
    return 3 * count if train else count


def _count_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        # Zeros that a transposed convolution puts between the positions of its input are not work.
        work = 2 * equation.outvars[0].aval.size * (kernel.size // outputs)
        return work // math.prod(params["lhs_dilation"])
    if name == "cond":
        return max(flops_of_jaxpr(branch.jaxpr) for branch in params["branches"])
    inner = sum(flops_of_jaxpr(part) for value in params.values() for part in _jaxprs(value))
    if name == "shard_map":  # written for one device
        return inner * params["mesh"].size
    return inner * (params["length"] if name == "scan" else 1)


def _jaxprs(value: Any) -> list[Any]:
    """The programs in one parameter of an equation."""
    if isinstance(value, (tuple, list)):
        return [part for element in value for part in _jaxprs(element)]
    value = getattr(value, "jaxpr", value)  # a closed one
    return [value] if hasattr(value, "eqns") else []
