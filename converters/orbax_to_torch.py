"""Writes a model of ours as a file that the PyTorch reference reads; the way back.

    python -m converters.orbax_to_torch --workdir runs/ade20k_resnet50 --output model.pth

The config is the one in the checkpoint.
"""

import os
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from converters import names
from converters.torch_files import import_safetensors, import_torch
from memseg_jax import checkpoint, command_line, trained_model
from memseg_jax.errors import UserError
from memseg_jax.models.segmentor import build_segmentor, method_of
from memseg_jax.runtime import files
from memseg_jax.training.state import abstract_variables

FLAGS = {
    "workdir": "folder of a run, or of a converted checkpoint; required",
    "checkpoint": "best, last or a step (default: best)",
    "output": "file to write, .pth or .safetensors; must not exist; required",
}


def state_dict(
    variables: Mapping[str, Any],
    config: ml_collections.ConfigDict,
    counters: Mapping[str, int] | int = 0,
) -> "OrderedDict[str, Any]":
    """Our variables as a state dict of the reference: its names, layouts and order.

    Args:
        variables: params, batch_stats and memory.
        config: the config of the model.
        counters: values of the normalisations' step counters by name, or one for all. With a fixed
            momentum, as here, PyTorch computes nothing from them.

    Returns:
        {key: torch.Tensor}, in the order of the reference's modules.

    Raises:
        UserError: the reference has no such model.
    """
    torch = import_torch()
    from converters.torch_model import build_torch_model

    with torch.device("meta"):  # names, shapes and order; no memory
        wanted = build_torch_model(config).state_dict()
    flat = names.flatten(dict(variables))
    keys = names.torch_keys(dict(variables), method_of(config))
    paths = {key: path for path, key in keys.items()}
    buffers = names.index_buffers({key: tensor.shape for key, tensor in wanted.items()})
    tensors = OrderedDict()
    for key, like in wanted.items():
        if key in paths:
            value = names.to_torch_layout(np.asarray(flat[paths[key]]), key)
            tensors[key] = torch.from_numpy(np.array(value, order="C"))
        elif key in buffers:
            tensors[key] = torch.from_numpy(buffers[key])
        else:
            count = counters if isinstance(counters, int) else counters.get(key, 0)
            tensors[key] = torch.tensor(count, dtype=like.dtype)
    return tensors


def convert(workdir: str | os.PathLike, which: str | int, output: str | os.PathLike) -> Path:
    """Writes the file; it appears complete or not at all.

    Args:
        workdir: folder of a run, or of a converted checkpoint.
        which: "best", "last" or a step.
        output: the file, `.pth` or `.safetensors`; it must not exist.

    Returns:
        Its path.

    Raises:
        UserError: there is no such checkpoint, the reference has no such model, or the file cannot
            be written.
    """
    output = files.absolute(output, "--output")
    if output.suffix not in (".pth", ".safetensors"):
        raise UserError(f"--output {output}: expected a name that ends in .pth or .safetensors")
    if files.exists(output):
        raise UserError(f"--output {output} exists already; choose another name, or remove it")
    if files.in_bucket(output):
        files.writable_folder(output.parent, "the folder", "--output")
    step, meta = checkpoint.read_meta(workdir, which)
    config = trained_model.config_of(meta)
    names.check_counterpart(config)
    abstract = abstract_variables(build_segmentor(config))
    variables, _ = checkpoint.restore_for_inference(workdir, abstract, step)
    origin = meta.get("origin")
    tensors = state_dict(variables, config, origin["counters"] if origin else step)
    del variables
    if files.in_bucket(output):
        with files.replacing(output) as local:
            _write(local, tensors)
    else:
        _write(output, tensors)
    return output


def _write(output: Path, tensors: "OrderedDict[str, Any]") -> None:
    torch, safetensors = import_torch(), import_safetensors()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
        os.close(handle)
    except OSError as error:
        raise UserError(f"--output {output} cannot be made: {error.strerror or error}") from error
    try:
        if output.suffix == ".pth":
            torch.save({"model": tensors}, unfinished)
        else:
            safetensors.torch.save_file(dict(tensors), unfinished, metadata={"format": "pt"})
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, output)
    # Each library has an exception of its own for a full disk; PyTorch's is a RuntimeError.
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{output} cannot be written ({str(error).splitlines()[0]}). Free space, or choose "
            "another --output."
        ) from error
    finally:
        Path(unfinished).unlink(missing_ok=True)


def main(argv: Iterable[str]) -> int:
    """Runs the command; returns the exit status."""
    values = command_line.parse(
        argv, FLAGS, required=("workdir", "output"), doc=__doc__, with_config=False
    )
    which = values.checkpoint or "best"
    output = convert(values.workdir, int(which) if which.isdecimal() else which, values.output)
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
