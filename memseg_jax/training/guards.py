"""Guards against losses and gradients that are not finite.

A step is judged on the device: if its loss, gradients, updates, new batch statistics or new memory
are not finite, its state is thrown away as a whole. One scalar of the metrics says so. The host
looks at that scalar when the step is over, a few steps later, and does what
`config.train.on_nonfinite` says:

    raise     ends the run. From the bad step on no step changes the state, so that the one before
              it can be written, beside the bad batch.
    skip      goes on; `config.train.max_nonfinite` bad steps in a row end the run.
    rollback  goes back to the state of the last checkpoint and continues with the data after the
              bad step: no data between the two is used again, as a loss that blows up is rarely
              the fault of its last batch alone. `max_nonfinite` times in a row end the run; a
              checkpoint that is saved in the course of the run restarts the count.
"""

import collections
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memseg_jax.errors import UserError
from memseg_jax.runtime import distributed, files
from memseg_jax.training.state import TrainState

log = logging.getLogger(__name__)

FLAG = "nonfinite"  # the metric: 1 for a bad step
# States of an optimiser whose `count` is a position in a schedule, which follows the data. All
# other counters count updates that were made, and stay with the numbers that were made by them.
_SCHEDULES = (optax.ScaleByScheduleState, optax.InjectStatefulHyperparamsState)
# Counts its own steps, and so do the schedules inside.
_OWN_TIME = (optax.MultiStepsState,)


# ---- On the device ------------------------------------------------------------------------------


def all_finite(tree: Any) -> jax.Array:
    """Whether all floating-point numbers of a tree are finite: a boolean scalar."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    bad = [~jnp.all(jnp.isfinite(x)) for x in leaves]
    # The index of the first True. XLA joins a plain `any` to each of the thousands of operations
    # that depend on it, with all its operands, and compiles for minutes; not an argmax.
    first = jnp.argmax(jnp.stack([*bad, jnp.array(True)]))
    return first == len(bad)


def keep_finite(
    before: TrainState, after: TrainState, checked: Any, halts: bool
) -> tuple[TrainState, jax.Array]:
    """Chooses between the states before and after a step.

    Args:
        before: the step's argument.
        after: its result.
        checked: tree of what has to be finite for the step to be good.
        halts: what happens after a bad step. False: only the clocks (`step` and the positions in
            schedules) move on. True: nothing does, and nothing will: `step` becomes negative, from
            which `before_halt` makes the state before the step again.

    Returns:
        The state, and 1 if the step was bad, otherwise 0 (int32).
    """
    finite = all_finite(checked)
    running = before.step >= 0
    good = finite & running if halts else finite

    chosen = jax.tree.map(lambda old, new: jnp.where(good, new, old), before, after)
    if halts:
        chosen = chosen.replace(step=jnp.where(running & ~finite, ~before.step, chosen.step))
    else:
        opt_state = _set_positions(chosen.opt_state, after.opt_state, lambda node: node.count)
        chosen = chosen.replace(step=after.step, opt_state=opt_state)
    return chosen, (~finite).astype(jnp.int32)


def before_halt(state: TrainState) -> TrainState:
    """The state before the bad step, from that of a run that has halted."""
    return state.replace(step=jax.jit(jnp.invert)(state.step))


def at_step(state: TrainState, step: int) -> TrainState:
    """Sets all clocks of a state: the data before `step` count as used."""

    def full(x: jax.Array) -> jax.Array:
        return jax.jit(lambda: jnp.full(x.shape, step, x.dtype), out_shardings=x.sharding)()

    opt_state = _set_positions(state.opt_state, state.opt_state, lambda node: full(node.count))
    return state.replace(step=full(state.step), opt_state=opt_state)


def _set_positions(opt_state: Any, source: Any, count: Callable[[Any], jax.Array]) -> Any:
    """Sets every position in a schedule to what `count` makes of the same node of `source`."""

    def moved(node: Any, other: Any) -> Any:
        return node._replace(count=count(other)) if isinstance(node, _SCHEDULES) else node

    return jax.tree.map(
        moved, opt_state, source, is_leaf=lambda x: isinstance(x, _SCHEDULES + _OWN_TIME)
    )


# ---- On the host --------------------------------------------------------------------------------


@dataclasses.dataclass
class BadStep:
    """A step whose result was not finite.

    Attributes:
        step: its number, counted from 1.
        metrics: of the step, on the host.
        batch: this process's part of its batch.
    """

    step: int
    metrics: dict[str, np.ndarray]
    batch: dict[str, np.ndarray]

    def files(self, describe: Callable[[int], str]) -> list[str]:
        """Names of the samples in the batch."""
        return [describe(int(index)) for index in self.batch["index"]]

    def explain(self, describe: Callable[[int], str]) -> str:
        """Says what was not finite, and which samples were in the batch."""
        bad = [
            name
            for name, value in self.metrics.items()
            if name != FLAG and not np.all(np.isfinite(value))
        ]
        what = ", ".join(bad) or "the updates, the new batch statistics or the new memory"
        files = "\n  ".join(self.files(describe))
        return f"step {self.step}: {what} not finite. Its batch:\n  {files}"


class GoBack(Exception):
    """The policy asks to go back to the state of the last checkpoint.

    Attributes:
        step: the bad step, after which the run goes on; the steps after it are forgotten.
    """

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


class Guard:
    """Checks the steps in order, as they finish, and applies the policy.

    Attributes:
        stop_seen: whether a finished step has returned a request to stop.

    Args:
        train: `config.train`.
        folder: of the run.
        describe: returns the files behind a sample of the training images, given its index.
        in_flight: number of steps that may be under way.
    """

    def __init__(
        self, train: Any, folder: files.Place, describe: Callable[[int], str], in_flight: int
    ):
        self._policy, self._limit = train.on_nonfinite, train.max_nonfinite
        self._folder = folder
        self._describe = describe
        self._in_flight = in_flight
        self._steps: collections.deque = collections.deque()
        self.stop_seen = False
        self._row = 0  # bad steps, or rollbacks, in a row
        self._last_bad = 0

    def add(self, step: int, batch: dict[str, np.ndarray], metrics: dict[str, jax.Array]) -> None:
        """Remembers a step that was started: its number from 1, its batch and its metrics."""
        self._steps.append((step, batch, metrics))

    def check(
        self, state: TrainState, snapshot: Callable[[TrainState, files.Place], None], wait: bool
    ) -> None:
        """Waits until no more steps than `in_flight` are under way, or none, and checks them.

        Args:
            state: after the steps so far.
            snapshot: writes a state into a folder.
            wait: for all steps.

        Raises:
            GoBack: there was a bad step, and the policy is to go back.
            UserError: the policy, or too many bad steps in a row, end the run. The message names
                the step and its files.
        """
        while len(self._steps) > (0 if wait else self._in_flight):
            step, batch, metrics = self._steps.popleft()
            is_bad, stop = jax.device_get((metrics[FLAG], metrics.get("stop", 0)))
            self.stop_seen |= bool(stop)
            if not is_bad:
                continue
            bad = BadStep(step, jax.device_get(metrics), batch)
            if self._policy == "raise":
                self._stop(bad, before_halt(state), snapshot)
            self._count(bad)
            if self._policy == "rollback":
                self._steps.clear()
                raise GoBack(step)

    def saved(self) -> None:
        """To be called when a checkpoint of the run was saved: a rollback goes back to it."""
        if self._policy == "rollback":
            self._row = 0

    def _count(self, bad: BadStep) -> None:
        in_a_row = self._policy == "rollback" or bad.step == self._last_bad + 1
        self._row = self._row + 1 if in_a_row else 1
        self._last_bad = bad.step
        text = bad.explain(self._describe)
        if self._row < self._limit:
            log.warning("%s", text)
            return
        kept = self._save_batch(bad)
        what = "rollbacks" if self._policy == "rollback" else "skipped steps"
        raise UserError(
            f"{text}\nThis would make {self._row} {what} in a row (config.train.max_nonfinite is "
            f"{self._limit}). {kept}\nThe last checkpoint is as it was. {_ADVICE}"
        )

    def _stop(
        self, bad: BadStep, state: TrainState, snapshot: Callable[[TrainState, files.Place], None]
    ) -> None:
        kept = self._save_batch(bad)
        try:
            snapshot(state, self._folder_of(bad))
            kept += f" The state before the step is a --workdir: {self._folder_of(bad)}."
        except UserError as error:
            kept += f" The state before the step could not be kept: {error}"
        raise UserError(f"{bad.explain(self._describe)}\n{kept}\n{_ADVICE}")

    def _folder_of(self, bad: BadStep) -> files.Place:
        return self._folder / f"nonfinite_step_{bad.step}"

    def _save_batch(self, bad: BadStep) -> str:
        """Writes this process's part of a batch; returns a sentence about it."""
        process = distributed.process_index()
        name = (
            "batch.npz" if distributed.process_count() == 1 else f"batch_of_process_{process}.npz"
        )
        path = self._folder_of(bad) / name
        try:
            files.make_folder(path.parent)
            with files.replacing(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **bad.batch, files=np.array(bad.files(self._describe)))
        except UserError as error:
            return f"The batch could not be kept in {path}: {error}."
        return f"The batch is in {path} (image, label, index, files)."


_ADVICE = (
    "A lower config.optimizer.lr is the usual cure, in another --workdir; or look at the batch. To "
    "go on from the last checkpoint: --config.train.on_nonfinite=skip leaves such steps out, "
    "rollback also goes back to the last checkpoint's state each time."
)
