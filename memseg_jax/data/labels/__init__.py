"""What label files hold, and which classes that means: one module for each form of them.

A form is a picklable object with

* `read(path)`: what is in a file, as it is: `[height, width]`, or `[height, width, 3]` for colours;
* `to_classes(values, path)`: the classes that this means, uint8 `[height, width]`: 0..K-1, or
  `IGNORE_LABEL`. It refuses what the config does not name.

Between the two, the sizes of image and label are compared.
"""

import dataclasses
from typing import Any

import numpy as np

from memseg_jax.data.classes import colors_by_class
from memseg_jax.data.labels import ids, labelme
from memseg_jax.data.labels.colors import ColorLabels
from memseg_jax.data.labels.ids import IdLabels, MappedIds
from memseg_jax.data.labels.labelme import LabelMe
from memseg_jax.data.labels.names import meanings_of, outside_of

SUFFIXES = (*ids.SUFFIXES, *labelme.SUFFIXES)  # of files that can be labels


@dataclasses.dataclass(frozen=True)
class FormOfEach:
    """A form itself: image files have one, JSON files are LabelMe's.

    Attributes:
        pixels: the form of image files.
        shapes: the form of JSON files.
    """

    pixels: Any
    shapes: LabelMe
    suffixes = SUFFIXES

    def read(self, path: str) -> np.ndarray:
        """Returns what is in a file, as it is."""
        return self._form(path).read(path)

    def to_classes(self, values: np.ndarray, path: str) -> np.ndarray:
        """Returns the classes that this means: uint8 `[height, width]`."""
        return self._form(path).to_classes(values, path)

    def _form(self, path: str) -> Any:
        return self.shapes if path.lower().endswith(labelme.SUFFIXES) else self.pixels


def form_of(data_config: Any) -> FormOfEach:
    """Returns the form of the label files that `config.data` describes.

    Args:
        data_config: `config.data`, which `config_rules` has checked.
    """
    shapes = LabelMe(meanings_of(data_config), outside_of(data_config))
    return FormOfEach(_form_of_pixels(data_config), shapes)


def _form_of_pixels(data_config: Any) -> Any:
    class_names = tuple(data_config.class_names)
    if data_config.label_colors:
        return ColorLabels(
            class_names=class_names,
            colors=colors_by_class(data_config.label_colors),
            ignored=tuple(map(tuple, data_config.ignore_colors)),
            unknown=data_config.unknown_color,
        )
    pairs = [(value, name) for value, name in data_config.label_map if isinstance(value, int)]
    ignore_label = int(data_config.ignore_label)
    if pairs:  # the others are names in JSON files
        return MappedIds(class_names, tuple(pairs), ignore_label)
    return IdLabels(len(class_names), ignore_label)
