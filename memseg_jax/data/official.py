"""What the readers of the published data sets share: samples by id, label tables, messages.

Each of them says where its files are. Here the images and labels are paired by id, which is the
name of an image file without what all names of the data set have in common. A list of ids, where
the data set has one, says which samples belong to a split and in what order.
"""

import dataclasses
import importlib
import itertools
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import cv2
import numpy as np

from memseg_jax.data import IGNORE_LABEL, data_sets, file_source, lists, scanning
from memseg_jax.errors import UserError
from memseg_jax.runtime.files import on_disk
from memseg_jax.runtime.text import first_few

_NOT_ALLOWED = 254  # in label tables


@dataclasses.dataclass(frozen=True)
class DataSet:
    """What is fixed about a published data set.

    Attributes:
        title: its name, for messages.
        num_classes: K.
        table: 256 bytes, the class of each value of its label files; see `label_table`.
        layout: where its files are below `config.data.root`, for messages.
        download: where its files come from, for messages.
        sizes: official number of samples by split.
        other_sizes: the same of other lists that are in use.
        marks: folders and files below the root by which the data set is known; () if it is not.
        ids: pattern of what is in the first of them: others have files in the same layout.
        places: where the root may be below `config.data.root`; the first is tried first.
        splits: the usual ones to train and to evaluate on.
    """

    title: str
    num_classes: int
    table: bytes
    layout: str
    download: str
    sizes: Mapping[str, int]
    other_sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    marks: tuple[str, ...] = ()
    ids: str = ""
    places: tuple[str, ...] = ("",)
    splits: tuple[str, str] = ("train", "val")

    def help(self) -> str:
        """Sentences that end a message about missing files."""
        return f"Expected {self.title} as it is downloaded: {self.layout}. {self.download}"


class Benchmark(NamedTuple):
    """What the server of a benchmark takes: one 8-bit grey PNG per image, all in one folder.

    Attributes:
        title: name of the data set, for messages.
        ending: what follows the name of the sample in file names.
        values: the value of each class.
    """

    title: str
    ending: str
    values: tuple[int, ...]


class Files(NamedTuple):
    """Some files by id, and the folder they were looked for in."""

    where: str
    by_id: dict[str, Path]


@dataclasses.dataclass(frozen=True, repr=False)
class OfficialSource(file_source.FileSource):
    """Samples of one split; see `DataSet` for `title` and `table`.

    Attributes:
        official_size: how many samples the split should have; None if that is not known.
    """

    title: str
    table: bytes
    official_size: int | None

    def map_values(self, values: np.ndarray, path: str) -> np.ndarray:
        """Returns the classes that values of a label file mean: uint8 [height, width]."""
        index = values
        if values.dtype != np.uint8:  # such as the floats of a .mat file: nothing may wrap
            whole = (values >= 0) & (values < 256) & (values == np.floor(values))
            index = np.where(whole, values, _NOT_ALLOWED).astype(np.uint8)
        table = np.frombuffer(self.table, np.uint8)
        label = cv2.LUT(index, table)  # five times as fast as table[index]
        bad = label == _NOT_ALLOWED
        if bad.any():
            unique, pixels = np.unique(values[bad], return_counts=True)
            found = first_few([f"{v:g} ({n} pixels)" for v, n in zip(unique, pixels)])
            raise UserError(
                f"{path}: label values that are not allowed: {', '.join(found)}. {self.title} has "
                f"{_ranges(np.flatnonzero(table != _NOT_ALLOWED))}. Replace the file with that of "
                "the official download; use data set 'folder' for labels of your own."
            )
        return label


def label_table(classes: Mapping[int, int], ignored: Iterable[int]) -> bytes:
    """Returns the table from values of label files to classes.

    Args:
        classes: value in the file -> class; all below 254.
        ignored: values in the file that mean "not labelled".

    Returns:
        256 bytes: the class, `IGNORE_LABEL`, or 254 for values that no file may hold.
    """
    table = np.full(256, _NOT_ALLOWED, np.uint8)
    table[list(ignored)] = IGNORE_LABEL
    table[list(classes)] = list(classes.values())
    return table.tobytes()


def voc_colour(index: int) -> tuple[int, int, int]:
    """The colour of an id by the rule of PASCAL VOC: its bits, in turn, from the top of R, G and B.

    Args:
        index: 0 to 255.
    """
    return tuple(
        sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3))
        for channel in range(3)
    )


def is_at(data_set: DataSet, root: Path) -> bool:
    """Whether a folder is the root of a data set, or one of `places` below it is."""
    base = base_folder(data_set, root)
    if not data_set.marks or not _has_marks(data_set, base):
        return False
    with os.scandir(base / data_set.marks[0]) as entries:
        some = [entry.name for entry in itertools.islice(entries, 5)]
    return all(re.fullmatch(data_set.ids, name.split(".")[0]) for name in some)


def data_set_at(root: Path) -> tuple[str, Any] | None:
    """Finds the published data set that a folder is.

    Args:
        root: the folder.

    Returns:
        The name and the module of the data set, or None if it is none that is known.
    """
    for name in data_sets():
        module = importlib.import_module(f"memseg_jax.data.{name}")
        if hasattr(module, "DATA_SET") and is_at(module.DATA_SET, root):
            return name, module
    return None


def base_folder(data_set: DataSet, root: Path) -> Path:
    """Returns the first of `places` that has all `marks`; the root itself if none has."""
    bases = [root / place for place in data_set.places]
    return next((base for base in bases if _has_marks(data_set, base)), root)


def _has_marks(data_set: DataSet, base: Path) -> bool:
    return all((base / mark).exists() for mark in data_set.marks)


def root_folder(data_set: DataSet, data_config) -> Path:
    """Returns the folder that `config.data.root` names.

    Raises:
        UserError: it is not set or not there, or the class names are not those of the data set.
    """
    found = len(data_config.class_names)
    if found != data_set.num_classes:
        raise UserError(
            f"config.data.class_names has {found} names; {data_set.title} has "
            f"{data_set.num_classes}. Use memseg_jax.data.{data_config.name}.CLASS_NAMES."
        )
    root = on_disk(data_config.root, "config.data.root")
    if not data_config.root or not root.is_dir():
        raise UserError(
            f"config.data.root is {data_config.root!r}, which is not a folder. {data_set.help()}"
        )
    return root


def subfolder(data_set: DataSet, root: Path, path: str) -> Path:
    """Returns a folder below the root, which must be there.

    Raises:
        UserError: it is not; the message says what is there instead.
    """
    wanted = root / path
    if not wanted.is_dir():
        there = next(parent for parent in wanted.parents if parent.is_dir())
        raise UserError(
            f"{wanted}: there is no such folder (config.data.root is {root}). "
            f"{scanning.holds(there)} {data_set.help()}"
        )
    return wanted


def check_split(data_set: DataSet, split: str, splits: Iterable[str]) -> None:
    """Refuses the name of a split that the data set does not have."""
    if split not in (splits := tuple(splits)):
        raise UserError(
            f"{data_set.title} has no split {split!r}. Expected one of {', '.join(splits)} "
            "(config.data.train_split, config.data.eval_split)."
        )


def files_by_id(where: Path, suffixes: tuple[str, ...], ending: str = "") -> Files:
    """Finds the files below a folder.

    Args:
        where: the folder.
        suffixes: of the files that are looked for, such as (".png",).
        ending: what the names have in common before the suffix; files without it are skipped.

    Returns:
        The files by id: name without suffix and ending.

    Raises:
        UserError: two files have the same id.
    """
    found = {}
    scan = scanning.one_of_each(scanning.files_by_stem(where), suffixes, suffixes[0].lstrip("."))
    for stem, path in scan.items():
        name = stem.rsplit("/", 1)[-1]
        if not name.endswith(ending):
            continue
        sample = name.removesuffix(ending)
        if sample in found:
            raise UserError(
                f"{found[sample]} and {path} have the same name. Is the data set in {where} twice?"
            )
        found[sample] = path
    return Files(str(where), found)


def make_source(
    data_set: DataSet,
    split: str,
    images: Files,
    labels: Files | None,
    list_file: Path | None = None,
    image_ending: str = "",
    source_class: type[OfficialSource] = OfficialSource,
) -> OfficialSource:
    """Pairs the images and the labels of a split by id.

    Args:
        data_set: what they belong to.
        split: its name.
        images: by id.
        labels: by id; None for a split whose labels are not public.
        list_file: if given, only the samples it names are taken, in its order. Without it all
            images are, sorted by id, and every label must have its image.
        image_ending: what the names in the list file may have after the id.
        source_class: class of the result.

    Returns:
        The source.

    Raises:
        UserError: there are no images, some have no label, or some label has no image.
    """
    if not images.by_id:
        raise UserError(
            f"{images.where}: no images (split {split!r}). {scanning.holds(Path(images.where))} "
            f"{data_set.help()}"
        )
    if list_file:
        chosen = _listed(data_set, split, images, list_file, image_ending)
    else:
        chosen = sorted(images.by_id)
        orphans = sorted(set(labels.by_id) - set(images.by_id)) if labels else []
        if orphans:
            raise UserError(
                f"{images.where}: {len(orphans)} of {len(labels.by_id)} labels of split {split!r} "
                f"have no image here: {', '.join(first_few(orphans))}. The images seem to be "
                f"downloaded or unpacked in part. {data_set.help()}"
            )
    missing = [sample for sample in chosen if sample not in labels.by_id] if labels else []
    if missing:
        raise UserError(
            f"{labels.where}: {len(missing)} of {len(chosen)} images of split {split!r} have no "
            f"label here: {', '.join(first_few(missing))}. The labels seem to be downloaded or "
            f"unpacked in part. {data_set.help()}"
        )
    others = data_set.other_sizes.get(split)
    return source_class(
        names=tuple(chosen),
        images=tuple(str(images.by_id[sample]) for sample in chosen),
        labels=tuple(str(labels.by_id[sample]) if labels else "" for sample in chosen),
        title=data_set.title,
        table=data_set.table,
        official_size=others if len(chosen) == others else data_set.sizes.get(split),
    )


def open_listed(data_set: DataSet, data_config, split: str) -> OfficialSource:
    """Opens a split of a data set in the layout of PASCAL VOC.

    Args:
        data_set: its `marks` are the folders of the images, of the labels and of the lists.
        data_config: `config.data`.
        split: its name, and that of its list.

    Returns:
        The source, in the order of the list.

    Raises:
        UserError: a folder or the list is not there, or a listed image or its label is missing.
    """
    check_split(data_set, split, data_set.sizes)
    root = base_folder(data_set, root_folder(data_set, data_config))
    images, labels, listing = (subfolder(data_set, root, mark) for mark in data_set.marks)
    return make_source(
        data_set,
        split,
        files_by_id(images, scanning.IMAGE_SUFFIXES),
        files_by_id(labels, (".png",)),
        listing / f"{split}.txt",
    )


def _listed(
    data_set: DataSet, split: str, images: Files, list_file: Path, image_ending: str
) -> list[str]:
    """The ids that a list file names, all of which must have an image."""
    lines = lists.read_list(list_file, f"split {split!r}", data_set.help())
    line_of = {}
    missing = []
    for number, line in lines:
        # Lists are read as CSV by some programs, and name files or ids, with or without folders.
        path = PurePosixPath(line.split(",")[0].strip())
        is_file = path.suffix.lower() in scanning.IMAGE_SUFFIXES
        sample = (path.stem if is_file else path.name).removesuffix(image_ending)
        if sample in line_of:
            raise UserError(
                f"{list_file}: line {number}: {sample} is named in line {line_of[sample]} already."
            )
        line_of[sample] = number
        if sample not in images.by_id:
            missing.append(f"{sample} (line {number})")
    if missing:
        raise UserError(
            f"{list_file}: {len(missing)} of {len(lines)} samples of split {split!r} have no image "
            f"in {images.where}: {', '.join(first_few(missing))}. {data_set.help()}"
        )
    return list(line_of)


def _ranges(values: np.ndarray) -> str:
    """Writes sorted numbers as "0..33, 255"."""
    parts = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(f"{part[0]}" if len(part) == 1 else f"{part[0]}..{part[-1]}" for part in parts)
