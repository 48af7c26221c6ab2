"""Reading checkpoints: nothing is used that differs from what was saved."""

import os
from collections.abc import Mapping
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict

from memseg_jax.checkpoint.checksums import checksums, describe
from memseg_jax.checkpoint.meta import read_meta
from memseg_jax.checkpoint.steps import FOLDER, DamagedCheckpoint, brief, damaged
from memseg_jax.errors import Unreachable, UserError
from memseg_jax.runtime import distributed, files
from memseg_jax.runtime.plain import flatten, show
from memseg_jax.runtime.text import first_few

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
    "model.memory.fusion",
    "model.method",
    "model.context",
    "model.fpn",
)


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
    workdir = files.absolute(workdir, "--workdir")
    return restore_arrays(workdir, step, dict(abstract_variables), meta, partial=True), meta


def restore_arrays(workdir: files.Place, step: int, abstract: Any, meta: Any, partial: bool) -> Any:
    """Restores into the structure and the shardings of `abstract`, and verifies the values.

    Of several processes, all have to call it. No process waits for another while it reads: a file
    that only one of them needs may be damaged. When all have tried, they agree whether to go on;
    only then come the checksums, which are computed together.

    Args:
        workdir: the folder of the run.
        step: of the checkpoint.
        abstract: tree of `jax.ShapeDtypeStruct`.
        meta: of the checkpoint.
        partial: whether `abstract` may lack whole entries of the top level.

    Returns:
        The tree of arrays.

    Raises:
        DamagedCheckpoint: an array is missing, cannot be read, or has not the saved checksum; in
            every process if it is so in one.
        UserError: it is of another model.
        Unreachable: its bucket gives no answer or refuses, which says nothing about it.
    """
    folder = workdir / FOLDER / str(step) / "state"
    # The plain form first: what is on disk knows nothing of dataclasses and named tuples.
    target = jax.tree.map(_with_sharding, flax.serialization.to_state_dict(abstract))
    whole, target = target, without_empty(target)
    restored, wrong, refused, cause = None, "", None, None
    with jax.transfer_guard("allow"):
        try:
            saved = list_arrays(workdir, step, meta)
            if partial:
                saved = {name: x for name, x in saved.items() if name.partition(".")[0] in target}
            check_same_arrays(folder, saved, flatten(target), meta)
            restored = _read(folder, target, partial)
        except DamagedCheckpoint as error:
            wrong, cause = error.what, error
        except UserError as error:
            refused = error
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # the checkpoint is not to blame
        except Exception as error:
            refused = unreachable(folder, error)
            if refused is None:
                names = ", ".join(unreadable(folder, target))
                wrong = f"the arrays in {folder}: {names and names + ': '}cannot be read"
                wrong, cause = f"{wrong} ({brief(error)})", error
        _agree(workdir, step, wrong, cause)
        if refused:
            raise refused
        if difference := differences(restored, meta["checksums"]):
            difference = f"the arrays in {folder}: {difference}"
        _agree(workdir, step, difference, None)
    for name in whole.keys() - target.keys():
        empty = np.zeros(whole[name].shape, whole[name].dtype)
        restored[name] = jax.device_put(empty, whole[name].sharding)
    return flax.serialization.from_state_dict(abstract, restored)


def _agree(workdir: files.Place, step: int, wrong: str, cause: BaseException | None) -> None:
    """Raises in every process if something is wrong in one of them."""
    if any_process(bool(wrong)):
        wrong = wrong or "another process could not read its part of the arrays, and says why"
        raise damaged(workdir, step, wrong) from cause


def list_arrays(workdir: files.Place, step: int, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes and types of a checkpoint's arrays by name, which are those that were saved.

    Raises:
        DamagedCheckpoint: the list cannot be read, or is not the one that was saved.
        Unreachable: as in `restore_arrays`.
    """
    folder = workdir / FOLDER / str(step) / "state"
    try:
        saved = flatten(ocp.PyTreeCheckpointHandler().metadata(folder).tree)
        found = {name: describe(x) for name, x in saved.items()}
    except Exception as error:
        if refused := unreachable(folder, error):
            raise refused from error
        raise damaged(
            workdir, step, f"the list of arrays in {folder} cannot be read ({brief(error)})"
        ) from error
    expected = {name: text.partition(" ")[0] for name, text in meta["checksums"].items()}
    lines = [
        f"{name}: found {found.get(name, 'none')}, expected {expected.get(name, 'none')}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if lines:
        wrong = "; ".join(first_few(lines))
        raise damaged(workdir, step, f"the list of arrays in {folder}: {wrong}")
    return saved


def unreachable(folder: files.Place, error: BaseException) -> Unreachable | None:
    """The error to raise in the place of one that says nothing about a checkpoint; else None.

    Args:
        folder: of the checkpoint, or in it.
        error: from reading it.
    """
    words = files.trouble(folder, error)
    if words is None:
        return None
    return Unreachable(f"{folder} cannot be read now: {words}. It may be good; try again later")


def read_on_host(folder: files.Place, names: list[str]) -> dict[str, np.ndarray]:
    """Reads arrays of a checkpoint's folder `state` by name, as NumPy arrays."""
    target = unflatten_dict(dict.fromkeys(names, 0), sep=".")
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    return flatten(_restore(folder, target, arguments, partial=True))


def unreadable(folder: files.Place, tree: Any) -> list[str]:
    """Tries every array by itself; returns the names of those that cannot be read."""
    bad = []
    for name in flatten(tree):
        try:
            read_on_host(folder, [name])
        except Exception:
            bad.append(name)
    return bad


def differences(arrays: Mapping[str, Any], expected: Mapping[str, str]) -> str:
    """Compares arrays with recorded checksums.

    Args:
        arrays: tree of arrays.
        expected: the checksums in the description.

    Returns:
        Names, found and expected checksums of those that differ; empty if all are the same.
    """
    found = checksums(flatten(arrays))
    lines = [
        f"{name} has the checksum {text.split()[1]}, expected {expected[name].split()[1]}"
        for name, text in found.items()
        if text != expected[name]
    ]
    return "; ".join(first_few(lines))


def without_empty(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out arrays without elements, which orbax refuses: the memory of a plain model."""
    return {name: x for name, x in tree.items() if 0 not in getattr(x, "shape", ())}


def any_process(failed: bool) -> bool:
    """Whether any process has failed: all have to take the same way from here."""
    return bool(distributed.reduce_on_primary("checkpoint", b"1" if failed else b"", b"".join))


def _read(folder: files.Place, target: Any, partial: bool) -> Any:
    arguments = ocp.checkpoint_utils.construct_restore_args(target)
    return _restore(folder, target, arguments, partial)


def _restore(folder: files.Place, target: Any, arguments: Any, partial: bool) -> Any:
    """Reads without a word to other processes, for which orbax's `Checkpointer` would wait."""
    handler = ocp.PyTreeCheckpointHandler()
    try:
        return handler.restore(
            folder,
            args=ocp.args.PyTreeRestore(
                item=target, restore_args=arguments, partial_restore=partial
            ),
        )
    finally:
        handler.close()


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
        sides = [
            describe(arrays[name]) if name in arrays else "absent" for arrays in (saved, wanted)
        ]
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
    raise UserError(
        f"{folder} is a checkpoint of another model: {len(lines)} of {len(wanted)} arrays "
        "differ.\n  "
        + "\n  ".join(first_few(lines))
        + f"\nThe likely cause is {cause}. The checkpoint was saved with "
        f"{len(meta['class_names'])} classes, "
        + ", ".join(f"{key} = {show(value)}" for key, value in facts.items())
        + ". Use the config it was trained with, or another --workdir."
    )
