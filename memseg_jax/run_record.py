"""What is recorded of a run beside its arrays, and whether two records are of the same run."""

import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import memseg_jax
from memseg_jax.errors import UserError
from memseg_jax.runtime import distributed

FORMAT_VERSION = 1
# Fields that may change between a run and its continuation: they say where files lie, how fast
# batches are made, what is kept in memory, what is reported, and what happens after a mishap, but
# not which numbers the training produces (rounding aside).
HARMLESS_FIELDS = (
    "data.root",
    "data.packed",
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
    "train.on_nonfinite",
    "train.max_nonfinite",
    "train.watchdog_minutes",
    "checkpoint.*",
    "eval.*",
)
# What there was before a field, where that is not the empty value: checkpoints of earlier versions
# lack the field, and a run of theirs goes on with this value.
_BEFORE_THE_FIELD = {"train.accumulate": 1}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


# ---- What is in a checkpoint besides the arrays -------------------------------------------------


def make_meta(
    config: Any,
    step: int,
    class_names: Any,
    palette: Any,
    fingerprint: str,
    scores: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Describes a checkpoint in plain JSON values.

    Args:
        config: the `ConfigDict` (or nested dict) of the run.
        step: number of finished training steps; also the position in the data.
        class_names: one string a class.
        palette: one (red, green, blue) a class.
        fingerprint: `Source.fingerprint()` of the training images.
        scores: the evaluation's numbers at this step, if there was one.

    Returns:
        The dict that `Checkpointer.save` takes as `meta`.
    """
    return {
        "format_version": FORMAT_VERSION,
        "step": int(step),
        "data_position": int(step),
        "config": _plain(config),
        "class_names": _plain(class_names),
        "palette": _plain(palette),
        "fingerprint": fingerprint,
        "versions": versions(),
        "scores": _plain(scores),
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, by name."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return found | {"memseg_jax": memseg_jax.__version__, "python": platform.python_version()}


def _plain(value: Any) -> Any:
    """Turns tuples, NumPy values and ConfigDicts into what JSON holds; NaN becomes null."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        value = np.asarray(value).tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ---- Is this the same run? ----------------------------------------------------------------------


def config_differences(saved: Mapping[str, Any], current: Any) -> list[str]:
    """Lists the fields that change the training and differ between two configs.

    Args:
        saved: `meta["config"]` of a checkpoint.
        current: the config (`ConfigDict` or nested dict) of now.

    Returns:
        Lines such as "train.batch_size: 16 in the checkpoint, 8 now", sorted by field. Fields in
        `HARMLESS_FIELDS` are left out, and so are those that a checkpoint of an earlier version
        lacks, as long as they now have the value that means what there was before the field: the
        empty one, or that of `_BEFORE_THE_FIELD`.
    """
    before, now = flatten(_plain(saved)), flatten(_plain(current))
    lines = []
    for field in sorted(before.keys() | now.keys()):
        old, new = before.get(field, _ABSENT), now.get(field, _ABSENT)
        is_new = old is _ABSENT and new in ("", [], _BEFORE_THE_FIELD.get(field, ""))
        if old != new and not is_new and not _harmless(field):
            lines.append(f"{field}: {show(old)} in the checkpoint, {show(new)} now")
    return lines


def check_same_run(meta: Mapping[str, Any], config: Any, fingerprint: str) -> None:
    """Refuses to continue a run with another config or other training images.

    Args:
        meta: the checkpoint's meta.
        config: the config of now.
        fingerprint: `Source.fingerprint()` of the training images of now.

    Raises:
        UserError: naming every field that differs, with both values.
    """
    differences = config_differences(meta["config"], config)
    if meta["fingerprint"] != fingerprint:
        differences.append(
            "the list of training images: fingerprint "
            f"{meta['fingerprint']} in the checkpoint, {fingerprint} now"
        )
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


def check_processes_agree(config: Any, fingerprint: str, workdir: Path | None) -> None:
    """Refuses a run whose processes have different configs, data or workdirs.

    Args:
        config: the config of this process.
        fingerprint: `Source.fingerprint()` of the training images of this process.
        workdir: folder of the run, which all processes must see; None: there is none.

    Raises:
        UserError: naming what differs.
    """
    if distributed.process_count() == 1:
        return
    values = {f"config.{name}": show(value) for name, value in flatten(_plain(config)).items()}
    for place in ("config.data.root", "config.data.packed"):  # disks of their own
        values.pop(place, None)
    values["the list of training images"] = fingerprint
    values |= {f"the version of {name}": version for name, version in versions().items()}
    values["whether there is a --workdir"] = workdir is not None
    distributed.check_same("config", values)
    if workdir is None:
        return
    # A folder of the same name on another disk would do until the first checkpoint.
    sign = workdir / ".processes"
    word = f"{time.time_ns()}"
    if distributed.is_primary():
        sign.write_text(word, encoding="utf-8")
    word = distributed.from_primary("workdir", word)
    try:
        found = sign.read_text(encoding="utf-8") == word
    except OSError:
        found = False
    distributed.check_same("sees", {"whether it sees the files of process 0 in --workdir": found})
    if distributed.is_primary():
        sign.unlink(missing_ok=True)


_ABSENT = object()


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts to dotted names; None and empty dicts hold no value."""
    if isinstance(tree, Mapping):
        flat = {}
        for key, value in tree.items():
            flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {} if tree is None else {prefix: tree}


def _harmless(field: str) -> bool:
    return any(
        field.startswith(rule[:-1]) if rule.endswith("*") else field == rule
        for rule in HARMLESS_FIELDS
    )


def show(value: Any) -> str:
    """A config value as a message shows it."""
    return "not set" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
