"""SGD with coupled weight decay, momentum, and a polynomial schedule per step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import optax

from memseg_jax.training.freezing import Frozen, check_patterns, matches


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


def path_of(keys: tuple) -> str:
    """The path of a parameter with "/" between its keys, which are as `jax.tree_util` has them."""
    return "/".join(key.key for key in keys)


def multiplier(path: tuple, multipliers: dict[str, tuple[float, float]]) -> tuple[float, float]:
    """Learning-rate and weight-decay factors of one parameter.

    Args:
        path: its keys, as `jax.tree_util` has them.
        multipliers: factors by pattern (`freezing.matches`); of several that select the parameter,
            the longest counts.
    """
    name = path_of(path)
    fitting = [pattern for pattern in multipliers if matches(name, pattern)]
    if not fitting:
        return 1.0, 1.0
    lr_factor, decay_factor = multipliers[max(fitting, key=lambda pattern: (len(pattern), pattern))]
    return lr_factor, decay_factor


def check_names(config: ml_collections.ConfigDict, params: optax.Params) -> None:
    """Refuses a config that names modules or parameters which the model does not have.

    Args:
        config: the whole config.
        params: of the model; only their names matter.

    Raises:
        UserError: names the field and the pattern; or everything is frozen.
    """
    check_patterns("config.optimizer.multipliers", config.optimizer.multipliers, params)
    Frozen.of(config).check(params)


def sgd(
    config: ml_collections.ConfigDict, schedule: Callable[[jax.Array], jax.Array]
) -> optax.GradientTransformation:
    """PyTorch's SGD: g += decay * p; v = momentum * v + g; p -= lr * v.

    The decay applies to every parameter, scales and biases of normalisation included, and the
    learning rate stays outside the momentum. `config.optimizer.multipliers` maps modules to factors
    on their learning rate and on their weight decay. What `config.train.freeze` selects does not
    move, and has no momentum in the state.

    Args:
        config: the whole config.
        schedule: learning rate as a function of the step.

    Returns:
        The transformation; its state counts steps by itself.
    """
    o = config.optimizer
    multipliers = {name: tuple(pair) for name, pair in o.multipliers.items()}
    frozen = Frozen.of(config)

    def check(params: optax.Params) -> optax.EmptyState:
        check_names(config, params)
        return optax.EmptyState()

    def factors(path: tuple) -> tuple[float, float]:
        return (0.0, 0.0) if path_of(path) in frozen else multiplier(path, multipliers)

    def add_decay(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params
    ) -> tuple[optax.Updates, optax.EmptyState]:
        def decayed(path: tuple, g: jax.Array, p: jax.Array) -> jax.Array:
            return g + o.weight_decay * factors(path)[1] * p

        return jax.tree_util.tree_map_with_path(decayed, updates, params), state

    def scale(updates: optax.Updates, params: optax.Params) -> optax.Updates:
        del params
        return jax.tree_util.tree_map_with_path(lambda path, v: v * factors(path)[0], updates)

    momentum = optax.trace(decay=o.momentum)
    return optax.chain(
        optax.GradientTransformation(check, add_decay),
        optax.masked(momentum, frozen.trained) if frozen else momentum,
        optax.stateless(scale),
        optax.scale_by_learning_rate(schedule),
    )
