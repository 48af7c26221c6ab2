"""Writing checkpoints, and going on from them."""

import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from memseg_jax.checkpoint.arrays import any_process, restore_arrays, without_empty
from memseg_jax.checkpoint.checksums import checksums
from memseg_jax.checkpoint.meta import holds_only_weights, read_meta, read_meta_file, sealed
from memseg_jax.checkpoint.scores import (
    kept_steps,
    readable_scores,
    without_gain,
    write_scores,
)
from memseg_jax.checkpoint.steps import (
    DAMAGED_FOLDER,
    FOLDER,
    DamagedCheckpoint,
    all_steps,
    brief,
    prepare_workdir,
)
from memseg_jax.errors import Unreachable, UserError
from memseg_jax.runtime import distributed, files
from memseg_jax.runtime.plain import flatten

log = logging.getLogger(__name__)

_saves = itertools.count()  # the same in all processes, which make the same saves
_CONCURRENT_GB = 1  # of arrays that are on their way to the disk at a time
# Devices that hold the same array write a part of it each. Cutting is a program of its own for
# every shape and device, which training waits for: only where it is little beside the writing.
_SMALLEST_PART = 2**20  # bytes
# The library below reports disk errors as plain ValueErrors, known only by the system's words.
_DISK_ERRORS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "Permission denied",
    "Read-only file system",
    "Input/output error",
)


def write_weights(
    workdir: str | os.PathLike, variables: Mapping[str, Any], meta: Mapping[str, Any]
) -> None:
    """Writes a checkpoint of step 0 that holds weights only: no state of an optimiser.

    Args:
        workdir: the folder; it should hold no run.
        variables: dict of params, batch_stats and memory.
        meta: from `make_meta`, with an entry "origin" that tells where the weights are from.

    Raises:
        UserError: the folder cannot be written.
    """
    # Plain arrays are written as they are, piece by piece: the copy that a save in the background
    # needs would double the memory.
    in_place = type_handlers.create_type_handler_registry(
        (np.ndarray, type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, type_handlers.ArrayHandler()),
    )
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=in_place, save_concurrent_gb=_CONCURRENT_GB
    )
    with Checkpointer(workdir, keep=1, write_now=handler) as checkpointer:
        checkpointer.save(dict(variables), meta)


def _background_handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax's usual handler of arrays, which writes in the background."""
    parts = type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SMALLEST_PART)
    registry = type_handlers.create_type_handler_registry(
        (np.ndarray, type_handlers.NumpyHandler()), (jax.Array, parts)
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


class Checkpointer:
    """Saves a run's state in the background and restores it; use it as a context manager.

    Opening it removes what a killed save left behind, so there must be one per workdir. In runs of
    several processes all of them make every call. The first process alone looks at the folder and
    says what is there: a shared file system may show each process something else.

    A save that fails in the background is reported by the next one, which takes its place and is
    waited for; if that fails too, it raises. A complete checkpoint is never written to again.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int, write_now: Any = None):
        """Opens the folder of checkpoints of a workdir, creating it if needed.

        Args:
            workdir: the folder of the run.
            keep: how many of the last checkpoints to keep, at least 1 (see `kept_steps`).
            write_now: orbax's handler of the arrays, to write them at once; None: its usual one,
                in the background.

        Raises:
            UserError: if the workdir cannot be written.
        """
        self._workdir = prepare_workdir(workdir)
        self._folder = self._workdir / FOLDER
        if not files.in_bucket(self._folder):
            prepare_workdir(self._folder)
        self._keep = keep
        self._saving: int | None = None  # the step of the last save until it is known to be over
        self._name = ""  # of that save, for the other processes
        self._failed = False  # since the last save that was completed
        self._untidy = True  # whether there may be checkpoints that need not be kept
        self._almost_saved = threading.Event()  # the save in the background nears its end
        self._remove_leftovers()
        handlers = ocp.CompositeCheckpointHandler(
            state=write_now or _background_handler(), meta=ocp.JsonCheckpointHandler()
        )
        self._checkpointer = (
            ocp.Checkpointer(handlers)
            if write_now
            else ocp.AsyncCheckpointer(
                handlers,
                async_options=ocp.options.AsyncOptions(
                    barrier_sync_fn=self._meet if distributed.process_count() > 1 else None,
                    post_finalization_callback=self._flush,
                    # Otherwise, where a folder cannot be made, a thread waits for it for five
                    # minutes, and the program cannot end before.
                    create_directories_asynchronously=False,
                ),
            )
        )

    def latest_step(self) -> int | None:
        """Returns the last complete step on disk (one still being written does not count)."""
        steps = self._steps()
        return steps[-1] if steps else None

    def save(self, state: Any, meta: Mapping[str, Any]) -> None:
        """Starts to save a state; returns as soon as it may be changed or donated.

        If `meta["step"]` is on disk already, nothing is done: the state is a function of the step.

        Args:
            state: a pytree with array leaves; `TrainState`.
            meta: from `make_meta`; `meta["step"]` names the checkpoint.

        Raises:
            UserError: if this save cannot start, or if it takes the place of one that failed and
                fails as well.
        """
        step = meta["step"]
        retry = self._report_failure(step)
        if step in self._steps():
            return
        tree = without_empty(flax.serialization.to_state_dict(state))
        with jax.transfer_guard("allow"), self._disk_errors(step):
            meta = sealed(dict(meta) | {"checksums": checksums(flatten(tree))})
            self._saving, self._untidy = step, True
            self._name = f"save/{next(_saves)}"
            self._almost_saved.clear()
            args = ocp.args.Composite(state=ocp.args.PyTreeSave(tree), meta=ocp.args.JsonSave(meta))
            for last in (False, False, True):
                try:
                    # With force, only the first process looks whether the folder is there.
                    self._checkpointer.save(self._folder / str(step), args=args, force=True)
                    break
                except FileExistsError:
                    # A write of a save that has failed was still under way when what it left was
                    # removed, and has made the unfinished folder again.
                    if last:
                        raise
                    self._remove_leftovers()
        if retry:
            self.wait_until_finished()

    def record_scores(self, step: int, scores: Mapping[str, Any]) -> None:
        """Records the scores of a step, among them "mIoU" in [0, 1], which decides the best.

        Raises:
            UserError: the file cannot be written.
        """
        if distributed.is_primary():
            write_scores(self._workdir, readable_scores(self._workdir) | {step: scores})
        self._untidy = True
        self.tidy()

    def has_scores(self, step: int) -> bool:
        """Whether the evaluation of a step came to its end."""
        return distributed.on_primary("has_scores", lambda: step in readable_scores(self._workdir))

    def evaluations_without_gain(self) -> int:
        """How many evaluations of this run have followed that of its highest mIoU."""
        return distributed.on_primary(
            "without_gain", lambda: without_gain(readable_scores(self._workdir))
        )

    def tidy(self) -> None:
        """Removes the checkpoints that need not be kept; cheap, and may be called at any time.

        The one being saved counts only when it is complete. The folder is looked at only if
        something has changed since the last time.
        """
        if not distributed.is_primary() or not self._untidy:
            return
        if self._saving is not None and not self._almost_saved.is_set():
            return
        try:
            steps = all_steps(self._workdir)
            surplus = set(steps) - kept_steps(steps, readable_scores(self._workdir), self._keep)
            if surplus:
                files.remove_folders(self._folder, [str(step) for step in sorted(surplus)])
            self._untidy = self._saving is not None and self._saving not in steps
        except Unreachable as error:  # what is too much can stay until the next time
            log.warning("checkpoints that need not be kept stay for now: %s", error)

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Restores a whole state.

        Args:
            abstract_state: the state's tree with `jax.ShapeDtypeStruct` leaves; arrays get their
                shardings (without one: the first device).
            step: which step; the last one if None.

        Returns:
            The state and the checkpoint's meta.

        Raises:
            UserError: if there is no such checkpoint, it is damaged, or it is of another model.
        """
        self.wait_until_finished()
        step, meta = read_meta(self._workdir, "last" if step is None else step)
        return restore_arrays(self._workdir, step, abstract_state, meta, partial=False), meta

    def resume(
        self, abstract_state: Any, check: Callable[[Mapping[str, Any]], None] = lambda meta: None
    ) -> tuple[Any, dict[str, Any]] | None:
        """Restores the last good checkpoint of a run.

        Those after it, which are damaged, are reported as warnings and moved into the workdir's
        folder `DAMAGED_FOLDER`.

        Args:
            abstract_state: as in `restore`.
            check: called with the meta before the arrays are read; refuses another run.

        Returns:
            The state and the meta; None if there is no checkpoint, or only weights to start from
            (`holds_only_weights`).

        Raises:
            UserError: all checkpoints are damaged (then none is moved), or the last good one is
                refused or is of another model.
        """
        self.wait_until_finished()
        bad: dict[int, str] = {}
        for step in reversed(self._steps()):
            try:
                meta = self._meta_of(step)
                if holds_only_weights(meta):
                    break
                check(meta)
                state = restore_arrays(self._workdir, step, abstract_state, meta, partial=False)
            except DamagedCheckpoint as error:
                bad[step] = error.what
                log.warning("%s", error)
                continue
            if bad:
                self._move_aside(list(bad), step)
            self._forget_scores_after(step)
            return state, meta
        if bad:
            raise UserError(
                f"no good checkpoint of this run is left in {self._folder}; nothing was "
                "changed or removed:\n  "
                + "\n  ".join(f"step {step}: {what}" for step, what in bad.items())
                + "\nBring one of them back from a copy, or start again in another --workdir."
            )
        return None

    def wait_until_finished(self) -> None:
        """Waits for the save in the background and raises its error, if it had one."""
        if self._saving is None:
            return
        try:
            with self._disk_errors(self._saving):
                self._wait()
        finally:
            self._saving = None
        if self._failed:  # writes that were under way then may have come after the removal
            self._failed = False
            self._remove_leftovers()
        self.tidy()

    def close(self) -> None:
        """Waits for the save in the background and closes the folder."""
        try:
            self.wait_until_finished()
        finally:
            self._checkpointer.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _steps(self) -> list[int]:
        """The complete steps as the first process sees them."""
        return distributed.on_primary("steps", lambda: all_steps(self._workdir))

    def _meta_of(self, step: int) -> dict[str, Any]:
        """The description of a step as the first process reads it."""

        def look() -> dict[str, Any]:
            try:
                return {"meta": read_meta_file(self._workdir, step)}
            except DamagedCheckpoint as error:
                return {"message": str(error), "what": error.what}

        found = distributed.on_primary("meta", look)
        if "meta" not in found:
            raise DamagedCheckpoint(found["message"], found["what"])
        return found["meta"]

    def _wait(self) -> None:
        if isinstance(self._checkpointer, ocp.AsyncCheckpointer):
            try:
                self._checkpointer.wait_until_finished()
            except Exception:
                distributed.call_off(self._name)
                raise

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Waits in the background for the other processes, which may have failed in their part."""
        # Orbax gives the same key to two saves of one step.
        distributed.meet(f"{self._name}/{key}", timeout_ms / 1000, self._name)

    def _report_failure(self, step: int) -> bool:
        """Waits for the save before; returns whether it failed, in any process."""
        before, error = self._saving, None
        if before is None:
            return False
        try:
            self._wait()
        except Exception as caught:
            error = caught
        self._saving = None
        failed = any_process(error is not None)
        if failed:
            self._after_failure()
            log.warning(
                "saving the checkpoint of step %s in %s failed: %s. The last good one is "
                "%s. Trying again now, at step %d.",
                before,
                self._folder,
                "in another process" if error is None else self._reason(error) or brief(error),
                distributed.on_primary("last_good", self._last_good),
                step,
            )
        self.tidy()
        return failed

    @contextlib.contextmanager
    def _disk_errors(self, step: int) -> Iterator[None]:
        """Turns a full or broken disk, or a bucket's trouble, into a `UserError`; nothing else."""
        try:
            yield
        except Exception as error:
            reason = self._reason(error)
            if reason is None and not isinstance(error, OSError):
                raise
            self._after_failure()
            cure = "Free space or repair the folder"
            if files.in_bucket(self._folder):
                cure = "See to the bucket"
            # What this process sees: the others need not come here.
            raise UserError(
                f"{self._folder}: saving the checkpoint of step {step} failed: "
                f"{reason or brief(error)}. {cure}, then start the same command again: it goes on "
                f"from the last complete checkpoint, which is {self._last_good()}."
            ) from error

    def _reason(self, error: BaseException) -> str | None:
        """What a full or broken disk, or a bucket, says, if that is what an error is about."""
        if words := files.trouble(self._folder, error):
            return words
        if files.in_bucket(self._folder) and "NOT_FOUND" in str(error):  # TensorStore's word
            return "there is no such bucket, or not any more"
        return next((words for words in _DISK_ERRORS if words in str(error)), None)

    def _last_good(self) -> str:
        """Words for the last complete step."""
        try:
            steps = all_steps(self._workdir)
        except Unreachable:
            return "not known, as the folder cannot be read now"
        return f"of step {steps[-1]}" if steps else "not there yet"

    def _flush(self) -> None:
        """Called in the background before the folder gets its name: all must be on the disk."""
        files.flush_unfinished(self._folder, str(self._saving))
        self._almost_saved.set()

    def _after_failure(self) -> None:
        self._failed = True
        with contextlib.suppress(Unreachable):  # then it is done after the next save
            self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Removes the folders of saves that did not come to their end."""
        if distributed.is_primary():
            files.remove_unfinished(self._folder)

    def _move_aside(self, steps: list[int], good: int) -> None:
        def move() -> list[str]:
            targets = []
            for step in steps:
                target = self._workdir / DAMAGED_FOLDER / str(step)
                number = 1
                while files.exists(target):
                    number += 1
                    target = target.with_name(f"{step}_{number}")
                with self._disk_errors(step):
                    files.move_folder(self._folder / str(step), target)
                targets.append(str(target))
            return targets

        for step, target in zip(steps, distributed.on_primary("move_aside", move)):
            log.warning("moved the damaged checkpoint of step %d to %s", step, target)
        log.warning(
            "going on from step %d instead of step %d: the steps after it are done again",
            good,
            steps[0],
        )

    def _forget_scores_after(self, step: int) -> None:
        """The steps after this one are done again, and their evaluations, too."""
        if distributed.is_primary():
            scores = readable_scores(self._workdir)
            earlier = {other: scores[other] for other in scores if other <= step}
            if earlier != scores:
                write_scores(self._workdir, earlier)
