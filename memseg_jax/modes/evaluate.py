"""The evaluate mode: segments the evaluation split with a checkpoint and scores it."""

import logging

import ml_collections

from memseg_jax import checkpoint, config_rules, reporting
from memseg_jax.data import benchmark_of, open_split
from memseg_jax.data.classes import palette_of
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import distributed
from memseg_jax.scoring import visualize
from memseg_jax.scoring.evaluator import Evaluator, settings
from memseg_jax.scoring.prediction_files import PredictionWriter
from memseg_jax.training.state import abstract_variables

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str, which: str | int = "best") -> dict:
    """Evaluates a checkpoint of `workdir` on `config.data.eval_split`.

    A split whose labels are not public is only segmented, into `config.eval.save_predictions`.

    Args:
        config: the whole config; `config.eval` decides how images are segmented.
        workdir: folder of a run.
        which: "best", "last" or a step.

    All processes of a run have to call it; process 0 prints and writes the scores.

    Returns:
        The scores; empty if there are no labels.

    Raises:
        UserError: there is no such checkpoint, it is of another model, the data are bad, or label
            maps cannot be written.
    """
    config_rules.check(config)
    _, meta = checkpoint.read_meta(workdir, which)  # first: a misspelt workdir is not to be made
    class_names = tuple(config.data.class_names)
    checkpoint.check_class_names(meta, class_names)
    distributed.check_same("evaluate", {"the checkpoint": meta["step"]})
    folder = checkpoint.prepare_workdir(workdir)
    split, save_to = config.data.eval_split, config.eval.save_predictions
    source = open_split(config.data, split, needs_labels=not save_to)
    model = build_segmentor(config)
    evaluator = Evaluator(config, model, source)
    variables, _ = checkpoint.restore_for_inference(folder, abstract_variables(model), which)
    writer = None
    if save_to:
        palette = visualize.resolve_palette(palette_of(config.data), len(class_names))
        writer = PredictionWriter(save_to, config.data.root, palette, benchmark_of(config.data))
    log.info("evaluating step %d on %d images (%s)", meta["step"], len(source), split)
    result = evaluator.evaluate(variables, save=writer and writer.save)
    if writer:
        writer.sizes.update(result.sizes)
    if not getattr(source, "has_labels", True):
        if not distributed.is_primary():
            return {}
        print(f"no scores: the labels of split {split!r} are not public")
        print(writer.finish(), flush=True)
        return {}
    if not distributed.is_primary():
        return result.scores
    extra = {"step": meta["step"], **settings(config), "seconds": round(result.seconds, 3)}
    evaluator.report(result, folder, extra)
    reporting.refresh(folder, reporting.about(meta, config), result.findings)
    if writer:
        print(writer.finish(), flush=True)
    return result.scores
