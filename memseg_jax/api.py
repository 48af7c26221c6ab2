"""What `import memseg_jax` offers: `load`, `train` and `evaluate`.

They run the code of the modes in this process. What the program shows is printed, and further
messages go to the logger "memseg_jax". Compiled programs are kept in ~/.cache/memseg_jax/xla, or in
$MEMSEG_CACHE, as the program does. Runs of several processes are started from the command line.
"""

import csv
import dataclasses
import io
import os
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags

from memseg_jax import trained_model
from memseg_jax.checkpoint import best_step, read_meta, read_scores
from memseg_jax.command_line import load_config
from memseg_jax.runtime import compilation, files
from memseg_jax.scoring.segmentation import Segmentation
from memseg_jax.trained_model import TrainedModel

__all__ = [
    "EvaluationResult",
    "Segmentation",
    "TrainedModel",
    "TrainingResult",
    "evaluate",
    "load",
    "train",
]

Workdir = str | os.PathLike[str]
Config = ml_collections.ConfigDict | str


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What a training run has come to.

    Attributes:
        workdir: folder of the run, which `load` and `evaluate` take.
        best_step: the step with the highest mIoU, whose checkpoint is "best".
        scores: of this step: aAcc, mAcc, mIoU, mDice, mFscore, mPrecision, mRecall, 0..1.
        evaluations: the scores of every step that was evaluated; None: not defined.
        history: the rows of metrics.csv, with the columns that have a value: step, epoch, loss, its
            parts, lr, images_per_second; scores as "eval_mIoU" and so on.
    """

    workdir: str
    best_step: int
    scores: dict[str, float | None]
    evaluations: dict[int, dict[str, float | None]] = dataclasses.field(repr=False)
    history: list[dict[str, float]] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """How well the predictions of a checkpoint agree with the labels of a split.

    Attributes:
        workdir: folder of the run.
        step: of the checkpoint.
        split: `config.data.eval_split`.
        scores: aAcc, mAcc, mIoU, mDice, mFscore, mPrecision, mRecall, 0..1; NaN: not defined.
            Empty if the labels of the split are not public.
        per_class: iou, acc, dice, fscore, precision, recall and share of every class by its name.
    """

    workdir: str
    step: int
    split: str
    scores: dict[str, float]
    per_class: dict[str, dict[str, float]] = dataclasses.field(repr=False)


def load(
    workdir: Workdir, config: Config | None = None, checkpoint: str | int = "best"
) -> TrainedModel:
    """Loads a model that was trained here or converted.

    Args:
        workdir: folder of the run or of the converted model; local, or in a bucket.
        config: a config, or the name of its file ("FILE.py" or "FILE.py:ARG"), to segment in
            another way than during training; None: that of the checkpoint.
        checkpoint: "best" (highest mIoU), "last" or a step.

    Returns:
        The model, whose `predict` segments pictures.

    Raises:
        UserError: there is no such checkpoint, it is damaged or of another model, or the config is
            wrong.
    """
    compilation.keep_programs()
    return trained_model.load(workdir, config, checkpoint)


def train(config: Config, workdir: Workdir) -> TrainingResult:
    """Trains a model, going on where an earlier run in the same folder stopped.

    Args:
        config: a config, or the name of its file: "FILE.py" or "FILE.py:ARG".
        workdir: folder of the run; local, or in a bucket. It is made.

    Returns:
        The scores and the course of the run, with what was done by earlier calls.

    Raises:
        UserError: something in config, data or folder that you can mend.
        Stopped: the run was interrupted (Ctrl-C, or a notebook's stop button); its state is saved,
            and the same call goes on.
        KeyboardInterrupt: so it was before the first step, or a second time.
    """
    from memseg_jax.modes import train as mode  # it imports what training alone needs

    _as_the_program_does()
    mode.run(_config(config), os.fspath(workdir), ends_process=False)
    folder = files.absolute(workdir)
    evaluations = read_scores(folder)
    best = best_step(evaluations, evaluations)
    if best is None:  # the whole split has no labelled pixel
        best = max(evaluations)
    return TrainingResult(
        os.fspath(workdir), best, evaluations[best], evaluations, _history(folder)
    )


def evaluate(
    workdir: Workdir, config: Config | None = None, checkpoint: str | int = "best"
) -> EvaluationResult:
    """Segments the evaluation split with a checkpoint, and scores it.

    Args:
        workdir: folder of the run or of the converted model; `metrics.json`, `per_class.csv`,
            `per_image.csv`, a picture and `report.html` are written there.
        config: a config, or the name of its file; None: that of the checkpoint.
        checkpoint: "best", "last" or a step.

    Returns:
        The scores.

    Raises:
        UserError: there is no such checkpoint, it is of another model, or the data are bad.
    """
    from memseg_jax.modes import evaluate as mode

    _as_the_program_does()
    step, meta = read_meta(workdir, checkpoint)
    config = trained_model.config_of(meta) if config is None else _config(config)
    scores = dict(mode.run(config, os.fspath(workdir), step))
    columns = scores.pop("per_class", {})
    data: Any = config.data
    names: Sequence[str] = data.class_names if columns else ()
    per_class = {
        name: {key: float(values[number]) for key, values in columns.items()}
        for number, name in enumerate(names)
    }
    return EvaluationResult(os.fspath(workdir), step, data.eval_split, scores, per_class)


def _as_the_program_does() -> None:
    compilation.keep_programs()
    flags.FLAGS.mark_as_parsed()  # grain's worker processes ask for it


def _config(config: Config) -> ml_collections.ConfigDict:
    return load_config(config) if isinstance(config, str) else config


def _history(folder: files.Place) -> list[dict[str, float]]:
    rows = csv.DictReader(io.StringIO(files.read_text(folder / "metrics.csv") or ""))
    return [{name: float(value) for name, value in row.items() if value} for row in rows]
