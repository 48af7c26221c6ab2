"""Writes state dicts to disk in all the ways in which released checkpoints come."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from converters import names

COUNT = 41  # what all counters of training steps say


def state_dict(variables: dict) -> dict[str, torch.Tensor]:
    """Our variables under the reference's names, counters included."""
    flat = names.flatten(variables)
    tensors = {
        names.torch_key(path): torch.from_numpy(
            np.array(names.to_torch_layout(np.asarray(value)), order="C")
        )
        for path, value in flat.items()
    }
    counters = {key: torch.tensor(COUNT) for key in names.counter_keys(tensors)}
    return tensors | counters


def save_2021(path: Path, tensors: dict) -> Path:
    """The training checkpoint of 2021."""
    torch.save({"epoch": 130, "model": tensors, "optimizer": {"state": {}, "lr": 0.01}}, path)
    return path


def save_now(path: Path, tensors: dict) -> Path:
    """The training checkpoint of the later reference."""
    beside = {"cur_epoch": 130, "cur_iter": 164190, "optimizer": {"state": {}}}
    torch.save(beside | {"model": tensors}, path)
    return path


def save_bare(path: Path, tensors: dict) -> Path:
    """A state dict alone, written from a model that was wrapped for several devices."""
    torch.save({f"module.{key}": value for key, value in tensors.items()}, path)
    return path


def save_safetensors(path: Path, tensors: dict) -> Path:
    """The format without pickle."""
    path = path.with_suffix(".safetensors")
    save_file(tensors, path)
    return path


def save_hostile(path: Path, victim: Path) -> Path:
    """A checkpoint that would create the file `victim` if it were simply unpickled."""

    class Hostile:
        def __reduce__(self):
            return (Path.touch, (victim,))

    torch.save({"model": Hostile()}, path)
    with zipfile.ZipFile(path) as archive:
        assert any(b"touch" in archive.read(name) for name in archive.namelist())
    return path


def save_hostile_old(path: Path, victim: Path) -> Path:
    """The same as a plain pickle, which is what PyTorch wrote before version 1.6."""

    class Hostile:
        def __reduce__(self):
            return (Path.touch, (victim,))

    path.write_bytes(pickle.dumps({"model": Hostile()}, protocol=2))
    return path
