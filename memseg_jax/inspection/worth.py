"""What the memory is worth: the scores of a checkpoint with its memory, and with wrong ones."""

import dataclasses
from typing import Any

import numpy as np

from memseg_jax.scoring import metrics
from memseg_jax.scoring.evaluator import Evaluator

AS_TRAINED, PERMUTED, ZEROS = "as trained", "rows permuted", "zeros"


def other_memories(memory: np.ndarray) -> dict[str, np.ndarray]:
    """Memories that tell the network nothing true.

    Args:
        memory: [classes, ...].

    Returns:
        Permuted: every class has what was stored for another one; all are on one cycle, so none
        keeps its own. Zeros: nothing is stored.
    """
    cycle = np.random.default_rng(0).permutation(len(memory))
    permuted = np.empty_like(memory)
    permuted[cycle] = memory[np.roll(cycle, 1)]
    return {PERMUTED: permuted, ZEROS: np.zeros_like(memory)}


@dataclasses.dataclass(frozen=True)
class Worth:
    """Scores with several memories.

    Attributes:
        matrices: int64 [classes, classes + 1] by the name of the memory.
        groups: names of groups of classes and their members, int64 [members].
    """

    matrices: dict[str, np.ndarray]
    groups: dict[str, np.ndarray]

    def scores(self, name: str) -> dict[str, float]:
        """mIoU, aAcc, and the mean IoU of every group by its name; NaN: not defined."""
        scores = metrics.scores(self.matrices[name])
        iou = scores["per_class"]["iou"]
        of_groups = {}
        for group, members in self.groups.items():
            defined = iou[members][~np.isnan(iou[members])]
            of_groups[group] = float(defined.mean()) if defined.size else float("nan")
        return {"mIoU": scores["mIoU"], "aAcc": scores["aAcc"]} | of_groups

    def iou(self, name: str) -> np.ndarray:
        """IoU of every class, float64 [classes]; NaN: not defined."""
        return metrics.scores(self.matrices[name])["per_class"]["iou"]


def frequency_groups(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Three groups of classes, as equal in number as possible.

    Args:
        pixels: [classes], how much was seen of each.
    """
    rarest_first = np.argsort(pixels, kind="stable")
    names = ("classes seen rarely", "in between", "seen often")
    if len(pixels) < len(names):
        return {}
    return dict(zip(names, np.array_split(rarest_first, len(names))))


def worth_of(
    evaluator: Evaluator,
    variables: dict[str, Any],
    pixels: np.ndarray | None,
    as_trained: np.ndarray | None = None,
) -> Worth:
    """Evaluates a checkpoint with its memory and with two wrong ones.

    Args:
        evaluator: of the split.
        variables: params, batch_stats and memory.
        pixels: [classes], how much was seen of each in training; None: as much as there is in the
            split.
        as_trained: the confusion matrix with its memory; None: it is measured.
    """
    memory = np.asarray(variables["memory"])
    matrices = {} if as_trained is None else {AS_TRAINED: as_trained}
    for name, other in ({AS_TRAINED: memory} | other_memories(memory)).items():
        if name not in matrices:
            matrices[name] = evaluator.evaluate(variables | {"memory": other}).matrix
    if pixels is None:
        pixels = matrices[AS_TRAINED].sum(axis=1)
    return Worth(matrices, frequency_groups(pixels))
