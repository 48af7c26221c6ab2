"""What label files hold, and which classes that means: one module for each form of them.

A form is a picklable object with

* `suffixes`: of the files that it reads;
* `read(path)`: what is in a file, as it is: `[height, width]`, or `[height, width, 3]` for colours;
* `to_classes(values, path)`: the classes that this means, uint8 `[height, width]`: 0..K-1, or
  `IGNORE_LABEL`. It refuses what the config does not name.

Between the two, the sizes of image and label are compared.
"""

from typing import Any

from memseg_jax.data.classes import colors_by_class
from memseg_jax.data.labels.colors import ColorLabels
from memseg_jax.data.labels.ids import IdLabels, MappedIds


def form_of(data_config: Any) -> Any:
    """Returns the form of the label files that `config.data` describes.

    Args:
        data_config: `config.data`, which `config_rules` has checked.
    """
    if data_config.label_colors:
        return ColorLabels(
            class_names=tuple(data_config.class_names),
            colors=colors_by_class(data_config.label_colors),
            ignored=tuple(map(tuple, data_config.ignore_colors)),
            unknown=data_config.unknown_color,
        )
    if data_config.label_map:
        return MappedIds(
            class_names=tuple(data_config.class_names),
            label_map=tuple((value, name) for value, name in data_config.label_map),
            ignore_label=int(data_config.ignore_label),
        )
    return IdLabels(len(data_config.class_names), int(data_config.ignore_label))
