"""What the memory was at every evaluation of a run: one small file each.

`<workdir>/memory_history/<step>.npz` is a function of the state at its step, and appears as a
whole. So nothing has to be mended after a kill: who comes to the same step again writes the same
file, and a file of a step that a resumed run has not reached yet is as true as it was.
"""

import dataclasses
import io
import logging
import zipfile
from collections.abc import Mapping

import numpy as np

from memseg_jax.errors import Unreachable
from memseg_jax.runtime import distributed, files

log = logging.getLogger(__name__)

FOLDER = "memory_history"
_SUFFIX = ".npz"


@dataclasses.dataclass(frozen=True)
class MemoryRecord:
    """The memory at a step.

    Attributes:
        step: number of completed steps.
        memory: float32 [classes, ...], as the method keeps it.
        ages: int64 [classes], steps since the class's rows last changed.
        pixels: int64 [classes], pixels that have moved them.
        steps: int64 [classes], steps in which there were any.
        since: the step after which pixels and steps were counted.
    """

    step: int
    memory: np.ndarray
    ages: np.ndarray
    pixels: np.ndarray
    steps: np.ndarray
    since: int


def write(workdir: files.Place, step: int, record: Mapping[str, np.ndarray]) -> None:
    """Writes what `MemoryHealth.record` returned; process 0 alone does.

    Raises:
        UserError: the file cannot be written.
    """
    if not distributed.is_primary():
        return
    folder = files.make_folder(workdir / FOLDER)
    with files.replacing(folder / f"{step}{_SUFFIX}") as temporary, open(temporary, "wb") as file:
        np.savez(file, **record)


def read(workdir: files.Place, last_step: int | None = None) -> list[MemoryRecord]:
    """The records of a run, by step; a damaged file is passed over with a warning.

    Args:
        workdir: of the run.
        last_step: later ones are left out; None: none is.

    Raises:
        Unreachable: the bucket gives no answer or refuses.
    """
    folder = workdir / FOLDER
    names = (name.removesuffix(_SUFFIX) for name in files.names(folder) if name.endswith(_SUFFIX))
    steps = sorted(int(name) for name in names if name.isdecimal())
    records = []
    for step in steps:
        if last_step is not None and step > last_step:
            break
        path = folder / f"{step}{_SUFFIX}"
        try:
            with np.load(io.BytesIO(files.read_bytes(path))) as arrays:
                record = MemoryRecord(step, **{name: arrays[name] for name in arrays.files})
        except Unreachable:
            raise
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
            log.warning("%s is passed over, as it cannot be read: %s", path, error)
            continue
        records.append(dataclasses.replace(record, since=int(record.since)))
    return records
