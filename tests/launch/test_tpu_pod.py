"""docs/launch/tpu_pod.sh as it is, with a stand-in for gcloud: slices are folders here."""

import csv
import os
import shutil
import subprocess
import sys
import time

import pytest

from memseg_jax import checkpoint
from memseg_jax.runtime import files
from tests import tiny
from tests.launch import slices

SCRIPT = tiny.ROOT / "docs" / "launch" / "tpu_pod.sh"
NAME = "my-slice"
LIMIT = 600  # seconds; the machine may be busy

pytestmark = pytest.mark.skipif(
    not (shutil.which("bash") and shutil.which("flock") and os.path.isdir("/proc/self")),
    reason="needs bash, flock and /proc",
)


class Launch:
    """Calls of the script from a machine of its own, in a folder that has all slices.

    Args:
        folder: an empty one.
        python: what takes the place of Python on the hosts: the lines of a shell script.
        variables: further ones of the environment.
    """

    def __init__(self, folder, python, **variables):
        self.slices = folder / "slices"
        self.slices.mkdir(parents=True)
        self.place = self.slices / NAME
        self._write(folder / "bin" / "gcloud", f'exec "{sys.executable}" "{slices.__file__}" "$@"')
        host_python = self._write(folder / "python", python)
        self.log = folder / "launch.log"
        self.log_object = folder / "runs" / "ade20k_resnet50" / "log.txt"
        self._env = os.environ | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "SLICES": str(self.slices),
            "HOSTS": "2",
            "TPU": NAME,
            "ZONE": "here",
            "BUCKET": str(folder),
            "DATA": "",
            "FLAGS": "",
            "POLL": "0.1",
            "INSTALL": f"mkdir -p .venv/bin && cp '{host_python}' .venv/bin/python",
            **variables,
        }

    def _write(self, path, text):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
        return path

    def start(self, *words):
        with open(self.log, "a") as log:
            command = [str(SCRIPT), *words]
            return subprocess.Popen(command, env=self._env, stdout=log, stderr=log)

    def call(self, *words):
        """The exit status."""
        return self.wait(self.start(*words))

    def wait(self, process):
        try:
            return process.wait(LIMIT)
        finally:
            process.kill()

    @property
    def output(self):
        return self.log.read_text()

    @property
    def is_there(self):
        return (self.place / "state").exists()

    def wait_until(self, condition, process):
        limit = time.monotonic() + LIMIT
        while not condition():
            assert process.poll() is None, self.output
            assert time.monotonic() < limit, self.output
            time.sleep(0.05)

    def end(self):
        """No process is left over, whatever the test found."""
        slices._end_all(self.place)


# ---- What `run` does, without a training --------------------------------------------------------

# Each start on a host does the next line of that host's plan; the last one is done ever again.
FOLLOW_PLAN = """
plan="$SLICES/plan.$SLURM_PROCID"
echo once >> "$SLICES/started.$SLURM_PROCID"
line=$(head -n 1 "$plan")
[ "$(wc -l < "$plan")" -le 1 ] || sed -i 1d "$plan"
eval "$line"
"""
ENDED, FAILED = ("exit 0", "exit 0"), ("echo a reason of its own; exit 1", "exit 1")
ASKED_TO_STOP, KILLED = ("exit 75", "exit 75"), ("exit 1", "kill -KILL $$")
RESTARTED = ("kill -KILL 0", "exit 1")  # of the host: what was started there is gone


@pytest.fixture
def launch(tmp_path):
    launches = []

    def make(*plans, **variables):
        launches.append(made := Launch(tmp_path, FOLLOW_PLAN, **variables))
        for host in range(2):
            lines = [plan[host] for plan in plans]
            (made.slices / f"plan.{host}").write_text("\n".join(lines) + "\n")
        return made

    yield make
    for made in launches:
        made.end()


@pytest.mark.parametrize(
    ("plans", "status", "starts", "words"),
    [
        ([ASKED_TO_STOP, ENDED], 0, 2, "the run has ended"),
        ([FAILED], 1, 1, "a reason of its own"),
        pytest.param([KILLED, ENDED], 0, 2, "the run has ended", marks=pytest.mark.slow),
        pytest.param([RESTARTED, ENDED], 0, 2, "the run has ended", marks=pytest.mark.slow),
        pytest.param([KILLED, FAILED], 1, 2, "a reason of its own", marks=pytest.mark.slow),
        pytest.param([KILLED], 1, 3, "given up: it has ended 3 times", marks=pytest.mark.slow),
    ],
)
def test_how_a_run_ends(launch, plans, status, starts, words):
    made = launch(*plans, TRIES="3")
    assert made.call("run") == status, made.output
    assert words in made.output
    (folder,) = made.place.glob("hosts_*")  # one slice was made, and is deleted
    assert not made.is_there
    assert len((made.slices / "started.0").read_text().split()) == starts, made.output
    assert (folder / "1" / "memseg_jax" / "configs" / "common.py").exists()


def test_it_is_stopped_and_the_slice_stays(launch):
    made = launch(("exec sleep 1000", "exec sleep 1000"))
    process = made.start("run")
    made.wait_until(lambda: ": wait" in made.output, process)
    assert made.call("stop") == 0
    assert made.wait(process) == 75
    assert made.is_there
    assert made.call("state") == 0
    assert made.output.splitlines()[-3:] == ["ready", "stopped", "stopped"]
    assert made.call("delete") == 0
    assert not made.is_there


def test_the_log_is_followed(launch):
    made = launch(ENDED)
    made.log_object.parent.mkdir(parents=True)
    process, shown = made.start("log"), ""
    try:
        for more in ("one\ntwo ä", "\n\nthree\n"):
            shown += more
            made.log_object.with_name("new").write_text(shown)
            made.log_object.with_name("new").rename(made.log_object)
            made.wait_until(lambda end=more: made.output.endswith(end), process)
        time.sleep(0.3)
        assert made.output.partition("one")[2] == shown.removeprefix("one")
    finally:
        process.kill()


@pytest.mark.slow
def test_no_slice_at_first(launch):
    made = launch(ENDED, TRIES="3")
    (made.slices / f"{NAME}.refusals").write_text("2")
    (made.slices / f"{NAME}.next").write_text("FAILED")
    made.place.mkdir()
    assert made.call("run") == 1, made.output  # two refusals and a request that fails
    assert "given up: no slice after 3 tries in a row" in made.output
    assert made.call("run") == 0, made.output


@pytest.mark.slow
def test_machines_that_are_gone_while_the_request_is_active(launch):
    made = launch(("exec sleep 1000", "exec sleep 1000"), ENDED)
    process = made.start("run")
    made.wait_until(lambda: ": wait" in made.output, process)
    (made.place / "node").write_text("PREEMPTED")
    assert made.wait(process) == 0, made.output
    assert "slice taken: recreate" in made.output
    assert len(list(made.place.glob("hosts_*"))) == 2


# ---- A training on a slice that is taken back ---------------------------------------------------

# The tiny training; code and configs are those that the script has brought to the host.
TRAIN = f"""
export PYTHONPATH="{tiny.ROOT}" JAX_PLATFORMS=cpu XLA_FLAGS="{tiny.FLAGS}"
export JAX_LOG_COMPILES=1 JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1
exec "{sys.executable}" -m tests.small_program "${{@:5}}"
"""
EPOCHS, EVERY = 8, 4  # 32 steps, and a checkpoint at every fourth
LOSSES = ("step", "loss", "loss_stage1", "loss_stage2", "loss_aux", "loss_memory", "lr")


def rehearse(folder, bucket, name):
    flags = f"--config.data.root={tiny.data_root()} --config.train.epochs={EPOCHS}"
    return Launch(
        folder,
        TRAIN,
        BUCKET=str(bucket),
        WORKDIR=str(bucket / name),
        FLAGS=f"{flags} --config.checkpoint.every={EVERY}",
        MEMSEG_HEARTBEAT_SECONDS="300",
        POLL="1",
    )


def numbers(workdir):
    """All that a run computes: losses, scores, and the checksum of every array of its end."""
    rows = csv.DictReader(files.read_text(workdir / "metrics.csv").splitlines())
    losses = [[row[name] for name in LOSSES] for row in rows if row["loss"]]
    scores = {name: (workdir / name).read_bytes() for name in ("metrics.json", "per_class.csv")}
    return losses, scores, checkpoint.read_meta(workdir)


@pytest.mark.slow
def test_a_slice_is_taken_back_twice_and_the_run_ends_with_the_same_numbers(bucket, tmp_path):
    undisturbed = rehearse(tmp_path / "a", bucket, "undisturbed")
    assert undisturbed.call("run") == 0, undisturbed.output

    workdir = bucket / "run"
    launch = rehearse(tmp_path / "b", bucket, "run")
    process = launch.start("run")
    try:
        for seconds in (30, 0):  # of grace after SIGTERM; SIGKILL at once
            done = max(checkpoint.all_steps(workdir), default=0)
            launch.wait_until(
                lambda last=done: max(checkpoint.all_steps(workdir), default=0) > last, process
            )
            slices.take_back(launch.place, seconds)
            assert 0 < checkpoint.all_steps(workdir)[-1] < 4 * EPOCHS
        assert launch.wait(process) == 0, launch.output
    finally:
        process.kill()
        launch.end()
    assert launch.output.count("slice taken: recreate") == 2
    first, second, third = (
        [(host / "memseg_jax/.launch/log").read_text() for host in sorted(folder.iterdir())]
        for folder in sorted(launch.place.glob("hosts_*"))
    )
    assert any("is saved. Start the same command again to go on." in log for log in first)
    assert "resuming at step" in second[0]
    assert "resuming at step" in third[0]
    assert f"step {4 * EPOCHS}/{4 * EPOCHS}" in third[0]
    # On CPUs, the keys of a program differ from process to process, and only the first one writes.
    for log in (first[0], second[0], third[0]):
        assert "Persistent compilation cache hit for 'jit_step'" in log
    assert numbers(workdir) == numbers(bucket / "undisturbed")
