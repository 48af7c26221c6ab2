"""Which checkpoints a workdir has, which of them are kept, and their descriptions."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memseg_jax.errors import UserError
from memseg_jax.run_record import FORMAT_VERSION

FOLDER = "checkpoints"
DAMAGED_FOLDER = "damaged"
META_FILE = "metadata"  # the name that orbax gives to the file of a JSON item
_SEAL = "meta_checksum"  # of the description itself


class DamagedCheckpoint(UserError):
    """A checkpoint cannot be read, or holds other values than were saved.

    Attributes:
        what: what was found, with the file and the array; without advice.
    """

    def __init__(self, message: str, what: str):
        super().__init__(message)
        self.what = what


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


def miou_by_step(workdir: Path) -> dict[int, float | None]:
    """The mIoU of every checkpoint; None where there is none, or where it cannot be read."""
    miou = {}
    for step in all_steps(workdir):
        try:
            miou[step] = read_meta_file(workdir, step)["miou"]
        except UserError:  # damaged: it is reported when somebody asks for this very step
            miou[step] = None
    return miou


def find_step(workdir: Path, which: str | int) -> int:
    """Turns "last", "best" or a step into the step of a checkpoint; see `reading.read_meta`."""
    steps = all_steps(workdir)
    if not steps:
        raise UserError(
            f"there is no checkpoint in {workdir / FOLDER}. Train first, or name the folder of "
            "the run with --workdir."
        )
    if which in ("last", "latest"):
        return steps[-1]
    if which == "best":
        # Which one is the best is not known if one of them does not tell its score.
        best = best_step({step: read_meta_file(workdir, step)["miou"] for step in steps})
        return steps[-1] if best is None else best
    if which not in steps:
        raise UserError(
            f"there is no checkpoint of step {which} in {workdir / FOLDER}. There are: "
            f"{', '.join(map(str, steps))}, or 'best' and 'last'."
        )
    return which


def meta_path(workdir: Path, step: int) -> Path:
    """The file of a checkpoint's description."""
    return workdir / FOLDER / str(step) / "meta" / META_FILE


def sealed(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to a description (plain JSON values) the checksum of itself."""
    rest = {key: value for key, value in meta.items() if key != _SEAL}
    text = json.dumps(rest, sort_keys=True)
    return rest | {_SEAL: hashlib.sha256(text.encode()).hexdigest()}


def read_meta_file(workdir: Path, step: int) -> dict[str, Any]:
    """Reads the description of one checkpoint.

    Raises:
        DamagedCheckpoint: it cannot be read, is incomplete, or was changed.
        UserError: it is of a later version.
    """
    path = meta_path(workdir, step)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version = meta["format_version"]
        missing = {"step", "config", "class_names", "palette", "fingerprint", "miou"} - set(meta)
        later = version > FORMAT_VERSION
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(workdir, step, f"{path} cannot be read ({brief(error)})") from error
    if _SEAL in meta and sealed(meta)[_SEAL] != meta[_SEAL]:
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


def damaged(workdir: Path, step: int, what: str) -> DamagedCheckpoint:
    """The error that a checkpoint is damaged, with what can be done."""
    others = [other for other in all_steps(workdir) if other != step]
    advice = (
        f"Other checkpoints of this run: {', '.join(map(str, others))}. Evaluate or predict with "
        "one of them (--checkpoint STEP); training goes on from the last good one by itself. "
        "--mode verify checks them all."
        if others
        else "It is the only one of this run: bring it back from a copy, or start again in "
        "another --workdir."
    )
    message = f"the checkpoint of step {step} is damaged: {what}. {advice}"
    return DamagedCheckpoint(message, what)


def brief(error: BaseException) -> str:
    """Kind and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
