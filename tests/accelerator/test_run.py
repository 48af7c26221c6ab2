"""The steps of a plan: ended, failed, late, left out, gone on with."""

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.accelerator import plan, process, run
from benchmarks.accelerator.plan import Step

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def step(name, code, seconds=1.0, files=()):
    """A step that runs a line of Python."""
    return Step(name, (("-c", code),), seconds, "a test", files)


def printing(values):
    return f"print({json.dumps(json.dumps(values))})"


def statuses(outcomes):
    return {outcome.name: outcome.status for outcome in outcomes}


def test_a_failed_step_does_not_end_the_run_and_is_tried_again(tmp_path):
    here = tmp_path / "ran.txt"
    count = f"open({str(here)!r}, 'a').write('x'); "
    mended = tmp_path / "mended"
    steps = [
        step("good", count + printing({"benchmark": "a", "x": 1})),
        step("bad", f"import os, sys; sys.exit(0 if os.path.exists({str(mended)!r}) else 3)"),
        step("other", printing({"benchmark": "b"}) + "; print('{broken'); print('{}')"),
    ]
    steps[1] = dataclasses.replace(steps[1], commands=(*steps[1].commands, *steps[2].commands))
    calls = []
    outcomes = run.run_all(steps, tmp_path / "all", 1e6, lambda x: calls.append(len(x)))
    assert statuses(outcomes) == {"good": run.ENDED, "bad": run.FAILED, "other": run.ENDED}
    assert calls == [1, 2, 3]
    results = run.read_all(tmp_path / "all")
    assert list(results) == ["good", "bad", "other"]
    assert results["good"]["results"] == [{"benchmark": "a", "x": 1}]
    assert (results["bad"]["exit_status"], results["bad"]["results"]) == (3, [])
    assert results["other"]["results"] == [{"benchmark": "b"}]  # other lines are no results

    mended.touch()
    outcomes = run.run_all(steps, tmp_path / "all", 1e6)
    assert statuses(outcomes) == dict.fromkeys(("good", "bad", "other"), run.ENDED)
    assert [outcome.before for outcome in outcomes] == [True, False, True]
    assert here.read_text() == "x"
    steps[0] = step("good", count + count + printing({"benchmark": "a"}))  # another command
    run.run_all(steps, tmp_path / "all", 1e6)
    assert here.read_text() == "xxx"


def test_what_does_not_fit_into_the_time_is_left_out(tmp_path):
    code, lines = printing({"benchmark": "a"}), []
    steps = [step("short", code, 1), step("long", code, 2e6), step("last", code, 1)]
    outcomes = run.run_all(steps, tmp_path, 1e6, say=lines.append)
    assert statuses(outcomes) == {"short": run.ENDED, "long": run.SKIPPED, "last": run.ENDED}
    assert any("long: left out, takes about" in line for line in lines)
    assert run.read_all(tmp_path)["long"]["status"] == run.SKIPPED
    assert statuses(run.run_all(steps[1:2], tmp_path, 4e6)) == {"long": run.ENDED}


def test_files_are_results_too(tmp_path):
    code = "import os, sys; os.mkdir(sys.argv[1]); open(sys.argv[1] + '/m.json', 'w').write('[2]')"
    code = code.replace("[2]", '{"x": 2}')
    good = Step("good", (("-c", code, f"{plan.STEP_FOLDER}/run"),), 1, "", ("run/m.json",))
    assert run.run_step(good, tmp_path / "good", 1e6)["results"] == [{"x": 2}]
    # A program that says nothing has not measured anything, whatever its status.
    missing = Step("none", (("-c", "pass"),), 1, "", ("run/m.json",))
    assert run.run_step(missing, tmp_path / "none", 1e6)["status"] == run.FAILED
    assert run.run_step(step("dumb", "pass"), tmp_path / "dumb", 1e6)["status"] == run.FAILED


@linux
def test_a_late_program_is_ended_with_children_that_ignore_the_request(tmp_path, monkeypatch):
    """Time is over as soon as the child is there: nothing depends on how fast this machine is."""
    log = tmp_path / "log.txt"
    child = "trap '' TERM; echo child $$; while true; do sleep 1; done"
    (tmp_path / "child.sh").write_text(child)
    code = "trap '' TERM; bash child.sh & wait"

    class Late(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is None:
                return super().wait()
            while not re.search(rb"child \d+\n", log.read_bytes()):
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(process, "_GRACE", 0.2)
    monkeypatch.setattr(process.subprocess, "Popen", Late)
    with open(log, "wb") as file:
        assert (
            process.run(("bash", "-c", code), file, 1e6, tmp_path, {"PATH": "/usr/bin:/bin"})
            is None
        )
    pid = int(re.search(rb"child (\d+)\n", log.read_bytes())[1])
    deadline = time.monotonic() + 60
    while running(pid):  # a signal takes its time to arrive
        assert time.monotonic() < deadline
        time.sleep(0.01)


def running(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_late_step_keeps_what_it_printed(tmp_path, monkeypatch):
    def late(command, log, limit, folder, environment):
        log.write(b'{"benchmark": "a"}\n{"benchmark": "b"')

    monkeypatch.setattr(process, "run", late)
    result = run.run_step(step("late", ""), tmp_path / "late", 1e6)
    assert (result["status"], result["results"]) == (run.LATE, [{"benchmark": "a"}])
