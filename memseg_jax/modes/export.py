"""The export mode: a trained network as a folder that runs without this package."""

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from memseg_jax import checkpoint, command_line, config_rules, trained_model
from memseg_jax.checkpoint.meta import versions
from memseg_jax.data import open_split
from memseg_jax.data.transforms import MEAN, STD, evaluation_resize, resize_image
from memseg_jax.errors import UserError
from memseg_jax.exporting import folder as export_folder
from memseg_jax.exporting import load, program
from memseg_jax.exporting.agreement import TOLERANCE, Reference, compare
from memseg_jax.exporting.folding import fold, unfold
from memseg_jax.exporting.weights import FORMS, pack, unpack
from memseg_jax.models.segmentor import Segmentor, build_segmentor
from memseg_jax.runtime import files
from memseg_jax.runtime.suggest import did_you_mean
from memseg_jax.scoring import visualize
from memseg_jax.scoring.evaluator import Evaluator
from memseg_jax.training.state import abstract_variables

log = logging.getLogger(__name__)

FORMAT_VERSION = 1


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """Reads "512x512,480x640" (height x width) as pairs; empty text: none.

    Raises:
        UserError: it is something else.
    """
    parts = text.split(",") if text else ()
    sizes = [command_line.parse_size(f"--sizes={text}", part.strip()) for part in parts]
    return list(dict.fromkeys(sizes))


def run(
    config: ml_collections.ConfigDict,
    workdir: str,
    which: str | int,
    picture: str,
    output: str,
    sizes: str = "",
    form: str = "float32",
) -> None:
    """Exports a checkpoint of `workdir`, and checks the result against the predictor.

    Args:
        config: the whole config.
        workdir: folder of a run.
        which: "best", "last" or a step.
        picture: file with which the programs are checked; a copy of it is part of the export.
        output: the folder to write; must not exist.
        sizes: see `parse_sizes`; besides the program for any size, each gets one of its own.
            Empty: the size of the picture.
        form: of the weights, one of `weights.FORMS`. Where it is not float32, the loss of mIoU is
            measured on `config.data.eval_split`.

    Raises:
        UserError: something is wrong with the arguments, the checkpoint or the data; or an exported
            program differs from the predictor by more than `agreement.TOLERANCE`. Nothing is
            written then.
    """
    config_rules.check(config)
    if form not in FORMS:
        raise UserError(f"--weights {form}: there is no such form. {did_you_mean(form, FORMS)}")
    target = files.absolute(output, "--output")
    fixed = parse_sizes(sizes)
    image = trained_model.read_picture(files.place(picture, "--input"))
    image = evaluation_resize(image, config.eval)
    with export_folder.whole(target) as folder:
        _fill(folder, _Network.read(config, workdir, which, form), image, fixed)
    print(f"wrote {target}; on any machine with jax, numpy and flatbuffers:\n  python load.py")


@dataclasses.dataclass(frozen=True)
class _Network:
    """What is exported.

    Attributes:
        config: the whole config.
        meta: the checkpoint's description.
        form: of the weights.
        table: the weights in that form.
        variables: of the usual network, with the same weights: what a program is compared with.
        original: as they were trained.
    """

    config: ml_collections.ConfigDict
    meta: dict[str, Any]
    form: str
    table: dict[str, np.ndarray]
    variables: dict[str, Any]
    original: dict[str, Any]

    @classmethod
    def read(
        cls, config: ml_collections.ConfigDict, workdir: str, which: str | int, form: str
    ) -> "_Network":
        step, meta = checkpoint.read_meta(workdir, which)
        checkpoint.check_class_names(meta, tuple(config.data.class_names))
        model = build_segmentor(config)
        folder = files.absolute(workdir, "--workdir")
        original, _ = checkpoint.restore_for_inference(folder, abstract_variables(model), step)
        folded = fold(original)
        used = abstract_variables(_without_auxiliary(model))["params"]
        params = {name: folded[name] for name in used}
        table = pack({"params": params, "memory": np.asarray(original["memory"])}, form)
        variables = original
        if form != "float32":
            params = jax.tree.map(np.asarray, unpack(table)["params"])
            variables = unfold(folded | params, original)
        return cls(config, meta, form, table, variables, original)


def _without_auxiliary(model: Segmentor) -> Segmentor:
    """The part of a network that predicts."""
    return model.clone(auxiliary=False)


def _fill(folder: Path, network: _Network, image: np.ndarray, sizes: list[tuple[int, int]]) -> None:
    """Writes all files of an export and checks its programs."""
    config = network.config
    model = _without_auxiliary(build_segmentor(config))
    evaluation: Any = config.eval
    contents = {export_folder.WEIGHTS: export_folder.archive(network.table)}
    sizes = sizes or [image.shape[:2]]
    for size in [*sizes, None]:
        name = export_folder.program_name(size)
        started = time.monotonic()
        exported = program.exported(model, network.table, size, evaluation.softmax_before_resize)
        contents[name] = bytes(exported.serialize())
        log.info("%s: %.1f s, %d bytes", name, time.monotonic() - started, len(contents[name]))
    description = _description(network, model.coarsest_stride)
    export_folder.write(folder, contents, description)

    predictor = Reference(config, network.variables)
    checks, stored = [], {}
    for size in [*sizes, None]:
        shown = _part_of_no(sizes, image) if size is None else resize_image(image, size)
        found, expected = load.Model(folder)(shown), predictor.predict(shown)
        name, tolerance = export_folder.program_name(size), description["tolerance"]
        checks.append(dataclasses.asdict(compare(name, found, expected, tolerance)))
        stored = stored or {
            "image": shown,
            "labels": expected.label,
            "confidence": expected.confidence,
        }
    contents[export_folder.CHECK] = export_folder.archive(stored)
    description |= {"checked": checks, "loss": _loss(network)}
    export_folder.write(folder, contents, description)


def _part_of_no(sizes: list[tuple[int, int]], image: np.ndarray) -> np.ndarray:
    """The upper left part of a picture, with a few rows and columns less.

    Its size is none of `sizes`, so that the program for any size segments it, and hardly ever one
    that needs no padding.
    """
    for cut in range(1, min(image.shape[:2])):
        part = image[:-cut, :-cut]
        if part.shape[:2] not in sizes:
            return part
    raise UserError(f"--input: a picture of {image.shape[1]}x{image.shape[0]} pixels is too small")


def _description(network: _Network, unit: int) -> dict[str, Any]:
    """What `model.json` says of a network before it is checked."""
    config, meta = network.config, network.meta
    evaluation: Any = config.eval
    names = list(meta["class_names"])
    palette = visualize.resolve_palette(meta["palette"], len(names))
    return {
        "format_version": FORMAT_VERSION,
        "model": f"{config.model.method}, {config.model.backbone}",
        "step": meta["step"],
        "class_names": names,
        "palette": palette.tolist(),
        "input": "RGB uint8 [height, width, 3]",
        "outputs": ["labels uint8 [height, width]", "confidence float32 [height, width]"],
        "normalisation": {"mean": MEAN, "std": STD, "done_by": "the programs"},
        "resize": {"base_size": evaluation.base_size, "keep_ratio": evaluation.keep_ratio},
        "unit": unit,
        "platforms": program.PLATFORMS,
        "weights": network.form,
        "compute_dtype": config.model.compute_dtype,
        "tolerance": TOLERANCE[config.model.compute_dtype],
        "versions": versions(),
    }


def _loss(network: _Network) -> dict[str, Any] | None:
    """What the form of the weights costs on the run's own evaluation split; None: nothing."""
    if network.form == "float32":
        return None
    config: Any = network.config
    split = config.data.eval_split
    evaluator = Evaluator(config, build_segmentor(config), open_split(config.data, split))
    scores = {}
    for name, variables in (("float32", network.original), (network.form, network.variables)):
        log.info("evaluating the weights in %s on %s", name, split)
        scores[name] = float(evaluator.evaluate(variables).scores["mIoU"])
    loss = scores["float32"] - scores[network.form]
    print(
        f"mIoU on {split}: {scores['float32']:.4f} with float32, {scores[network.form]:.4f} with "
        f"{network.form} weights: {loss:+.4f} lost"
    )
    return {"split": split, "mIoU": scores, "lost": loss}
