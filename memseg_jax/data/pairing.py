"""Which images of a folder belong to a split, and which label belongs to each of them."""

import hashlib
import os
import re
import unicodedata
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from memseg_jax.data.lists import Line, read_lines
from memseg_jax.data.scanning import IMAGE_SUFFIXES, Finder, files_by_stem, holds, one_of_each
from memseg_jax.errors import UserError
from memseg_jax.runtime.text import first_few

LOSSY_SUFFIXES = (".jpg", ".jpeg", ".webp")


class Pair(NamedTuple):
    """An image, its label, and the sample's name: the image's path without root and suffix."""

    name: str
    image: Path
    label: Path | str


def pairs_of(
    data_config: Any, split: str, root: Path, label_suffixes: tuple[str, ...]
) -> list[Pair]:
    """Finds the images and labels of a split.

    Args:
        data_config: `config.data`.
        split: replaces "{split}" in the folders and the list file.
        root: `config.data.root`.
        label_suffixes: of files that can be labels, in lower case.

    Returns:
        The pairs, sorted by name, or in the order of the list file.

    Raises:
        UserError: a folder, a file or a label is missing, or there are no images.
    """
    folders = _Folders(data_config, searched_split(data_config, split), root, label_suffixes)
    pairs = _listed(folders) if data_config.list_file else _all_of_folder(folders)
    return part_of(pairs, data_config, split)


class _Folders:
    """Where the files of a split are, and which label belongs to an image."""

    def __init__(self, data_config: Any, split: str, root: Path, label_suffixes: tuple[str, ...]):
        self.data, self.split, self.root = data_config, split, root
        self.label_suffixes = label_suffixes
        self.image_dir, self.label_dir = (
            Path(os.path.normpath(root / data_config[field].replace("{split}", split)))
            for field in ("image_dir", "label_dir")
        )
        self.finder = Finder()

    def need(self, field: str) -> Path:
        """The folder that a field names, which must exist."""
        folder = getattr(self, field)
        if not folder.is_dir():
            raise UserError(
                f"{folder}: there is no such folder (config.data.{field} = {self.data[field]!r}, "
                f"split {self.split!r}). {holds(self.root)} Correct config.data.root, "
                f"config.data.{field} or the name of the split."
            )
        return folder

    def find_label(self, image: Path) -> Path | None:
        """The label of an image that no list names."""
        name = self.label_name(image)
        return self.finder.find((self.label_dir,), name, self.label_suffixes, "label", image)

    def label_name(self, image: Path) -> str:
        """What the label of an image is called below the label folder."""
        inside = next((f for f in (self.image_dir, self.root) if image.is_relative_to(f)), None)
        path = PurePosixPath(image.relative_to(inside) if inside else image.name)
        pattern = self.data.label_name
        if not pattern:
            return path.with_suffix("").as_posix()
        values = {"{stem}": path.stem, "{name}": path.name, "{parent}": path.parent.as_posix()}
        name = re.sub("{stem}|{name}|{parent}", lambda match: values[match[0]], pattern)
        return name if "{parent}" in pattern else (path.parent / name).as_posix()

    def is_named_like_a_label(self, path: Path) -> bool:
        """Whether the name of a file is one that `config.data.label_name` gives to labels."""
        pattern = re.escape(self.data.label_name)
        for word in ("stem", "name", "parent"):
            pattern = pattern.replace(re.escape(f"{{{word}}}"), ".+")
        name = path.name if Path(self.data.label_name).suffix else path.stem
        return bool(re.fullmatch(pattern, name))


def sample_name(image: Path, root: Path) -> str:
    """Returns the path of an image relative to the root, without suffix; never an absolute one."""
    path = image.relative_to(root if image.is_relative_to(root) else image.anchor)
    return path.with_suffix("").as_posix()


# ---- All files of a folder ----------------------------------------------------------------------


def _all_of_folder(folders: _Folders) -> list[Pair]:
    image_dir, label_dir = folders.need("image_dir"), folders.need("label_dir")
    scan = files_by_stem(image_dir)
    label_of = {}
    if label_dir.is_relative_to(image_dir):  # then the labels are among the files
        scan, label_of = _without_labels(scan, folders)
    images = one_of_each(scan, IMAGE_SUFFIXES, "image")
    if not images:
        raise UserError(
            f"{image_dir}: no images (split {folders.split!r}; {', '.join(IMAGE_SUFFIXES)}). "
            f"{holds(image_dir)} Correct config.data.image_dir or add images."
        )
    pairs, missing = [], []
    for stem in sorted(images):
        image = images[stem]
        label = label_of.get(image) or folders.find_label(image)
        if label is None:
            missing.append(image)
        else:
            pairs.append(Pair(sample_name(image, folders.root), image, label))
    if missing:
        raise UserError(_missing_labels(folders, len(images), missing))
    return pairs


def _without_labels(
    scan: dict[str, list[Path]], folders: _Folders
) -> tuple[dict[str, list[Path]], dict[Path, Path]]:
    """Leaves the labels out of the files of a folder in which they are as well.

    Returns:
        The other files by stem, and the labels that were found, by image.
    """
    image_dir, label_dir = folders.image_dir, folders.label_dir
    label_name = folders.data.label_name
    files = [p for paths in scan.values() for p in paths if p.suffix.lower() in IMAGE_SUFFIXES]
    if label_dir != image_dir:
        labels = {path for path in files if path.is_relative_to(label_dir)}
        label_of = {}
    elif label_name:
        label_of = {path: folders.find_label(path) for path in files}
        # A label may have no image any more; a file that is its own label is one.
        labels = set(label_of.values())
        labels |= {p for p in files if folders.label_name(p) == p.relative_to(label_dir).as_posix()}
        if "/" not in label_name:
            labels |= {path for path in files if folders.is_named_like_a_label(path)}
    else:
        return scan, {}
    others = {
        stem: kept
        for stem, paths in scan.items()
        if (kept := [path for path in paths if path not in labels])
    }
    return others, label_of


def _missing_labels(folders: _Folders, images: int, missing: list[Path]) -> str:
    """The message for images without labels."""
    first, label_dir = missing[0], folders.label_dir
    names = ", ".join(first_few([path.name for path in missing]))
    expected = folders.label_name(first)
    if not folders.data.label_name:
        expected += ".png"
    message = (
        f"{label_dir}: {len(missing)} of {images} images of split {folders.split!r} have no label: "
        f"{names}. For {first} the file {label_dir / expected} was expected. "
    )
    scan = files_by_stem(label_dir)
    others = [p for image in missing for p in scan.get(Path(folders.label_name(image)).name, ())]
    others = [path for path in others if path not in missing]
    if others and others[0].suffix.lower() in LOSSY_SUFFIXES:
        message += (
            f"{others[0]} is no label file: labels must be {', '.join(folders.label_suffixes)}, "
            "because lossy formats change class ids. "
        )
    elif len(missing) == images and scan:
        example = next(iter(scan.values()))[0]
        message += (
            f"The folder holds for example {example.relative_to(label_dir)}: if names of images "
            "and labels differ, set config.data.label_name, such as '{stem}_mask.png', or list the "
            "pairs in config.data.list_file. "
        )
    return message + "Add the labels, remove the images, or correct config.data.label_dir."


# ---- The samples of a list ----------------------------------------------------------------------


def _listed(folders: _Folders) -> list[Pair]:
    root, list_file = folders.root, folders.data.list_file
    list_path = root / list_file.replace("{split}", folders.split)
    lines = read_lines(
        list_path,
        f"config.data.list_file = {list_file!r}, split {folders.split!r}",
        f"{holds(root)} Correct config.data.list_file; leave it empty to read all files of the "
        "folders.",
    )
    pairs, line_of, problems = [], {}, []
    for line in lines:
        try:
            image, label = _pair_of_line(line, folders)
        except FileNotFoundError as error:
            problems.append(f"line {line.number}: {error}")
            continue
        name = sample_name(image, root)
        if name in line_of:
            problems.append(f"line {line.number}: {name} is named in line {line_of[name]} already")
        line_of.setdefault(name, line.number)
        pairs.append(Pair(name, image, label))
    if problems:
        raise UserError(
            f"{list_path}: {len(problems)} of {len(lines)} lines cannot be used. "
            + "; ".join(first_few(problems))
            + f". {_how_lines_are_read(folders)}"
        )
    return pairs


def _pair_of_line(line: Line, folders: _Folders) -> tuple[Path, Path]:
    """The image and the label of one line; FileNotFoundError says what is missing."""
    for image_text, label_text in line.readings:
        places = (folders.image_dir, folders.root)
        image = folders.finder.find(places, image_text, IMAGE_SUFFIXES, "image")
        if image is None:
            continue
        if not label_text:
            folders.need("label_dir")
            label = folders.find_label(image)
            expected = folders.label_name(image) + ".png" * (not folders.data.label_name)
        else:
            places = (folders.label_dir, folders.root)
            # An image may have the name of its label, in another folder.
            suffixes = folders.label_suffixes
            label = folders.finder.find(places, label_text, suffixes, "label", but_not=image)
            expected = label_text
        if label is None:
            raise FileNotFoundError(
                f"there is no label {folders.label_dir / expected} (image {image})"
            )
        return image, label
    raise FileNotFoundError(f"there is no image {line.text!r}")


def _how_lines_are_read(folders: _Folders) -> str:
    """What a line of a list may be, in the order in which it is tried."""
    there = "" if folders.image_dir.is_dir() else ", which does not exist"
    return (
        "A line is looked for as an absolute path, then below config.data.image_dir "
        f"({folders.image_dir}{there}), then below config.data.root ({folders.root}); each time "
        "first as it is, then with an image suffix added, then with its suffix replaced by "
        "another; and then once more as an image and a label with a tab, a comma or a space "
        f"between them. Labels are looked for below config.data.label_dir ({folders.label_dir}); "
        "those that are named in the list also below config.data.root"
    )


# ---- A share of the samples ---------------------------------------------------------------------


def searched_split(data_config: Any, split: str) -> str:
    """Returns the split whose folders and lists are searched for the samples of a split.

    Args:
        data_config: `config.data`; with `val_share`, one split has no files of its own.
        split: the split.

    Raises:
        UserError: `val_share` does not make this split.
    """
    share = data_config.val_share
    if not share:
        return split
    if split not in (data_config.train_split, data_config.eval_split):
        raise UserError(
            f"split {split!r}: with config.data.val_share = {share:g} there are the two splits "
            f"{data_config.train_split!r} and {data_config.eval_split!r}. Set "
            "--config.data.val_share=0 for a split with a folder or a list of its own."
        )
    return data_config.train_split


def part_of(pairs: list[Pair], data_config: Any, split: str) -> list[Pair]:
    """Returns the samples that belong to a split: all, or those that `val_share` gives to it.

    Args:
        pairs: what was found for `searched_split`.
        data_config: `config.data`.
        split: the split.

    Raises:
        UserError: one of the two splits would be empty.
    """
    share = data_config.val_share
    if not share:
        return pairs
    evaluated = [pair for pair in pairs if place_of(pair.name) < share]
    if not evaluated or len(evaluated) == len(pairs):
        places = sorted(place_of(pair.name) for pair in pairs)
        least = places[0] + 1e-3 if not evaluated else places[-1] - 1e-3
        raise UserError(
            f"config.data.val_share = {share:g} leaves {len(evaluated)} of {len(pairs)} images for "
            f"split {data_config.eval_split!r}, and {len(pairs) - len(evaluated)} for "
            f"{data_config.train_split!r}: a hash of each image's name decides. Set it to "
            f"{least:.3f}, or list the images of both splits in config.data.list_file."
        )
    if split == data_config.eval_split:
        return evaluated
    return [pair for pair in pairs if place_of(pair.name) >= share]


def place_of(name: str) -> float:
    """A number from 0 to 1 for the name of a sample, the same everywhere and every time."""
    # macOS writes accents as characters of their own.
    text = unicodedata.normalize("NFC", name).encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64
