"""SGD with coupled weight decay, momentum, and a polynomial schedule per step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import optax

from memseg_jax.errors import UserError


def poly_schedule(
    lr: float, min_lr: float, power: float, total_steps: int
) -> Callable[[jax.Array], jax.Array]:
    """Returns lr(step) = (lr - min_lr) * (1 - step / total_steps)^power + min_lr.

    Args:
        lr: learning rate at step 0.
        min_lr: floor that is reached at `total_steps`.
        power: exponent.
        total_steps: length of the run in steps.
    """

    def schedule(step: jax.Array) -> jax.Array:
        # Exact until the last division: 1 - step / total would lose digits near the end.
        left = jnp.maximum(total_steps - jnp.asarray(step, jnp.result_type(float)), 0)
        left = left / total_steps
        return (lr - min_lr) * left**power + min_lr

    return schedule


def schedule_from_config(
    config: ml_collections.ConfigDict, total_steps: int
) -> Callable[[jax.Array], jax.Array]:
    """Returns the learning-rate schedule of a run of `total_steps` steps."""
    o = config.optimizer
    return poly_schedule(o.lr, o.min_lr, o.power, total_steps)


def multiplier(path: tuple, multipliers: dict[str, tuple[float, float]]) -> tuple[float, float]:
    """Learning-rate and weight-decay factors of one parameter, by the module it is in."""
    module = path[0].key
    lr_factor, decay_factor = multipliers.get(module, (1.0, 1.0))
    return lr_factor, decay_factor


def sgd(
    config: ml_collections.ConfigDict, schedule: Callable[[jax.Array], jax.Array]
) -> optax.GradientTransformation:
    """PyTorch's SGD: g += decay * p; v = momentum * v + g; p -= lr * v.

    The decay applies to every parameter, scales and biases of normalisation included, and the
    learning rate stays outside the momentum. `config.optimizer.multipliers` maps the name of a
    top-level module to factors on its learning rate and on its weight decay.

    Args:
        config: the whole config.
        schedule: learning rate as a function of the step.

    Returns:
        The transformation; its state counts steps by itself.
    """
    o = config.optimizer
    multipliers = {name: tuple(pair) for name, pair in o.multipliers.items()}

    def check(params: optax.Params) -> optax.EmptyState:
        unknown = sorted(set(multipliers) - set(params))
        if unknown:
            raise UserError(
                f"config.optimizer.multipliers names {', '.join(unknown)}; "
                f"the model's modules are {', '.join(sorted(params))}"
            )
        return optax.EmptyState()

    def add_decay(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params
    ) -> tuple[optax.Updates, optax.EmptyState]:
        def decayed(path: tuple, g: jax.Array, p: jax.Array) -> jax.Array:
            return g + o.weight_decay * multiplier(path, multipliers)[1] * p

        return jax.tree_util.tree_map_with_path(decayed, updates, params), state

    def scale(updates: optax.Updates, params: optax.Params) -> optax.Updates:
        del params
        return jax.tree_util.tree_map_with_path(
            lambda path, v: v * multiplier(path, multipliers)[0], updates
        )

    return optax.chain(
        optax.GradientTransformation(check, add_decay),
        optax.trace(decay=o.momentum),
        optax.stateless(scale),
        optax.scale_by_learning_rate(schedule),
    )
