"""Stopping a training with signals: nothing is lost, and the status says what happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from memseg_jax import checkpoint
from memseg_jax.errors import Stopped
from memseg_jax.inference import Prediction
from memseg_jax.runtime import distributed
from memseg_jax.runtime.stopping import SIGNALS, StopRequests
from memseg_jax.scoring import evaluator
from tests import tiny
from tests.processes import (
    LIMIT,
    PROGRAM,
    STEPS,
    assert_same_run,
    finish,
    rows,
    run,
    start,
    wait_for,
)

pytestmark = [
    pytest.mark.usefixtures("quiet_entry"),
]
HANDLERS = {number: signal.getsignal(number) for number in SIGNALS}


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Handlers are as they were, and nobody is asked to stop."""
    yield
    distributed.stop_requested().clear()
    assert {number: signal.getsignal(number) for number in SIGNALS} == HANDLERS
    assert signal.set_wakeup_fd(-1) == -1


def send(number, at):
    """What a step does that sends a signal to this process at some step, and waits for it."""

    def during(step):
        if step == at:
            os.kill(os.getpid(), number)
            assert distributed.stop_requested().wait(LIMIT)

    return during


class FakePredictor:
    """Predicts one class; sends a signal before its last image."""

    signal_at_last = True

    def __init__(self, *args, **kw):
        pass

    def predict(self, variables, images):
        for index, image in images:
            if index == 3 and self.signal_at_last:
                os.kill(os.getpid(), signal.SIGTERM)
                assert distributed.stop_requested().wait(LIMIT)
            size = image.shape[:2]
            yield Prediction(index, np.zeros(size, np.uint8))


# ---- In this process ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number",
    [n if n == signal.SIGTERM else pytest.param(n, marks=pytest.mark.slow) for n in SIGNALS],
)
def test_a_signal_saves_at_the_end_of_the_step(
    place_of_run, capsys, monkeypatch, three_convolutions, number
):
    tiny.count_steps(monkeypatch, send(number, at=5))
    monkeypatch.setattr(evaluator, "Predictor", FakePredictor)
    monkeypatch.setattr(FakePredictor, "signal_at_last", False)
    arguments = (f"--config.data.root={tiny.data_root()}", "--workdir", place_of_run)
    arguments += ("--config.checkpoint.every=1000",)
    assert tiny.run(*arguments) == Stopped.EXIT_STATUS
    error = capsys.readouterr().err
    name = signal.Signals(number).name
    assert f"{name}: finishing the step and saving" in error
    assert f"stopped by {name} after step 5 of {STEPS}, which is saved" in error
    assert checkpoint.all_steps(place_of_run) == [5]
    assert [int(row["step"]) for row in rows(place_of_run)] == [1, 2, 3, 4, 5]
    assert tiny.run(*arguments) == 0
    assert [int(row["step"]) for row in rows(place_of_run)] == list(range(1, STEPS + 1))


def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(
    tmp_path, capsys, monkeypatch, three_convolutions
):
    tiny.count_steps(monkeypatch)
    monkeypatch.setattr(evaluator, "Predictor", FakePredictor)
    arguments = (f"--config.data.root={tiny.data_root()}", "--workdir", tmp_path)
    assert tiny.run(*arguments) == Stopped.EXIT_STATUS
    assert f"stopped by SIGTERM after step {STEPS} of {STEPS}" in capsys.readouterr().err
    assert checkpoint.all_steps(tmp_path)[-1] == STEPS
    assert not (tmp_path / "metrics.json").exists()
    monkeypatch.setattr(FakePredictor, "signal_at_last", False)
    assert tiny.run(*arguments) == 0  # which makes up for it
    assert json.loads((tmp_path / "metrics.json").read_text())["step"] == STEPS


def test_signals_are_left_alone_in_other_threads():
    found = []

    def listen():
        with StopRequests() as stops:
            found.append((signal.getsignal(signal.SIGTERM), stops.wanted(), stops.reached(False)))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [(HANDLERS[signal.SIGTERM], False, False)]


def test_in_another_program_nothing_ends_it(capfd):
    with StopRequests(ends_process=False) as stops:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        assert not stops.wanted()
    with StopRequests(ends_process=False) as stops:
        stops.unsaved = True
        signal.raise_signal(signal.SIGTERM)
        assert distributed.stop_requested().wait(LIMIT)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert "after step 3 of 4" in str(stops.stopped(3, 4))
    assert capfd.readouterr().err.count("finishing the step and saving") == 1


# ---- A program that does nothing but wait -------------------------------------------------------


def waiting_program(unsaved):
    """Starts a program that listens for signals while its main thread sleeps in one call."""
    text = f"""
        import time
        from memseg_jax.runtime.stopping import StopRequests
        with StopRequests() as stops:
            stops.unsaved = {unsaved}
            print("ready", flush=True)
            end = time.monotonic() + {LIMIT}
            while time.monotonic() < end:
                time.sleep(0.5)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text)], cwd=tiny.ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_first_step_there_is_nothing_to_wait_for(number):
    process = waiting_program(unsaved=False)
    process.send_signal(number)
    _, error = process.communicate(timeout=LIMIT)
    assert process.returncode == Stopped.EXIT_STATUS
    assert f"stopped by {signal.Signals(number).name}, there was nothing new to save" in error


def test_a_second_interrupt_stops_at_once_and_a_second_sigterm_does_not():
    process = waiting_program(unsaved=True)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(1)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    assert error.count("finishing the step and saving") == 1
    assert "interrupted a second time" in error


# ---- The real program ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run that was never stopped."""
    workdir = tmp_path_factory.mktemp("never_stopped") / "run"
    run(1, workdir)
    return workdir


def checksums(workdir):
    """Of every array of the last checkpoint."""
    step, meta = checkpoint.read_meta(workdir, "last")
    assert step == STEPS
    assert len(meta["checksums"]) > 50
    return meta["checksums"]


def stop_after_some_steps(workdir, *arguments, count=1, which=-1):
    processes = start(count, workdir, *arguments)
    wait_for(lambda: "step 2/16" in processes[0].log.read_text(), processes)
    processes[which].send_signal(signal.SIGTERM)
    codes, logs = finish(processes)
    assert codes == [Stopped.EXIT_STATUS] * count, logs
    step = checkpoint.all_steps(workdir)[-1]
    assert f"after step {step} of {STEPS}, which is saved" in logs[0]
    assert 2 <= step < STEPS
    return step


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.exhaustive), 2])
def test_stopped_and_continued_is_the_run_that_never_stopped(alone, tmp_path, workers):
    workdir = tmp_path / "run"
    arguments = (f"--config.data.workers={workers}", "--config.checkpoint.every=1000")
    step = stop_after_some_steps(workdir, *arguments)
    (log,) = run(1, workdir, *arguments)
    assert f"resuming at step {step} of {STEPS}" in log
    assert checksums(workdir) == checksums(alone)
    assert_same_run(workdir, alone)


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(alone, tmp_path):
    workdir = tmp_path / "run"
    # Only the second one gets the signal.
    step = stop_after_some_steps(workdir, "--config.checkpoint.every=1000", count=2, which=1)
    assert checkpoint.all_steps(workdir) == [step]
    logs = run(2, workdir)
    assert f"resuming at step {step} of {STEPS}" in logs[0]
    assert_same_run(workdir, alone)


@pytest.mark.slow
def test_a_worker_that_raises(alone, tmp_path):
    root = shutil.copytree(tiny.data_root(), tmp_path / "data")
    bad = root / "images" / "train" / "07.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:40])
    workdir = tmp_path / "run"
    arguments = ("--config.data.workers=2", "--config.checkpoint.every=1")
    codes, logs = finish(start(1, workdir, *arguments, root=root))
    assert codes == [1]
    assert "images/train/07.png" in logs[0]
    assert "Traceback" not in logs[0]
    bad.write_bytes(good)
    run(1, workdir, *arguments, root=root)
    assert checksums(workdir) == checksums(alone)


def children(pid):
    """Process ids of the workers of a process."""
    found = Path(f"/proc/{pid}/task").glob("*/children")
    pids = [int(pid) for path in found for pid in path.read_text().split()]
    return [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_a_worker_that_is_killed_does_not_hang_the_run(alone, tmp_path):
    workdir = tmp_path / "run"
    arguments = ("--config.data.workers=1", "--config.data.prefetch=1")
    arguments += ("--config.checkpoint.every=1",)
    (process,) = start(1, workdir, *arguments)
    wait_for(lambda: "step 1/16" in process.log.read_text(), [process])
    for pid in children(process.pid):
        os.kill(pid, signal.SIGKILL)
    codes, logs = finish([process])
    assert codes != [0] or "step 16/16" in logs[0]
    run(1, workdir, *arguments)
    assert checksums(workdir) == checksums(alone)


def test_the_program_of_these_tests_is_there():
    assert (tiny.ROOT / (PROGRAM[-1].replace(".", "/") + ".py")).is_file()
