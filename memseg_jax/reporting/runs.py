"""A run's files, read for a page."""

import csv
import dataclasses
import io
import math
from typing import Any

from memseg_jax.errors import UserError
from memseg_jax.runtime import files
from memseg_jax.scoring import evaluation_file, metrics
from memseg_jax.scoring.findings import Findings

Points = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Run:
    """What there is to show of a run.

    Attributes:
        name: of its folder.
        about: see `evaluation_file.Stored`.
        findings: of the last evaluation.
        scores: its scores, see `metrics.scores`.
        curves: step and value by the name of the column of metrics.csv; without those that are not
            finite.
    """

    name: str
    about: dict[str, Any]
    findings: Findings
    scores: dict[str, Any]
    curves: dict[str, Points]


def read(workdir: files.Place) -> Run:
    """Reads what a run and its last evaluation have left.

    Raises:
        UserError: there was no evaluation, or a file cannot be read.
    """
    stored = evaluation_file.read(workdir)
    if stored is None:
        raise UserError(
            f"{workdir} has no {evaluation_file.FILE}: there was no evaluation yet. "
            f"--mode evaluate --workdir {workdir} makes one."
        )
    scores = metrics.scores(stored.findings.per_image.total())
    return Run(workdir.name, stored.about, stored.findings, scores, curves(workdir))


def curves(workdir: files.Place) -> dict[str, Points]:
    """The columns of a run's metrics.csv, empty if there is none (a converted model)."""
    try:
        text = files.read_text(workdir / "metrics.csv")
    except OSError as error:
        raise UserError(f"cannot read {workdir / 'metrics.csv'}: {error}") from error
    result: dict[str, Points] = {}
    for row in csv.DictReader(io.StringIO(text or "")):
        for name, cell in row.items():
            # A run that goes on at this moment may have written half a line.
            value = _number(cell)
            if name and name != "step" and value is not None and (row["step"] or "").isdecimal():
                result.setdefault(name, []).append((int(row["step"]), value))
    return result


def _number(cell: Any) -> float | None:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None
