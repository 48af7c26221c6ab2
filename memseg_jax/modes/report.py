"""The report mode: makes a page about a run, or about the difference of several."""

import logging

import jax
import ml_collections

from memseg_jax import checkpoint, config_rules, reporting, trained_model
from memseg_jax.data import open_split
from memseg_jax.errors import UserError
from memseg_jax.inspection import inspector
from memseg_jax.inspection.looking import Looker
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import distributed, files
from memseg_jax.runtime.plain import plain
from memseg_jax.scoring import evaluation_file
from memseg_jax.scoring.evaluator import Evaluator, settings
from memseg_jax.training.state import abstract_variables

log = logging.getLogger(__name__)

COMPARISON = "comparison.html"


def run(
    config: ml_collections.ConfigDict | None,
    workdir: str,
    which: str | int = "best",
    overwrite: bool = False,
) -> None:
    """Writes `<workdir>/report.html`, with all that can be said about a checkpoint.

    The reports that a training writes are made of what its evaluations had at hand. Here the split
    is segmented once more, with confidences and outlines; unless that was done before. Then the
    memory is inspected, by a single process only.

    Args:
        config: of the evaluation; None: that of the checkpoint.
        workdir: folder of a run.
        which: "best", "last" or a step.
        overwrite: whether to segment the split although it was done before.

    All processes of a run have to call it; process 0 writes.

    Raises:
        UserError: there is no such checkpoint, it is of another model, or the data are bad.
    """
    if config is not None:
        config_rules.check(config)
    _, meta = checkpoint.read_meta(workdir, which)  # first: a misspelt workdir is not to be made
    if config is None:
        config = trained_model.config_of(meta)
        config_rules.check(config)
    names = tuple(config.data.class_names)
    checkpoint.check_class_names(meta, names)
    distributed.check_same("report", {"the checkpoint": meta["step"]})
    folder = checkpoint.prepare_workdir(workdir)
    described = reporting.about(meta, config)

    def is_done() -> bool:
        return not overwrite and _is_done(folder, described)

    if not distributed.on_primary("report", is_done):
        source = open_split(config.data, config.data.eval_split)
        model = build_segmentor(config)
        evaluator = Evaluator(config, model, source, thorough=True)
        variables, _ = checkpoint.restore_for_inference(folder, abstract_variables(model), which)
        log.info("segmenting %d images with step %d", len(source), meta["step"])
        result = evaluator.evaluate(variables)
        if model.memory_enabled and distributed.process_count() == 1:
            found = inspector.inspect_memory(
                config, model, Looker(model, config), jax.device_put(variables), source, folder,
                meta["step"], as_trained=result.matrix,
            )  # fmt: skip
            inspector.write_files(found, files.make_folder(folder / inspector.FOLDER))
        if distributed.is_primary():
            extra = {"step": meta["step"], **settings(config), "seconds": round(result.seconds, 3)}
            evaluator.report(result, folder, extra)
            evaluation_file.write(folder, described, result.findings)
    if distributed.is_primary():
        page = reporting.write_report(folder)
        print(f"Open it in a browser:\n  {page}", flush=True)


def _is_done(folder: files.Place, described: dict) -> bool:
    """Whether the last evaluation was this one, with confidences."""
    try:
        stored = evaluation_file.read(folder)
    except UserError as error:
        log.warning("%s", error)
        return False
    if stored is None or stored.findings.reliability is None:
        return False
    return all(stored.about[name] == plain(value) for name, value in described.items())


def compare(workdirs: str, output: str | None) -> None:
    """Writes a page with several runs side by side; needs their evaluations only.

    Args:
        workdirs: folders of runs, with commas between them; the others are compared with the first.
        output: the HTML file; None: `comparison.html` in the folder of the last run.

    Raises:
        UserError: there are fewer than two, or they cannot be compared.
    """
    folders = [files.absolute(x.strip(), "--compare") for x in workdirs.split(",") if x.strip()]
    if len(folders) < 2:
        raise UserError(
            f"--compare={workdirs}: expected two or more workdirs with commas between them, such "
            "as --compare=runs/without,runs/with"
        )
    target = files.absolute(output, "--output") if output else folders[-1] / COMPARISON
    page = reporting.write_comparison(folders, target)
    print(f"Open it in a browser:\n  {page}", flush=True)
