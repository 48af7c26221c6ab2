"""Label files that show every class in a colour of its own, or in several."""

import dataclasses
import functools
from typing import Any

import numpy as np

from memseg_jax.data import IGNORE_LABEL
from memseg_jax.data.classes import Color
from memseg_jax.data.images import read_colors
from memseg_jax.errors import UserError
from memseg_jax.runtime.text import first_few

_UNKNOWN = 254
_MANY = 20  # unknown colours in one file that cannot each be a class that was forgotten


@dataclasses.dataclass(frozen=True)
class ColorLabels:
    """Colours mean classes, exactly.

    Attributes:
        class_names: K names.
        colors: of every class.
        ignored: colours that mean "not labelled".
        unknown: what any other colour means: "error", "ignore", or "nearest": the class (or "not
            labelled") whose colour is nearest, by the distance of the RGB values.
    """

    class_names: tuple[str, ...]
    colors: tuple[tuple[Color, ...], ...]
    ignored: tuple[Color, ...]
    unknown: str

    def read(self, path: str) -> np.ndarray:
        """Returns the colours of a file: uint8 `[height, width, 3]`."""
        return read_colors(path)

    def to_classes(self, values: np.ndarray, path: str) -> np.ndarray:
        """Returns the classes that the colours mean: uint8 `[height, width]`.

        Raises:
            UserError: names the colours that mean nothing, the nearest that do, and the file.
        """
        codes = _codes(values)
        label = self._table[codes]
        bad = label == _UNKNOWN
        if not bad.any():
            return label
        if self.unknown == "ignore":
            label[bad] = IGNORE_LABEL
            return label
        found, inverse, pixels = np.unique(codes[bad], return_inverse=True, return_counts=True)
        nearest = self._nearest(found)
        if self.unknown == "error":
            raise UserError(self._message(path, values, found, pixels, nearest))
        label[bad] = self._known[1][nearest][inverse]
        return label

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the table out, which is large and quick to make."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def _known(self) -> tuple[np.ndarray, np.ndarray]:
        """All colours that mean something, int `[n, 3]`, and what they mean, uint8 `[n]`."""
        pairs = [(color, k) for k, of_class in enumerate(self.colors) for color in of_class]
        pairs += [(color, IGNORE_LABEL) for color in self.ignored]
        colors, meanings = zip(*pairs)
        return np.array(colors), np.array(meanings, np.uint8)

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """What each of the 2^24 colours means; a look-up is faster than any search."""
        table = np.full(1 << 24, _UNKNOWN, np.uint8)
        colors, meanings = self._known
        table[_codes(colors)] = meanings
        return table

    def _nearest(self, codes: np.ndarray) -> np.ndarray:
        """The index of the nearest colour that means something; of equal ones the first."""
        known, best = self._known[0], []
        for start in range(0, len(codes), 4096):  # there may be as many as there are pixels
            colors = _from_codes(codes[start : start + 4096])
            distance = ((colors[:, None] - known[None]) ** 2).sum(-1)
            best.append(distance.argmin(1))
        return np.concatenate(best)

    def _message(
        self,
        path: str,
        values: np.ndarray,
        found: np.ndarray,
        pixels: np.ndarray,
        nearest: np.ndarray,
    ) -> str:
        """The message for a file with unknown colours, those of most pixels first."""
        colors, meanings = self._known
        parts = []
        for k in np.argsort(-pixels, kind="stable"):
            meaning = int(meanings[nearest[k]])
            name = "not labelled" if meaning == IGNORE_LABEL else repr(self.class_names[meaning])
            parts.append(
                f"{_shown(_from_codes(found[k]))} ({pixels[k]} pixels; the nearest known one is "
                f"{_shown(colors[nearest[k]])}, {name})"
            )
        message = (
            f"{path}: {len(found)} colours that config.data.label_colors does not name: "
            f"{'; '.join(first_few(parts, 3))}. "
        )
        if (values == values[..., :1]).all() and values.max() < len(self.class_names):
            return (
                f"{message}The file is grey and as dark as class ids are: if it holds those, leave "
                "config.data.label_colors empty."
            )
        if len(found) > _MANY:
            message += (
                "So many are left by JPEG compression, by smoothed edges, or by resizing with "
                "interpolation: export the masks without them, or take the nearest colour "
                "with --config.data.unknown_color=nearest."
            )
            return message
        return (
            f"{message}Add them to the colours of their class in config.data.label_colors, or to "
            "config.data.ignore_colors if they mean 'not labelled'; or ask for "
            "--config.data.unknown_color=nearest (or ignore)."
        )


def _codes(colors: np.ndarray) -> np.ndarray:
    """One number for each colour `[..., 3]`: red, green and blue in eight bits each."""
    wide = colors.astype(np.int32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


def _from_codes(codes: np.ndarray) -> np.ndarray:
    """The colours int `[..., 3]` of numbers."""
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255], -1)


def _shown(color: np.ndarray) -> str:
    return str(tuple(color.tolist()))
