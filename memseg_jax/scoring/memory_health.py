"""How the feature memory is doing: the norms of its rows, when and by how much they changed."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memseg_jax.runtime.text import first_few

# The metric of a training step that says how many pixels of every class moved the memory.
PIXELS = "memory_pixels"


class MemoryHealth:
    """Inspects the memory at intervals, and keeps per class when its rows last changed.

    It also adds up, per class, the pixels that moved the memory and the steps that had any.

    The interval is the resolution: a row that changed since the last inspection counts as changed
    now.

    Args:
        class_names: one per class.
        step: number of completed steps.
        memory: at this step, [classes, ...].
        ages: what `ages` returned at this step, if it was kept; None: counting starts now.
        initial: what the memory of a class is before it is seen, of the memory's shape, or a number
            that it is full of.
        rows_of: makes a memory the rows that are read, [classes, rows of a class, channels]; None:
            it is these rows.
        updates: what `updates` returned at this step, if it was kept; None: counting starts now.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        step: int,
        memory: jax.Array,
        ages: Sequence[int] | None = None,
        initial: np.ndarray | float = 0.0,
        rows_of: Callable[[jax.Array], jax.Array] | None = None,
        updates: Mapping[str, Any] | None = None,
    ):
        self._names = tuple(class_names)
        self._changed = step - np.array(ages if ages else [0] * len(self._names), np.int64)
        self._step = step
        inspect = functools.partial(_inspect, initial=initial, rows_of=rows_of)
        self._program = jax.jit(inspect, out_shardings=_everywhere(memory))
        self._sums = jax.device_get(self._program(memory))[1]
        self._whole = jax.jit(lambda x: x, out_shardings=_everywhere(memory))
        self.go_back(step, updates)

    @property
    def ages(self) -> list[int]:
        """Steps since the rows of every class last changed, as of the last inspection."""
        return (self._step - self._changed).tolist()

    @property
    def updates(self) -> dict[str, Any]:
        """Per class the pixels that moved the memory and the steps that had any, in plain numbers.

        "since" is the number of the step after which counting started.
        """
        counts = {"pixels": self._pixels.tolist(), "steps": self._steps.tolist()}
        return {"since": self._since} | counts

    def go_back(self, step: int, updates: Mapping[str, Any] | None) -> None:
        """Takes up the counting where a checkpoint has it.

        Args:
            step: number of completed steps.
            updates: what `updates` returned then; None: counting starts now.
        """
        none = [0] * len(self._names)
        updates = updates or {"since": step, "pixels": none, "steps": none}
        self._since = int(updates["since"])
        self._pixels = np.array(updates["pixels"], np.int64)
        self._steps = np.array(updates["steps"], np.int64)

    def count(self, steps: Iterable[np.ndarray]) -> None:
        """Adds the pixels [classes] of some steps, from the metric `PIXELS`."""
        for pixels in steps:
            self._pixels += np.rint(pixels).astype(np.int64)
            self._steps += pixels > 0

    def record(self, step: int, memory: jax.Array) -> dict[str, np.ndarray]:
        """What `memory_history` keeps of a step; all processes have to call it.

        Args:
            step: number of completed steps, inspected before.
            memory: at this step.

        Returns:
            Arrays on the host: memory, and per class ages, pixels and steps (int64 [classes]); and
            since, of `updates`.
        """
        return {
            "memory": np.asarray(jax.device_get(self._whole(memory)), np.float32),
            "ages": step - self._changed,
            "pixels": self._pixels.copy(),
            "steps": self._steps.copy(),
            "since": np.int64(self._since),
        }

    def look(self, step: int, memory: jax.Array) -> tuple[dict[str, float], str]:
        """Inspects the memory.

        Args:
            step: number of completed steps.
            memory: at this step, [classes, ...].

        Returns:
            Numbers for the metrics, and a line of text. Norms are of the rows of classes that were
            seen, ages are in steps, of the same classes.
        """
        norms, sums, seen = jax.device_get(self._program(memory))
        self._changed[np.any(sums != self._sums, axis=-1)] = step
        self._sums, self._step = sums, step
        of_seen = norms[seen] if seen.any() else np.zeros((1, 1))
        ages = np.where(seen, step - self._changed, -1)
        oldest = int(np.argmax(ages))
        values = {
            "memory_norm_min": float(of_seen.min()),
            "memory_norm_mean": float(of_seen.mean()),
            "memory_norm_max": float(of_seen.max()),
            "memory_never_seen": float(np.mean(~seen)),
            "memory_age_mean": float(ages[seen].mean()) if seen.any() else 0.0,
            "memory_age_max": float(max(ages[oldest], 0)),
        }
        never = [name for name, was_seen in zip(self._names, seen) if not was_seen]
        line = (
            f"memory: norms of the rows {values['memory_norm_min']:.3g} to "
            f"{values['memory_norm_max']:.3g}, mean {values['memory_norm_mean']:.3g}; "
            + (
                f"longest without a change: {self._names[oldest]}, {ages[oldest]} steps; "
                if seen.any()
                else ""
            )
            + f"{len(never)} of {len(seen)} classes never seen"
            + (f": {', '.join(first_few(never))}" if never else "")
        )
        return values, line


def _inspect(
    memory: jax.Array,
    initial: np.ndarray | float,
    rows_of: Callable[[jax.Array], jax.Array] | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What is looked at on the devices.

    Returns:
        The norm of every row [classes, rows of a class]; a number that changes with the bits of
        every vector of the memory [classes, ...]; and whether a class was seen, bool [classes].
    """
    rows = memory if rows_of is None else rows_of(memory)
    norms = jnp.sqrt(jnp.sum(jnp.square(rows.astype(jnp.float32)), axis=-1))
    seen = jnp.any(memory != initial, axis=tuple(range(1, memory.ndim)))
    memory = memory.astype(jnp.float32).reshape(len(memory), -1, memory.shape[-1])
    bits = jax.lax.bitcast_convert_type(memory, jnp.uint32)
    odd = 2 * jnp.arange(memory.shape[-1], dtype=jnp.uint32) + 1
    sums = jnp.sum(bits * odd * jnp.uint32(0x9E3779B1), axis=-1, dtype=jnp.uint32)
    return norms, sums, seen


def _everywhere(memory: Any) -> Any:
    """Every device, so that every process can read the results."""
    mesh = getattr(memory.sharding, "mesh", None)
    return None if mesh is None else jax.NamedSharding(mesh, jax.P())
