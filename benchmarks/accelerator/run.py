"""Runs the steps of a plan in a folder: what has ended is there, and is not run again."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accelerator import process
from benchmarks.accelerator.plan import STEP_FOLDER, Step
from memseg_jax.errors import UserError
from memseg_jax.runtime import files
from memseg_jax.runtime.text import format_duration

ROOT = Path(__file__).absolute().parents[2]
RESULT, LOG = "result.json", "log.txt"
MACHINE = "machine"  # the step that looks at it
ENDED, FAILED, LATE, SKIPPED = "ended", "failed", "timed out", "no time left"
_PATIENCE = 3.0  # a step may take this many times the seconds that the plan has for it, ...
_START = 120.0  # ... and this many more: imports from a cold disk, the first use of a device


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a step.

    Attributes:
        name: of the step.
        status: `ENDED`, `FAILED`, `LATE` or `SKIPPED`.
        seconds: that it took, now or in an earlier call.
        before: whether it ended in an earlier call.
    """

    name: str
    status: str
    seconds: float = 0.0
    before: bool = False


def run_all(
    steps: Sequence[Step],
    folder: Path,
    seconds: float,
    after_each: Callable[[list[Outcome]], None] = lambda outcomes: None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> list[Outcome]:
    """Runs the steps that have not ended yet and that fit into the time.

    Args:
        steps: in the order in which they run.
        folder: gets a folder for each step, with `result.json` and `log.txt`.
        seconds: for all of them.
        after_each: called with the outcomes so far after each step.
        say: shows a line.

    Returns:
        An outcome for each step, in their order.
    """
    outcomes: list[Outcome] = []
    start = time.monotonic()
    for number, step in enumerate(steps, 1):
        left = seconds - (time.monotonic() - start)
        title = f"{number}/{len(steps)} {step.name}"
        stored = read_result(folder / step.name)
        if stored and stored["status"] == ENDED and _commands(stored) == step.commands:
            outcomes.append(Outcome(step.name, ENDED, stored["seconds"], before=True))
            say(f"{title}: ended before, in {format_duration(stored['seconds'])}")
        elif step.seconds > left:
            outcomes.append(Outcome(step.name, SKIPPED))
            if not stored:
                _write_skipped(step, folder / step.name)
            takes, rest = format_duration(step.seconds), format_duration(left)
            say(f"{title}: left out, takes about {takes}, and {rest} are left")
        else:
            takes, rest = format_duration(step.seconds), format_duration(left)
            say(f"{title} ({step.why}): about {takes}, {rest} left")
            result = run_step(step, folder / step.name, left)
            outcomes.append(Outcome(step.name, result["status"], result["seconds"]))
            where = "" if result["status"] == ENDED else f", see {folder / step.name / LOG}"
            say(f"  {result['status']} after {format_duration(result['seconds'])}{where}")
        after_each(outcomes)
    return outcomes


def run_step(step: Step, folder: Path, left: float) -> dict[str, Any]:
    """Runs a step and writes its result.

    Args:
        step: the step.
        folder: of the step.
        left: seconds that are left in all.

    Returns:
        What `result.json` holds: "name", "commands", "status", "began" (seconds since 1970),
        "seconds", "exit_status" and "results", the objects that its programs printed and the
        contents of its files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + min(_PATIENCE * step.seconds + _START, left)
    start, began, status = time.monotonic(), time.time(), 0
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # the log is whole whenever it ends
    environment.setdefault("MEMSEG_CACHE", str(folder.parent / "cache"))
    with open(folder / LOG, "wb") as log:
        for arguments in step.commands:
            filled = [argument.replace(STEP_FOLDER, str(folder)) for argument in arguments]
            log.write(f"$ python {' '.join(filled)}\n".encode())
            log.flush()
            limit = max(deadline - time.monotonic(), 0)
            command = (sys.executable, *filled)
            status = process.run(command, log, limit, ROOT, environment)
            if status != 0:
                break
    results = printed_results(folder / LOG)
    if status == 0:
        results += [_read_json(folder / name) for name in step.files]
    result = {
        "name": step.name,
        "commands": step.commands,
        "status": LATE if status is None else FAILED if status else ENDED,
        "began": began,
        "seconds": round(time.monotonic() - start, 1),
        "exit_status": status,
        "results": results,
    }
    if not all(isinstance(x, dict) for x in results) or not results:
        result["status"] = FAILED if result["status"] == ENDED else result["status"]
        result["results"] = [x for x in results if isinstance(x, dict)]
    write_result(folder, result)
    return result


def _write_skipped(step: Step, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    result = {"name": step.name, "commands": step.commands, "status": SKIPPED, "seconds": 0.0}
    write_result(folder, result | {"began": time.time(), "exit_status": None, "results": []})


def read_result(folder: Path) -> dict[str, Any] | None:
    """What a step has written; None if it has not, or something else is there."""
    found = _read_json(folder / RESULT)
    keys = {"name", "commands", "status", "began", "seconds", "results"}
    return found if isinstance(found, dict) and keys <= found.keys() else None


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes `result.json`, which is whole whenever this process ends."""
    files.write_text(folder / RESULT, json.dumps(result, indent=1) + "\n")


def read_all(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of all steps in a folder, by name, in the order in which they ran.

    Raises:
        UserError: the folder is not there, or holds none.
    """
    found = {}
    for path in sorted(folder.glob(f"*/{RESULT}")):
        if result := read_result(path.parent):
            found[result["name"]] = result
    if not found:
        raise UserError(
            f"{folder} holds no results of `python -m benchmarks.accelerator`: no folder in it has "
            f"a {RESULT}; give the folder that was its --output"
        )
    # Every call looks at the machine, so its time does not tell its place.
    order = sorted(found.values(), key=lambda result: (result["name"] != MACHINE, result["began"]))
    return {result["name"]: result for result in order}


def printed_results(log: Path) -> list[dict[str, Any]]:
    """The objects with a "benchmark" that programs printed, each a line of JSON."""
    found = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("{"):
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and "benchmark" in value:
                found.append(value)
    return found


def machine_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the step `MACHINE` found; None if it has not ended."""
    result = results.get(MACHINE, {"status": FAILED})
    return result["results"][0] if result["status"] == ENDED else None


def _commands(stored: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(arguments) for arguments in stored["commands"])


def _read_json(path: Path) -> Any:
    """The content of a file of JSON; None if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
