"""The training state: everything that changes, in one tree."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from memseg_jax.models.segmentor import Segmentor

# Shapes of parameters do not depend on the size of the images; any small size does.
_INIT_IMAGE = (1, 64, 64, 3)


@struct.dataclass
class TrainState:
    """Everything that changes in a run. Randomness is a function of the seed and the step.

    Attributes:
        step: int32 scalar, number of completed steps.
        params: trainable parameters.
        batch_stats: running means and variances of the normalisations.
        memory: float32, of the shape that the method has (`Segmentor.memory_shape`).
        opt_state: state of the optimiser.
    """

    step: Any
    params: Any
    batch_stats: Any
    memory: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What inference needs: params, batch_stats and memory."""
        return {
            "params": self.params,
            "batch_stats": self.batch_stats,
            "memory": self.memory,
        }


def abstract_variables(model: Segmentor) -> dict[str, Any]:
    """Shapes and types of params, batch_stats and memory, without computing anything."""

    def copied(tree: Any) -> Any:  # whoever asks may change their dicts, whose order matters
        return {k: copied(v) for k, v in tree.items()} if isinstance(tree, dict) else tree

    return copied(_traced(model, jax.config.jax_enable_x64))


@functools.lru_cache(maxsize=4)  # a run asks several times, and tracing takes seconds
def _traced(model: Segmentor, double_precision: bool) -> dict[str, Any]:
    """`abstract_variables`; the types depend on JAX's setting."""
    del double_precision
    images = jax.ShapeDtypeStruct(_INIT_IMAGE, jnp.float32)
    memory = jax.ShapeDtypeStruct(model.memory_shape(), jnp.float32)
    keys = {name: jax.eval_shape(lambda: jax.random.key(0)) for name in ("params", "dropout")}
    tree = jax.eval_shape(lambda k, x, m: model.init(k, x, m), keys, images, memory)
    return {"params": tree["params"], "batch_stats": tree["batch_stats"], "memory": memory}


def abstract_state(model: Segmentor, tx: optax.GradientTransformation) -> TrainState:
    """Shapes and types of the whole state, without computing anything."""
    variables = abstract_variables(model)
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        opt_state=jax.eval_shape(tx.init, variables["params"]),
        **variables,
    )


def init_array(
    path: str, shape: tuple[int, ...], fan_in: int, rng: np.random.Generator
) -> np.ndarray:
    """Initial value of one array by the last part of its name, as PyTorch initialises layers.

    Args:
        path: "/"-separated name; the last part gives the kind.
        shape: shape of the array.
        fan_in: inputs of one output of the layer it belongs to.
        rng: source of the random numbers.

    Returns:
        float32 array: kernels and their biases uniform in +-1/sqrt(fan_in), biases of relative
        positions normal with a standard deviation of 0.02, everything else the neutral value of its
        kind. Class token and positions of a ViT are zero, as in the PyTorch
        reference before it loads pretrained weights.

    Raises:
        ValueError: the name is of no known kind.
    """
    kind = path.rsplit("/", 1)[-1]
    if kind == "kernel" or (kind == "bias" and fan_in):
        bound = fan_in**-0.5
        return rng.uniform(-bound, bound, shape).astype(np.float32)
    if kind == "relative_position_bias_table":
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)
    if kind in ("scale", "var"):
        return np.ones(shape, np.float32)
    if kind in ("bias", "mean", "memory", "cls_token", "pos_embed"):
        return np.zeros(shape, np.float32)
    raise ValueError(f"no rule to initialise {path}")


def init_variables(
    model: Segmentor, seed: int, known: Mapping[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """Fresh params, batch_stats and memory as NumPy arrays.

    NumPy fills the arrays in seconds where compiling the model's own initialisation takes half a
    minute; each array depends only on the seed and its own name.

    Args:
        model: the model.
        seed: any integer.
        known: arrays that are there already, by their "/"-separated path; they are taken as they
            are.

    Returns:
        {"params", "batch_stats", "memory"}: nested dicts of float32 arrays.
    """
    known = known or {}
    abstract, zeros = abstract_variables(model), model.zeros_at_start()

    def fill(tree: Any, prefix: str) -> Any:
        if not isinstance(tree, dict):
            raise TypeError(prefix)
        # A bias without a kernel beside it belongs to a normalisation.
        fan_in = int(np.prod(tree["kernel"].shape[:-1])) if "kernel" in tree else 0
        filled = {}
        for name, value in tree.items():
            path = f"{prefix}/{name}"
            if isinstance(value, dict):
                filled[name] = fill(value, path)
            elif path in known:
                filled[name] = known[path]
            elif path in zeros:
                filled[name] = np.zeros(value.shape, np.float32)
            else:
                entropy = [seed % 2**63, *path.encode()]
                filled[name] = init_array(path, value.shape, fan_in, np.random.default_rng(entropy))
        return filled

    return {
        "params": fill(abstract["params"], "params"),
        "batch_stats": fill(abstract["batch_stats"], "batch_stats"),
        "memory": known.get("memory", model.initial_memory()),
    }


def init_state(variables: dict[str, Any], tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step, on the host; see `sharding.place` for devices.

    Args:
        variables: params, batch_stats and memory.
        tx: the optimiser.
    """
    opt_state = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(tx.init, variables["params"])
    )
    return TrainState(step=np.zeros((), np.int32), opt_state=opt_state, **variables)
