"""A checkpoint's description: what is recorded beside the arrays, and whether it is of this run."""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import memseg_jax
from memseg_jax.checkpoint.steps import FOLDER, DamagedCheckpoint, brief, damaged, find_step
from memseg_jax.errors import Unreachable, UserError
from memseg_jax.runtime import distributed, files
from memseg_jax.runtime.plain import ABSENT, flatten, plain, show

FORMAT_VERSION = 1
META_FILE = "metadata"  # the name that orbax gives to the file of a JSON item
_SEAL = "meta_checksum"  # of the description itself
_REQUIRED = {"step", "config", "class_names", "palette", "fingerprint", "checksums", _SEAL}
# Fields that may change between a run and its continuation: they say where files lie, how fast
# batches are made, what is kept in memory, what is reported, and what happens after a mishap, but
# not which numbers the training produces (rounding aside).
HARMLESS_FIELDS = (
    "data.root",
    "data.packed",
    "data.stage",
    "data.stage_gb",
    "data.workers",
    "data.threads",
    "data.prefetch",
    "data.palette",
    "data.eval_split",
    "data.num_val",
    "model.remat",
    "sharding.*",
    "train.log_every",
    "train.eval_every",
    "train.early_stop",
    "train.on_nonfinite",
    "train.max_nonfinite",
    "train.watchdog_minutes",
    "train.profile_steps",
    "checkpoint.*",
    "eval.*",
    "serve.*",
)
# What the fields that came later were before: checkpoints of then lack them.
_EARLIER = {
    "model.precision": "default",
    "data.label_map": [],
    "data.outside_polygons": "ignore",
    "data.label_colors": [],
    "data.ignore_colors": [],
    "data.unknown_color": "error",
    "data.label_name": "",
    "data.val_share": 0.0,
    "train.freeze": [],
    "optimizer.name": "sgd",
    "optimizer.warmup_steps": 0,
    "optimizer.warmup_start": 1e-6,
    "optimizer.base_batch": 0,
    "model.norm_group": 0,
    "model.method": "mcibi",
    "model.context": "aspp",
    "model.pool_scales": [1, 2, 3, 6],
    "model.fpn": False,
    "model.fpn_dim": 512,
    "model.drop_path": 0.0,
    "model.decoder_kernels.pixels": 1,
    "model.decoder_kernels.context": 1,
    "model.decoder_kernels.final": 1,
    "model.memory.downsample": 1,
    "model.memory.read_by": "context",
    "model.memory.fuse_before_fpn": False,
    "model.memory.fusion": "published",
    "model.memory.start_epoch": 1,
    "loss.context": 1.0,
    "eval.rows": 1,
}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


# ---- What is in a checkpoint besides the arrays -------------------------------------------------


def make_meta(
    config: Any,
    step: int,
    class_names: Any,
    palette: Any,
    fingerprint: str,
    class_weights: Sequence[float] = (),
) -> dict[str, Any]:
    """Describes a checkpoint in plain JSON values.

    Args:
        config: the `ConfigDict` (or nested dict) of the run.
        step: number of finished training steps; also the position in the data.
        class_names: one string per class.
        palette: one (red, green, blue) per class.
        fingerprint: `Source.fingerprint()` of the training images.
        class_weights: of the loss, one per class; empty: all are equal.

    Returns:
        The dict that `Checkpointer.save` takes as `meta`.
    """
    return {
        "format_version": FORMAT_VERSION,
        "step": int(step),
        "data_position": int(step),
        "config": plain(config),
        "class_names": plain(class_names),
        "palette": plain(palette),
        "fingerprint": fingerprint,
        "class_weights": plain(class_weights),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, by name."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return found | {"memseg_jax": memseg_jax.__version__, "python": platform.python_version()}


def sealed(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to a description (plain JSON values) the checksum of itself."""
    rest = {key: value for key, value in meta.items() if key != _SEAL}
    text = json.dumps(rest, sort_keys=True)
    return rest | {_SEAL: hashlib.sha256(text.encode()).hexdigest()}


def holds_only_weights(meta: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is from `write_weights`: training starts from it, and anew."""
    return meta.get("origin") is not None


# ---- Reading ------------------------------------------------------------------------------------


def read_meta(workdir: str | os.PathLike, step: str | int = "last") -> tuple[int, dict[str, Any]]:
    """Reads a checkpoint's description without loading its arrays.

    Of several processes, all have to call it: the first one looks, and tells the others.

    Args:
        workdir: the folder of the run.
        step: a step, "last" (or "latest"), or "best" (highest mIoU; the last one if no checkpoint
            has a score).

    Returns:
        The step and its meta: what `make_meta` returned, with the checksums of the arrays.

    Raises:
        UserError: if there is no such checkpoint, or it is damaged or of a later version.
    """
    workdir = files.absolute(workdir, "--workdir")

    def look() -> tuple[int, dict[str, Any]]:
        found = find_step(workdir, step)
        return found, read_meta_file(workdir, found)

    found, meta = distributed.on_primary("read_meta", look)
    return found, meta


def read_meta_file(workdir: files.Place, step: int) -> dict[str, Any]:
    """Reads the description of one checkpoint.

    Raises:
        DamagedCheckpoint: it cannot be read, is empty or incomplete, or was changed.
        UserError: it is of a later version.
        Unreachable: its bucket gives no answer or refuses, which says nothing about it.
    """
    path = workdir / FOLDER / str(step) / "meta" / META_FILE
    try:
        text = files.read_bytes(path).decode("utf-8")
        if not text.strip():
            raise damaged(workdir, step, f"{path} is empty")
        meta = json.loads(text)
        version = meta["format_version"]
        missing = _REQUIRED - set(meta)
        later = version > FORMAT_VERSION
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, DamagedCheckpoint | Unreachable):
            raise
        raise damaged(workdir, step, f"{path} cannot be read ({brief(error)})") from error
    if not missing and sealed(meta)[_SEAL] != meta[_SEAL]:
        raise damaged(
            workdir,
            step,
            f"{path} has the checksum {sealed(meta)[_SEAL][:16]}..., expected "
            f"{str(meta[_SEAL])[:16]}...: it was changed after it had been written",
        )
    if later:
        raise UserError(
            f"{path} has format version {version}; this version of memseg_jax "
            f"reads up to {FORMAT_VERSION}. Install a newer memseg_jax."
        )
    if missing:
        raise damaged(workdir, step, f"{path} lacks {', '.join(sorted(missing))}")
    return meta


def recorded_config(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The config that a checkpoint was trained with, by dotted field.

    Fields that came later have the value that says what was done before them, where there is one.
    """
    return _EARLIER | flatten(meta["config"])


# ---- Is this the same run? ----------------------------------------------------------------------


def config_differences(saved: Mapping[str, Any], current: Any) -> list[str]:
    """Lists the fields that change the training and differ between two configs.

    Args:
        saved: `meta["config"]` of a checkpoint.
        current: the config (`ConfigDict` or nested dict) of now.

    Returns:
        Lines such as "train.batch_size: 16 in the checkpoint, 8 now", sorted by field. Fields in
        `HARMLESS_FIELDS` are left out.
    """
    before, now = _EARLIER | flatten(plain(saved)), flatten(plain(current))
    lines = []
    for field in sorted(before.keys() | now.keys()):
        old, new = before.get(field, ABSENT), now.get(field, ABSENT)
        if old != new and not _harmless(field):
            lines.append(f"{field}: {show(old)} in the checkpoint, {show(new)} now")
    return lines


def check_same_run(
    meta: Mapping[str, Any], config: Any, fingerprint: str, class_weights: Sequence[float] = ()
) -> None:
    """Refuses to continue a run with another config or other training images.

    Args:
        meta: the checkpoint's meta.
        config: the config of now.
        fingerprint: `Source.fingerprint()` of the training images of now.
        class_weights: of the loss of now, as in `make_meta`.

    Raises:
        UserError: naming every field that differs, with both values.
    """
    differences = config_differences(meta["config"], config)
    if meta["fingerprint"] != fingerprint:
        differences.append(
            "the list of training images: fingerprint "
            f"{meta['fingerprint']} in the checkpoint, {fingerprint} now"
        )
    before, now = meta.get("class_weights", []), plain(class_weights)
    if before and before != now:  # earlier checkpoints have those of the config alone
        differences.append(f"the class weights: {show(before)} in the checkpoint, {show(now)} now")
    if differences:
        raise UserError(
            f"the workdir holds a run at step {meta['step']} that was trained with other "
            "settings, so it cannot be continued with these:\n  "
            + "\n  ".join(differences)
            + "\nStart a new run with another --workdir, or go back to the values of the "
            "checkpoint to continue this one."
        )


def check_class_names(meta: Mapping[str, Any], class_names: Sequence[str]) -> None:
    """Refuses classes that have the right number but other names than those of a checkpoint.

    Another number shows in the shapes of the arrays, where more can be said.

    Raises:
        UserError: shows both lists.
    """
    trained = list(meta["class_names"])
    if list(class_names) != trained and len(class_names) == len(trained):
        raise UserError(
            f"config.data.class_names are {list(class_names)}, but the checkpoint was trained "
            f"with {trained}: scores would be given to the wrong classes"
        )


def _harmless(field: str) -> bool:
    return any(
        field.startswith(rule[:-1]) if rule.endswith("*") else field == rule
        for rule in HARMLESS_FIELDS
    )
