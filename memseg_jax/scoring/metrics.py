"""Segmentation scores from one global confusion matrix.

The formulas are those of the PyTorch reference: counts are summed over all pixels of all images
first, and a score that would be 0/0 is NaN and left out of means. In particular a class that is
in neither truth nor prediction has no IoU, and one that is predicted but never true has IoU 0.
"""

import csv
import io
import json
import math
import os
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from memseg_jax.data import IGNORE_LABEL
from memseg_jax.runtime.files import place, replacing


def confusion_matrix(
    prediction: np.ndarray, label: np.ndarray, num_classes: int, ignore: int = IGNORE_LABEL
) -> np.ndarray:
    """Counts pixels by true and predicted class.

    The matrices of several images are added up; the sum does not grow with their number.

    Args:
        prediction: integers of any shape. Values outside 0..num_classes-1 are wrong for every
            class.
        label: integers of the same shape. Pixels of value `ignore` or outside 0..num_classes-1 are
            left out.
        num_classes: K.
        ignore: label of pixels that do not count.

    Returns:
        int64 [K, K + 1]: row = true class, column = predicted class, the last column being
        predictions outside 0..K-1.

    Raises:
        ValueError: the shapes differ or a value is not an integer.
    """
    prediction, label = np.asarray(prediction), np.asarray(label)
    if prediction.shape != label.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, label has {label.shape}")
    for name, array in (("prediction", prediction), ("label", label)):
        if array.dtype.kind not in "iu":
            raise ValueError(f"{name} must have an integer type, not {array.dtype}")
    valid = (label >= 0) & (label < num_classes) & (label != ignore)
    truth = label[valid].astype(np.int64)
    guess = prediction[valid].astype(np.int64)
    guess[(guess < 0) | (guess >= num_classes)] = num_classes
    columns = num_classes + 1
    counts = np.bincount(truth * columns + guess, minlength=num_classes * columns)
    return counts.reshape(num_classes, columns).astype(np.int64)


def scores(matrix: np.ndarray) -> dict:
    """Computes all scores of a confusion matrix.

    With I_k = pixels of class k that were found, G_k = true and P_k = predicted pixels of class k:
    IoU = I / (P + G - I), accuracy = recall = I / G, precision = I / P, dice = 2 I / (P + G),
    F-score = 2 precision recall / (precision + recall); aAcc = sum I / sum G. Dice and F-score
    differ only where recall or precision is 0/0, or both are 0 (F-score NaN, dice 0).

    Args:
        matrix: int64 [K, K + 1], from `confusion_matrix`.

    Returns:
        A dict of the floats aAcc, mAcc, mIoU, mDice, mFscore, mPrecision, mRecall (all 0..1; NaN if
        no class has the score) and of `per_class`: a dict of the float64 [K] arrays iou, acc, dice,
        fscore, precision, recall (NaN: not defined) and share (part of all true pixels).
    """
    num_classes = matrix.shape[0]
    found = np.diagonal(matrix).astype(np.float64)
    truth = matrix.sum(axis=1).astype(np.float64)
    predicted = matrix[:, :num_classes].sum(axis=0).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = found / predicted, found / truth
        per_class = {
            "iou": found / (predicted + truth - found),
            "acc": recall,
            "dice": 2 * found / (predicted + truth),
            "fscore": 2 * precision * recall / (precision + recall),
            "precision": precision,
            "recall": recall,
            "share": truth / truth.sum(),
        }
        all_accuracy = float(found.sum() / truth.sum())
    means = {
        name: _nan_mean(per_class[key])
        for name, key in (
            ("mAcc", "acc"),
            ("mIoU", "iou"),
            ("mDice", "dice"),
            ("mFscore", "fscore"),
            ("mPrecision", "precision"),
            ("mRecall", "recall"),
        )
    }
    return {"aAcc": all_accuracy, **means, "per_class": per_class}


def _nan_mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else math.nan


def format_table(scores: Mapping, class_names: Sequence[str]) -> str:
    """Returns the per-class table and the means as text for a console.

    Args:
        scores: from `scores`.
        class_names: K names.

    Returns:
        Lines without a last line break. A class that is in neither truth nor prediction is
        "absent"; "-" is a score that is not defined, such as the accuracy of a class that has no
        true pixel.
    """
    per_class = scores["per_class"]
    columns = ("iou", "acc", "dice", "precision", "share")
    names = [*class_names, "class", "mean"]
    width = max(_text_width(name) for name in names)

    def row(name: str, cells: Sequence[str]) -> str:
        padding = " " * (width - _text_width(name))
        return f"{name}{padding}" + "".join(f"{cell:>11}" for cell in cells)

    rule = "-" * (width + 11 * len(columns))
    lines = [row("class", ("IoU", "accuracy", "Dice", "precision", "share")), rule]
    for k, name in enumerate(class_names):
        if np.isnan(per_class["iou"][k]):
            lines.append(row(name, ("absent",)))
        else:
            cells = [_number(per_class[c][k]) for c in columns[:-1]]
            lines.append(row(name, [*cells, f"{per_class['share'][k]:.2%}"]))
    means = [_number(scores[key]) for key in ("mIoU", "mAcc", "mDice", "mPrecision")]
    lines += [rule, row("mean", means), ""]
    lines.append(
        "  ".join(f"{key} {_number(scores[key])}" for key in ("mIoU", "mAcc", "aAcc", "mDice"))
    )
    return "\n".join(lines)


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4f}"


def _text_width(text: str) -> int:
    """Returns the columns a text takes in a terminal (East Asian characters take two)."""
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def write_results(
    workdir: str | os.PathLike,
    scores: Mapping,
    matrix: np.ndarray,
    class_names: Sequence[str],
    extra: Mapping,
) -> None:
    """Writes `metrics.json` and `per_class.csv`, each in one piece.

    Scores that are not defined are null in the JSON file and empty in the CSV file, where the
    column `state` is "scored", "absent" (in neither truth nor prediction) or "predicted only".

    Args:
        workdir: folder that is there.
        scores: from `scores`.
        matrix: int64 [K, K + 1], from `confusion_matrix`.
        class_names: K names.
        extra: further entries of the JSON file, such as {"step": 1000}; what JSON can hold.

    Raises:
        UserError: a file cannot be written.
    """
    workdir = place(workdir)
    num_classes = matrix.shape[0]
    truth = matrix.sum(axis=1)
    predicted = matrix[:, :num_classes].sum(axis=0)
    rows = []
    for k, name in enumerate(class_names):
        state = "absent" if truth[k] + predicted[k] == 0 else "scored"
        if truth[k] == 0 < predicted[k]:
            state = "predicted only"
        row = {"class": k, "name": name, "state": state}
        row |= {key: _defined(values[k]) for key, values in scores["per_class"].items()}
        row |= {"true_pixels": int(truth[k]), "predicted_pixels": int(predicted[k])}
        rows.append(row)

    means = {key: _defined(value) for key, value in scores.items() if key != "per_class"}
    result = {k: _defined(v) if isinstance(v, float) else v for k, v in extra.items()}
    result |= {**means, "pixels": int(truth.sum()), "per_class": rows}
    with replacing(workdir / "metrics.json") as temporary:
        text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")

    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(workdir / "per_class.csv") as temporary:
        temporary.write_text(table.getvalue(), encoding="utf-8")


def _defined(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
