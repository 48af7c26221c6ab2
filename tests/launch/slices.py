"""Takes gcloud's place: a slice is a folder, each of its hosts a folder in it, ssh a shell there.

Run as a program, it understands the commands of `docs/launch/tpu_pod.sh`, and no flag that gcloud
does not have; its buckets are folders, too. The environment says where slices are ($SLICES) and how
many hosts one has ($HOSTS). Imported, it has what the cloud does: it takes slices back.
"""

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

FLAGS = {
    "queued-resources create": {"zone", "node-id", "accelerator-type", "runtime-version", "spot"},
    "queued-resources list": {"zone", "filter", "format"},
    "queued-resources delete": {"zone", "force", "quiet"},
    "tpu-vm list": {"zone", "filter", "format"},
    "tpu-vm ssh": {"zone", "worker", "quiet", "command"},
    "tpu-vm scp": {"zone", "worker", "quiet"},
}
# JAX takes the hosts for tasks of Slurm, and the port of the first one from the number of the job.
_FIRST_PORT, _PORTS = 61440, 4096


def main(arguments: list[str]) -> int:
    """Does what gcloud would do; returns the exit status."""
    words = [word for word in arguments if not word.startswith("--")]
    flags = dict(word[2:].partition("=")[::2] for word in arguments if word.startswith("--"))
    if words[:2] == ["storage", "cat"]:
        assert flags.keys() == {"range"}
        content = Path(words[2]).read_bytes()
        sys.stdout.buffer.write(content[int(flags["range"].removesuffix("-")) :])
        return 0
    assert words[:2] == ["compute", "tpus"], words
    what = " ".join(words[2:4])
    assert flags.keys() <= FLAGS[what], (what, flags)
    root = Path(os.environ["SLICES"])
    if what.endswith("list"):
        assert flags["format"] == f"value({'state' if what[0] == 't' else 'state.state'})"
        name = flags["filter"].removeprefix("name~/").removesuffix("$")
        which = "node" if what[0] == "t" else "state"
        print(_read(root / name / which))
        return 0
    place = root / words[-1].partition(":")[0]
    if what.endswith("create"):
        return _create(place)
    if what.endswith("delete"):
        _end_all(place)
        shutil.move(place / "hosts", place / f"hosts_{time.monotonic_ns()}")
        (place / "state").unlink()
        return 0
    if _read(place / "node") != "READY":
        print("ssh: connect to host: connection timed out", file=sys.stderr)
        return 255
    if what.endswith("scp"):
        target = words[-1].partition(":")[2]
        for host in _hosts(place):
            shutil.copy(words[4], host / target)
        return 0
    return _on_all(place, flags["command"])


def _create(place: Path) -> int:
    refusals = Path(f"{place}.refusals")
    if left := int(_read(refusals) or 0):
        refusals.write_text(str(left - 1))
        print("ERROR: quota exceeded", file=sys.stderr)
        return 1
    assert not (place / "state").exists()
    for index in range(int(os.environ["HOSTS"])):
        (place / "hosts" / str(index)).mkdir(parents=True)
    for number in itertools.count(os.getpid()):
        with socket.socket() as free, open(place / "job", "w") as job:
            try:
                free.bind(("127.0.0.1", _FIRST_PORT + number % _PORTS))
            except OSError:
                continue
            job.write(str(number % _PORTS))
            break
    (place / "node").write_text("READY")
    (place / "state").write_text(_read(Path(f"{place}.next")) or "ACTIVE")
    Path(f"{place}.next").unlink(missing_ok=True)
    return 0


def _on_all(place: Path, command: str) -> int:
    """Runs a command in the home of each host, at the same time."""
    hosts = _hosts(place)
    processes = []
    for index, home in enumerate(hosts):
        env = os.environ | {
            "SLICE": str(place),
            "HOME": str(home),
            "TMPDIR": str(home),
            "SLURM_JOB_ID": _read(place / "job"),
            "SLURM_STEP_NODELIST": "127.0.0.1",
            "SLURM_NTASKS": str(len(hosts)),
            "SLURM_PROCID": str(index),
            "SLURM_LOCALID": "0",
        }
        processes.append(subprocess.Popen(["bash", "-c", command], cwd=home, env=env))
    return max(process.wait() for process in processes)


def _hosts(place: Path) -> list[Path]:
    return sorted((place / "hosts").iterdir())


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


# ---- What the cloud does ------------------------------------------------------------------------


def take_back(place: Path, seconds: float) -> None:
    """Takes a slice back: its processes get SIGTERM and some seconds, or, with 0, neither.

    Its request is suspended, and what was on its hosts can be looked at, but not from them.
    """
    if seconds:
        _signal_all(place, signal.SIGTERM)
        limit = time.monotonic() + seconds
        while _processes(place) and time.monotonic() < limit:
            time.sleep(0.05)
    (place / "node").write_text("PREEMPTED")
    _end_all(place)
    (place / "state").write_text("SUSPENDED")


def _end_all(place: Path) -> None:
    while _processes(place):
        _signal_all(place, signal.SIGKILL)
        time.sleep(0.01)


def _signal_all(place: Path, number: int) -> None:
    for process in _processes(place):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def _processes(place: Path) -> list[int]:
    """Those that were started by `tpu-vm ssh`: they have the slice in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"SLICE={place}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
