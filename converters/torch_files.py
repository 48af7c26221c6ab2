"""Reads tensors from files that PyTorch wrote, without running anything that is inside them.

A `.pth` file is a pickle, and a pickle can run code. Only PyTorch's restricted reader is used
(`weights_only=True`, which is kept safe since PyTorch 2.10), and there is no way to switch it off.
"""

import dataclasses
import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from memseg_jax.errors import UserError
from memseg_jax.runtime import files

_LEAST_TORCH = (2, 10)
_WRAPPERS = ("model", "state_dict")  # where the tensors may be, in the order of the reference
_PREFIX = "module."  # what a model wrapped for several devices puts before every name
_INSTALL = 'pip install -e ".[convert]"'


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """The tensors of a file.

    Attributes:
        path: the file.
        sha256: of the whole file, in hexadecimal digits.
        tensors: by name, in the order of the file; memory-mapped where the format allows.
        entries: the names beside the tensors at the top of the file, such as "epoch".
        layout: in words, what the file is.
    """

    path: files.Place
    sha256: str
    tensors: dict[str, np.ndarray]
    entries: tuple[str, ...]
    layout: str


def read(path: str | os.PathLike, sha256: str | None = None) -> TorchFile:
    """Reads the tensors of a checkpoint.

    Args:
        path: a file of `torch.save` (a bare state dict, or one under "model" or "state_dict") or
            a `.safetensors` file. A prefix "module." that all names share is dropped.
        sha256: what the file's SHA-256 must be; None: anything.

    Returns:
        Its tensors, as arrays that must not be written to.

    Raises:
        UserError: the file is missing, damaged, not as announced, would run code, or holds
            something else; or PyTorch is missing or too old.
    """
    path = files.place(path)
    try:
        with files.readable(path) as local:
            return _read(path, local, sha256)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _read(path: files.Place, local: Path, sha256: str | None) -> TorchFile:
    """Reads a file of this name, whose content is on this disk."""
    digest = sha256_of(local)
    if sha256 is not None and digest != sha256.strip().lower():
        raise UserError(
            f"{path} has the SHA-256 {digest}, not {sha256}: it is another file, or was damaged "
            "on the way. Download it again."
        )
    if path.suffix == ".safetensors":
        loaded, entries, layout = _read_safetensors(local), (), "safetensors"
    else:
        loaded, entries, layout = _unwrap(path, _read_pickle(local))
    tensors = _as_arrays(path, loaded)
    if all(name.startswith(_PREFIX) for name in tensors):
        tensors = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
        layout += f", names with {_PREFIX!r}"
    return TorchFile(path, digest, tensors, entries, layout)


def check_finite(file: TorchFile, name: str, array: np.ndarray) -> None:
    """Refuses a tensor with a value that is not finite.

    Args:
        file: where it is from.
        name: its name there.
        array: its values, as they are to be used.

    Raises:
        UserError: names the tensor and counts the values.
    """
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise UserError(
            f"{file.path}: in {name}, {bad} of {array.size} values are not finite as "
            f"{array.dtype}. The training that wrote the file had failed, or the file was damaged."
        )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def import_torch():
    """Returns the module `torch`.

    Raises:
        UserError: it is not installed, or too old to read files safely.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(f"this needs PyTorch: {_INSTALL}") from error
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _LEAST_TORCH:
        raise UserError(
            f"PyTorch {torch.__version__} is too old to read files safely; "
            f"{_LEAST_TORCH[0]}.{_LEAST_TORCH[1]} or newer is needed: {_INSTALL}"
        )
    return torch


def import_safetensors():
    """Returns the module `safetensors`, with its part for PyTorch.

    Raises:
        UserError: it is not installed.
    """
    import_torch()
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError(f"this needs safetensors: {_INSTALL}") from error
    return safetensors


def _read_pickle(path: Path) -> object:
    torch = import_torch()
    try:
        # Files of PyTorch before 1.6 are not archives and cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # PyTorch's own message is not shown: it tells how to read such a file all the same.
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise UserError(
                f"{path} holds more than tensors and plain values: it asks for {asked[1]}. Reading "
                "it could run code, so it is refused. Save only the state dict with the program "
                "that wrote the file."
            ) from error
        raise _damaged(path, "not a pickle of tensors") from error
    except Exception as error:  # damaged files make the reader raise errors of any kind
        reason = _first_line(error).partition(" In PyTorch ")[0]  # the same advice again
        raise _damaged(path, reason) from error


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is damaged, or not a file of torch.save ({reason}). "
        "Download it again, and compare its size or SHA-256 with the source's."
    )


def _unwrap(path: Path, loaded: object) -> tuple[Mapping, tuple[str, ...], str]:
    """Finds the tensors in what the file holds."""
    if not isinstance(loaded, Mapping):
        raise UserError(
            f"{path} holds a {type(loaded).__name__}; expected a state dict, or a dict that has "
            f"one under {' or '.join(map(repr, _WRAPPERS))}"
        )
    for wrapper in _WRAPPERS:
        if isinstance(loaded.get(wrapper), Mapping):
            entries = tuple(str(name) for name in loaded if name != wrapper)
            beside = f", beside {', '.join(entries)}" if entries else ""
            return loaded[wrapper], entries, f"state dict under {wrapper!r}{beside}"
    return loaded, (), "bare state dict"


def _read_safetensors(path: Path) -> Mapping:
    safetensors = import_safetensors()
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged, or not a safetensors file ({_first_line(error)}). "
            "Download it again."
        ) from error


def _as_arrays(path: Path, loaded: Mapping) -> dict[str, np.ndarray]:
    torch = import_torch()
    arrays = {}
    for name, value in loaded.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(
                f"{path}: {name!r} is a {type(value).__name__}, not a tensor; expected a state "
                "dict of tensors"
            )
        try:
            arrays[str(name)] = value.detach().numpy()
        except (TypeError, RuntimeError) as error:  # bfloat16, sparse, quantised, ...
            raise UserError(
                f"{path}: the tensor {name!r} is of type {value.dtype}, layout {value.layout}; "
                "expected plain float32. Convert it with the program that wrote the file."
            ) from error
    if not arrays:
        raise UserError(f"{path} holds no tensors")
    return arrays


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
