"""The kernels that a training step spends its time in: a trace of a few steps, and its longest ten.

    python -m benchmarks.longest_kernels --config configs/ade20k_resnet50.py --crop 512x512
    python -m benchmarks.longest_kernels --profile runs/mine/profile

With --profile: of a trace that is there, as `config.train.profile_steps` writes it. A kernel's time
is its own, without that of the operations inside it (a loop's body). On a CPU, where there are no
kernels, they are the operations of the compiled program.
"""

import collections
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import measure, models
from memseg_jax import command_line
from memseg_jax.errors import UserError
from memseg_jax.training.program import random_batch

FLAGS = {name: models.FLAGS[name] for name in ("crop", "batch", "dtype")} | {
    "profile": "folder with a trace, to read instead of taking one",
    "trace": "folder that gets the trace (default: a temporary one)",
    "steps": "training steps to trace (default: 5)",
    "count": "kernels to list (default: 10)",
}
_WARM_UP = 3
_EPOCH_STEPS = 1000


def main(argv: Sequence[str]) -> int:
    """Prints a Markdown table and a line of JSON; returns the exit status."""
    values = measure.parse(argv, FLAGS, __doc__, config=True)
    count = measure.number("count", values.count, 10)
    if values.profile:
        what, rows, steps = f"trace in {values.profile}", kernels(Path(values.profile)), None
    else:
        steps = measure.number("steps", values.steps, 5)
        with tempfile.TemporaryDirectory() as folder:
            what = _trace(values, steps, Path(values.trace or folder))
            rows = kernels(Path(values.trace or folder))
    total = sum(row["seconds"] for row in rows)
    print(f"\n{what}: {1e3 * total / (steps or 1):.4g} ms in {len(rows)} kernels\n")
    print("| kernel | from | times | ms | share |\n|---|---|---|---|---|")
    for row in rows[:count]:
        row["share"] = row["seconds"] / total
        source = ", ".join(row["operations"][:2])
        print(
            f"| {row['name'][:80]} | {source[:60]} | {row['times']} | "
            f"{1e3 * row['seconds']:.4g} | {row['share']:.1%} |"
        )
    facts = {"benchmark": "longest_kernels", "what": what, "steps": steps, "seconds": total}
    facts |= {"kernels": len(rows)} | measure.machine()
    print("\n" + json.dumps(facts | {"rows": rows[:count]}), flush=True)
    return 0


def _trace(values: Any, steps: int, folder: Path) -> str:
    """Traces training steps on random images; returns what they are."""
    config, model, variables = models.prepare(values)
    batch = random_batch(
        config.train.batch_size, tuple(config.augment.crop), len(config.data.class_names)
    )
    take_step, _ = measure.training_step(config, model, variables, batch, _EPOCH_STEPS)
    for _ in range(_WARM_UP):
        take_step()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # what Python does fills the file and is not read
    with jax.profiler.trace(str(folder), profiler_options=options):
        for _ in range(steps):
            take_step()
    return f"{steps} training steps: {models.describe(config)}"


def kernels(folder: Path) -> list[dict[str, Any]]:
    """Adds up the time of every kernel in a trace.

    Args:
        folder: that was given to the profiler, or `profile` of a run.

    Returns:
        The longest first: "name", "operations" (those of the program that it comes from, where the
        trace says so), "times" and "seconds", its own, of all devices.

    Raises:
        UserError: there is no trace, or no kernel in it.
    """
    files = sorted(folder.rglob("*.xplane.pb"))
    if not files:
        raise UserError(f"{folder} holds no trace: no file *.xplane.pb in it or below")
    newest = max(file.parent.name for file in files)  # folders are named by the time
    seconds: collections.Counter = collections.Counter()
    times: collections.Counter = collections.Counter()
    operations: dict[str, dict[str, None]] = collections.defaultdict(dict)
    for file in files:
        if file.parent.name != newest:
            continue
        data = jax.profiler.ProfileData.from_file(str(file))
        for events in device_lines(data):
            for event, own in own_times(events):
                name = event.name
                seconds[name] += own / 1e9
                times[name] += 1
                if operation := dict(event.stats).get("hlo_op"):
                    operations[name].setdefault(str(operation))
    if not seconds:
        raise UserError(f"{folder}: the trace has no kernel; nothing ran while it was taken")
    return [
        {"name": name, "operations": list(operations[name]), "times": times[name], "seconds": own}
        for name, own in seconds.most_common()
    ]


def device_lines(data: Any) -> Iterator[list[Any]]:
    """The events of each line of a trace on which a device shows its kernels.

    GPUs have a line for each stream, TPUs one of operations. On a CPU, operations are among the
    other events of the threads that run them, and are those that say which they are.

    Args:
        data: `jax.profiler.ProfileData`, or what has the same attributes.
    """
    for plane in data.planes:
        for line in plane.lines:
            if plane.name.startswith("/device:TPU"):
                wanted = line.name == "XLA Ops"
            elif plane.name.startswith("/device:"):
                wanted = line.name.startswith("Stream")
            elif plane.name == "/host:CPU":
                yield [event for event in line.events if "hlo_op" in dict(event.stats)]
                continue
            else:
                continue
            if wanted:
                yield list(line.events)


def own_times(events: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Each event of a line with its time in ns, less that of the events inside it."""
    ordered = sorted(events, key=lambda event: (event.start_ns, -event.duration_ns))
    own = [float(event.duration_ns) for event in ordered]
    around: list[int] = []  # the events that the present one is inside of
    for index, event in enumerate(ordered):
        while around and event.start_ns >= _end(ordered[around[-1]]):
            around.pop()
        # What only overlaps runs beside it, as on the threads of a CPU.
        if around and _end(event) <= _end(ordered[around[-1]]):
            own[around[-1]] -= event.duration_ns
        around.append(index)
    return zip(ordered, (max(x, 0.0) for x in own))


def _end(event: Any) -> float:
    return event.start_ns + event.duration_ns


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
