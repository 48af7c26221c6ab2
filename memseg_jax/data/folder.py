"""Any folder of images and index-PNG labels.

    root/images/train/street/a.jpg      root/labels/train/street/a.png
    root/images/val/b.png               root/labels/val/b.png

An image and its label have the same path below their folders, up to the suffix. The folders are
`config.data.image_dir` and `label_dir`; with `config.data.list_file` only the samples in that file
are read, in its order. Each line is a stem ("street/a"), or an image and a label path relative to
the root ("photos/a.jpg masks/a_mask.png"; with a tab between them the paths may hold spaces).
Empty lines and lines that start with # are skipped.

Pixel values of labels are class ids 0..K-1 in the order of `config.data.class_names`, or
`config.data.ignore_label`. For files with 0 = not labelled and classes from 1 on, name id 0 too
and set `ignore_label=0`.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from memseg_jax.data import IGNORE_LABEL
from memseg_jax.data.images import (
    exif_orientation,
    map_ids,
    read_image,
    read_label,
)
from memseg_jax.errors import UserError
from memseg_jax.runtime.files import on_disk
from memseg_jax.runtime.text import first_few

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")  # those that keep values as they are


@dataclasses.dataclass(frozen=True, repr=False)
class FileSource:
    """Samples of one split: files that are read and checked when asked for.

    What the values of label files mean is up to the subclass.

    Attributes:
        names: a short unique id of every sample.
        images: paths.
        labels: paths; "" for a sample without label, all of whose pixels are then ignored.
    """

    names: tuple[str, ...]
    images: tuple[str, ...]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        """Reads and checks one sample.

        Args:
            index: position in the split.

        Returns:
            `dict(image=uint8 [height, width, 3] RGB, label=uint8 [height, width], name=str)`.

        Raises:
            UserError: a file cannot be read, the sizes differ, or the label holds values that are
                not allowed.
        """
        image_path, label_path = self.images[index], self.labels[index]
        image = read_image(image_path)
        if label_path:
            values = self.read_values(label_path)
            if image.shape[:2] != values.shape:
                raise UserError(_size_message(image_path, image.shape, label_path, values.shape))
            label = self.map_values(values, label_path)
        else:
            label = np.full(image.shape[:2], IGNORE_LABEL, np.uint8)
        return {"image": image, "label": label, "name": self.names[index]}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} samples, {self.fingerprint()})"

    def read_values(self, path: str) -> np.ndarray:
        """Returns the values of a label file as they are: integers [height, width]."""
        return read_label(path)

    def map_values(self, values: np.ndarray, path: str) -> np.ndarray:
        """Returns the classes that values of a label file mean: uint8 [height, width]."""
        raise NotImplementedError

    @property
    def has_labels(self) -> bool:
        """Whether there is anything to train or to score on."""
        return any(self.labels)

    def describe(self, index: int) -> str:
        """Returns the files behind sample `index`."""
        return f"{self.images[index]} (label {self.labels[index] or 'not public'})"

    def fingerprint(self) -> str:
        """Returns a short hash of the ordered names."""
        return hashlib.sha256("\n".join(self.names).encode("utf-8", "replace")).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, repr=False)
class FolderSource(FileSource):
    """Samples whose label files hold 0..num_classes-1, or `ignore_label` (-1: there is none)."""

    num_classes: int
    ignore_label: int

    def map_values(self, values: np.ndarray, path: str) -> np.ndarray:
        """Returns the classes that values of a label file mean: uint8 [height, width]."""
        return map_ids(values, self.num_classes, self.ignore_label, path)


def open_split(data_config, split: str) -> FolderSource:
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
    if data_config.list_file:
        pairs = _listed(data_config, split, root)
    else:
        pairs = _all_of_folder(data_config, split, root)
    return FolderSource(
        names=tuple(_name(image, root) for image, _ in pairs),
        images=tuple(str(image) for image, _ in pairs),
        labels=tuple(str(label) for _, label in pairs),
        num_classes=len(data_config.class_names),
        ignore_label=int(data_config.ignore_label),
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


def _folder(data_config, field: str, split: str, root: Path) -> Path:
    """The folder that a config field names, which must exist."""
    folder = root / data_config[field].replace("{split}", split)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: there is no such folder (config.data.{field} = {data_config[field]!r}, "
            f"split {split!r}). {holds(root)} Correct config.data.root, config.data.{field} or "
            "the name of the split."
        )
    return folder


def holds(folder: Path) -> str:
    """A sentence with the first entries of a folder."""
    entries = sorted(e.name + "/" * e.is_dir() for e in folder.iterdir() if e.name[0] != ".")
    if not entries:
        return f"{folder} is empty."
    return f"{folder} holds {', '.join(first_few(entries))}."


def files_by_stem(folder: Path) -> dict[str, list[Path]]:
    """All visible files below a folder by stem (relative path without suffix, with "/")."""
    found = {}
    visited = set()

    def refuse(error):
        raise UserError(f"{error.filename}: the folder cannot be read ({error.strerror}).")

    # Links to folders are followed: large data sets are often put together from them.
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in sorted(files):
            if name[0] != ".":
                path = Path(parent, name)
                stem = path.relative_to(folder).with_suffix("").as_posix()
                found.setdefault(stem, []).append(path)
    return found


def one_of_each(scan: dict[str, list[Path]], suffixes: tuple[str, ...], kind: str):
    """Stem -> the one file with such a suffix; two of them are an error."""
    chosen = {}
    for stem, paths in scan.items():
        matching = [path for path in paths if path.suffix.lower() in suffixes]
        if len(matching) > 1:
            raise UserError(
                f"{matching[0]} and {matching[1].name}: two {kind} files with the same stem. Keep "
                "one of them in the folder; if one is the label of the other, put labels in a "
                "folder of their own or list the pairs in config.data.list_file."
            )
        if matching:
            chosen[stem] = matching[0]
    return chosen


def _all_of_folder(data_config, split: str, root: Path) -> list[tuple[Path, Path]]:
    image_dir = _folder(data_config, "image_dir", split, root)
    label_dir = _folder(data_config, "label_dir", split, root)
    scan = files_by_stem(image_dir)
    images = one_of_each(scan, IMAGE_SUFFIXES, "image")
    if not images:
        raise UserError(
            f"{image_dir}: no images (split {split!r}; {', '.join(IMAGE_SUFFIXES)}). "
            f"{holds(image_dir)} Correct config.data.image_dir or add images."
        )
    label_scan = files_by_stem(label_dir)
    labels = one_of_each(label_scan, LABEL_SUFFIXES, "label")
    missing = [stem for stem in sorted(images) if stem not in labels]
    if missing:
        raise UserError(_missing_labels(split, images, missing, label_dir, label_scan))
    return [(images[stem], labels[stem]) for stem in sorted(images)]


def _listed(data_config, split: str, root: Path) -> list[tuple[Path, Path]]:
    """The samples of the list file."""
    list_path = root / data_config.list_file.replace("{split}", split)
    wanted = read_list(
        list_path,
        f"config.data.list_file = {data_config.list_file!r}, split {split!r}",
        f"{holds(root)} Correct config.data.list_file; leave it empty to read all files of the "
        "folders.",
    )

    folders = _StemFolders(data_config, split, root)
    pairs = []
    line_of = {}
    problems = []
    for number, line in wanted:
        try:
            pair = _listed_pair(line, root, folders)
        except FileNotFoundError as error:
            problems.append(f"line {number}: {error}")
            continue
        name = _name(pair[0], root)
        if name in line_of:
            problems.append(f"line {number}: {name} is named in line {line_of[name]} already")
        line_of.setdefault(name, number)
        pairs.append(pair)
    if problems:
        raise UserError(
            f"{list_path}: {len(problems)} of {len(wanted)} lines cannot be used. "
            + "; ".join(first_few(problems))
            + ". Expected a stem, or an image path and a label path relative to config.data.root."
        )
    return pairs


def read_list(path: Path, where: str, advice: str) -> list[tuple[int, str]]:
    """Reads a list of samples.

    Args:
        path: the list file: one sample a line; empty lines and those that start with # are skipped.
        where: for messages, what names the file.
        advice: for the message about a file that cannot be read.

    Returns:
        (line number from 1, text without spaces around it) of every sample.

    Raises:
        UserError: the file cannot be read or names no samples.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(
            f"{path}: the list file cannot be read ({error.strerror}; {where}). {advice}"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: the list file is not UTF-8 text.") from None
    samples = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    samples = [(number, line) for number, line in samples if line and line[0] != "#"]
    if not samples:
        raise UserError(f"{path}: the list file names no samples ({where}). Expected one per line.")
    return samples


class _StemFolders:
    """Images and labels by stem; the folders are read only if some line needs them."""

    def __init__(self, data_config, split: str, root: Path):
        self._folder: Callable[[str], Path] = lambda field: _folder(data_config, field, split, root)
        self._images = self._labels = None

    def images(self) -> dict[str, Path]:
        if self._images is None:
            scan = files_by_stem(self._folder("image_dir"))
            self._images = one_of_each(scan, IMAGE_SUFFIXES, "image")
        return self._images

    def labels(self) -> dict[str, Path]:
        if self._labels is None:
            scan = files_by_stem(self._folder("label_dir"))
            self._labels = one_of_each(scan, LABEL_SUFFIXES, "label")
        return self._labels

    def label_dir(self) -> Path:
        return self._folder("label_dir")


def _listed_pair(line: str, root: Path, folders: _StemFolders) -> tuple[Path, Path]:
    """The image and the label of one line; FileNotFoundError says what is missing."""
    fields = [field.strip() for field in line.split("\t")] if "\t" in line else line.split()
    if len(fields) == 2 and (root / fields[0]).is_file():
        image, label = (Path(os.path.normpath(root / field)) for field in fields)
        if not label.is_file():
            raise FileNotFoundError(f"there is no label {label}")
        return image, label
    images = folders.images()
    stem = line
    if stem not in images and Path(line).suffix.lower() in IMAGE_SUFFIXES:
        stem = Path(line).with_suffix("").as_posix()
    if stem not in images:
        what = root / fields[0] if len(fields) == 2 else repr(line)
        raise FileNotFoundError(f"there is no image {what}")
    if stem not in folders.labels():
        raise FileNotFoundError(f"there is no label {folders.label_dir() / stem}.png")
    return images[stem], folders.labels()[stem]


def _name(image: Path, root: Path) -> str:
    """Path of the image relative to the root, without suffix; never an absolute path."""
    path = image.relative_to(root if image.is_relative_to(root) else image.anchor)
    return path.with_suffix("").as_posix()


def _missing_labels(split, images, missing, label_dir, label_scan) -> str:
    """The message for images without labels."""
    first = missing[0]
    names = ", ".join(first_few([images[stem].name for stem in missing]))
    message = (
        f"{label_dir}: {len(missing)} of {len(images)} images of split {split!r} have no label: "
        f"{names}. For {images[first]} the file {label_dir / first}.png was expected. "
    )
    others = [path for stem in missing for path in label_scan.get(stem, ())]
    if others:
        message += (
            f"{others[0]} is no label file: labels must be {', '.join(LABEL_SUFFIXES)}, because "
            "lossy formats change class ids. "
        )
    elif len(missing) == len(images) and label_scan:
        example = next(iter(label_scan.values()))[0]
        message += (
            f"The folder holds for example {example.relative_to(label_dir)}: if names of images "
            "and labels differ, list the pairs in config.data.list_file. "
        )
    return message + "Add the labels, remove the images, or correct config.data.label_dir."


def _size_message(image_path, image_shape, label_path, label_shape) -> str:
    """The message for an image and a label of different sizes."""
    orientation = exif_orientation(image_path)
    turned = orientation != 1
    message = (
        f"{image_path} is {image_shape[0]} x {image_shape[1]} (height x width"
        + (f", after its EXIF orientation {orientation} was applied" if turned else "")
        + f"), but its label {label_path} is {label_shape[0]} x {label_shape[1]}. "
        "Expected equal sizes"
    )
    if turned and tuple(image_shape[1::-1]) == tuple(label_shape):
        return (
            f"{message}: the label seems to be drawn on the picture before it was turned. Turn "
            "the label the way viewers show the picture, or remove the image's EXIF orientation."
        )
    return f"{message}: export the label again at the size of the image, or remove both."
