"""Seconds from the start of a training to its first step, with an empty and a filled cache.

    python -m benchmarks.start_up
    python -m benchmarks.start_up --processes=2 --caches=/tmp/programs,gs://my-bucket/programs
    python -m benchmarks.start_up --config configs/ade20k_resnet50.py --config.data.root=DATA

The real program is started as a user starts it, in a new workdir on this machine, and ended when it
shows its first step; first with an empty cache of compiled programs, then with what that left.
Places for caches are folders, on a disk or in a bucket, in which each round makes one of its own.
A bucket may be that of a server on this machine: $STORAGE_EMULATOR_HOST says where it is. Process 0
is measured; the others start with it, on the same cores.
"""

import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import measure
from memseg_jax import command_line

FLAGS = {
    "processes": "how many take part (default: 1)",
    "caches": "places for caches, comma-separated (default: a temporary folder)",
    "rounds": "how often, at each place in turn (default: 3)",
}
# What ends each phase: the beginning of a line of process 0.
PHASES = {
    "until compiling": "compiling the training step",
    "compiling": "compiled the training step",
    "first step": "step ",
}


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    values = measure.parse(argv, FLAGS, __doc__, config=True, default_config=measure.SMALL_CONFIG)
    count = measure.number("processes", values.processes, 1)
    rounds = measure.number("rounds", values.rounds, 3)
    given = [word for word in argv[1:] if word.split("=")[0].startswith("--config.")]
    arguments = [f"--config={values.config_flag}", *given]
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        places = values.caches.split(",") if values.caches else [folder]
        for _ in range(rounds):
            for place in places:
                cache = f"{place}/{secrets.token_hex(4)}"
                for state in ("empty", "filled"):
                    seconds = seconds_to_first_step(arguments, count, cache, folder)
                    results.setdefault((place, state), []).append(seconds)
                    print(f"{place} {state}: {seconds}", file=sys.stderr, flush=True)
    _report(results, values.config_flag, count, rounds)
    return 0


def seconds_to_first_step(
    arguments: Sequence[str], count: int, cache: str, folder: str
) -> dict[str, float]:
    """Starts a training, waits for its first step, and ends it.

    Args:
        arguments: of the program, --config among them.
        count: number of processes.
        cache: folder of compiled programs.
        folder: an existing one, for the workdir.

    Returns:
        Seconds of each of `PHASES`.

    Raises:
        RuntimeError: it ended before its first step.
    """
    workdir = tempfile.mkdtemp(dir=folder)
    command = [sys.executable, "-u", "-m", "memseg_jax.main", *arguments, f"--workdir={workdir}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    start = time.perf_counter()
    try:
        for index in range(count):
            together = ["--num_processes", str(count), "--process_id", str(index)]
            together += ["--coordinator_address", address]
            processes.append(
                subprocess.Popen(
                    [*command, "--config.train.log_every=1", *(together if count > 1 else ())],
                    env=os.environ | {"MEMSEG_CACHE": cache},
                    stdout=subprocess.DEVNULL if index else subprocess.PIPE,
                    stderr=subprocess.DEVNULL if index else subprocess.STDOUT,
                    text=True,
                )
            )
        return _phases(processes[0].stdout, start)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _phases(lines: Any, start: float) -> dict[str, float]:
    seconds, seen = {}, []
    wanted = list(PHASES)
    for line in lines:
        seen.append(line)
        if line.startswith(PHASES[wanted[0]]):
            now = time.perf_counter()
            seconds[wanted.pop(0)], start = now - start, now
            if not wanted:
                return seconds
    raise RuntimeError("the training ended before its first step:\n" + "".join(seen[-20:]))


def _report(results: Any, config: str, count: int, rounds: int) -> None:
    medians = {
        key: {phase: statistics.median(x[phase] for x in of_key) for phase in PHASES}
        for key, of_key in results.items()
    }
    print(f"\n{config}, {count} process(es), medians of {rounds} round(s), seconds\n")
    print(f"| cache | state | {' | '.join(PHASES)} | together | compiling, times that of empty |")
    print("|---" * (len(PHASES) + 4) + "|")
    for (place, state), of_phase in medians.items():
        ratio = of_phase["compiling"] / medians[place, "empty"]["compiling"]
        shown = [*of_phase.values(), sum(of_phase.values())]
        print(f"| {place} | {state} | {' | '.join(f'{x:.1f}' for x in shown)} | {ratio:.2f} |")
    facts = {"benchmark": "start_up", "config": config, "processes": count} | measure.machine()
    facts["rounds"] = [[*key, of_key] for key, of_key in results.items()]
    print("\n" + json.dumps(facts), flush=True)


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
