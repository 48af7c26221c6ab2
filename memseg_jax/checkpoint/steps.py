"""Which checkpoints a workdir has, and what is said about those that are damaged."""

import os

from memseg_jax.checkpoint.scores import best_step, read_scores
from memseg_jax.errors import UserError
from memseg_jax.runtime import files

FOLDER = "checkpoints"
DAMAGED_FOLDER = "damaged"


class DamagedCheckpoint(UserError):
    """A checkpoint cannot be read, or holds other values than were saved.

    Attributes:
        what: what was found, with the file and the array; without advice.
    """

    def __init__(self, message: str, what: str):
        super().__init__(message)
        self.what = what


def prepare_workdir(workdir: str | os.PathLike) -> files.Place:
    """Makes the workdir and tries to write in it; returns its absolute path.

    Raises:
        UserError: it cannot be made or written.
    """
    return files.writable_folder(workdir, "the workdir", "--workdir")


def all_steps(workdir: str | os.PathLike) -> list[int]:
    """Returns the steps of the complete checkpoints on disk, in rising order.

    A save that is under way, or was killed, is not counted: its folder has another name, or in a
    bucket no marker. Of several processes only the first may list (`Checkpointer` sees to that):
    network file systems can show each of them another list.
    """
    found = files.complete_folders(files.place(workdir) / FOLDER)
    return sorted(int(name) for name in found if name.isdecimal())


def find_step(workdir: files.Place, which: str | int) -> int:
    """Turns "last", "best" or a step into the step of a checkpoint; see `meta.read_meta`."""
    steps = all_steps(workdir)
    if not steps:
        raise UserError(
            f"there is no checkpoint in {workdir / FOLDER}. Train first, or name the folder of "
            "the run with --workdir."
        )
    if which in ("last", "latest"):
        return steps[-1]
    if which == "best":
        best = best_step(steps, read_scores(workdir))
        return steps[-1] if best is None else best
    if which not in steps:
        raise UserError(
            f"there is no checkpoint of step {which} in {workdir / FOLDER}. There are: "
            f"{', '.join(map(str, steps))}, or 'best' and 'last'."
        )
    return which


def damaged(workdir: files.Place, step: int, what: str) -> DamagedCheckpoint:
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
