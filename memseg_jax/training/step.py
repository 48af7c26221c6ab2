"""One training step as a pure function: state, batch -> state, metrics.

The order inside matters: the forward pass reads the memory of the previous step; then the memory is
updated from the features and the labels; then come the losses (the consistency loss sees the
updated memory), the gradients, and the optimiser.

`Losses` has the pieces. They are put together twice: `whole_batch` is the step as one would write
it down; `accumulate_gradients` gives the same losses and gradients from one part of the batch after
the other (`config.train.accumulate`), in the memory of one part.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from memseg_jax.models.memory_update import memory_momentum
from memseg_jax.models.segmentor import Segmentor
from memseg_jax.runtime.sharding import ALL, Shares
from memseg_jax.scoring.memory_health import PIXELS
from memseg_jax.training.freezing import Frozen
from memseg_jax.training.guards import FLAG, keep_finite
from memseg_jax.training.losses import consistency_loss, cross_entropy, group_weights
from memseg_jax.training.norm_groups import normalised_in_groups
from memseg_jax.training.optimizer import linear_scale
from memseg_jax.training.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# Gradients with respect to the parameters, metrics, new statistics, new memory.
Result = tuple[Any, Metrics, Any, jax.Array]


def make_train_step(
    model: Segmentor,
    config: ml_collections.ConfigDict,
    tx: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    steps_per_epoch: int,
    shares: Shares = ALL,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the step function, to be compiled with `jax.jit`.

    Args:
        model: the segmentor.
        config: the whole config.
        tx: the optimiser, from `optimizer.from_config`.
        schedule: learning rate by step; the memory's momentum follows it.
        steps_per_epoch: the memory and the consistency loss start with an epoch.
        shares: of the parameters, where devices hold parts of them.

    Returns:
        step(state, batch) -> (state, metrics), where batch has "image" float32
        [batch, height, width, 3], "label" integer [batch, height, width], and in a run "stop" int32
        [devices]; metrics are the scalars: the losses by name (weighted), "loss" their sum, "lr",
        "grad_norm", "nonfinite": 1 if the step was bad and its result thrown away (see `guards`),
        otherwise 0, and "stop": the largest of the flags (see `runtime.stopping`); and with a
        memory `PIXELS` [classes]: how many pixels of every class moved it.
    """
    losses = Losses(model, config, steps_per_epoch)
    parts = config.train.accumulate
    halts = config.train.on_nonfinite == "raise"

    def traced(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = dict(batch)
        requests = {"stop": jnp.max(batch.pop("stop"))} if "stop" in batch else {}
        lr = schedule(state.step)
        rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
        whole = state.replace(params=shares.gather(state.params))
        if parts == 1:
            result = whole_batch(losses, whole, batch, lr, rng)
        else:
            result = accumulate_gradients(losses, whole, batch, lr, rng, parts)
        grads, metrics, batch_stats, memory = result
        grads = shares.scatter(grads)
        batch_stats = losses.frozen.statistics(state.batch_stats, batch_stats)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            memory=memory,
            opt_state=opt_state,
        )
        grad_norm = optax.tree.norm(grads)
        checked = (metrics["loss"], grad_norm, updates, batch_stats, memory)
        new_state, bad = keep_finite(state, new_state, checked, halts)
        return new_state, metrics | {"lr": lr, "grad_norm": grad_norm, FLAG: bad} | requests

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # Around all of it: gradients are traced outside of the model.
        with jax.default_matmul_precision(model.precision):
            return traced(state, batch)

    return step


# ---- The pieces of a step -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Losses:
    """The pieces of a step: its losses and its memory update.

    Attributes:
        model: the segmentor.
        config: the whole config.
        steps_per_epoch: the memory and the consistency loss start with an epoch.
    """

    model: Segmentor
    config: ml_collections.ConfigDict
    steps_per_epoch: int

    @property
    def first_memory_step(self) -> int:
        """Number of steps before the first one that moves the memory."""
        return (self.config.model.memory.start_epoch - 1) * self.steps_per_epoch

    @property
    def first_consistency_step(self) -> int:
        """Number of steps before the first one in which the consistency loss counts."""
        of_loss = (self.config.loss.consistency_from_epoch - 1) * self.steps_per_epoch
        return max(of_loss, self.first_memory_step)

    @property
    def class_weights(self) -> jax.Array | None:
        """[classes], or None where all are equal."""
        weights = self.config.loss.class_weights
        return jnp.asarray(weights) if weights else None

    @property
    def frozen(self) -> Frozen:
        """The parameters that keep their values."""
        return Frozen.of(self.config)

    def apply(
        self,
        method: str,
        params: Any,
        batch_stats: Any,
        rng: jax.Array,
        *args: Any,
        of_images: bool = True,
    ) -> tuple[Any, Any]:
        """Runs one part of the model in training; returns its result and the new statistics.

        With `of_images`, `config.model.norm_group` says over how many of them a normalisation goes.
        """
        group = self.config.model.norm_group if of_images else 0
        with self.frozen.applied(), normalised_in_groups(group):
            out, mutated = self.model.apply(
                {"params": self.frozen.without_gradients(params), "batch_stats": batch_stats},
                *args,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": rng},
                method=method,
            )
        return out, mutated["batch_stats"]

    def memory_sums(self, memory: jax.Array, encoded: Any, labels: jax.Array) -> Any:
        """What the memory's update needs of some images, for every replica group."""
        groups = self.config.replica_groups
        return self.model.memory_sums(memory, encoded, labels, groups=groups)

    def move_memory(
        self, state: TrainState, sums: Any, lr: jax.Array
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """Moves the memory, once its first epoch has come.

        Args:
            state: before the step.
            sums: of all images.
            lr: learning rate.

        Returns:
            The new memory, every replica group's own, and `PIXELS`.
        """
        m = self.config.model.memory
        momentum = memory_momentum(lr, m.momentum, m.base_lr * linear_scale(self.config))
        moved, local = self.model.move_memory(state.memory, sums, momentum)
        per_group = sums.count.reshape(len(sums.count), self.model.num_classes, -1)
        pixels = jnp.sum(per_group, axis=(0, 2)).astype(jnp.float32)
        if self.first_memory_step:
            starts = state.step >= self.first_memory_step
            moved, local = (jnp.where(starts, x, state.memory) for x in (moved, local))
            pixels = jnp.where(starts, pixels, 0)
        return moved, local, {PIXELS: pixels}

    def of_images(
        self,
        logits: jax.Array,
        encoded: Any,
        labels: jax.Array,
        total_weights: jax.Array | None = None,
    ) -> Metrics:
        """The weighted cross entropies of some images, by name; see `losses.cross_entropy`."""

        def entropy(logits: jax.Array) -> jax.Array:
            return cross_entropy(
                logits,
                labels,
                groups=self.config.replica_groups,
                class_weights=self.class_weights,
                total_weights=total_weights,
            )

        weights = self.config.loss
        losses = {"loss_stage2": weights.stage2 * entropy(logits)}
        for name, further in self.model.further_logits(encoded).items():
            losses[f"loss_{name}"] = weights[name] * entropy(further)
        for index, logits in enumerate(encoded["auxiliary"]):
            name = "loss_aux" if len(encoded["auxiliary"]) == 1 else f"loss_aux{index + 1}"
            losses[name] = weights.auxiliary * entropy(logits)
        return losses

    def of_rows(
        self,
        params: Any,
        batch_stats: Any,
        local: jax.Array | None,
        rng: jax.Array,
        step: jax.Array,
    ) -> tuple[Metrics, Any]:
        """The weighted consistency loss, if there is one, and the statistics that it updates.

        Args:
            params: of the model.
            batch_stats: of the model.
            local: every group's updated memory [groups, classes, slots, channels].
            rng: for the dropout.
            step: number of completed steps.
        """
        weight = self.config.loss.consistency
        if not (self.model.classifies_rows and weight > 0):
            return {}, batch_stats

        def consistency(
            params: Any, batch_stats: Any, rows: jax.Array, rng: jax.Array
        ) -> tuple[jax.Array, Any]:
            flat = rows.reshape(-1, rows.shape[-1])
            logits, batch_stats = self.apply(
                "classify_rows", params, batch_stats, rng, flat, of_images=False
            )
            return consistency_loss(logits.reshape(*rows.shape[:-1], -1)), batch_stats

        # The second pass through the decoder moves its statistics only when it counts.
        loss, batch_stats = jax.lax.cond(
            step >= self.first_consistency_step,
            consistency,
            lambda params, batch_stats, rows, rng: (jnp.zeros((), rows.dtype), batch_stats),
            params,
            batch_stats,
            local,
            rng,
        )
        return {"loss_memory": weight * loss}, batch_stats


# ---- The whole batch at once --------------------------------------------------------------------


def whole_batch(
    losses: Losses, state: TrainState, batch: Batch, lr: jax.Array, rng: jax.Array
) -> Result:
    """Gradients of a batch; arguments as for `accumulate_gradients`."""
    rngs = jax.random.split(rng, 3)

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[Metrics, Any, jax.Array]]:
        memory, local, pixels = state.memory, None, {}
        encoded, batch_stats = losses.apply(
            "encode", params, state.batch_stats, rngs[0], batch["image"]
        )
        # The update needs nothing that comes later, and the gradient of the memory read is to
        # see the updated rows (`read_memory`); the value that is read is the old one.
        if losses.model.memory_enabled:
            sums = losses.memory_sums(memory, encoded, batch["label"])
            memory, local, pixels = losses.move_memory(state, sums, lr)
        logits, batch_stats = losses.apply(
            "decode", params, batch_stats, rngs[1], encoded, state.memory, local
        )
        metrics = losses.of_images(logits, encoded, batch["label"])
        of_rows, batch_stats = losses.of_rows(params, batch_stats, local, rngs[2], state.step)
        metrics |= of_rows
        metrics["loss"] = sum(metrics.values())
        return metrics["loss"], (metrics | pixels, batch_stats, memory)

    grads, rest = jax.grad(loss_fn, has_aux=True)(state.params)
    return grads, *rest


# ---- Part by part -------------------------------------------------------------------------------


def accumulate_gradients(
    losses: Losses, state: TrainState, batch: Batch, lr: jax.Array, rng: jax.Array, parts: int
) -> Result:
    """Gradients of a batch, one part after the other; see `docs/method.md`.

    Every part has images of all replica groups. The denominators of the means come from all labels,
    so that the parts' losses and gradients add up to those of the batch, however the labelled
    pixels are distributed. Where the gradient of the memory read sees the updated rows
    (`read_memory`), a first pass through the parts makes the sums of the memory's update.

    Args:
        losses: the pieces.
        state: the state before the step.
        batch: as in `make_train_step`.
        lr: learning rate.
        rng: key of the step.
        parts: their number; divides the images of every replica group and of every device.

    Returns:
        See `Result`.
    """
    keys = jax.random.split(rng, parts + 1)
    # Part i takes images i, i + parts, ...: with the batch split over devices, nothing moves.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]), batch)

    def part(index: jax.Array) -> tuple[Batch, jax.Array]:
        """Images and labels of one part, and its two keys: the same in both passes."""
        images = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False), split
        )
        return images, jax.random.split(keys[index])

    def encode(params: Any, images: jax.Array, rng: jax.Array) -> tuple[Any, Any]:
        return losses.apply("encode", params, state.batch_stats, rng, images)

    def memory_sums(encoded: Any, images: Batch) -> Any:
        return losses.memory_sums(state.memory, encoded, images["label"])

    def sums_of_part(index: jax.Array) -> Any:
        images, rngs = part(index)
        return memory_sums(encode(state.params, images["image"], rngs[0])[0], images)

    memory, local, pixels = state.memory, None, {}
    update_comes_first = losses.model.memory_enabled and losses.model.gradient_sees_update
    update_comes_last = losses.model.memory_enabled and not update_comes_first
    if update_comes_first:
        sums = _sum_over_parts(sums_of_part, parts)
        memory, local, pixels = losses.move_memory(state, sums, lr)

    total_weights = group_weights(
        batch["label"],
        losses.model.num_classes,
        groups=losses.config.replica_groups,
        class_weights=losses.class_weights,
    )

    def gradients_of_part(index: jax.Array) -> tuple[Any, Metrics, Any, Any]:
        images, rngs = part(index)

        def loss_fn(params: Any) -> tuple[jax.Array, tuple[Metrics, Any, Any]]:
            encoded, batch_stats = encode(params, images["image"], rngs[0])
            logits, batch_stats = losses.apply(
                "decode", params, batch_stats, rngs[1], encoded, state.memory, local
            )
            metrics = losses.of_images(logits, encoded, images["label"], total_weights)
            sums = memory_sums(encoded, images) if update_comes_last else None
            return sum(metrics.values()), (metrics, batch_stats, sums)

        grads, (metrics, batch_stats, sums) = jax.grad(loss_fn, has_aux=True)(state.params)
        return grads, metrics, jax.tree.map(lambda x: x / parts, batch_stats), sums

    def consistency(params: Any) -> tuple[jax.Array, tuple[Metrics, Any]]:
        metrics, moved = losses.of_rows(params, batch_stats, local, keys[-1], state.step)
        return sum(metrics.values(), jnp.zeros(())), (metrics, moved)

    grads, metrics, batch_stats, sums = _sum_over_parts(gradients_of_part, parts)
    if update_comes_last:
        memory, local, pixels = losses.move_memory(state, sums, lr)
    more, (of_rows, batch_stats) = jax.grad(consistency, has_aux=True)(state.params)
    grads = jax.tree.map(jnp.add, grads, more)
    metrics |= of_rows
    return grads, metrics | {"loss": sum(metrics.values())} | pixels, batch_stats, memory


def _sum_over_parts(function: Callable[[jax.Array], Any], parts: int) -> Any:
    """Sums the trees that `function` returns for every part, in at least float32."""

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)

    def add(total: Any, index: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, wide(function(index))), None

    shapes = jax.eval_shape(lambda index: wide(function(index)), jnp.zeros((), jnp.int32))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, jnp.arange(parts))[0]
