"""Label files whose pixel values are class ids."""

import dataclasses
import functools

import cv2
import numpy as np

from memseg_jax.data import IGNORE_LABEL
from memseg_jax.data.classes import IGNORE
from memseg_jax.data.images import map_ids, read_label
from memseg_jax.errors import UserError
from memseg_jax.runtime.text import first_few

SUFFIXES = (".png", ".bmp", ".tif", ".tiff")  # those that keep values as they are
_UNKNOWN = 254


@dataclasses.dataclass(frozen=True)
class IdLabels:
    """Values are 0..num_classes-1, or `ignore_label` (-1: there is none)."""

    num_classes: int
    ignore_label: int

    def read(self, path: str) -> np.ndarray:
        """Returns the values of a file as they are: integers `[height, width]`."""
        return read_label(path)

    def to_classes(self, values: np.ndarray, path: str) -> np.ndarray:
        """Returns the classes that the values mean: uint8 `[height, width]`."""
        return map_ids(values, self.num_classes, self.ignore_label, path)


@dataclasses.dataclass(frozen=True)
class MappedIds:
    """Values mean what `config.data.label_map` says of them, and nothing else is allowed.

    Attributes:
        class_names: K names.
        label_map: pairs of a value and the name of its class, or "ignore".
        ignore_label: one more value that means "not labelled", unless the map has it; -1: none.
    """

    class_names: tuple[str, ...]
    label_map: tuple[tuple[int, str], ...]
    ignore_label: int

    def read(self, path: str) -> np.ndarray:
        """Returns the values of a file as they are: integers `[height, width]`."""
        return read_label(path)

    def to_classes(self, values: np.ndarray, path: str) -> np.ndarray:
        """Returns the classes that the values mean: uint8 `[height, width]`.

        Raises:
            UserError: names the values that the map lacks, and the file.
        """
        known, meanings = self._known
        if values.dtype == np.uint8:
            table = np.full(256, _UNKNOWN, np.uint8)
            small = known < 256
            table[known[small]] = meanings[small]
            label = cv2.LUT(values, table)
        else:
            place = np.minimum(np.searchsorted(known, values), len(known) - 1)
            label = np.where(known[place] == values, meanings[place], _UNKNOWN).astype(np.uint8)
        bad = label == _UNKNOWN
        if bad.any():
            unique, pixels = np.unique(values[bad], return_counts=True)
            found = first_few([f"{v} ({n} pixels)" for v, n in zip(unique, pixels)])
            raise UserError(
                f"{path}: label values that config.data.label_map does not have: "
                f"{', '.join(found)}. It has {', '.join(first_few(list(map(str, known)), 20))}. "
                f"Add the pair ({unique[0]}, 'CLASS NAME') or ({unique[0]}, {IGNORE!r}) for each "
                "of them, or correct the file."
            )
        return label

    @functools.cached_property
    def _known(self) -> tuple[np.ndarray, np.ndarray]:
        """All values that mean something, sorted, and what they mean, uint8."""
        meanings = {self.ignore_label: IGNORE_LABEL} if self.ignore_label >= 0 else {}
        for value, name in self.label_map:
            meanings[value] = IGNORE_LABEL if name == IGNORE else self.class_names.index(name)
        known = sorted(meanings)
        return np.array(known), np.array([meanings[value] for value in known], np.uint8)
