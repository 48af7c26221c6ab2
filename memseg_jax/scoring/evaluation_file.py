"""The last evaluation of a run, as one file: what a report or a comparison is made of.

`<workdir>/evaluation.npz` holds the confusion matrix of every image, a few pictures, and what was
evaluated. It is replaced as a whole. Whoever makes a page of it needs no network and no data.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from memseg_jax.errors import Unreachable, UserError
from memseg_jax.runtime import files
from memseg_jax.scoring.findings import Findings

FILE = "evaluation.npz"
_FORMAT = 1


class Stored(NamedTuple):
    """The content of the file.

    Attributes:
        about: plain JSON values: step, split, class_names, palette, config, versions, and how
            images were segmented.
        findings: of all processes.
    """

    about: dict[str, Any]
    findings: Findings


def write(workdir: files.Place, about: Mapping[str, Any], findings: Findings) -> None:
    """Replaces the file.

    Raises:
        UserError: it cannot be written.
    """
    text = np.array(json.dumps({"format": _FORMAT} | dict(about)), np.str_)
    with files.replacing(workdir / FILE) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, about=text, **findings.arrays())


def read(workdir: files.Place) -> Stored | None:
    """Reads the file; None if there is none.

    Raises:
        UserError: it is damaged, or of another version.
        Unreachable: its bucket gives no answer or refuses.
    """
    path = workdir / FILE
    try:
        with np.load(io.BytesIO(files.read_bytes(path)), allow_pickle=False) as found:
            arrays = dict(found)
        about = json.loads(str(arrays["about"]))
        if about["format"] == _FORMAT:
            findings = Findings(len(about["class_names"]), "reliability" in arrays)
            findings.update(arrays)
            return Stored(about, findings)
    except FileNotFoundError:
        return None
    except Unreachable:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Remove it; --mode evaluate writes it anew."
        ) from error
    raise UserError(
        f"{path} has format {about['format']}; this version of memseg_jax reads {_FORMAT}. "
        "--mode evaluate writes it anew."
    )
