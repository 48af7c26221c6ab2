"""A picture of what `benchmarks.ablation` found: differences with intervals, and curves with bands.

    pip install ".[plots]"
    python -m benchmarks.ablation_plots --workdir runs/memory --output memory.png

Left, every variant beside the baseline, the first of them: the mean difference of mIoU with its
95 % interval over seeds (Student's t), and every seed as a dot. Right, if the runs are still there:
the training loss of the final prediction, the mean over seeds with the band between the lowest and
the highest.
"""

import csv
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ablation
from benchmarks.seeds import paired
from memseg_jax import command_line
from memseg_jax.errors import UserError

FLAGS = {
    "workdir": "folder of all runs, as of benchmarks.ablation",
    "output": "picture to write (default: ablation.png in the workdir)",
    "only": "comma-separated names of variants, the baseline first (default: all, in their order)",
    "title": "what is above it",
}
CURVE = "loss_stage2"  # of the final prediction, which every variant has
Scores = dict[str, dict[int, float]]  # variant -> seed -> mIoU


def main(argv: Sequence[str]) -> int:
    """Writes the picture; returns the exit status."""
    values = command_line.parse(list(argv), FLAGS, doc=__doc__, with_config=False)
    if not values.workdir:
        raise UserError("--workdir is required; --help says what it is")
    workdir = Path(values.workdir)
    rows = ablation.read(workdir / ablation.RESULTS)
    if not rows:
        raise UserError(f"{workdir / ablation.RESULTS} is not there or empty; run ablation first")
    scores: Scores = {}
    for (name, seed), row in rows.items():
        scores.setdefault(name, {})[seed] = float(row["mIoU"])
    scores = ablation.choose(scores, values.only)
    curves = {name: read_curves(workdir, name, seeds) for name, seeds in scores.items()}
    output = Path(values.output or workdir / "ablation.png")
    draw(scores, curves, output, values.title or "")
    print(output)
    return 0


def read_curves(workdir: Path, name: str, seeds: Mapping[int, float]) -> dict[int, list[float]]:
    """The curve of a variant: step -> values of its seeds; empty if no run is there."""
    found: dict[int, list[float]] = {}
    for seed in seeds:
        path = ablation.folder_of(workdir, name, seed) / "metrics.csv"
        if path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    if row.get(CURVE):
                        found.setdefault(int(row["step"]), []).append(float(row[CURVE]))
    return found


def draw(
    scores: Scores, curves: Mapping[str, Mapping[int, list[float]]], output: Path, title: str
) -> None:
    """Draws the picture.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UserError('pictures need matplotlib: pip install "memseg_jax[plots]"') from error
    mpl.use("agg")  # no window
    from matplotlib import pyplot

    with_curves = any(curves.values())
    figure, axes = pyplot.subplots(
        1, 1 + with_curves, figsize=(5 + 5 * with_curves, 1.4 + 0.4 * len(scores)), squeeze=False
    )
    colours = {name: f"C{place % 10}" for place, name in enumerate(scores)}
    _differences(axes[0, 0], scores, colours)
    if with_curves:
        _curves(axes[0, 1], curves, colours)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(output, dpi=130)
    pyplot.close(figure)


def _differences(axis: Any, scores: Scores, colours: Mapping[str, str]) -> None:
    baseline, *others = scores
    for place, name in enumerate(others):
        low, mean, high = paired(scores[baseline], scores[name])
        common = scores[baseline].keys() & scores[name].keys()
        seeds = [scores[name][seed] - scores[baseline][seed] for seed in common]
        axis.plot([low, high], [place, place], color=colours[name], linewidth=6, alpha=0.35)
        axis.plot([mean], [place], "|", color=colours[name], markersize=16, markeredgewidth=3)
        axis.plot(seeds, [place] * len(seeds), "o", color="black", markersize=4)
    axis.axvline(0, color="grey", linewidth=1)
    axis.set_yticks(range(len(others)), others)
    axis.invert_yaxis()
    axis.set_xlabel(f"mIoU minus that of {baseline}")


def _curves(
    axis: Any, curves: Mapping[str, Mapping[int, list[float]]], colours: Mapping[str, str]
) -> None:
    for name, curve in curves.items():
        steps = sorted(curve)
        mean = [statistics.fmean(curve[step]) for step in steps]
        limits = ([reach(curve[step]) for step in steps] for reach in (min, max))
        axis.plot(steps, mean, label=name, color=colours[name])
        axis.fill_between(steps, *limits, color=colours[name], alpha=0.2, linewidth=0)
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("training loss of the final prediction")
    axis.legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
