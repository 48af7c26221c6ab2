"""The result for one picture, as data and as a picture with a legend."""

import dataclasses
import io

import numpy as np
from PIL import Image

from memseg_jax.scoring import visualize


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """The classes of a picture's pixels. Notebooks show it beside the picture, with a legend.

    Attributes:
        labels: uint8 [height, width], the number of each pixel's class in `class_names`.
        confidence: float32 [height, width], 0..1, the probability of that class.
        class_names: K names.
        image: uint8 [height, width, 3], the picture as RGB, upright.
        palette: uint8 [K, 3], the colours of the classes.
        source: the file that the picture was read from; None: there was none.
    """

    labels: np.ndarray
    confidence: np.ndarray
    class_names: tuple[str, ...]
    image: np.ndarray
    palette: np.ndarray
    source: str | None = None

    def overlay(self, alpha: float = 0.5) -> Image.Image:
        """Lays the colours of the classes over the picture.

        Args:
            alpha: weight of the colours, 0..1.

        Returns:
            A picture of the same size, RGB.
        """
        return Image.fromarray(visualize.overlay(self.image, self.labels, self.palette, alpha))

    def shares(self) -> dict[str, float]:
        """The share of the picture that each class covers, 0..1, in the order of `class_names`."""
        pixels = visualize.pixels_per_value(self.labels)
        return {name: int(pixels[k]) / self.labels.size for k, name in enumerate(self.class_names)}

    def __repr__(self) -> str:
        height, width = self.labels.shape
        found = {name: share for name, share in self.shares().items() if share}
        largest = sorted(found, key=lambda name: -found[name])
        words = ", ".join(f"{name} {found[name]:.0%}" for name in largest[:4])
        more = ", ..." if len(largest) > 4 else ""
        return f"<Segmentation of {self.source or 'a picture'}, {height}x{width}: {words}{more}>"

    def _repr_png_(self) -> bytes:
        """What a notebook shows: a PNG file."""
        names = [f"{name} {share:.1%}" for name, share in self.shares().items()]
        sheet = visualize.overlay_sheet(self.image, self.labels, names, self.palette)
        file = io.BytesIO()
        Image.fromarray(sheet).save(file, format="PNG")
        return file.getvalue()
