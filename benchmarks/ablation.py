"""Scores of a config with several changes, each trained with several seeds.

    python -m benchmarks.ablation --config configs/quickstart.py \
        --variants benchmarks/methods.json --seeds 0,1,2 --workdir runs/methods

The file of variants is JSON: names, each with a list of settings such as
"model.memory.enabled=False"; the first one is what the others are compared with, seed by seed.
Every run is a training of its own, by the real program, in a folder below the workdir. What is
there already is not trained again, and a run that was stopped goes on, so that the same command,
or one with more seeds, completes the table. --only chooses variants of the file, the first of which
is then what the others are compared with. Further `--config.` arguments are for all runs.
"""

import csv
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import measure
from benchmarks.seeds import paired
from memseg_jax import command_line
from memseg_jax.errors import UserError
from memseg_jax.runtime.suggest import did_you_mean
from memseg_jax.runtime.text import first_few

FLAGS = {
    "variants": "a JSON file: {name: [settings]}",
    "only": "comma-separated names of variants (default: all of the file)",
    "seeds": "comma-separated numbers (default: 0,1,2)",
    "workdir": "folder of all runs",
}
RESULTS = "ablation.csv"
SCORES = ("mIoU", "mAcc", "aAcc")
Variant = TypeVar("Variant")


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    values = measure.parse(argv, FLAGS, __doc__, config=True)
    if not values.workdir or not values.variants:
        raise UserError("--variants and --workdir are required; --help says what they are")
    variants = choose(read_variants(values.variants), values.only)
    seeds = read_seeds(values.seeds or "0,1,2")
    given = [word for word in argv[1:] if word.split("=")[0].startswith("--config.")]
    workdir, rows = Path(values.workdir), []
    known = read(workdir / RESULTS)
    for seed in seeds:  # seed by seed: what is there can be compared at any time
        for name, settings in variants.items():
            flags = [*given, *(f"--config.{x}" for x in settings), f"--config.seed={seed}"]
            result = train(values.config_flag, flags, folder_of(workdir, name, seed))
            if before := known.get((name, seed)):  # this call only looked at what is there
                result["seconds"] = before["seconds"]
            rows.append({"variant": name, "seed": seed} | result)
            print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), file=sys.stderr, flush=True)
            known[name, seed] = rows[-1]
            write(workdir / RESULTS, known.values())
    print(table(rows))
    summary = {"benchmark": "ablation", "config": values.config_flag, "rows": rows}
    print(json.dumps(summary), flush=True)
    return 0


def read_variants(path: str) -> dict[str, list[str]]:
    """Reads the file of variants.

    Raises:
        UserError: it is not there, or holds something else.
    """
    try:
        variants = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--variants={path}: {error}; expected a JSON file") from error
    good = isinstance(variants, dict) and all(
        isinstance(settings, list) and all(isinstance(x, str) and "=" in x for x in settings)
        for settings in variants.values()
    )
    if not good or not variants:
        raise UserError(
            f'--variants={path}: expected {{"name": ["model.memory.enabled=False", ...], ...}}'
        )
    return variants


def folder_of(workdir: Path, name: str, seed: int) -> Path:
    """Where the run of a variant is."""
    return workdir / f"{name}_{seed}".replace(" ", "_")


def choose(variants: Mapping[str, Variant], only: str | None) -> dict[str, Variant]:
    """Returns the variants of --only in the order given there; all of them without it.

    Raises:
        UserError: there is no such variant.
    """
    if not only:
        return dict(variants)
    chosen = [name.strip() for name in only.split(",")]
    for name in chosen:
        if name not in variants:
            raise UserError(f"--only: no variant {name!r}. {did_you_mean(name, variants)}")
    return {name: variants[name] for name in chosen}


def read_seeds(text: str) -> list[int]:
    """Returns the numbers of --seeds.

    Raises:
        UserError: it holds something else.
    """
    if not all(word.strip().isdecimal() for word in text.split(",")):
        raise UserError(f"--seeds={text}: expected numbers such as 0,1,2")
    return [int(word) for word in text.split(",")]


def train(config_flag: str, flags: Sequence[str], folder: Path) -> dict[str, float]:
    """Trains one variant to its end; returns its last scores, and the seconds of this call.

    Raises:
        UserError: the program failed; with its last lines.
    """
    command = [sys.executable, "-m", "memseg_jax.main", "--config", config_flag, *flags]
    start = time.monotonic()
    done = subprocess.run(
        [*command, "--workdir", str(folder)], env=os.environ, capture_output=True, text=True
    )
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise UserError(f"{folder}: the training ended with status {done.returncode}:\n{last}")
    scores = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    seconds = round(time.monotonic() - start, 1)
    return {name: round(scores[name], 4) for name in SCORES} | {"seconds": seconds}


def read(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Reads the results of earlier calls: variant and seed -> row; none if there is no file."""
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        rows = [{**row, "seconds": float(row["seconds"])} for row in csv.DictReader(file)]
    return {(row["variant"], int(row["seed"])): row for row in rows}


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes all results so far, those of earlier calls included."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("variant", "seed", *SCORES, "seconds"))
        writer.writeheader()
        writer.writerows(rows)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The mean scores of every variant, and its difference to the first one, seed by seed.

    Returns:
        A table in Markdown. Differences have the limits of the 95 % interval of Student's t over
        the seeds that both have; with one seed there is none.
    """
    by_name: dict[str, dict[int, float]] = {}
    for row in rows:
        by_name.setdefault(row["variant"], {})[row["seed"]] = row["mIoU"]
    first = next(iter(by_name.values()))
    lines = ["| variant | seeds | mIoU | its deviation | difference | 95 % interval |"]
    lines.append("|---|---|---|---|---|---|")
    for name, scores in by_name.items():
        mean = statistics.fmean(scores.values())
        deviation = statistics.stdev(scores.values()) if len(scores) > 1 else math.nan
        low, difference, high = paired(first, scores)
        seeds = ", ".join(first_few([str(seed) for seed in scores]))
        lines.append(
            f"| {name} | {seeds} | {mean:.4f} | {deviation:.4f} | {difference:+.4f} "
            f"| {low:+.4f} to {high:+.4f} |"
        )
    return "\n".join(lines).replace("+nan", "-").replace("nan", "-")


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
