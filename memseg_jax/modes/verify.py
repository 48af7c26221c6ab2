"""The verify mode: reads every checkpoint of a workdir and compares it with its checksums."""

import os
from typing import NamedTuple

import jax

from memseg_jax.checkpoint import arrays as stored
from memseg_jax.checkpoint import steps as records
from memseg_jax.checkpoint.meta import read_meta_file
from memseg_jax.runtime import bars, files


class Report(NamedTuple):
    """What was found in one checkpoint.

    Attributes:
        arrays: their number.
        size: of the arrays that could be read, in bytes.
        problems: what is wrong, with the names of files and arrays; empty if all is well.
    """

    arrays: int
    size: int
    problems: list[str]


def run(workdir: str | os.PathLike) -> int:
    """Checks all checkpoints of a workdir and prints a table of them.

    Every array is read, so this takes as long as reading the files does. Nothing is changed.

    Args:
        workdir: folder of a run.

    Returns:
        The exit status: 0, or 1 if anything is damaged.

    Raises:
        UserError: there is no checkpoint.
    """
    # Accelerators are not needed, and the run that uses them may still be going on.
    jax.config.update("jax_platforms", "cpu")
    folder = files.absolute(workdir, "--workdir")
    found = records.all_steps(folder)
    if not found:
        records.find_step(folder, "last")  # raises, and says what to do
    print(f"{'step':>9}  {'arrays':>6}  {'MB':>9}  result")
    bad = []
    for step in found:
        report = check(folder, step)
        result = "ok"
        if report.problems:
            bad.append(step)
            result = "DAMAGED"
        print(f"{step:>9}  {report.arrays:>6}  {report.size / 1e6:>9.1f}  {result}", flush=True)
        for problem in report.problems:
            print(f"{'':>9}  {problem}", flush=True)
    aside = folder / records.DAMAGED_FOLDER
    if names := files.names(aside):
        print(f"{aside}: found damaged earlier and not used: {', '.join(names)}")
    good = [step for step in found if step not in bad]
    if not bad:
        print(f"all {len(found)} checkpoints in {folder / records.FOLDER} are good")
        return 0
    print(
        f"{len(bad)} of {len(found)} checkpoints in {folder / records.FOLDER} are damaged: steps "
        f"{', '.join(map(str, bad))}. "
        + (f"Training goes on from step {good[-1]}." if good else "No good one is left.")
    )
    return 1


def check(workdir: files.Place, step: int) -> Report:
    """Checks one checkpoint.

    Args:
        workdir: folder of the run.
        step: of the checkpoint.

    Returns:
        What was found.

    Raises:
        Unreachable: its bucket gives no answer or refuses, which says nothing about it.
    """
    folder = workdir / records.FOLDER / str(step) / "state"
    try:
        meta = read_meta_file(workdir, step)
        saved = stored.list_arrays(workdir, step, meta)
    except records.DamagedCheckpoint as error:
        return Report(0, 0, [error.what])
    size, problems = 0, []
    # One by one: a checkpoint may be larger than the memory of the machine that looks at it.
    with bars.bar(len(saved), f"verifying step {step}", "array") as bar:
        for name in saved:
            bar.update()
            try:
                array = stored.read_on_host(folder, [name])[name]
            except Exception as error:
                if refused := stored.unreachable(folder, error):
                    raise refused from error
                problems.append(f"{name} in {folder} cannot be read ({records.brief(error)})")
                continue
            size += array.nbytes
            if difference := stored.differences({name: array}, meta["checksums"]):
                problems.append(f"{difference}, in {folder}")
    return Report(len(saved), size, problems)
