"""The memory mode: shows what the memory of a checkpoint holds, how it is read, and its worth."""

import re

import jax
import ml_collections

from memseg_jax import checkpoint, config_rules, trained_model
from memseg_jax.data import images, open_split
from memseg_jax.errors import UserError
from memseg_jax.inspection import inspector, page
from memseg_jax.inspection.findings import Picture
from memseg_jax.inspection.looking import Looker
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import files
from memseg_jax.runtime.log_file import say
from memseg_jax.training.state import abstract_variables


def run(
    config: ml_collections.ConfigDict,
    workdir: str,
    which: str | int = "best",
    picture: str = "",
    pixel: str = "",
    output: str = "",
) -> None:
    """Inspects the memory of a checkpoint of `workdir`.

    The evaluation split is segmented three times: with the memory, with its rows permuted, and with
    zeros. The run itself is only read.

    Args:
        config: the whole config; `config.eval` decides how images are segmented.
        workdir: folder of a run.
        which: "best", "last" or a step.
        picture: to look at, pixel by pixel; empty: none is.
        pixel: "ROW,COLUMN" of the picture, to show first; empty: its middle.
        output: folder for the results; empty: `<workdir>/memory`.

    Raises:
        UserError: the model has no memory; there is no such checkpoint, or it is of another model;
            the data or the picture cannot be read; the pixel is none; a file cannot be written.
    """
    config_rules.check(config)
    step, meta = checkpoint.read_meta(workdir, which)
    class_names = tuple(config.data.class_names)
    checkpoint.check_class_names(meta, class_names)
    model = build_segmentor(config)
    looker = Looker(model, config)
    images.allow_megapixels(config.eval.max_megapixels)
    where = parse_pixel(pixel) if pixel else None
    image = trained_model.read_picture(files.place(picture, "--input")) if picture else None
    source = open_split(config.data, config.data.eval_split)
    run_folder = files.absolute(workdir, "the workdir")
    folder = files.writable_folder(
        output or run_folder / inspector.FOLDER, "the folder for the results", "--output"
    )
    variables, _ = checkpoint.restore_for_inference(run_folder, abstract_variables(model), step)
    variables = jax.device_put(variables)  # once, and not for every picture

    shown = None
    if image is not None:
        look = looker.look(variables, image)
        height, width = image.shape[:2]
        shown = Picture(files.place(picture).name, image, look, where or (height // 2, width // 2))
        look.at(*shown.pixel)  # before what takes long: whether there is such a pixel
    found = inspector.inspect_memory(
        config, model, looker, variables, source, run_folder, step, picture=shown
    )
    inspector.write_files(found, folder)
    say(page.in_words(found))
    say(f"Look at it: {folder / inspector.PAGE}")


def parse_pixel(text: str) -> tuple[int, int]:
    """Reads "ROW,COLUMN".

    Raises:
        UserError: it is something else.
    """
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if not match:
        raise UserError(
            f"--pixel {text}: expected ROW,COLUMN of a pixel of the picture, such as --pixel 120,80"
        )
    return int(match[1]), int(match[2])
