"""The inspection of a checkpoint's memory from start to end, and the files that tell of it."""

import logging
from typing import Any

import ml_collections
import numpy as np

from memseg_jax.data.classes import palette_of
from memseg_jax.inspection import findings, page, pictures
from memseg_jax.inspection.findings import Findings, Picture
from memseg_jax.inspection.looking import Looker
from memseg_jax.inspection.maps import has_neighbour_maps
from memseg_jax.inspection.samples import sample_features
from memseg_jax.inspection.worth import worth_of
from memseg_jax.models.segmentor import Segmentor
from memseg_jax.reporting import sections
from memseg_jax.reporting.report import MEMORY
from memseg_jax.runtime import files
from memseg_jax.runtime.log_file import say
from memseg_jax.scoring import memory_history, visualize
from memseg_jax.scoring.evaluator import Evaluator

log = logging.getLogger(__name__)

FOLDER = MEMORY  # in the workdir
PAGE, ARRAYS, SIMILARITY, MAP = "memory.html", "memory.npz", "similarity.png", "map.png"


def inspect_memory(
    config: ml_collections.ConfigDict,
    model: Segmentor,
    looker: Looker,
    variables: dict[str, Any],
    source: Any,
    workdir: files.Place,
    step: int,
    *,
    picture: Picture | None = None,
    as_trained: np.ndarray | None = None,
) -> Findings:
    """Finds out what a memory holds, which classes look alike to it, and what it is worth.

    The split is segmented with the memory, unless that is known, with its rows permuted, and with
    zeros.

    Args:
        config: the whole config; `config.eval` decides how images are segmented.
        model: the segmentor, with a memory.
        looker: of the model.
        variables: params, batch_stats and memory.
        source: images and labels of `config.data.eval_split`.
        workdir: of the run, which is only read.
        step: of the checkpoint.
        picture: that was looked at.
        as_trained: int64 [classes, classes + 1], the confusion matrix with the memory as it is;
            None: it is measured.
    """
    if not has_neighbour_maps():
        say('no map by t-SNE, as scikit-learn is not installed: pip install "memseg_jax[memory]"')
    class_names, split = tuple(config.data.class_names), config.data.eval_split
    records = memory_history.read(workdir, step)
    log.info("sampling pixel features of %s", split)
    features = sample_features(looker, variables, source, len(class_names))
    seen = records[-1].pixels if records and records[-1].pixels.any() else None
    log.info("scoring %d images with other memories", len(source))
    worth = worth_of(Evaluator(config, model, source), variables, seen, as_trained)
    return findings.find(
        model,
        np.asarray(variables["memory"]),
        records,
        features,
        worth,
        class_names=class_names,
        palette=visualize.resolve_palette(palette_of(config.data), len(class_names)),
        step=step,
        split=split,
        picture=picture,
    )


def write_files(found: Findings, folder: files.Place) -> None:
    """Writes the page, its parts for the report, its pictures and its arrays.

    Args:
        found: what was found.
        folder: exists.

    Raises:
        UserError: a file cannot be written.
    """
    findings.save_arrays(found, folder / ARRAYS)
    visualize.save_png(folder / SIMILARITY, pictures.similarity_sheet(found))
    if (sheet := pictures.map_sheet(found)) is not None:
        visualize.save_png(folder / MAP, sheet)
    sections.write(folder, found.step, page.sections(found))
    files.write_text(folder / PAGE, page.whole_page(found))
