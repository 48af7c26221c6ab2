"""Polygons in the files of LabelMe: one JSON file for each image."""

import base64
import binascii
import dataclasses
import io
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from memseg_jax.data.labels.names import unknown_names
from memseg_jax.errors import UserError

SUFFIXES = (".json",)


@dataclasses.dataclass(frozen=True)
class LabelMe:
    """Shapes are drawn in the order of the file: where two overlap, the later one counts.

    They are drawn as LabelMe itself does, outlines included.

    Attributes:
        meanings: the class of every name.
        outside: the class of pixels in no shape.
    """

    meanings: Mapping[str, int]
    outside: int

    def read(self, path: str) -> np.ndarray:
        """Returns the classes that the shapes of a file mean: uint8 `[height, width]`.

        Raises:
            UserError: the file is not one of LabelMe, or holds a name or a shape without meaning.
        """
        try:
            with open(path, "rb") as file:
                content = json.load(file)
            size = int(content["imageWidth"]), int(content["imageHeight"])
            shapes = [_Shape.of(shape) for shape in content["shapes"]]
        except OSError as error:
            raise UserError(f"{path}: the file cannot be read ({error.strerror}).") from None
        except (ValueError, TypeError, LookupError) as error:
            raise UserError(
                f"{path}: not a file of LabelMe, or damaged ({type(error).__name__}: {error}). "
                "Expected JSON with imageHeight, imageWidth and shapes: save it again in LabelMe, "
                "or remove it with its image."
            ) from None
        unknown = [shape.name for shape in shapes if shape.name not in self.meanings]
        if unknown:
            raise unknown_names(path, unknown, self.meanings)
        label = Image.new("L", size, self.outside)
        for number, shape in enumerate(shapes):
            try:
                shape.draw(label, self.meanings[shape.name])
            except (ValueError, TypeError, LookupError, OSError, binascii.Error) as error:
                raise UserError(
                    f"{path}: shape {number} ({shape.name!r}, {shape.kind}) cannot be drawn: "
                    f"{error}. Expected a polygon, rectangle, circle or mask: correct or remove it "
                    "in LabelMe."
                ) from None
        return np.array(label)

    def to_classes(self, values: np.ndarray, path: str) -> np.ndarray:
        """Returns what `read` gave."""
        return values


@dataclasses.dataclass(frozen=True)
class _Shape:
    """One shape of a file: points are (x, y) in pixels; `mask` a PNG file in base 64, or None."""

    name: str
    kind: str
    points: list[tuple[float, float]]
    mask: str | None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "_Shape":
        points = [(float(x), float(y)) for x, y in fields["points"]]
        kind = fields.get("shape_type") or "polygon"
        return cls(str(fields["label"]), kind, points, fields.get("mask"))

    def draw(self, label: Image.Image, value: int) -> None:
        """Draws the shape into a label; ValueError says why it cannot be."""
        draw = ImageDraw.Draw(label)
        if self.kind == "polygon":
            if len(self.points) < 3:
                raise ValueError(f"it has {len(self.points)} points, which is no area")
            draw.polygon(self.points, fill=value, outline=value)
            return
        if self.kind not in ("rectangle", "circle", "mask"):
            raise ValueError("it has no area")
        if len(self.points) != 2:
            raise ValueError(f"it has {len(self.points)} points instead of 2")
        (x, y), (u, v) = self.points
        if self.kind == "circle":  # the centre, and a point of the outline
            radius = math.hypot(u - x, v - y)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), value, value)
        elif self.kind == "rectangle":
            draw.rectangle((min(x, u), min(y, v), max(x, u), max(y, v)), value, value)
        else:
            data = base64.b64decode(self.mask or "", validate=True)
            with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
                inside = picture.convert("1")
            label.paste(value, (round(min(x, u)), round(min(y, v))), inside)
