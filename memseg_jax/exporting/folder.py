"""The folder of an export: written whole, or not at all."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memseg_jax.errors import UserError
from memseg_jax.exporting import load
from memseg_jax.runtime import files

DESCRIPTION = "model.json"
WEIGHTS = "weights.npz"
CHECK = "check.npz"
ANY_SIZE = "any_size.stablehlo"


def program_name(size: tuple[int, int] | None) -> str:
    """The file of the program for pictures of one size, or of any."""
    return f"{size[0]}x{size[1]}.stablehlo" if size else ANY_SIZE


def archive(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays as the content of an .npz file; not compressed: weights hardly get smaller."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def write(folder: Path, contents: Mapping[str, bytes], description: Mapping[str, Any]) -> None:
    """Writes all files, the loader and, last, the description with their checksums.

    Args:
        folder: is there; files of the same names are replaced.
        contents: of the files, by name.
        description: what `model.json` holds besides.
    """
    loader = Path(load.__file__).read_bytes()
    contents = {**contents, "load.py": loader}
    checksums = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    text = json.dumps({**description, "sha256": checksums}, indent=1)
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole(target: files.Place) -> Iterator[Path]:
    """Yields a temporary folder on a disk, which takes its place when the block ends.

    After an error, nothing is left of it. In a bucket, the description is written last: a folder
    without it is none.

    Args:
        target: the folder; must not exist.

    Raises:
        UserError: it exists, or cannot be written.
    """
    if files.exists(target):
        raise UserError(f"{target} exists already: remove it, or choose another --output")
    if files.in_bucket(target):
        files.writable_folder(target.parent, "the folder of the export", "--output")
        with tempfile.TemporaryDirectory(prefix="memseg_jax_") as name:
            yield (folder := Path(name))
            # Sorted by this, the description comes last.
            for path in sorted(folder.iterdir(), key=lambda path: path.name == DESCRIPTION):
                files.copy_file(path, target / path.name)
        return
    files.make_folder(target.parent, "--output")
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"cannot write to {target.parent}: {error.strerror or error}") from error
    try:
        yield folder
        folder.chmod(0o755)
        try:
            for path in (*folder.iterdir(), folder):
                files.flush(path)
            os.rename(folder, target)
            files.flush(target.parent)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
