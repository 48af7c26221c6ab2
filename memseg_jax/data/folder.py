"""Any folder of images and labels.

    root/images/train/street/a.jpg      root/labels/train/street/a.png
    root/images/val/b.png               root/labels/val/b.png

An image and its label have the same path below their folders, up to the suffix; other names have a
pattern, `config.data.label_name`. The folders are `config.data.image_dir` and `label_dir`, which
may be one; with `config.data.list_file` only the samples in that file are read, in its order.
Without folders or lists for the splits, `config.data.val_share` divides the samples.

What labels hold is one of the forms of `memseg_jax.data.labels`: class ids 0..K-1 in the order of
`config.data.class_names`, other ids with a map, colours, or polygons.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from memseg_jax.data import coco, labels
from memseg_jax.data.file_source import FileSource
from memseg_jax.data.pairing import pairs_of
from memseg_jax.errors import UserError
from memseg_jax.runtime.files import on_disk


@dataclasses.dataclass(frozen=True, repr=False)
class FolderSource(FileSource):
    """Samples whose label files have a form of `memseg_jax.data.labels`."""

    form: Any

    def read_values(self, path: str) -> np.ndarray:
        """Returns what is in a label file as it is, see `memseg_jax.data.labels`."""
        return self.form.read(path)

    def map_values(self, values: np.ndarray, path: str) -> np.ndarray:
        """Returns the classes that this means: uint8 [height, width]."""
        return self.form.to_classes(values, path)


def open_split(data_config, split: str) -> FileSource:
    """Finds the images and labels of a split; reads none of them yet.

    Args:
        data_config: `config.data`.
        split: replaces "{split}" in the folders and the list file.

    Returns:
        The source. Sorted by name, or in the order of the list file.

    Raises:
        UserError: a config field is not usable, a folder or file is missing, there are no images,
            or images without label.
    """
    root = _root(data_config)
    if data_config.label_dir.endswith(".json"):
        return coco.open_json(data_config, split, root)
    form = labels.form_of(data_config)
    pairs = pairs_of(data_config, split, root, form.suffixes)
    return FolderSource(
        names=tuple(pair.name for pair in pairs),
        images=tuple(str(pair.image) for pair in pairs),
        labels=tuple(str(pair.label) for pair in pairs),
        form=form,
    )


def _root(data_config) -> Path:
    if not data_config.root:
        raise UserError(
            "config.data.root is not set: give the folder of the data set, for example "
            "--config.data.root=/data/streets."
        )
    root = on_disk(data_config.root, "config.data.root")
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"config.data.root: {root} {what}. Give the folder of the data set.")
    return root
