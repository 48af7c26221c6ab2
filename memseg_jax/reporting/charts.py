"""Which curves are drawn together, and what the script that draws them is given."""

from collections.abc import Mapping, Sequence
from typing import Any

from memseg_jax.reporting.runs import Points

_MOST_POINTS = 600  # of a curve: more than a chart has pixels for
_LOSSES = {
    "loss": "total",
    "loss_stage2": "stage 2",
    "loss_stage1": "stage 1",
    "loss_context": "context",
    "loss_aux": "auxiliary",
    "loss_consistency": "consistency",
}
# Title -> the unit of its axis, and the columns of metrics.csv with their names.
_CHARTS = {
    "Losses": ("", _LOSSES),
    "Scores of the evaluations": (
        "%",
        {"eval_mIoU": "mIoU", "eval_mAcc": "mAcc", "eval_aAcc": "aAcc"},
    ),
    "Learning rate": ("", {"lr": "learning rate"}),
    "Speed": ("images/s", {"images_per_second": "images/s"}),
    "Waiting for data": ("%", {"data_wait": "share of the time"}),
    "Norm of the gradients": ("", {"grad_norm": "norm"}),
}
# Those of a comparison, where their first column has one curve a run, and their titles there.
_COMPARED = {
    "Losses": "Loss",
    "Scores of the evaluations": "mIoU",
    "Learning rate": "Learning rate",
    "Speed": "Speed",
}


def of_run(curves: Mapping[str, Points]) -> list[dict[str, Any]]:
    """The charts of one run: those for which there are values."""
    charts = []
    for title, (unit, columns) in _CHARTS.items():
        series = [
            {"name": name, "points": _thinned(curves[column])}
            for column, name in columns.items()
            if curves.get(column)
        ]
        if series:
            charts.append(_chart(title, unit, series))
    return charts


def of_runs(names: Sequence[str], all_curves: Sequence[Mapping[str, Points]]) -> list[dict]:
    """The charts of a comparison: the first column of each kind, one curve a run."""
    charts = []
    for title in _COMPARED:
        unit, columns = _CHARTS[title]
        column = next(iter(columns))
        series = [
            {"name": name, "points": _thinned(curves.get(column, []))}
            for name, curves in zip(names, all_curves)
        ]
        if any(x["points"] for x in series):
            chart = _chart(title, unit, series)
            charts.append(chart | {"title": _COMPARED[title]})
    return charts


def _chart(title: str, unit: str, series: list[dict[str, Any]]) -> dict[str, Any]:
    # Scores differ by little: their axis need not begin at 0.
    return {"title": title, "unit": unit, "zoom": title.startswith("Scores"), "series": series}


def _thinned(points: Points) -> Points:
    """Every n-th point and the last one."""
    step = max(-(-len(points) // _MOST_POINTS), 1)
    return points[::step] + ([points[-1]] if step > 1 and (len(points) - 1) % step else [])
