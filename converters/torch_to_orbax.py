r"""Turns a released PyTorch checkpoint of a segmentor into one that every mode starts from.

    python -m converters.torch_to_orbax --checkpoint deeplabv3_r50_ade20k.pth \
        --config configs/ade20k_resnet50.py --output runs/ade20k_resnet50

Then `python -m memseg_jax.main --config configs/ade20k_resnet50.py --workdir runs/ade20k_resnet50`
evaluates, predicts or goes on to train.
"""

import dataclasses
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from converters import names, recognise, torch_files
from converters.mismatch import mismatches
from converters.torch_files import TorchFile
from memseg_jax import checkpoint, command_line
from memseg_jax.errors import UserError
from memseg_jax.models.segmentor import Segmentor, build_segmentor
from memseg_jax.runtime import files
from memseg_jax.scoring import visualize
from memseg_jax.training.state import abstract_variables

REPORT = "conversion.txt"
_REMOVAL_ATTEMPTS = 100  # a tenth of a second apart
FLAGS = {
    "checkpoint": "file of the PyTorch model (.pth, .pt or .safetensors); required",
    "output": "folder to write, to be used as --workdir; must not exist; required",
    "sha256": "what the file's SHA-256 must be",
}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What became of every tensor of a file.

    Attributes:
        taken: name in the file -> path of ours.
        kept_beside: counters, which no number depends on: kept as plain values.
        dropped: name in the file -> reason.
        derived: buffers that follow from the shapes of others, and are what they should be.
    """

    taken: dict[str, str]
    kept_beside: dict[str, int]
    dropped: dict[str, str]
    derived: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line of counts."""
        derived = f"{len(self.derived)} that follow from others, " if self.derived else ""
        return (
            f"{len(self.taken)} tensors taken, {len(self.kept_beside)} counters kept beside them, "
            f"{derived}{len(self.dropped)} dropped, none left at initialisation"
        )


def to_variables(
    file: TorchFile, model: Segmentor, config: ml_collections.ConfigDict
) -> tuple[dict[str, Any], Conversion]:
    """Maps the tensors of a file to the arrays of our model.

    Args:
        file: from `torch_files.read`.
        model: the model that `config` describes.
        config: the whole config.

    Returns:
        params, batch_stats and memory (views of the file's arrays where the layouts allow), and
        what became of every tensor.

    Raises:
        UserError: a tensor is missing, unknown, of another shape or type, or not finite.
    """
    names.check_counterpart(config)
    abstract = names.flatten(abstract_variables(model))
    keys = names.torch_keys(names.unflatten(abstract), config.model.method)
    wanted = {
        keys[path]: names.torch_shape(leaf.shape, keys[path]) for path, leaf in abstract.items()
    }
    counters = set(names.counter_keys(wanted))
    buffers = names.index_buffers(wanted)
    found = dict(file.tensors)
    beside = {key: int(found.pop(key)) for key in counters & found.keys() if found[key].ndim == 0}
    dropped = {}
    if not model.auxiliary:
        heads = [key for key in found if key.startswith("auxiliary_decoder.")]
        if heads and model.backbone.auxiliary_levels:
            dropped = dict.fromkeys(heads, "config.model.auxiliary is False")
    found = {key: value for key, value in found.items() if key not in dropped}
    shapes = {key: buffer.shape for key, buffer in buffers.items()}
    _check_names_and_shapes(file, config, found, wanted | shapes)
    _check_buffers(file, {key: found.pop(key) for key in buffers}, buffers)
    _check_values(file, found)
    variables = {path: names.from_torch_layout(found[key], key) for path, key in keys.items()}
    taken = {key: path for path, key in keys.items()}
    return names.unflatten(variables), Conversion(taken, beside, dropped, tuple(buffers))


def convert(
    path: str | os.PathLike,
    config: ml_collections.ConfigDict,
    output: str | os.PathLike,
    sha256: str | None = None,
) -> tuple[TorchFile, Conversion]:
    """Writes a folder that `--workdir` can name; it appears complete or not at all.

    Args:
        path: the PyTorch file.
        config: the config of the model.
        output: the folder; it must not exist.
        sha256: what the file's SHA-256 must be; None: anything.

    Returns:
        The file, and what became of its tensors.

    Raises:
        UserError: the file does not fit the config, or the output cannot be written.
    """
    output = files.absolute(output, "--output")
    if files.exists(output):
        raise UserError(f"--output {output} exists already; choose another folder, or remove it")
    if files.in_bucket(output):
        files.writable_folder(output, "the folder", "--output")
    file = torch_files.read(path, sha256)
    variables, conversion = to_variables(file, build_segmentor(config), config)
    class_names = tuple(config.data.class_names)
    palette = visualize.resolve_palette(config.data.palette, len(class_names))
    meta = checkpoint.make_meta(config, 0, class_names, palette, "")
    meta["origin"] = {
        "file": file.path.name,
        "sha256": file.sha256,
        "layout": file.layout,
        "entries": list(file.entries),
        "counters": conversion.kept_beside,
    }
    if files.in_bucket(output):  # in which nothing counts before the checkpoint's marker is there
        files.write_text(output / REPORT, report(file, conversion))
        checkpoint.write_weights(output, variables, meta)
        return file, conversion
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise UserError(f"--output {output} cannot be made: {error.strerror or error}") from error
    try:
        checkpoint.write_weights(unfinished, variables, meta)
        (unfinished / REPORT).write_text(report(file, conversion), encoding="utf-8")
        unfinished.chmod(0o777 & ~_umask())
        unfinished.rename(output)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}") from error
    finally:
        _remove(unfinished)
    return file, conversion


def report(file: TorchFile, conversion: Conversion) -> str:
    """The full report of a conversion: one line per tensor."""
    lines = [
        f"file     {file.path.name}",
        f"SHA-256  {file.sha256}",
        f"layout   {file.layout}",
        f"summary  {conversion.summary()}",
        "",
        *(f"taken    {key} -> {path}" for key, path in conversion.taken.items()),
        *(f"beside   {key} = {value}" for key, value in conversion.kept_beside.items()),
        *(f"derived  {key}" for key in conversion.derived),
        *(f"dropped  {key}: {reason}" for key, reason in conversion.dropped.items()),
    ]
    return "\n".join(lines) + "\n"


def _check_names_and_shapes(
    file: TorchFile,
    config: ml_collections.ConfigDict,
    found: Mapping[str, np.ndarray],
    wanted: Mapping[str, tuple[int, ...]],
) -> None:
    shapes = {key: array.shape for key, array in found.items()}
    lines = mismatches(shapes, wanted)
    if lines:
        cause = recognise.likely_cause(file, config, wanted)
        raise UserError("\n".join([f"{file.path} does not fit the config:", *lines, cause]))


def _check_buffers(
    file: TorchFile, found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]
) -> None:
    for key, buffer in wanted.items():
        if found[key].dtype != buffer.dtype or not np.array_equal(found[key], buffer):
            raise UserError(
                f"{file.path}: {key} ({found[key].dtype}) is not what it is in the PyTorch "
                "reference, where it says which entry of the table beside it belongs to which pair "
                "of positions. The model in the file is another one."
            )


def _check_values(file: TorchFile, found: Mapping[str, np.ndarray]) -> None:
    for key, array in found.items():
        if array.dtype != np.float32:
            raise UserError(
                f"{file.path}: {key} is {array.dtype}; expected float32, as the released "
                "checkpoints are"
            )
        torch_files.check_finite(file, key, array)


def _remove(folder: Path) -> None:
    """Removes a folder, if it is there, into which threads of a failed save may still write."""
    for _ in range(_REMOVAL_ATTEMPTS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def main(argv: Iterable[str]) -> int:
    """Runs the command; returns the exit status."""
    values = command_line.parse(argv, FLAGS, required=("checkpoint", "output"), doc=__doc__)
    file, conversion = convert(values.checkpoint, values.config, values.output, values.sha256)
    print(f"{file.path.name}: {file.layout}\nSHA-256 {file.sha256}\n{conversion.summary()}")
    for reason in sorted(set(conversion.dropped.values())):
        print(f"  dropped because {reason}")
    for line in recognise.remarks(file, values.config):
        print(f"note: {line}")
    print(
        f"wrote {values.output} ({REPORT} lists every tensor). Next:\n"
        f"  python -m memseg_jax.main --config {values.config_flag} --workdir {values.output} "
        "--mode evaluate"
    )
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
