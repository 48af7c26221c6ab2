"""The predict mode: segments the user's own pictures and videos."""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ml_collections
import numpy as np

from memseg_jax import checkpoint, config_rules, trained_model
from memseg_jax.data.reading import map_ahead
from memseg_jax.data.scanning import IMAGE_SUFFIXES
from memseg_jax.data.videos import VIDEO_SUFFIXES, Video, VideoWriter, open_video
from memseg_jax.errors import UserError
from memseg_jax.inference import Prediction
from memseg_jax.runtime import bars, files
from memseg_jax.scoring import visualize
from memseg_jax.scoring.summary import Summary

log = logging.getLogger(__name__)

# What `save` adds to the name of a picture's results, and `save_video` to that of a video's.
LABELS, OVERLAY, CONFIDENCE, IDS, VIDEO = ENDINGS = (
    "{}.png",
    "{}_overlay.jpg",
    "{}_confidence.png",
    "{}_ids.png",
    "{}_overlay.mp4",
)
# That read, and as many that write. More would hold more pictures at a time, which may be large.
_THREADS = 2
# Fields of `config.eval` that do not change a result, rounding aside.
_HARMLESS = ("batch_size", "exact_sizes", "canvases", "size_multiple", "save_predictions")

Found = tuple[files.Place, pathlib.Path]


def find_images(pattern: str, output: files.Place) -> list[Found]:
    """Finds the pictures and videos that `--input` names, and names their results.

    Args:
        pattern: a file, a folder (searched with its sub-folders) or a glob such as "in/*.jpg".
        output: folder of the results. What lies below it is no input.

    Returns:
        Pairs of a file and the path of its results relative to `output`, without ending: that of
        the file relative to the input folder, without suffix where that is unique.

    Raises:
        UserError: nothing is found, or a result would overwrite an input.
    """
    if not pattern:
        raise UserError("--mode=predict needs --input: a picture, a video, a folder or a glob")
    path = files.place(pattern, "--input")
    if files.is_file(path):
        found, base = [path], path.parent
    elif files.exists(path):
        found, base = [p for p in files.files_below(path) if _is_input(p)], path
    else:
        found = [p for p in files.matching(path) if _is_input(p)]
        base = path.parent
        while glob.has_magic(str(base)):
            base = base.parent
    results = _real(output)
    if _real(base) != results:
        found = [p for p in found if results not in _real(p).parents]
    if not found:
        raise UserError(
            f"--input={pattern}: no picture found; expected a file, a folder or a glob with "
            f"files that end in {', '.join(sorted(IMAGE_SUFFIXES + VIDEO_SUFFIXES))}"
        )
    names = _unique_names([pathlib.Path(p.relative_to(base).as_posix()) for p in found])
    inputs = {_real(p) for p in found}
    for name in names:
        for ending in ENDINGS:
            result = _result(output / name, ending)
            if _real(result) in inputs:
                raise UserError(
                    f"--output={output}: the result {result} would overwrite a file of the "
                    "input; choose another folder"
                )
    return list(zip(found, names))


def _real(path: files.Place) -> files.Place:
    """The path without symbolic links, which buckets do not have."""
    return path if files.in_bucket(path) else path.resolve()


def _is_input(path: files.Place) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES or _is_video(path)


def _is_video(path: files.Place) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def _result(target: files.Place, ending: str) -> files.Place:
    return target.with_name(ending.format(target.name))


def _unique_names(paths: list[pathlib.Path]) -> list[pathlib.Path]:
    """A name for the results of each file, such that no two results have the same name."""
    taken: set[pathlib.Path] = set()
    names = []
    for path in paths:
        numbered = (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
        for name in itertools.chain([path.with_suffix(""), path], numbered):
            results = {_result(name, ending) for ending in ENDINGS}
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
    visualize.save_palette_png(_result(target, LABELS), prediction.label, palette)
    step = -(-max(prediction.label.shape) // visualize.JPEG_SIDE)
    shown = np.s_[::step, ::step]
    overlay = visualize.overlay(image[shown], prediction.label[shown], palette)
    visualize.save_jpeg(_result(target, OVERLAY), overlay)
    if save_confidence:
        certainty = np.clip(prediction.confidence, 0, 1) * 255
        confidence = np.round(certainty).astype(np.uint8)
        visualize.save_png(_result(target, CONFIDENCE), confidence)
    if save_ids:
        visualize.save_png(_result(target, IDS), prediction.label)


def run(
    config: ml_collections.ConfigDict,
    workdir: str,
    which: str | int = "best",
    pattern: str = "",
    output: str = "",
    save_confidence: bool = False,
    save_ids: bool = False,
    overwrite: bool = False,
) -> None:
    """Segments pictures and videos with a checkpoint of `workdir`.

    Class names and colours are those of the checkpoint. What the same checkpoint made with the same
    settings of the same file is not made again.

    Args:
        config: the whole config; `config.eval` decides how images are segmented.
        workdir: folder of a run.
        which: "best", "last" or a step.
        pattern: a file, a folder or a glob.
        output: folder for the results; empty: `<workdir>/predictions`.
        save_confidence: see `save`.
        save_ids: see `save`.
        overwrite: whether to make again what is done.

    Raises:
        UserError: the config is wrong, nothing to segment, no such checkpoint, or some pictures
            could not be read (raised at the end; all others are done by then).
    """
    config_rules.check(config)
    folder = files.place(output or files.place(workdir) / "predictions", "--output")
    found = find_images(pattern, folder)
    step, meta = checkpoint.read_meta(workdir, which)  # first: no misspelt workdir is made
    if files.in_bucket(folder):  # on a disk, nothing is made before it is needed
        files.writable_folder(folder, "the folder for the results", "--output")
    summary = Summary(folder, meta["class_names"], _made_by(config, meta))
    endings = [LABELS, OVERLAY] + [CONFIDENCE] * save_confidence + [IDS] * save_ids
    todo = found if overwrite else [x for x in found if not _is_done(x, folder, summary, endings)]
    failed = []
    if todo:
        # This step: "best" may be another by now, if the run goes on.
        model = trained_model.load(workdir, config, step, confidence=save_confidence)
        files.make_folder(folder, "--output")
        job = _Job(
            model.segment,
            folder,
            summary,
            functools.partial(
                save, palette=model.palette, save_confidence=save_confidence, save_ids=save_ids
            ),
            model.palette,
        )
        log.info("segmenting %d pictures with step %d", len(todo), model.step)
        summary.begin(name.as_posix() for _, name in todo)
        try:
            failed = job.pictures([x for x in todo if not _is_video(x[0])])
            failed += job.videos([x for x in todo if _is_video(x[0])])
        finally:
            summary.close()
    done = len(todo) - len(failed)
    words = f"{done} picture{'' if done == 1 else 's'} segmented"
    if skipped := len(found) - len(todo):
        words += f", {skipped} skipped that were done before (--overwrite makes them again)"
    print(f"{words}, results in {folder}", flush=True)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(found)} pictures could not be read:\n" + "\n".join(failed)
        )


def _made_by(config: ml_collections.ConfigDict, meta: dict[str, Any]) -> str:
    """Names a checkpoint and all that decides about results: "step 500, 1f0c9a3e"."""
    settings = {k: v for k, v in config.eval.to_dict().items() if k not in _HARMLESS}
    model = config.model.compute_dtype, config.model.precision
    text = json.dumps([meta, settings, model, config.augment.crop, config.augment.flip_pairs])
    return f"step {meta['step']}, {hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _is_done(found: Found, folder: files.Place, summary: Summary, endings: list[str]) -> bool:
    path, name = found
    if not summary.has(str(files.absolute(path)), name.as_posix()):
        return False
    for ending in [VIDEO] if _is_video(path) else endings:
        result = _result(folder / name, ending)
        if not files.is_file(result):
            return False
        # An object in a bucket is taken as unchanged.
        on_disk = not files.in_bucket(path) and not files.in_bucket(result)
        if on_disk and os.path.getmtime(path) > os.path.getmtime(result):
            return False
    return True


@dataclasses.dataclass(frozen=True)
class _Job:
    """Reading, segmenting and writing, which go on at the same time.

    Attributes:
        segment: `TrainedModel.segment`.
        folder: of the results.
        summary: gets a line for each of them.
        save: `save` but for the prediction, the image and the target.
        palette: uint8 [classes, 3].
    """

    segment: Callable[[Iterable[tuple[Any, np.ndarray]]], Iterator[Prediction]]
    folder: files.Place
    summary: Summary
    save: Callable[[Prediction, np.ndarray, files.Place], None]
    palette: np.ndarray

    def pictures(self, found: list[Found]) -> list[str]:
        """Segments pictures; returns what is wrong with those that could not be read."""
        waiting: dict[int, np.ndarray] = {}
        failed: list[str] = []

        def read(index: int) -> np.ndarray | UserError:
            try:
                return trained_model.read_picture(found[index][0])
            except UserError as error:
                return error

        def inputs() -> Iterator[tuple[int, np.ndarray]]:
            for index, image in enumerate(map_ahead(read, range(len(found)), _THREADS)):
                if isinstance(image, UserError):
                    log.error("%s", image)
                    failed.append(str(image))
                    bar.update()
                else:
                    waiting[index] = image
                    yield index, image

        def write(prediction: Prediction) -> None:
            self.save(
                prediction, waiting.pop(prediction.key), self.folder / found[prediction.key][1]
            )
            pixels = visualize.pixels_per_value(prediction.label)
            self._add(found[prediction.key], prediction.label.shape, pixels)
            bar.update()

        with bars.bar(len(found), "segmenting", "picture") as bar:
            for _ in map_ahead(write, self.segment(inputs()), _THREADS):
                pass
        return failed

    def videos(self, found: list[Found]) -> list[str]:
        """The same for videos, one after the other."""
        failed = []
        for path, name in found:
            with contextlib.ExitStack() as stack:
                try:
                    video = open_video(stack.enter_context(files.readable(path)), path)
                except (OSError, UserError) as error:
                    log.error("%s", error)
                    failed.append(str(error))
                else:
                    self._video(video, (path, name))
        return failed

    def _video(self, video: Video, found: Found) -> None:
        """Writes a video of overlays, of the rate and the size of the video that was given."""
        target = _result(self.folder / found[1], VIDEO)
        files.make_folder(target.parent, "--output")
        waiting: dict[int, np.ndarray] = {}
        pixels, frames = np.zeros(256, np.int64), 0

        def inputs() -> Iterator[tuple[int, np.ndarray]]:
            for number, frame in enumerate(video.read()):
                waiting[number] = frame
                yield number, frame

        def write(prediction: Prediction) -> np.ndarray:
            frame = waiting.pop(prediction.key)
            writer.add(visualize.overlay(frame, prediction.label, self.palette))
            return prediction.label

        with (
            files.replacing(target) as temporary,
            tempfile.TemporaryDirectory(dir=temporary.parent) as folder,
            bars.bar(video.frames or None, found[1].name, "frame") as bar,
        ):
            file = pathlib.Path(folder, "video.mp4")  # OpenCV takes the format from the name
            with contextlib.closing(VideoWriter(file, video.rate)) as writer:
                for label in map_ahead(write, self.segment(inputs()), 1):
                    pixels += visualize.pixels_per_value(label)
                    frames += 1
                    bar.update()
            os.replace(file, temporary)
        self._add(found, label.shape, pixels, frames)

    def _add(
        self, found: Found, size: tuple[int, int], pixels: np.ndarray, frames: int = 1
    ) -> None:
        path, name = found
        source = str(files.absolute(path))
        largest = self.summary.add(source, name.as_posix(), size, pixels, frames)
        log.info("%s: %s", path, largest)
