"""How `config.data` names classes, and their colours in label files and in pictures."""

from collections.abc import Sequence
from typing import Any

IGNORE = "ignore"  # stands for "not labelled" where the name of a class may be given
Color = tuple[int, int, int]  # red, green, blue: 0..255


def colors_by_class(label_colors: Sequence[Any]) -> tuple[tuple[Color, ...], ...]:
    """Returns all colours of every class; in the config, a class with one may have it alone.

    Args:
        label_colors: `config.data.label_colors`.
    """
    return tuple(
        tuple(tuple(color) for color in ([entry] if isinstance(entry[0], int) else entry))
        for entry in label_colors
    )


def palette_of(data_config: Any) -> tuple[Color, ...]:
    """Returns the colours for pictures: the palette, or else the first colours in label files.

    Args:
        data_config: `config.data`.

    Returns:
        One colour per class; empty if the config has none.
    """
    if data_config.palette:
        return tuple(map(tuple, data_config.palette))
    return tuple(colors[0] for colors in colors_by_class(data_config.label_colors))
