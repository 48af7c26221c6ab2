"""Names of classes in the files of annotation tools, and what they mean."""

from collections.abc import Iterable, Mapping
from typing import Any

from memseg_jax.data import IGNORE_LABEL
from memseg_jax.data.classes import IGNORE
from memseg_jax.errors import UserError
from memseg_jax.runtime.suggest import did_you_mean
from memseg_jax.runtime.text import first_few


def meanings_of(data_config: Any) -> dict[str, int]:
    """Returns the class of every name that files may hold: 0..K-1, or `IGNORE_LABEL`.

    Args:
        data_config: `config.data`; every class has its own name, and `label_map` adds others.
    """
    classes = {name: k for k, name in enumerate(data_config.class_names)}
    others = {
        str(name): IGNORE_LABEL if meaning == IGNORE else classes[meaning]
        for name, meaning in data_config.label_map
    }
    return classes | others


def outside_of(data_config: Any) -> int:
    """Returns the class of the pixels in no polygon: 0..K-1, or `IGNORE_LABEL`."""
    name = data_config.outside_polygons
    return IGNORE_LABEL if name == IGNORE else list(data_config.class_names).index(name)


def unknown_names(path: Any, names: Iterable[str], meanings: Mapping[str, int]) -> UserError:
    """Returns the error about names that mean nothing.

    Args:
        path: the file.
        names: that it holds and that mean nothing.
        meanings: from `meanings_of`.
    """
    names = list(dict.fromkeys(names))
    return UserError(
        f"{path}: {', '.join(first_few(list(map(repr, names))))}: no such class. "
        f"{did_you_mean(names[0], meanings)} Add the names to config.data.class_names, or to "
        f"config.data.label_map: ({names[0]!r}, 'CLASS NAME') for another name of a class, "
        f"({names[0]!r}, {IGNORE!r}) for what shall not count."
    )
