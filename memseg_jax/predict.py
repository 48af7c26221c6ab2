"""The predict mode: segments the user's own pictures."""

import glob
import logging
import pathlib
from collections.abc import Iterator

import jax
import ml_collections
import numpy as np

from memseg_jax import checkpoint, visualize
from memseg_jax.data.folder import IMAGE_SUFFIXES
from memseg_jax.data.images import read_image
from memseg_jax.errors import UserError
from memseg_jax.inference import Prediction, Predictor
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.sharding import make_mesh
from memseg_jax.state import abstract_variables

log = logging.getLogger(__name__)


def find_images(pattern: str) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """Finds the pictures that `--input` names.

    Args:
        pattern: a file, a folder (searched with its sub-folders) or a glob such as "in/*.jpg".

    Returns:
        Pairs of a file and the relative path, without suffix, that its results get. Pictures of
        the same name keep their suffix there, so that no result overwrites another.

    Raises:
        UserError: nothing is found.
    """
    path = pathlib.Path(pattern)
    if not pattern:
        raise UserError("--mode=predict needs --input: a picture, a folder or a glob")
    if path.is_file():
        files, base = [path], path.parent
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        base = path
    else:
        found = (pathlib.Path(name) for name in sorted(glob.glob(pattern, recursive=True)))
        files = [p for p in found if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES]
        fixed = []
        for part in path.parts[:-1]:
            if glob.has_magic(part):
                break
            fixed.append(part)
        base = pathlib.Path(*fixed)
    if not files:
        raise UserError(
            f"--input={pattern}: no picture found; expected a file, a folder or a glob with "
            f"files that end in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    stems = [p.relative_to(base).with_suffix("") for p in files]
    names = [
        stem if stems.count(stem) == 1 else p.relative_to(base) for stem, p in zip(stems, files)
    ]
    return list(zip(files, names))


def save(
    prediction: Prediction,
    image: np.ndarray,
    target: pathlib.Path,
    palette: np.ndarray,
    save_confidence: bool,
    save_ids: bool,
) -> None:
    """Writes the results of one picture.

    Args:
        prediction: the class and the confidence of every pixel.
        image: the picture, RGB uint8 [height, width, 3].
        target: path of the results without suffix; its folder is made.
        palette: uint8 [classes, 3].
        save_confidence: also `<target>_confidence.png`, 8 bit, 255 = certain.
        save_ids: also `<target>_ids.png`, 8 bit, the value is the class id.

    Raises:
        UserError: the folder or a file cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot make the folder {target.parent}: {error}") from error

    def named(ending: str) -> pathlib.Path:
        return target.with_name(target.name + ending)

    visualize.save_palette_png(named(".png"), prediction.label, palette)
    overlay = visualize.overlay(image, prediction.label, palette)
    visualize.save_jpeg(named("_overlay.jpg"), overlay)
    if save_confidence:
        confidence = np.round(np.clip(prediction.confidence, 0, 1) * 255).astype(np.uint8)
        visualize.save_png(named("_confidence.png"), confidence)
    if save_ids:
        visualize.save_png(named("_ids.png"), prediction.label)


def run(
    config: ml_collections.ConfigDict,
    workdir: str,
    which: str | int = "best",
    pattern: str = "",
    output: str = "",
    save_confidence: bool = False,
    save_ids: bool = False,
) -> None:
    """Segments pictures with a checkpoint of `workdir`.

    Class names and colours are those of the checkpoint.

    Args:
        config: the whole config; `config.eval` decides how images are segmented.
        workdir: folder of a run.
        which: "best", "last" or a step.
        pattern: a file, a folder or a glob.
        output: folder for the results; empty: `<workdir>/predictions`.
        save_confidence: see `save`.
        save_ids: see `save`.

    Raises:
        UserError: nothing to segment, no such checkpoint, or some pictures could not be read
            (raised at the end; all others are done by then).
    """
    pictures = find_images(pattern)
    folder = pathlib.Path(output) if output else pathlib.Path(workdir) / "predictions"
    _, meta = checkpoint.read_meta(workdir, which)
    with config.unlocked():
        config.data.class_names = tuple(meta["class_names"])
    model = build_segmentor(config)
    variables, _ = checkpoint.restore_for_inference(workdir, abstract_variables(model), which)
    palette = visualize.resolve_palette(meta["palette"], len(meta["class_names"]))
    predictor = Predictor(model, variables, config.eval, make_mesh(jax.local_devices()))
    log.info("segmenting %d pictures with step %d", len(pictures), meta["step"])

    waiting: dict[int, np.ndarray] = {}
    failed: list[str] = []

    def images() -> Iterator[tuple[int, np.ndarray]]:
        for index, (path, _) in enumerate(pictures):
            try:
                waiting[index] = read_image(path)
            except UserError as error:
                log.error("%s", error)
                failed.append(str(error))
                continue
            yield index, waiting[index]

    for prediction in predictor.predict(images()):
        path, name = pictures[prediction.key]
        image = waiting.pop(prediction.key)
        save(prediction, image, folder / name, palette, save_confidence, save_ids)
        log.info("%s: %s", path, _summary(prediction.label, meta["class_names"]))
    done = len(pictures) - len(failed)
    print(f"{done} picture{'' if done == 1 else 's'} segmented, results in {folder}", flush=True)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(pictures)} pictures could not be read:\n" + "\n".join(failed)
        )


def _summary(label: np.ndarray, class_names: list[str]) -> str:
    """The largest classes of a label map, for one line of log."""
    counts = np.bincount(label.reshape(-1), minlength=len(class_names))
    largest = [k for k in np.argsort(-counts)[:4] if counts[k]]
    return ", ".join(f"{class_names[k]} {counts[k] / label.size:.0%}" for k in largest)
