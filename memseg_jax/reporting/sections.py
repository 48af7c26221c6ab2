"""Parts of a report that are made elsewhere, and the file that keeps them for the next report."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from typing import Any

from memseg_jax.errors import Unreachable
from memseg_jax.runtime import files

log = logging.getLogger(__name__)

FILE = "sections.json"


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        anchor: its id in the page, of letters.
        title: its heading, plain text.
        html: its body. What comes from data has to be escaped in it.
        script: JavaScript, run after the whole page is there; "": there is none.
        data: JSON values, which `sectionData("<anchor>")` returns in the script.
    """

    anchor: str
    title: str
    html: str
    script: str = ""
    data: Any = None


def write(folder: files.Place, step: int, sections: Sequence[Section]) -> None:
    """Keeps the sections about a checkpoint in `<folder>/sections.json`.

    Raises:
        UserError: the file cannot be written.
    """
    stored = {"step": step, "sections": [dataclasses.asdict(section) for section in sections]}
    files.write_text(folder / FILE, json.dumps(stored))


def read(folder: files.Place, step: int) -> list[Section]:
    """The sections about the checkpoint of this step; none if the file is of another or missing.

    A file that cannot be read is passed over with a warning: a report can do without.

    Raises:
        Unreachable: the bucket gives no answer or refuses.
    """
    path = folder / FILE
    try:
        if (text := files.read_text(path)) is None:
            return []
        stored = json.loads(text)
        return [Section(**fields) for fields in stored["sections"] if stored["step"] == step]
    except Unreachable:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("%s is passed over, as it cannot be read: %s", path, error)
        return []
