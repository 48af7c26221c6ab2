"""One training step as a pure function: state, batch -> state, metrics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from memseg_jax.losses import consistency_loss, cross_entropy
from memseg_jax.models.memory import memory_momentum, update_memory_groups
from memseg_jax.models.segmentor import Segmentor
from memseg_jax.state import TrainState

Metrics = dict[str, jax.Array]


def make_train_step(
    model: Segmentor,
    config: ml_collections.ConfigDict,
    tx: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    steps_per_epoch: int,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
    """Returns the step function, to be compiled with `jax.jit`.

    The order inside matters: the forward pass reads the memory of the step before; then the
    memory is updated from the features and the labels; then come the losses (the consistency loss
    sees the updated memory), the gradients, and SGD.

    Args:
        model: the segmentor.
        config: the whole config.
        tx: the optimiser, from `optimizer.sgd`.
        schedule: learning rate by step; the memory's momentum follows it.
        steps_per_epoch: the consistency loss starts with an epoch.

    Returns:
        step(state, batch) -> (state, metrics), where batch has "image" float32
        [batch, height, width, 3] and "label" integer [batch, height, width]; metrics are scalars:
        the losses by name (weighted), "loss" their sum, "lr", and "grad_norm".
    """
    groups = config.replica_groups
    weights = config.loss
    first_consistency_step = (weights.consistency_from_epoch - 1) * steps_per_epoch
    class_weights = jnp.asarray(weights.class_weights) if weights.class_weights else None
    memory_config = config.model.memory
    use_consistency = model.memory_enabled and weights.consistency > 0

    def entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return cross_entropy(logits, labels, groups=groups, class_weights=class_weights)

    def apply(
        method: Callable, params: Any, batch_stats: Any, rng: jax.Array, *args: Any
    ) -> tuple[Any, Any]:
        """Runs one part of the model in training; returns its result and the new statistics."""
        out, mutated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            *args,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": rng},
            method=method,
        )
        return out, mutated["batch_stats"]

    def consistency(
        params: Any, batch_stats: Any, rows: jax.Array, rng: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Loss of the decoder on the memory rows, and the statistics that this moves."""
        flat = rows.reshape(-1, rows.shape[-1])
        logits, batch_stats = apply(Segmentor.classify_rows, params, batch_stats, rng, flat)
        return consistency_loss(logits.reshape(*rows.shape[:-1], -1)), batch_stats

    def loss_fn(
        params: Any, state: TrainState, batch: dict[str, jax.Array], lr: jax.Array, rng: jax.Array
    ) -> tuple[jax.Array, tuple[Metrics, Any, jax.Array]]:
        memory, labels = state.memory, batch["label"]
        rngs = jax.random.split(rng, 3)

        encoded, batch_stats = apply(
            Segmentor.encode, params, state.batch_stats, rngs[0], batch["image"]
        )
        # The update needs nothing that comes later, and the gradient of the memory read is to
        # see the updated rows (`read_memory`); the value that is read is the old one.
        local = None
        if model.memory_enabled:
            memory, local = update_memory_groups(
                memory,
                jax.lax.stop_gradient(encoded["memory_input"]),
                labels,
                memory_momentum(lr, memory_config.momentum, memory_config.base_lr),
                groups=groups,
                strategy=memory_config.strategy,
            )
        logits, batch_stats = apply(
            Segmentor.decode, params, batch_stats, rngs[1], encoded, state.memory, local
        )

        losses = {"loss_stage2": weights.stage2 * entropy(logits, labels)}
        if model.memory_enabled:
            losses["loss_stage1"] = weights.stage1 * entropy(encoded["stage1"], labels)
        for index, logits in enumerate(encoded["auxiliary"]):
            name = "loss_aux" if len(encoded["auxiliary"]) == 1 else f"loss_aux{index + 1}"
            losses[name] = weights.auxiliary * entropy(logits, labels)
        if use_consistency:
            # The second pass through the decoder moves its statistics only when it counts.
            loss, batch_stats = jax.lax.cond(
                state.step >= first_consistency_step,
                consistency,
                lambda params, batch_stats, rows, rng: (jnp.zeros((), rows.dtype), batch_stats),
                params,
                batch_stats,
                local,
                rngs[2],
            )
            losses["loss_memory"] = weights.consistency * loss
        losses["loss"] = sum(losses.values())
        return losses["loss"], (losses, batch_stats, memory)

    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        lr = schedule(state.step)
        rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
        grads, (metrics, batch_stats, memory) = jax.grad(loss_fn, has_aux=True)(
            state.params, state, batch, lr, rng
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            memory=memory,
            opt_state=opt_state,
        )
        return new_state, metrics | {"lr": lr, "grad_norm": optax.tree.norm(grads)}

    return step
