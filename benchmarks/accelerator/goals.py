"""What was promised for one H200, and whether the figures of a folder keep it."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.accelerator import run
from benchmarks.accelerator.plan import CAMVID_TEST
from benchmarks.seeds import paired
from memseg_jax.runtime.text import format_bytes

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
DEVICE = "H200"  # what the goals about speed are for
TRAINING_RATE = 172.0  # images/s of a ResNet-50: 30 % of the peak
TIMES_TORCH = 2.0  # as fast as torch.compile
EVALUATION_RATE = 40.0  # images/s
LEAST_SEEDS = 3
COMPILED = "PyTorch, torch.compile"
# What the figures have to be of.
_MODEL = {"backbone": "resnet50", "compute_dtype": "bfloat16"}
_TRAINING = _MODEL | {"crop": [512, 512], "batch_size": 16}
_EVALUATION = _MODEL | {"evaluation_image": [1024, 2048], "evaluation_mode": "whole"}
_COMPARISON = "resnet50, 150 classes, 16 x 512x512, bfloat16"

Results = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A goal and what became of it.

    Attributes:
        goal: in words.
        status: `MET`, `MISSED` or `NOT_MEASURED`.
        found: the figure, or why there is none.
    """

    goal: str
    status: str
    found: str


def check(results: Results) -> list[Verdict]:
    """Compares the figures of a folder with all goals.

    Args:
        results: from `run.read_all`.
    """
    return [
        _training_rate(results),
        _beside_torch(results),
        _memory_beside_torch(results),
        _evaluation_rate(results),
        _score(results),
        _worth_of_the_memory(results),
    ]


def figures(results: Results, step: str, key: str) -> list[Mapping[str, Any]]:
    """The objects of a step that have a key; none if the step has not ended."""
    found = results.get(step, {"status": run.FAILED, "results": []})
    return [x for x in found["results"] if key in x] if found["status"] == run.ENDED else []


def scores(results: Results, variant: str) -> dict[int, float]:
    """Scores (mIoU) on CamVid's test split by seed, of trainings of the real config to their end.

    Args:
        results: from `run.read_all`.
        variant: "memory" or "baseline".
    """
    found = {}
    for name, result in results.items():
        if name.startswith(f"camvid-{variant}-"):
            whole = "--config=configs/camvid_resnet50.py" in result["commands"][0]
            for values in figures(results, name, "mIoU") if whole else []:
                found[int(name.rsplit("-", 1)[1])] = values["mIoU"]
    return found


def _on_the_device(results: Results) -> bool:
    machine = run.machine_of(results)
    return bool(machine) and DEVICE in machine["device"] and machine["devices"] == 1


def _no_figure(goal: str, results: Results) -> Verdict:
    reason = "no figure" if _on_the_device(results) else f"for one {DEVICE}"
    return Verdict(goal, NOT_MEASURED, reason)


def _verdict(goal: str, holds: bool, found: str) -> Verdict:
    return Verdict(goal, MET if holds else MISSED, found)


def _like(values: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(values.get(key) == value for key, value in wanted.items())


def _training_rate(results: Results) -> Verdict:
    goal = f"training, ResNet-50, 16 x 512x512, bfloat16: at least {TRAINING_RATE:g} images/s"
    found = figures(results, "benchmark-resnet50-bfloat16", "images_per_second")
    if not _on_the_device(results) or not found or not _like(found[0], _TRAINING):
        return _no_figure(goal, results)
    rate = found[0]["images_per_second"]
    share = found[0].get("share_of_nominal_peak")
    shown = f"{rate:.4g} images/s" + (f", {share:.0%} of the maker's peak" if share else "")
    return _verdict(goal, rate >= TRAINING_RATE, shown)


def _compared(results: Results) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """JAX and compiled PyTorch in the training step of the goals, on their device."""
    for values in figures(results, "training-resnet50", "results"):
        rows = {row["name"]: row for row in values["results"]}
        if _COMPARISON in values["what"] and {"JAX", COMPILED} <= rows.keys():
            return (rows["JAX"], rows[COMPILED]) if _on_the_device(results) else None
    return None


def _beside_torch(results: Results) -> Verdict:
    goal = f"the same step: at least {TIMES_TORCH:g} times as fast as torch.compile"
    if not (pair := _compared(results)):
        return _no_figure(goal, results)
    return _verdict(goal, pair[1]["ratio"] >= TIMES_TORCH, f"{pair[1]['ratio']:.3g} times")


def _memory_beside_torch(results: Results) -> Verdict:
    goal = "the same step: no more memory than torch.compile"
    pair = _compared(results)
    if not pair or None in (pair[0]["memory"], pair[1]["memory"]):
        return _no_figure(goal, results)
    ours, theirs = (row["memory"] for row in pair)
    return _verdict(goal, ours <= theirs, f"{format_bytes(ours)} and {format_bytes(theirs)}")


def _evaluation_rate(results: Results) -> Verdict:
    goal = f"evaluation, whole images of 1024x2048: at least {EVALUATION_RATE:g} images/s"
    found = figures(results, "benchmark-large-images", "evaluation_seconds_per_image")
    if not _on_the_device(results) or not found or not _like(found[0], _EVALUATION):
        return _no_figure(goal, results)
    rate = 1 / found[0]["evaluation_seconds_per_image"]
    return _verdict(goal, rate >= EVALUATION_RATE, f"{rate:.4g} images/s")


def _score(results: Results) -> Verdict:
    goal = f"CamVid, ResNet-50, test split: mIoU above {CAMVID_TEST} (ESPNet's)"
    found = scores(results, "memory")
    if not found:
        return Verdict(goal, NOT_MEASURED, "no training ended")
    mean = statistics.fmean(found.values())
    return _verdict(goal, mean > CAMVID_TEST, f"{mean:.4f}, mean of {_seeds(found)}")


def _worth_of_the_memory(results: Results) -> Verdict:
    """To know it is the goal, whatever it is."""
    goal = f"CamVid: memory against baseline over at least {LEAST_SEEDS} seeds, with its error bar"
    with_it, without = scores(results, "memory"), scores(results, "baseline")
    both = sorted(with_it.keys() & without.keys())
    if len(both) < LEAST_SEEDS:
        return Verdict(goal, NOT_MEASURED, f"{_seeds(both)} of both")
    low, mean, high = paired(without, with_it)
    shown = f"mIoU {mean:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}, {_seeds(both)}"
    return _verdict(goal, not math.isnan(low), shown)


def _seeds(found: Sequence[int] | Mapping[int, float]) -> str:
    return "1 seed" if len(found) == 1 else f"{len(found)} seeds"
