"""The predict mode: segments the user's own pictures."""

import glob
import itertools
import logging
import pathlib
from collections.abc import Iterator

import jax
import ml_collections
import numpy as np

from memseg_jax import checkpoint, config_rules
from memseg_jax.data.images import read_image
from memseg_jax.data.scanning import IMAGE_SUFFIXES
from memseg_jax.errors import UserError
from memseg_jax.inference import Prediction, Predictor
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import files, sharding
from memseg_jax.scoring import visualize
from memseg_jax.training.state import abstract_variables

log = logging.getLogger(__name__)


# What `save` adds to the name of a picture's results.
ENDINGS = ("{}.png", "{}_overlay.jpg", "{}_confidence.png", "{}_ids.png")


def find_images(pattern: str, output: files.Place) -> list[tuple[files.Place, pathlib.Path]]:
    """Finds the pictures that `--input` names, and names their results.

    Args:
        pattern: a file, a folder (searched with its sub-folders) or a glob such as "in/*.jpg".
        output: folder of the results. What lies below it is no input.

    Returns:
        Pairs of a file and the path of its results relative to `output`, without ending: that of
        the picture relative to the input folder, without suffix where that is unique.

    Raises:
        UserError: nothing is found, or a result would overwrite a picture.
    """
    if not pattern:
        raise UserError("--mode=predict needs --input: a picture, a folder or a glob")
    path = files.place(pattern, "--input")
    if files.is_file(path):
        found, base = [path], path.parent
    elif files.exists(path):
        found, base = [p for p in files.files_below(path) if _is_image(p)], path
    else:
        found = [p for p in files.matching(path) if _is_image(p)]
        base = path.parent
        while glob.has_magic(str(base)):
            base = base.parent
    results = _real(output)
    if _real(base) != results:
        found = [p for p in found if results not in _real(p).parents]
    if not found:
        raise UserError(
            f"--input={pattern}: no picture found; expected a file, a folder or a glob with "
            f"files that end in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    names = _unique_names([pathlib.Path(p.relative_to(base).as_posix()) for p in found])
    pictures = {_real(p) for p in found}
    for name in names:
        for ending in ENDINGS:
            result = output / name.with_name(ending.format(name.name))
            if _real(result) in pictures:
                raise UserError(
                    f"--output={output}: the result {result} would overwrite a picture of the "
                    "input; choose another folder"
                )
    return list(zip(found, names))


def _real(path: files.Place) -> files.Place:
    """The path without symbolic links, which buckets do not have."""
    return path if files.in_bucket(path) else path.resolve()


def _is_image(path: files.Place) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _unique_names(paths: list[pathlib.Path]) -> list[pathlib.Path]:
    """A name for the results of each file, such that no two results have the same name."""
    taken: set[pathlib.Path] = set()
    names = []
    for path in paths:
        numbered = (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
        for name in itertools.chain([path.with_suffix(""), path], numbered):
            results = {name.with_name(ending.format(name.name)) for ending in ENDINGS}
            if not results & taken:
                break
        taken |= results
        names.append(name)
    return names


def save(
    prediction: Prediction,
    image: np.ndarray,
    target: files.Place,
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
    files.make_folder(target.parent, "--output")
    labels, overlay, confidence, ids = (
        target.with_name(ending.format(target.name)) for ending in ENDINGS
    )
    visualize.save_palette_png(labels, prediction.label, palette)
    visualize.save_jpeg(overlay, visualize.overlay(image, prediction.label, palette))
    if save_confidence:
        certainty = np.clip(prediction.confidence, 0, 1) * 255
        visualize.save_png(confidence, np.round(certainty).astype(np.uint8))
    if save_ids:
        visualize.save_png(ids, prediction.label)


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
        UserError: the config is wrong, nothing to segment, no such checkpoint, or some pictures
            could not be read (raised at the end; all others are done by then).
    """
    config_rules.check(config)
    folder = files.place(output or files.place(workdir) / "predictions", "--output")
    pictures = find_images(pattern, folder)
    _, meta = checkpoint.read_meta(workdir, which)  # first: a misspelt workdir is not to be made
    if files.in_bucket(folder):  # on a disk, nothing is made before it is needed
        files.writable_folder(folder, "the folder for the results", "--output")
    with config.unlocked():
        config.data.class_names = tuple(meta["class_names"])
    model = build_segmentor(config)
    variables, _ = checkpoint.restore_for_inference(workdir, abstract_variables(model), which)
    palette = visualize.resolve_palette(meta["palette"], len(meta["class_names"]))
    files.make_folder(folder, "--output")
    mesh = sharding.make_mesh(jax.local_devices())
    pairs = config.augment.flip_pairs
    predictor = Predictor(model, config.eval, mesh, pairs, confidence=save_confidence)
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

    for prediction in predictor.predict(variables, images()):
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
