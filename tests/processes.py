"""Several real processes as one run, for tests: started, waited for, and compared.

They train in double precision (see `small_program`), so that sums in another order, which is all
that several processes change, do not show in the nine digits of metrics.csv.
"""

import contextlib
import csv
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from tests import session, tiny

PROGRAM = (sys.executable, "-m", "tests.small_program")
WITH_RESNET = (sys.executable, "-m", "memseg_jax.main", "--config", tiny.CONFIG)
STEPS = 16
LIMIT = 600  # seconds; the machine may be busy
LOSSES = ("loss", "loss_stage1", "loss_stage2", "loss_aux", "loss_memory", "lr")


def start(
    count, workdir, *arguments, root=None, devices=1, program=PROGRAM, heartbeat=300, last=(),
    homes=None, of_last=(),
):  # fmt: skip
    """Starts the processes of one run; their output goes to files beside the workdir.

    `last` are further arguments of the last process, `of_last` its own environment. With a folder
    `homes`, each process has a disk of its own there, as far as a process can tell, and the output
    goes there.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"{tiny.FLAGS} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "MEMSEG_CACHE": session.cache(),
        "MEMSEG_HEARTBEAT_SECONDS": str(heartbeat),
        "PYTHONFAULTHANDLER": "1",  # for `where_they_are`
    }
    processes = []
    for index in range(count):
        command = [*program, "--workdir", workdir, *arguments]
        command.append(f"--config.data.root={root or tiny.data_root()}")
        if count > 1:
            command.append(f"--coordinator_address=127.0.0.1:{port}")
            command += [f"--num_processes={count}", f"--process_id={index}"]
        if index == count - 1:
            command += last
        beside, own, place = workdir, env, tiny.ROOT
        if homes:
            beside = homes / "run"
            place = tempfile.mkdtemp(dir=homes)
            own = env | {"HOME": place, "TMPDIR": place, "PYTHONPATH": str(tiny.ROOT)}
        if index == count - 1:
            own = own | dict(of_last)
        path = beside.with_name(f"{beside.name}.{time.monotonic_ns()}.{index}.log")
        with open(path, "w") as file:
            process = subprocess.Popen(
                list(map(str, command)), cwd=place, env=own, stdout=file, stderr=file
            )
        process.log = path
        processes.append(process)
    return processes


def finish(processes, limit=LIMIT):
    """Waits for all; returns their exit statuses and what they printed."""
    try:
        for process in processes:
            process.wait(limit)
    except subprocess.TimeoutExpired:
        pytest.fail(where_they_are(processes))
    finally:
        for process in processes:
            process.kill()
    return [p.returncode for p in processes], [p.log.read_text() for p in processes]


def run(count, workdir, *arguments, **options):
    codes, logs = finish(start(count, workdir, *arguments, **options))
    assert codes == [0] * count, "\n".join(logs)
    return logs


def wait_for(condition, processes):
    limit = time.monotonic() + LIMIT
    while not condition():
        assert all(p.poll() is None for p in processes), [p.log.read_text() for p in processes]
        assert time.monotonic() < limit, where_they_are(processes)
        time.sleep(0.01)


def where_they_are(processes):
    """Ends processes that do not go on; returns what they printed, and all stacks."""
    for process in processes:
        process.send_signal(signal.SIGABRT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        for process in processes:
            process.wait(60)
    return "\n".join(process.log.read_text() for process in processes)


def rows(workdir, column="loss"):
    text = (workdir / "metrics.csv").read_text()
    return [row for row in csv.DictReader(text.splitlines()) if row[column]]


def assert_same_run(workdir, other, losses=LOSSES):
    """Losses of every step to the last of nine digits or nearly so; the scores exactly."""
    ours, theirs = rows(workdir), rows(other)
    assert [row["step"] for row in ours] == [str(step) for step in range(1, STEPS + 1)]
    for a, b in zip(ours, theirs, strict=True):
        for name in losses:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-7, abs=1e-12)
    for name in ("metrics.json", "per_class.csv", "examples.png"):
        assert (workdir / name).read_bytes() == (other / name).read_bytes()
