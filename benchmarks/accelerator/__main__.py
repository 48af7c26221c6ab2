"""Everything that can be measured on the accelerator at hand, in one folder, with a report.

    python -m benchmarks.accelerator
    python -m benchmarks.accelerator --minutes 120 --camvid CAMVID
    python -m benchmarks.accelerator --list

See docs/accelerator.md. Steps run in the order of their value, each in a process of its own, until
the time is over; a second call goes on. Without an accelerator the same runs at reduced sizes.
"""

import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accelerator import plan, report, run
from memseg_jax import command_line
from memseg_jax.errors import UserError
from memseg_jax.runtime.text import format_duration

FLAGS = {
    "output": "folder of all results (default: runs/accelerator)",
    "minutes": "for this call (default: 40)",
    "only": "steps or patterns such as 'camvid*', with commas between them (default: all)",
    "camvid": "folder of CamVid, for trainings to the end (default: none)",
    "batch": "images of a training step, where 16 do not fit (default: 16)",
    "reduced": (False, "small sizes, as on a CPU"),
    "list": (False, "show the steps and end"),
}


def main(argv: Sequence[str]) -> int:
    """Runs the steps; returns 0 if all of them have ended."""
    values = command_line.parse(list(argv), FLAGS, doc=__doc__, with_config=False)
    minutes = _number("minutes", values.minutes, 40.0)
    batch = _number("batch", values.batch, 0)
    if values.camvid and not (Path(values.camvid) / "train.txt").is_file():
        raise UserError(
            f"--camvid {values.camvid}: there is no train.txt; expected a folder with train, "
            "trainannot, train.txt and so on (configs/camvid_resnet18.py)"
        )
    camvid = os.path.abspath(values.camvid) if values.camvid else None
    folder = Path(values.output or "runs/accelerator").absolute()
    if values.list:
        _list(plan.choose(_steps(values.reduced, batch, camvid), values.only))
        return 0
    plan.choose(_steps(values.reduced, batch, camvid), values.only)  # wrong names are refused first
    # Who ends this program wants its steps to end, too: as an exception, it does.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return _measure(values, folder, batch, camvid, 60 * minutes)
    finally:
        signal.signal(signal.SIGTERM, before)


def _measure(values: Any, folder: Path, batch: int, camvid: str | None, seconds: float) -> int:
    machine = _machine(folder)
    reduced = values.reduced or machine["platform"] == "cpu"
    if reduced and not values.reduced:
        if machine["nvidia_smi"]:
            raise UserError(
                f"this machine has {machine['nvidia_smi']!r}, but JAX finds only its CPU; install "
                'with ".[cuda]" (benchmarks/accelerator.sh does), or give --reduced to measure the '
                "CPU"
            )
        print("no accelerator here: reduced sizes, on the CPU", file=sys.stderr)
    steps = plan.choose(_steps(reduced, batch, camvid), values.only)
    outcomes = run.run_all(steps, folder, seconds, lambda _: _report_so_far(folder))
    report.write(folder)
    print(f"\nwrote {folder / report.REPORT} and {folder / report.SECTION}", file=sys.stderr)
    left = [outcome for outcome in outcomes if outcome.status != run.ENDED]
    for outcome in left:
        print(f"{outcome.name}: {outcome.status}", file=sys.stderr)
    if left:
        print("the same command goes on with these", file=sys.stderr)
    return 1 if left else 0


def _steps(reduced: bool, batch: int, camvid: str | None) -> list[plan.Step]:
    sizes = plan.REDUCED if reduced else plan.FULL
    return plan.steps(dataclasses.replace(sizes, batch=batch or sizes.batch), camvid)


def _machine(folder: Path) -> dict[str, Any]:
    """Looks at the machine, anew in every call.

    Raises:
        UserError: JAX does not start, or the folder has the figures of another device.
    """
    step = plan.steps(plan.FULL)[0]
    own = folder / step.name
    try:
        own.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot make a folder there: {error}") from error
    stored = run.read_result(own)
    result = run.run_step(step, own, float("inf"))
    found, known = (run.machine_of({step.name: x}) if x else None for x in (result, stored))
    if found and known and found["device"] != known["device"]:
        run.write_result(own, stored)
        raise UserError(
            f"{folder} has figures of {known['device']!r}, and JAX finds {found['device']!r} here; "
            "give another folder as --output"
        )
    if not found:
        log = own / run.LOG
        raise UserError(f"JAX does not start here; {log} says why:\n{_last_lines(log)}")
    return found


def _report_so_far(folder: Path) -> None:
    try:
        report.write(folder)
    except Exception as error:  # an hour of a device is worth more; the last report will say it
        print(f"no report yet: {error!r}", file=sys.stderr)


def _last_lines(log: Path, count: int = 5) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])


def _number(name: str, text: str | None, default: float) -> float:
    """The value of a flag that takes a positive number, whole if `default` is."""
    try:
        value = default if text is None else type(default)(text)
    except ValueError as error:
        raise UserError(f"--{name} {text}: expected a positive number") from error
    if text is not None and not 0 < value < float("inf"):
        raise UserError(f"--{name} {text}: expected a positive number")
    return value


def _list(steps: Sequence[plan.Step]) -> None:
    total = 0.0
    for step in steps:
        total += step.seconds
        takes = format_duration(step.seconds)
        print(f"{step.name:32}{takes:>7}  {format_duration(total):>7}  {step.why}")


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
