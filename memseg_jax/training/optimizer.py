"""The optimisers, and their learning rate: polynomial, scaled with the batch, after a warm-up."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import optax

from memseg_jax.errors import UserError
from memseg_jax.training.freezing import Frozen, check_patterns, matches

Schedule = Callable[[jax.Array], jax.Array]

# ---- Learning rate ------------------------------------------------------------------------------


def poly_schedule(lr: float, min_lr: float, power: float, total_steps: int) -> Schedule:
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


def with_warmup(schedule: Schedule, steps: int, start: float) -> Schedule:
    """Returns a schedule that rises linearly to another one, which goes on below it.

    lr(step) = (start + (1 - start) * step / steps) * schedule(step) up to `steps`.

    Args:
        schedule: the other one.
        steps: of the warm-up, at least 1.
        start: share of the other's value at step 0.
    """

    def warmed(step: jax.Array) -> jax.Array:
        done = jnp.asarray(step, jnp.result_type(float)) / steps
        share = jnp.where(done < 1, start + (1 - start) * done, 1)  # 1 itself, not rounded to it
        return share * schedule(step)

    return warmed


def linear_scale(config: ml_collections.ConfigDict) -> float:
    """Returns the factor on all learning rates: the batch's size over `optimizer.base_batch`.

    The linear rule of Goyal et al., "Accurate, Large Minibatch SGD", 2017. The memory's `base_lr`
    has the same factor: its momentum is a share of the learning rate that was given.
    """
    base = config.optimizer.base_batch
    return config.train.batch_size / base if base else 1.0


def check_warmup(config: ml_collections.ConfigDict, total_steps: int) -> None:
    """Refuses a warm-up that the run of `total_steps` steps would not outlast.

    Raises:
        UserError: names the field, and the length of the run.
    """
    steps = config.optimizer.warmup_steps
    if steps and steps >= total_steps:
        raise UserError(
            f"config.optimizer.warmup_steps is {steps}; expected fewer than the run has steps, "
            f"{total_steps} (config.train.epochs = {config.train.epochs}): its learning rate would "
            "never be reached. Usual is a twentieth of the run or less"
        )


def schedule_from_config(config: ml_collections.ConfigDict, total_steps: int) -> Schedule:
    """Returns the learning-rate schedule of a run.

    Args:
        config: the whole config.
        total_steps: length of the run in steps.

    Raises:
        UserError: the warm-up is as long as the run.
    """
    o, scale = config.optimizer, linear_scale(config)
    check_warmup(config, total_steps)
    schedule = poly_schedule(o.lr * scale, o.min_lr * scale, o.power, total_steps)
    if o.warmup_steps:
        schedule = with_warmup(schedule, o.warmup_steps, o.warmup_start)
    return schedule


# ---- Factors by name ----------------------------------------------------------------------------


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


# ---- Optimisers ---------------------------------------------------------------------------------

# What no recipe varies: Adam's second decay and its epsilon, PyTorch's defaults; and eta of LARS,
# with the value of its paper (a factor on the learning rate of all that LARS adapts).
_B2, _EPSILON = 0.999, 1e-8
_TRUST = 1e-3


def from_config(
    config: ml_collections.ConfigDict, schedule: Schedule
) -> optax.GradientTransformation:
    """Returns the optimiser that `config.optimizer.name` chooses.

    With gradient g, parameter p, weight decay d, momentum m and learning rate lr of the step:

        sgd     v = m v + (g + d p);  p -= lr v
        adamw   p -= lr (Adam(g) + d p), Adam's first decay m
        lars    v = m v + lr t (g + d p);  p -= v,  t = 0.001 |p| / |g + d p| for every parameter

    `sgd` and `adamw` are PyTorch's, whose decay applies to every parameter, scales and biases of
    normalisations included. `lars` has neither decay nor t for these, nor for other parameters with
    one axis: their learning rate is lr. Its t is optax's: the paper's denominator is |g| + d |p|,
    which is the same without decay, and larger with it.

    `config.optimizer.multipliers` maps modules to factors on their lr and on their d. What
    `config.train.freeze` selects does not move, and has no momentum in the state.

    Args:
        config: the whole config.
        schedule: learning rate as a function of the step.

    Returns:
        The transformation; its state counts steps by itself.

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019 (AdamW); You et al.,
        "Large Batch Training of Convolutional Networks", 2017 (LARS).
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
            if o.name == "lars" and not _is_adapted(p):
                return g
            return g + o.weight_decay * factors(path)[1] * p

        return jax.tree_util.tree_map_with_path(decayed, updates, params), state

    def scale(updates: optax.Updates, params: optax.Params) -> optax.Updates:
        del params
        return jax.tree_util.tree_map_with_path(lambda path, v: v * factors(path)[0], updates)

    def of_trained(part: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.masked(part, frozen.trained) if frozen else part

    decay = optax.GradientTransformation(check, add_decay)
    rate = (optax.stateless(scale), optax.scale_by_learning_rate(schedule))
    if o.name == "adamw":
        adam = optax.scale_by_adam(o.momentum, _B2, _EPSILON)
        return optax.chain(of_trained(adam), decay, *rate)
    momentum = of_trained(optax.trace(o.momentum))
    if o.name == "lars":
        trust = optax.scale_by_trust_ratio(trust_coefficient=_TRUST)
        adapted = optax.masked(trust, lambda tree: jax.tree.map(_is_adapted, tree))
        return optax.chain(decay, adapted, *rate, momentum)
    return optax.chain(decay, momentum, *rate)


def _is_adapted(x: jax.Array) -> bool:
    """Whether LARS scales a parameter: kernels and tables, not biases and normalisations."""
    return x.ndim > 1
