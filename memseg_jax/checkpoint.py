"""Checkpoints: what a run needs to go on, written in the background and kept by age and score.

    <workdir>/checkpoints/<step>/state   arrays: nested dicts step, params, batch_stats, memory,
                                         opt_state (orbax)
    <workdir>/checkpoints/<step>/meta    JSON: config, classes, colours, versions, scores

This is the only module that knows the library underneath (orbax's `CheckpointManager`).

A step's arrays are written once. Saving a step that already exists replaces only its `meta`, and
only to add a score: the state is a function of the step, so there is nothing else to write.
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import type_handlers

from memseg_jax.errors import UserError
from memseg_jax.run_record import FORMAT_VERSION, flatten, show

FOLDER = "checkpoints"
# Fields that decide the shapes of the arrays: named when a checkpoint does not fit.
_SHAPE_FIELDS = (
    "model.backbone",
    "model.backbone_width",
    "model.feature_dim",
    "model.aspp_dim",
    "model.auxiliary",
    "model.memory.enabled",
    "model.memory.attention_dim",
    "model.memory.slots",
)
_META_FILE = "metadata"  # the name that orbax gives to the file of a JSON item
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


# ---- Which steps there are, and which are kept --------------------------------------------------


def prepare_workdir(workdir: str | os.PathLike) -> Path:
    """Creates the workdir and tries to write in it, so that this does not fail hours later.

    Args:
        workdir: the folder of the run.

    Returns:
        Its absolute path.

    Raises:
        UserError: if it cannot be created or written.
    """
    path = Path(workdir).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"test")
            file.flush()
    except OSError as error:
        raise UserError(
            f"cannot write to the workdir {path}: {error.strerror or error}. Choose another "
            "folder with --workdir, or make this one writable."
        ) from error
    return path


def all_steps(workdir: str | os.PathLike) -> list[int]:
    """Returns the steps of the complete checkpoints on disk, in rising order.

    A save that is under way, or was killed, is in a folder with another name and not counted.
    """
    folder = Path(workdir) / FOLDER
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def kept_steps(miou: Mapping[int, float | None], keep: int) -> set[int]:
    """Returns the steps to keep: the last `keep` ones and the best.

    Args:
        miou: step -> mIoU, or None where it was not evaluated; such a step is never the best.
        keep: how many of the last steps to keep, at least 1.

    Returns:
        The steps; of equally good ones the newest is the best. Step 0 stays too: it is no product
        of the run, but the weights that it started from.
    """
    best = best_step(miou)
    return set(sorted(miou)[-keep:]) | ({best} if best is not None else set()) | ({0} & set(miou))


def best_step(miou: Mapping[int, float | None]) -> int | None:
    """Returns the step of the highest mIoU (the newest of equal ones), or None without any."""
    scored = {step: value for step, value in miou.items() if value is not None}
    return max(scored, key=lambda step: (scored[step], step)) if scored else None


def _miou_by_step(workdir: Path) -> dict[int, float | None]:
    miou = {}
    for step in all_steps(workdir):
        try:
            miou[step] = _read_meta_file(workdir, step)["miou"]
        except UserError:  # damaged: it is reported when somebody asks for this very step
            miou[step] = None
    return miou


def _find_step(workdir: Path, which: str | int) -> int:
    steps = all_steps(workdir)
    if not steps:
        raise UserError(
            f"there is no checkpoint in {workdir / FOLDER}. Train first, or name the folder of "
            "the run with --workdir."
        )
    if which in ("last", "latest"):
        return steps[-1]
    if which == "best":
        best = best_step(_miou_by_step(workdir))
        return steps[-1] if best is None else best
    if which not in steps:
        raise UserError(
            f"there is no checkpoint of step {which} in {workdir / FOLDER}. There are: "
            f"{', '.join(map(str, steps))}, or 'best' and 'last'."
        )
    return which


# ---- Reading ------------------------------------------------------------------------------------


def read_meta(workdir: str | os.PathLike, step: str | int = "last") -> tuple[int, dict[str, Any]]:
    """Reads a checkpoint's description without loading its arrays.

    Args:
        workdir: the folder of the run.
        step: a step, "last" (or "latest"), or "best" (highest mIoU; the last one if no checkpoint
            has a score).

    Returns:
        The step and its meta: what `make_meta` returned, and `miou` (a number or None).

    Raises:
        UserError: if there is no such checkpoint, or it is damaged or of a later version.
    """
    workdir = Path(workdir).expanduser().absolute()
    step = _find_step(workdir, step)
    return step, _read_meta_file(workdir, step)


def restore_for_inference(
    workdir: str | os.PathLike, abstract_variables: Mapping[str, Any], which: str | int = "best"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads only what a forward pass needs; the optimiser's state is not touched.

    Args:
        workdir: the folder of the run.
        abstract_variables: dict of params, batch_stats and memory; leaves are
            `jax.ShapeDtypeStruct` (without a sharding: the first device).
        which: a step, "last" or "best", as in `read_meta`.

    Returns:
        The dict filled with arrays, and the meta.

    Raises:
        UserError: as `read_meta`, and if the arrays are damaged or of another model.
    """
    step, meta = read_meta(workdir, which)
    workdir = Path(workdir).expanduser().absolute()
    return _restore_arrays(workdir, step, dict(abstract_variables), meta, partial=True), meta


def _read_meta_file(workdir: Path, step: int) -> dict[str, Any]:
    path = workdir / FOLDER / str(step) / "meta" / _META_FILE
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version = meta["format_version"]
        missing = {"step", "config", "class_names", "palette", "fingerprint", "miou"} - set(meta)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(workdir, step, f"{path} cannot be read ({_brief(error)})") from error
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}; this version of memseg_jax "
            f"reads up to {FORMAT_VERSION}. Install a newer memseg_jax."
        )
    if missing:
        raise _damaged(workdir, step, f"{path} lacks {', '.join(sorted(missing))}")
    return meta


def _restore_arrays(workdir: Path, step: int, abstract: Any, meta: Any, partial: bool) -> Any:
    """Restores into the structure and the shardings of `abstract`, after comparing shapes."""
    folder = workdir / FOLDER / str(step) / "state"
    # The plain form first: what is on disk knows nothing of dataclasses and named tuples.
    target = jax.tree.map(_with_sharding, flax.serialization.to_state_dict(abstract))
    whole, target = target, _without_empty(target)
    with jax.transfer_guard("allow"):
        try:
            saved = ocp.PyTreeCheckpointHandler().metadata(folder).tree
        except Exception as error:
            raise _damaged(
                workdir, step, f"the list of arrays in {folder} cannot be read ({_brief(error)})"
            ) from error
        if partial:
            saved = {key: value for key, value in saved.items() if key in target}
        check_same_arrays(folder, flatten(saved), flatten(target), meta)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                restored = reader.restore(
                    folder,
                    args=ocp.args.PyTreeRestore(
                        item=target,
                        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                        partial_restore=partial,
                    ),
                )
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # the checkpoint is not to blame
        except Exception as error:
            raise _damaged(
                workdir, step, f"the arrays in {folder} cannot be read ({_brief(error)})"
            ) from error
    for name in whole.keys() - target.keys():
        empty = np.zeros(whole[name].shape, whole[name].dtype)
        restored[name] = jax.device_put(empty, whole[name].sharding)
    return flax.serialization.from_state_dict(abstract, restored)


def _without_empty(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out arrays without elements, which orbax refuses: the memory of a plain model."""
    return {name: x for name, x in tree.items() if 0 not in getattr(x, "shape", ())}


def _with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    # Without one, orbax would ask for the devices of the machine that saved.
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def check_same_arrays(
    folder: str | os.PathLike,
    saved: Mapping[str, Any],
    wanted: Mapping[str, Any],
    meta: Mapping[str, Any],
) -> None:
    """Compares the arrays of a checkpoint with those of a model.

    Args:
        folder: of the checkpoint, for the message.
        saved: {name: array}, or anything with a shape and a dtype.
        wanted: the same of the model.
        meta: of the checkpoint.

    Raises:
        UserError: a name, shape or type differs; tells which, and the likely cause.
    """
    lines, other_names = [], False
    for name in sorted(saved.keys() | wanted.keys()):
        sides = [_shape(saved.get(name)), _shape(wanted.get(name))]
        if sides[0] != sides[1]:
            other_names |= "absent" in sides
            lines.append(f"{name}: {sides[0]} in the checkpoint, {sides[1]} in this model")
    if not lines:
        return
    cause = (
        "another backbone, or a part of the model switched on or off (model.backbone, "
        "model.auxiliary, model.memory.*)"
        if other_names
        else "another number of classes or other widths (data.class_names, model.feature_dim, "
        "model.aspp_dim, model.memory.*)"
    )
    config = flatten(meta["config"])
    facts = {field: config[field] for field in _SHAPE_FIELDS if field in config}
    more = f"\n  and {len(lines) - 5} more" if len(lines) > 5 else ""
    raise UserError(
        f"{folder} is a checkpoint of another model: {len(lines)} of {len(wanted)} arrays "
        "differ.\n  "
        + "\n  ".join(lines[:5])
        + f"{more}\nThe likely cause is {cause}. The checkpoint was saved with "
        f"{len(meta['class_names'])} classes, "
        + ", ".join(f"{key} = {show(value)}" for key, value in facts.items())
        + ". Use the config it was trained with, or another --workdir."
    )


def _shape(leaf: Any) -> str:
    if leaf is None:
        return "absent"
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def _damaged(workdir: Path, step: int, what: str) -> UserError:
    folder = workdir / FOLDER / str(step)
    others = [other for other in all_steps(workdir) if other != step]
    advice = (
        f"Other checkpoints of this run: {', '.join(map(str, others))}. Remove the folder "
        f"{folder} to go on without it (training continues from the last one that remains)."
        if others
        else "It is the only one of this run: bring it back from a copy, or start again in "
        "another --workdir."
    )
    return UserError(f"the checkpoint of step {step} is damaged: {what}. {advice}")


def _brief(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


# ---- Writing, and continuing --------------------------------------------------------------------


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


def holds_only_weights(meta: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is from `write_weights`: training starts from it, and anew."""
    return meta.get("origin") is not None


class Checkpointer:
    """Saves a run's state in the background and restores it; use it as a context manager.

    Opening it removes what a killed save left behind, so there must be one per workdir.
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
            UserError: if the save before this one failed for lack of space or permission.
        """
        self.wait_until_finished()
        step = meta["step"]
        meta = dict(meta, miou=None if miou is None or math.isnan(miou) else float(miou))
        if step in all_steps(self._workdir):
            if meta["miou"] is not None:
                self._replace_meta(step, meta)
            return
        self._manager.reload()  # folders may have been removed by hand
        self._pending = {step: meta["miou"]}
        with jax.transfer_guard("allow"), self._disk_errors(step):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(
                        _without_empty(flax.serialization.to_state_dict(state))
                    ),
                    meta=ocp.args.JsonSave(meta),
                ),
                force=True,  # the caller decides when; orbax's own rules stay out of it
            )

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
        return _restore_arrays(self._workdir, step, abstract_state, meta, partial=False), meta

    def wait_until_finished(self) -> None:
        """Waits for the save in the background and raises its error, if it had one."""
        with self._disk_errors(next(iter(self._pending), None)):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
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
        kept = kept_steps(_miou_by_step(self._workdir) | self._pending, self._keep)
        return [checkpoint.step in kept for checkpoint in checkpoints]

    @contextlib.contextmanager
    def _disk_errors(self, step: int | None) -> Iterator[None]:
        """Turns a full or broken disk into a `UserError`; other errors pass as they are."""
        try:
            yield
        except Exception as error:
            reason = next((words for words in _DISK_ERRORS if words in str(error)), None)
            if reason is None and not isinstance(error, OSError):
                raise
            raise UserError(
                f"saving the checkpoint of step {step} in {self._workdir / FOLDER} failed: "
                f"{reason or _brief(error)}. Free space or repair the folder, then start the "
                "same command again: it continues from the last complete checkpoint."
            ) from error

    def _open(self, handler: Any) -> ocp.CheckpointManager:
        folder = self._workdir / FOLDER
        if jax.process_index() == 0 and folder.is_dir():
            for path in folder.iterdir():
                if ".orbax-checkpoint-tmp" in path.name:
                    shutil.rmtree(path, ignore_errors=True)
        handlers = handler and {"state": handler, "meta": ocp.JsonCheckpointHandler()}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self, enable_async_checkpointing=handler is None
        )
        return ocp.CheckpointManager(folder, item_handlers=handlers, options=options)

    def _replace_meta(self, step: int, meta: Mapping[str, Any]) -> None:
        path = self._workdir / FOLDER / str(step) / "meta" / _META_FILE
        if jax.process_index() == 0:
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text(json.dumps(meta), encoding="utf-8")
            os.replace(temporary, path)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("memseg_jax.checkpoint.replace_meta")
        # The best may have changed, and no later save may come that would clear up.
        self._manager.reload()
        miou = _miou_by_step(self._workdir)
        for surplus in sorted(miou.keys() - kept_steps(miou, self._keep)):
            self._manager.delete(surplus)
