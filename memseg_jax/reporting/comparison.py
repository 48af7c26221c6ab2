"""Runs side by side on one page, with error bars for their differences."""

from collections.abc import Sequence
from typing import Any

from memseg_jax.errors import UserError
from memseg_jax.reporting import charts, page, report, runs
from memseg_jax.runtime import files
from memseg_jax.runtime.plain import ABSENT, show
from memseg_jax.scoring import bootstrap

_NOT_DIFFERENT = ("data.root", "data.packed", "data.stage", "data.workers", "data.threads")
_SCORES = ("mIoU", "mAcc", "aAcc")


def write_comparison(workdirs: Sequence[files.Place], target: files.Place) -> files.Place:
    """Compares the last evaluations of runs; the first run is what the others are compared with.

    Args:
        workdirs: folders of at least two runs.
        target: the HTML file.

    Returns:
        `target`.

    Raises:
        UserError: a run was not evaluated, on other images or with other classes, or a file cannot
            be read or written.
    """
    files.write_text(target, render([runs.read(workdir) for workdir in workdirs], workdirs))
    return target


def render(found: Sequence[runs.Run], workdirs: Sequence[files.Place]) -> str:
    """The page as text; see `write_comparison`."""
    first = found[0]
    for run, workdir in zip(found[1:], workdirs[1:]):
        _check_comparable(first, run, f"{workdirs[0]} and {workdir}")
    names = [run.name for run in found]
    if len(set(names)) < len(names):
        names = list(map(str, workdirs))
    counts = [run.findings.per_image.counts() for run in found]
    differences = [bootstrap.difference(x, counts[0]) for x in counts[1:]]
    drawn = charts.of_runs(names, [run.curves for run in found])
    images = len(first.findings.per_image)
    return page.render(
        "comparison.html",
        title=" – ".join(names),
        lead=f"{images} images of split {first.about['evaluation']['split']}, "
        f"{len(first.about['class_names'])} classes. Differences are to {names[0]}.",
        names=names,
        draws=f"{bootstrap.DRAWS:,}",
        rows=_scores(names, found, differences),
        charts=drawn,
        classes=_classes(found, differences),
        fields=_fields(found),
        data={"charts": drawn},
    )


def _check_comparable(one: runs.Run, two: runs.Run, which: str) -> None:
    if one.about["class_names"] != two.about["class_names"]:
        raise UserError(f"--compare: {which} have other classes, so no score can be compared.")
    names = [run.findings.per_image.names for run in (one, two)]
    if names[0] != names[1]:
        both = len(set(names[0]) & set(names[1]))
        raise UserError(
            f"--compare: {which} were not evaluated on the same images ({len(names[0])} and "
            f"{len(names[1])}, {both} in common). Evaluate both with the same "
            "config.data.eval_split and data."
        )
    if not names[0]:
        raise UserError(f"--compare: {which} were evaluated on no image.")


def _scores(
    names: Sequence[str], found: Sequence[runs.Run], differences: Sequence[bootstrap.Difference]
) -> list[dict[str, Any]]:
    rows = []
    for name, run, difference in zip(names, found, [None, *differences]):
        cells = [page.percent(run.scores[score], 2) for score in _SCORES]
        row = {"name": name, "step": run.about["step"], "cells": cells, "interval": None}
        if difference:
            row |= {"interval": _words(difference.miou), "verdict": _verdict(difference.miou)}
        rows.append(row)
    return rows


def _verdict(interval: bootstrap.Interval) -> str:
    if interval.low > 0:
        return "higher"
    return "lower" if interval.high < 0 else "no clear difference"


def _words(interval: bootstrap.Interval) -> str:
    value, low, high = (f"{100 * x:+.2f}" for x in interval)
    return f"{value} ({low} to {high})"


def _classes(
    found: Sequence[runs.Run], differences: Sequence[bootstrap.Difference]
) -> list[dict[str, Any]]:
    palette = report.palette_of(found[0].about).tolist()
    ends = [x for d in differences for i in d.per_class for x in (i.low, i.high) if x == x]
    widest = max(map(abs, ends), default=0.0) or 1.0
    rows = []
    for k, name in enumerate(found[0].about["class_names"]):
        ious = [float(run.scores["per_class"]["iou"][k]) for run in found]
        cells = []
        for interval in (d.per_class[k] for d in differences):
            if interval.value != interval.value or interval.low != interval.low:
                cells.append(None)
                continue
            scaled = [f"{50 + 50 * x / widest:.2f}%" for x in (interval.low, interval.high)]
            cells.append(
                {
                    "value": interval.value,
                    "words": _words(interval),
                    "sign": {"higher": "up", "lower": "down"}.get(_verdict(interval), ""),
                    "low": scaled[0],
                    "high": scaled[1],
                    "at": f"{50 + 50 * interval.value / widest:.2f}%",
                }
            )
        rows.append(
            {
                "name": name,
                "colour": "rgb({}, {}, {})".format(*palette[k]),
                "ious": [(page.percent(x, 2), -1 if x != x else x) for x in ious],
                "differences": cells,
            }
        )
    return rows


def _fields(found: Sequence[runs.Run]) -> list[tuple[str, list[str]]]:
    """The fields of the configs that differ, with the value of each run."""
    configs = [run.about["config"] for run in found]
    rows = []
    for name in sorted({name for config in configs for name in config} - set(_NOT_DIFFERENT)):
        values = [show(config.get(name, ABSENT)) for config in configs]
        if len(set(values)) > 1:
            rows.append((name, values))
    return rows
