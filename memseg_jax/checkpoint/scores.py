"""The scores of a run's checkpoints: one file beside them, by step.

A complete checkpoint is never written to again, and an evaluation ends long after the save. So
`<workdir>/scores.json` holds {step: {name: number}}, replaced as a whole after every evaluation.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from memseg_jax.errors import Unreachable, UserError
from memseg_jax.runtime import files
from memseg_jax.runtime.plain import plain

log = logging.getLogger(__name__)

FILE = "scores.json"
MIOU = "mIoU"  # the score that decides which checkpoint is the best


def read_scores(workdir: files.Place) -> dict[int, dict[str, Any]]:
    """The scores of every step that was evaluated; empty if there is no file.

    Raises:
        UserError: the file is damaged.
        Unreachable: its bucket gives no answer or refuses.
    """
    path = workdir / FILE
    try:
        text = files.read_text(path)
        if text is None:
            return {}
        return {int(step): dict(scores) for step, scores in json.loads(text).items()}
    except Unreachable:
        raise
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}), so the best checkpoint is not known: name a step "
            "or 'last', or remove the file; --mode evaluate scores a checkpoint anew."
        ) from error


def readable_scores(workdir: files.Place) -> dict[int, dict[str, Any]]:
    """`read_scores`, but a damaged file counts as none, with a warning: a run goes on without."""
    try:
        return read_scores(workdir)
    except Unreachable:
        raise  # it may be good: what is done without it, such as removing checkpoints, is for good
    except UserError as error:
        log.warning("%s", error)
        return {}


def write_scores(workdir: files.Place, scores: Mapping[int, Mapping[str, Any]]) -> None:
    """Replaces the file."""
    ordered = {str(step): plain(scores[step]) for step in sorted(scores)}
    files.write_text(workdir / FILE, json.dumps(ordered, indent=1))


def best_step(steps: Iterable[int], scores: Mapping[int, Mapping[str, Any]]) -> int | None:
    """The step of the highest mIoU (the newest of equal ones), or None if none has one."""
    scored = {step: scores[step].get(MIOU) for step in steps if step in scores}
    scored = {step: miou for step, miou in scored.items() if miou is not None}
    return max(scored, key=lambda step: (scored[step], step)) if scored else None


def without_gain(scores: Mapping[int, Mapping[str, Any]]) -> int:
    """How many evaluations there were since the one that first had the highest mIoU of all.

    Args:
        scores: of the steps that were evaluated. One without mIoU (no class was scored) is no gain.
    """
    best, count = None, 0
    for step in sorted(scores):
        miou = scores[step].get(MIOU)
        if miou is not None and (best is None or miou > best):
            best, count = miou, 0
        else:
            count += 1
    return count


def kept_steps(
    steps: Iterable[int], scores: Mapping[int, Mapping[str, Any]], keep: int
) -> set[int]:
    """Which checkpoints stay: the last `keep` ones, the best, and step 0.

    Args:
        steps: those on disk.
        scores: of the steps that were evaluated.
        keep: how many of the last ones, at least 1.

    Returns:
        The steps. Step 0 is no product of the run, but the weights that it started from.
    """
    steps = sorted(steps)
    best = best_step(steps, scores)
    return set(steps[-keep:]) | ({best} if best is not None else set()) | ({0} & set(steps))
