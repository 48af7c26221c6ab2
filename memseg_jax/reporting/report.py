"""The report of a run: `<workdir>/report.html`."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from memseg_jax.checkpoint import recorded_config
from memseg_jax.reporting import charts, page, pictures, runs, sections
from memseg_jax.runtime import files
from memseg_jax.runtime.plain import plain, show
from memseg_jax.scoring import evaluation_file, gallery, visualize
from memseg_jax.scoring.evaluator import settings
from memseg_jax.scoring.findings import Findings

log = logging.getLogger(__name__)

REPORT = "report.html"
MEMORY = "memory"  # the folder of what is found out about the memory
_RECORDED = ("step", "class_names", "palette", "versions")
# Fields of config.eval that change no score.
_SAME_SCORES = ("batch_size", "rows", "save_predictions", "max_megapixels")
_METHODS = {"mcibi": "MCIBI", "mcibi_plus_plus": "MCIBI++"}


def about(meta: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """What `evaluation_file.write` records of an evaluation.

    Args:
        meta: the description of the checkpoint, see `checkpoint.make_meta`.
        config: of the evaluation, whose split and fields may be others than in training.
    """
    recorded = {name: plain(meta[name]) for name in _RECORDED}
    fields = {x: value for x, value in plain(config.eval).items() if x not in _SAME_SCORES}
    evaluation = plain(settings(config)) | {"fields": fields}
    return recorded | {"config": recorded_config(meta), "evaluation": evaluation}


def refresh(
    workdir: files.Place,
    described: Mapping[str, Any],
    findings: Findings,
) -> None:
    """Records an evaluation and makes the report anew; whatever goes wrong is only a warning.

    A run is not to end for want of a page. Only process 0 may call it.

    Args:
        workdir: folder of the run.
        described: from `about`.
        findings: of the evaluation, of all processes.
    """
    try:
        evaluation_file.write(workdir, described, findings)
        write_report(workdir)
    except Exception as error:
        log.warning("%s was not written: %s: %s", REPORT, type(error).__name__, error)


def write_report(workdir: files.Place) -> files.Place:
    """Makes the report of the last evaluation; the network and the data are not needed.

    What `--mode memory` found out about the same checkpoint is a part of it.

    Args:
        workdir: folder of the run.

    Returns:
        The path of the page.

    Raises:
        UserError: there was no evaluation, or a file cannot be read or written.
    """
    run = runs.read(workdir)
    parts = sections.read(workdir / MEMORY, run.about["step"])
    files.write_text(workdir / REPORT, render(run, parts))
    return workdir / REPORT


def render(run: runs.Run, parts: Sequence[sections.Section] = ()) -> str:
    """The page as text.

    Args:
        run: what is reported.
        parts: further ones, in their order.
    """
    findings, names = run.findings, run.about["class_names"]
    matrix = findings.per_image.total()
    chosen = gallery.choose(findings.per_image, list(findings.gallery.pictures))
    drawn = charts.of_run(run.curves)
    shown = [*chosen.worst, *chosen.middle, *chosen.best, *(x.index for x in chosen.confusions)]
    data = {
        "classes": names,
        "palette": palette_of(run.about).tolist(),
        "charts": drawn,
        "matrix": matrix.tolist(),
        "pictures": {
            index: pictures.for_page(findings.gallery.pictures[index])
            for index in sorted({i for i in shown if i is not None})
        },
        "reliability": findings.reliability.bins.tolist() if findings.reliability else None,
        "sections": {part.anchor: part.data for part in parts},
    }
    return page.render(
        "report.html",
        tuple(part.script for part in parts if part.script),
        title=run.name,
        lead=_lead(run),
        tiles=_tiles(run),
        charts=drawn,
        classes=_classes(run),
        groups=_groups(run, chosen),
        confusions=_confusions(names, chosen),
        reliability=findings.reliability is not None,
        sections=parts,
        memory=run.about["config"]["model.memory.enabled"],
        facts=facts(run),
        config=[(name, show(value)) for name, value in run.about["config"].items()],
        data=data,
    )


def palette_of(described: Mapping[str, Any]) -> Any:
    """The colours of the classes, uint8 [K, 3]."""
    return visualize.resolve_palette(described["palette"], len(described["class_names"]))


def facts(run: runs.Run) -> dict[str, str]:
    """What was trained on what, with what, in words by their headings."""
    config, evaluation = run.about["config"], run.about["evaluation"]
    versions = ", ".join(f"{name} {version}" for name, version in run.about["versions"].items())
    scales = ", ".join(f"{x:g}" for x in evaluation["scales"])
    mirror = " and mirror images" if evaluation["flip"] else ""
    root = config["data.root"] or config["data.packed"]
    return {
        "Model": f"{_method(config)}, backbone {config['model.backbone']}, "
        f"{config['model.compute_dtype']}",
        "Trained on": f"{config['data.name']}{' in ' + root if root else ''}, split "
        f"{config['data.train_split']}",
        "Training": f"{config['train.epochs']} epochs of batches of {config['train.batch_size']}; "
        f"{config['optimizer.name']}, learning rate {config['optimizer.lr']:g}; seed "
        f"{config['seed']}",
        "Evaluated": f"step {run.about['step']} on {len(run.findings.per_image)} images of split "
        f"{evaluation['split']}; mode {evaluation['mode']}, scales {scales}{mirror}",
        "Versions": versions,
    }


def _method(config: Mapping[str, Any]) -> str:
    if not config["model.memory.enabled"]:
        return f"plain baseline without memory ({config['model.context']})"
    method = config["model.method"]
    return f"{_METHODS.get(method, method)} ({config['model.context']})"


def _lead(run: runs.Run) -> str:
    config = run.about["config"]
    return (
        f"{_method(config)} with {config['model.backbone']} on {config['data.name']}, step "
        f"{run.about['step']}: {len(run.findings.per_image)} images of split "
        f"{run.about['evaluation']['split']}, {len(run.about['class_names'])} classes"
    )


def _tiles(run: runs.Run) -> list[tuple[str, str, str]]:
    """Name, value and meaning of the scores at the top."""
    scores, findings = run.scores, run.findings
    tiles = [
        ("mIoU", page.percent(scores["mIoU"]), "mean over classes of intersection / union"),
        ("mAcc", page.percent(scores["mAcc"]), "mean over classes of pixels found"),
        ("aAcc", page.percent(scores["aAcc"]), "share of all pixels that are right"),
    ]
    if findings.boundary:
        defined = [x for x in findings.boundary.scores().tolist() if x == x]
        mean = sum(defined) / len(defined) if defined else float("nan")
        tiles.append(("boundary F", page.percent(mean), "mean over classes of outlines hit"))
    if findings.reliability:
        error = page.percent(findings.reliability.error())
        tiles.append(("ECE", error, "how far confidences are from what is right; 0 is best"))
    return tiles


def _classes(run: runs.Run) -> list[dict[str, Any]]:
    per_class = {name: values.tolist() for name, values in run.scores["per_class"].items()}
    images = run.findings.per_image.images_of_class().tolist()
    boundary = run.findings.boundary.scores().tolist() if run.findings.boundary else None
    palette = palette_of(run.about).tolist()
    rows = []
    for k, name in enumerate(run.about["class_names"]):
        cells = [per_class[key][k] for key in ("iou", "acc", "precision")]
        cells += [boundary[k]] if boundary else []
        share = per_class["share"][k]
        rows.append(
            {
                "name": name,
                "colour": "rgb({}, {}, {})".format(*palette[k]),
                "cells": [(page.percent(x, 2), -1 if x != x else x) for x in cells],
                "share": (page.percent(share, 2), -1 if share != share else share),
                "images": images[k],
            }
        )
    return rows


def _groups(run: runs.Run, chosen: gallery.Chosen) -> list[dict[str, Any]]:
    per_image = run.findings.per_image
    scores = dict(zip(per_image.indices, per_image.scores()))
    names = dict(zip(per_image.indices, per_image.names))
    ranked = sorted((i for i in scores if scores[i] == scores[i]), key=lambda i: (scores[i], i))
    rank = {index: number for number, index in enumerate(ranked, 1)}
    titles = {"Worst": chosen.worst, "Around the median": chosen.middle, "Best": chosen.best}
    return [
        {
            "title": title,
            "images": [
                {
                    "index": i,
                    "name": names[i],
                    "miou": page.percent(scores[i]),
                    "rank": f"{rank[i]} of {len(ranked)}",
                }
                for i in indices
            ],
        }
        for title, indices in titles.items()
        if indices
    ]


def _confusions(names: Sequence[str], chosen: gallery.Chosen) -> list[dict[str, Any]]:
    return [
        {
            "true": names[pair.true],
            "predicted": names[pair.predicted],
            "pair": f"{pair.true},{pair.predicted}",
            "share": page.percent(pair.share),
            "pixels": f"{pair.pixels:,}",
            "index": pair.index,
        }
        for pair in chosen.confusions
    ]
