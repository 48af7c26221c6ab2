"""Damaged checkpoints and two real processes that each hold a part of the arrays: no hang."""

import os
import socket
import subprocess
import sys

from tests import tiny
from tests.checkpoints import DAMAGES


def test_every_damage_is_survived_and_nobody_waits_for_ever(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": tiny.FLAGS,
        "MEMSEG_HEARTBEAT_SECONDS": "300",
    }
    command = [sys.executable, "-m", "tests.checkpoint.two_processes", address]
    processes = []
    for index in range(2):
        with open(tmp_path / f"{index}.log", "w") as log:
            processes.append(
                subprocess.Popen(
                    [*command, str(index), str(tmp_path)],
                    cwd=tiny.ROOT, env=env, stdout=log, stderr=log,
                )
            )  # fmt: skip
    try:
        codes = [process.wait(600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [(tmp_path / f"{index}.log").read_text() for index in range(2)]
    assert codes == [0, 0], "\n".join(logs)
    for log in logs:
        for damage in (*DAMAGES, "halve of process 1", "unlink of process 1"):
            assert f"{damage}: step 2" in log
        assert "all damaged: refused" in log
        for shown in ([], [1], [1, 2, 3, 9]):
            assert f"another list {shown}: step 3" in log
