"""Writing checkpoints, and going on from them."""

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from memseg_jax.checkpoint.arrays import (
    any_process,
    holds_only_weights,
    read_meta,
    restore_arrays,
    without_empty,
)
from memseg_jax.checkpoint.checksums import checksums
from memseg_jax.checkpoint.meta import (
    DAMAGED_FOLDER,
    FOLDER,
    DamagedCheckpoint,
    all_steps,
    brief,
    kept_steps,
    meta_path,
    miou_by_step,
    prepare_workdir,
    read_meta_file,
    sealed,
)
from memseg_jax.errors import UserError
from memseg_jax.run_record import flatten
from memseg_jax.runtime import distributed

log = logging.getLogger(__name__)

_CONCURRENT_GB = 1  # of arrays that are on their way to the disk at a time
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
    with Checkpointer(workdir, keep=1, handler=handler) as checkpointer:
        checkpointer.save(dict(variables), meta)


class Checkpointer:
    """Saves a run's state in the background and restores it; use it as a context manager.

    Opening it removes what a killed save left behind, so there must be one per workdir.

    A save that fails in the background is reported by the next one, which takes its place and is
    waited for; if that fails too, it raises. In multi-process runs all processes make every call.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int, handler: Any = None):
        """Opens the folder of checkpoints of a workdir, creating it if needed.

        Args:
            workdir: the folder of the run.
            keep: how many of the last checkpoints to keep, at least 1 (see `kept_steps`).
            handler: what writes the arrays, at once; None: orbax's own, in the background.

        Raises:
            UserError: if the workdir cannot be written, or `keep` is less than 1.
        """
        if keep < 1:
            raise UserError(f"config.checkpoint.keep is {keep}; it must be at least 1")
        self._workdir = prepare_workdir(workdir)
        self._keep = keep
        self._pending: dict[int, float | None] = {}
        self._manager = self._open(handler)

    def latest_step(self) -> int | None:
        """Returns the last complete step on disk (one still being written does not count)."""
        steps = all_steps(self._workdir)
        return steps[-1] if steps else None

    def save(self, state: Any, meta: Mapping[str, Any], miou: float | None = None) -> None:
        """Starts to save a state; returns as soon as it may be changed or donated.

        If `meta["step"]` is on disk already, its arrays stay, and its meta is replaced if
        `miou` is given.

        Args:
            state: a pytree with array leaves; `TrainState`.
            meta: from `make_meta`; `meta["step"]` names the checkpoint.
            miou: the mIoU in [0, 1] at this step, if it was evaluated.

        Raises:
            UserError: if this save cannot start, or if it takes the place of one that failed and
                fails as well.
        """
        step = meta["step"]
        retry = self._report_failure(step)
        meta = dict(meta, miou=None if miou is None or math.isnan(miou) else float(miou))
        if step in all_steps(self._workdir):
            if meta["miou"] is not None:
                self._replace_meta(step, meta)
            return
        self._manager.reload()  # folders may have been removed by hand
        tree = without_empty(flax.serialization.to_state_dict(state))
        self._pending = {step: meta["miou"]}
        with jax.transfer_guard("allow"), self._disk_errors(step):
            meta = sealed(meta | {"checksums": checksums(flatten(tree))})
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(tree), meta=ocp.args.JsonSave(meta)
                ),
                force=True,  # the caller decides when; orbax's own rules stay out of it
            )
        if retry:
            self.wait_until_finished()

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
        bad: dict[int, DamagedCheckpoint] = {}
        steps = all_steps(self._workdir)
        for step in reversed(steps):
            try:
                meta = read_meta_file(self._workdir, step)
                if holds_only_weights(meta):
                    break
                check(meta)
                state = restore_arrays(self._workdir, step, abstract_state, meta, partial=False)
            except DamagedCheckpoint as error:
                bad[step] = error
                log.warning("%s", error)
                continue
            if bad:
                self._move_aside(list(bad), step)
            return state, meta
        if bad:
            raise UserError(
                f"no good checkpoint of this run is left in {self._workdir / FOLDER}; nothing was "
                "changed or removed:\n  "
                + "\n  ".join(f"step {step}: {error.what}" for step, error in bad.items())
                + "\nBring one of them back from a copy, or start again in another --workdir."
            )
        return None

    def wait_until_finished(self) -> None:
        """Waits for the save in the background and raises its error, if it had one."""
        with self._disk_errors(next(iter(self._pending), None)):
            self._wait()
        self._pending = {}

    def close(self) -> None:
        """Waits for the save in the background and closes the folder."""
        try:
            self.wait_until_finished()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Tells orbax which checkpoints stay once the one being saved is complete."""
        del context
        kept = kept_steps(miou_by_step(self._workdir) | self._pending, self._keep)
        return [checkpoint.step in kept for checkpoint in checkpoints]

    def _wait(self) -> None:
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def _report_failure(self, step: int) -> bool:
        """Waits for the save before; returns whether it failed, in any process."""
        error = None
        try:
            self._wait()
        except Exception as caught:
            error = caught
        failed = any_process(error is not None)
        if failed:
            before = next(iter(self._pending), None)
            log.warning(
                "saving the checkpoint of step %s in %s failed: %s. The last good one is of step "
                "%s. Trying again now, at step %d.",
                before,
                self._workdir / FOLDER,
                "in another process" if error is None else _reason(error) or brief(error),
                self.latest_step(),
                step,
            )
            self._remove_leftovers()
        self._pending = {}
        return failed

    @contextlib.contextmanager
    def _disk_errors(self, step: int | None) -> Iterator[None]:
        """Turns a full or broken disk into a `UserError`; other errors pass as they are."""
        try:
            yield
        except Exception as error:
            reason = _reason(error)
            if reason is None and not isinstance(error, OSError):
                raise
            self._remove_leftovers()
            last = self.latest_step()
            raise UserError(
                f"{self._workdir / FOLDER}: saving the checkpoint of step {step} failed: "
                f"{reason or brief(error)}. Free space or repair the folder, then start the "
                "same command again: it continues from the last complete checkpoint"
                + ("." if last is None else f", that of step {last}.")
            ) from error

    def _open(self, handler: Any) -> ocp.CheckpointManager:
        self._remove_leftovers()
        handlers = handler and {"state": handler, "meta": ocp.JsonCheckpointHandler()}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self, enable_async_checkpointing=handler is None
        )
        return ocp.CheckpointManager(
            prepare_workdir(self._workdir / FOLDER), item_handlers=handlers, options=options
        )

    def _remove_leftovers(self) -> None:
        """Removes the folders of saves that did not come to their end."""
        folder = self._workdir / FOLDER
        if distributed.is_primary() and folder.is_dir():
            for path in folder.iterdir():
                if ".orbax-checkpoint-tmp" in path.name:
                    shutil.rmtree(path, ignore_errors=True)

    def _move_aside(self, steps: list[int], good: int) -> None:
        for step in steps:
            source = self._workdir / FOLDER / str(step)
            target = self._workdir / DAMAGED_FOLDER / str(step)
            number = 1
            while target.exists():
                number += 1
                target = target.with_name(f"{step}_{number}")
            if distributed.is_primary():
                with self._disk_errors(step):
                    target.parent.mkdir(exist_ok=True)
                    shutil.move(source, target)
            log.warning("moved the damaged checkpoint of step %d to %s", step, target)
        log.warning(
            "going on from step %d instead of step %d: the steps after it are done again",
            good,
            steps[0],
        )
        distributed.wait_for_all("move_aside")
        self._manager.reload()

    def _replace_meta(self, step: int, meta: dict[str, Any]) -> None:
        path = meta_path(self._workdir, step)
        if distributed.is_primary():
            before = read_meta_file(self._workdir, step)
            meta = sealed(meta | {"checksums": before.get("checksums")})
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text(json.dumps(meta), encoding="utf-8")
            os.replace(temporary, path)
        distributed.wait_for_all("replace_meta")
        # The best may have changed, and no later save may come that would clear up.
        self._manager.reload()
        miou = miou_by_step(self._workdir)
        for surplus in sorted(miou.keys() - kept_steps(miou, self._keep)):
            self._manager.delete(surplus)


def _reason(error: BaseException) -> str | None:
    """The system's words for a full or broken disk, if that is what an error is about."""
    return next((words for words in _DISK_ERRORS if words in str(error)), None)
