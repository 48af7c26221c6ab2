"""Guesses how a folder is laid out: where its images and labels are, and how it is split.

What is found is a dict of fields of `config.data`. Two folders belong together if the names of
their files do; which of them holds the labels is seen in the files.
"""

import collections
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from PIL import Image

from memseg_jax.data.labels import SUFFIXES
from memseg_jax.data.labels.ids import SUFFIXES as PIXEL_SUFFIXES
from memseg_jax.data.labels.labelme import SUFFIXES as SHAPE_SUFFIXES
from memseg_jax.data.pairing import pairs_of, place_of
from memseg_jax.data.scanning import IMAGE_SUFFIXES, Finder, files_by_stem, holds
from memseg_jax.errors import UserError

VAL_SHARE = 0.15
_TRAIN = ("train", "training", "Train", "TRAIN", "trn")
_VAL = ("val", "valid", "validation", "Val", "VAL", "dev", "test", "testing", "Test", "TEST")
_LABEL_WORDS = ("label", "mask", "annot", "seg", "gt", "ground", "truth")
_IMAGE_WORDS = ("image", "img", "photo", "picture", "rgb")
_FOLDERS = 80  # that are compared with each other at most
_LOOKED_INTO = 3  # files of a folder that tell what it holds
_FEW_COLOURS = 64  # a label has at most

_Names = dict[str, list[str]]  # folder relative to another -> names of files


class _Match(NamedTuple):
    """Two folders that belong together.

    Attributes:
        count: number of images with a label.
        likeness: how much more the second looks like labels than the first.
        depth: of the folders.
        images: folder, relative to the root, with "/".
        labels: the same.
        label_name: pattern of the labels' names; "" if they are those of the images.
    """

    count: int
    likeness: float
    depth: int
    images: str
    labels: str
    label_name: str


def find_layout(root: Path) -> dict[str, Any]:
    """Guesses the fields of `config.data` that say where the files are.

    Args:
        root: the folder of the data set.

    Returns:
        Fields and values: the folders, and where they apply names, splits, lists or a share.

    Raises:
        UserError: no images with labels were found; the message says what was.
    """
    files = sorted(
        path.relative_to(root).as_posix()
        for paths in files_by_stem(root).values()
        for path in paths
    )
    return _coco_layout(root, files) or _folder_layout(root, files)


# ---- Annotations in one file --------------------------------------------------------------------


def _coco_layout(root: Path, files: list[str]) -> dict[str, Any] | None:
    """The layout if there are annotations in the format of COCO."""
    found = []
    for file in files:
        if file.endswith(".json") and (first := _first_coco_image(root / file)):
            found.append((file, first))
    if not found:
        return None
    finder = Finder()
    folders = sorted({PurePosixPath(f).parent.as_posix() for f in files if _is_image(f)}, key=len)
    # Instances first: they are what most tools export.
    for file, first in sorted(found, key=lambda pair: "panoptic" in pair[0]):
        for folder in folders:
            if finder.find((root / folder,), first, IMAGE_SUFFIXES, "image"):
                names = {name for name, _ in found}
                fields = _split_of(folder, file, lambda _, label, names=names: label in names)
                return fields or {"image_dir": folder, "label_dir": file} | _share(root, files)
    raise UserError(
        f"{root / found[0][0]}: these annotations name {found[0][1]!r} first, which is in no "
        f"folder below {root}. Add the images."
    )


def _first_coco_image(path: Path) -> str:
    """The first image that annotations in the format of COCO name; "" if these are none."""
    try:
        content = json.loads(path.read_bytes())
        content["annotations"], content["categories"]
        return content["images"][0]["file_name"]
    except (OSError, ValueError, TypeError, LookupError):
        return ""


# ---- Folders ------------------------------------------------------------------------------------


def _folder_layout(root: Path, files: list[str]) -> dict[str, Any]:
    matches = list(_matches(root, files))
    if not matches:
        images = sum(map(_is_image, files))
        raise UserError(
            f"{root}: no images with labels were found among {len(files)} files, {images} of them "
            f"images. {holds(root)} Expected two folders, or one, with files whose names belong "
            "together, such as images/a.jpg and labels/a.png, or a.jpg and a_mask.png. If names of "
            "images and labels have nothing in common, list the pairs in a file and write a config "
            "with config.data.list_file."
        )
    best = max(matches)
    of_match = {"label_name": best.label_name} if best.label_name else {}

    def both_there(images: str, labels: str) -> bool:
        names = _below(files, images), _below(files, labels)
        return bool(_count(*names, best.label_name, same=images == labels))

    above = "" if best.images == "." else f"{best.images}/"
    above_labels = "" if best.labels == "." else f"{best.labels}/"
    splits = [_split_of(best.images, best.labels, both_there)]
    splits += [
        _split_of(above + train, above_labels + train, both_there)
        for train in _TRAIN
        if both_there(above + train, above_labels + train)
    ]
    split = next(filter(None, splits), None)
    if split:
        return split | of_match
    fields = {"image_dir": best.images, "label_dir": best.labels} | of_match
    return fields | (_lists(root, files, fields) or _share(root, files, best))


def _matches(root: Path, files: list[str]) -> Iterator[_Match]:
    """All pairs of folders whose files belong together."""
    folders = {".": None}
    for file in files:
        if _is_image(file) or file.endswith(SHAPE_SUFFIXES):
            folders |= dict.fromkeys(p.as_posix() for p in PurePosixPath(file).parents)
    folders = sorted(folders, key=lambda folder: (folder.count("/"), folder))[:_FOLDERS]
    below = {folder: _below(files, folder) for folder in folders}
    looks: dict[str, float] = {}
    for images in folders:
        for labels in folders:
            same = images == labels
            of_images, of_labels = below[images], below[labels]
            if not same and _is_below(labels, images):
                of_images = _without(of_images, labels, images)
            elif not same and _is_below(images, labels):
                of_labels = _without(of_labels, images, labels)
            for label_name in _patterns(of_images, of_labels, same):
                pairs = _count(of_images, of_labels, label_name, same)
                if not pairs:
                    continue
                of_labels_like, of_images_like = (
                    np.mean([_likeness(root, f"{folder}/{file}", looks) for file in some])
                    for folder, some in ((labels, _some(pairs.values())), (images, _some(pairs)))
                )
                likeness = of_labels_like - of_images_like
                likeness += 0.2 * _hint(f"{labels}/{label_name}") - 0.2 * _hint(images)
                if of_labels_like > 0.4 and likeness > 0:
                    depth = images.count("/") + labels.count("/")
                    yield _Match(len(pairs), likeness, depth, images, labels, label_name)


def _below(files: list[str], folder: str) -> _Names:
    """The files below a folder, by their folder relative to it."""
    found = collections.defaultdict(list)
    prefix = "" if folder == "." else f"{folder}/"
    for file in files:
        if file.startswith(prefix):
            parent, _, name = file[len(prefix) :].rpartition("/")
            found[parent].append(name)
    return found


def _is_below(folder: str, parent: str) -> bool:
    return parent == "." or folder.startswith(f"{parent}/")


def _without(names: _Names, folder: str, parent: str) -> _Names:
    """Leaves out the files below one folder."""
    inside = folder if parent == "." else folder[len(parent) + 1 :]
    return {k: v for k, v in names.items() if k != inside and not k.startswith(f"{inside}/")}


def _patterns(images: _Names, labels: _Names, same: bool) -> list[str]:
    """Patterns that the names of some labels have; "" for the names of the images."""
    found = collections.Counter()
    for parent, names in labels.items():
        beside = [name for name in images.get(parent, ()) if _is_image(name)]
        # Longest first: "a_1_mask" belongs to "a_1", not to "a".
        beside.sort(key=len, reverse=True)
        for label in _some([n for n in names if n.endswith(SUFFIXES)], 10):
            stem = PurePosixPath(label).stem
            for image in beside:
                image_stem = PurePosixPath(image).stem
                if image == label and same:
                    continue
                if image_stem == stem:
                    found["{stem}" + label[len(stem) :] if same else ""] += 1
                elif image in stem:
                    found[label.replace(image, "{name}", 1)] += 1
                elif image_stem in stem:
                    found[label.replace(image_stem, "{stem}", 1)] += 1
                else:
                    continue
                break
    return [pattern for pattern, _ in found.most_common(3)]


def _count(images: _Names, labels: _Names, label_name: str, same: bool) -> dict[str, str]:
    """Image -> label, relative to their folders, of all images that have one."""
    pairs = {}
    for parent, names in images.items():
        there = set(labels.get(parent, ()))
        stems = {PurePosixPath(n).stem: n for n in there if n.lower().endswith(SUFFIXES)}
        for name in filter(_is_image, names):
            stem = PurePosixPath(name).stem
            if label_name:
                label = label_name.replace("{stem}", stem).replace("{name}", name)
                label = label if label in there else None
            else:
                label = stems.get(stem)
            if label and not (same and label == name):
                prefix = f"{parent}/" if parent else ""
                pairs[prefix + name] = prefix + label
    return pairs


def _likeness(root: Path, file: str, known: dict[str, float]) -> float:
    """From 0, a photograph, to 1, a label."""
    if file not in known:
        known[file] = 0.0
        if file.endswith(SHAPE_SUFFIXES):
            known[file] = 1.0
        elif file.lower().endswith(PIXEL_SUFFIXES):
            try:
                with Image.open(root / file) as image:
                    colours = image.convert("RGB").getcolors(4 * _FEW_COLOURS)
                known[file] = 0.5 * (colours is not None)
                if colours and len(colours) <= _FEW_COLOURS:
                    known[file] = 1.0
            except Exception:  # whatever a damaged file raises, --mode check_data names it
                pass
    return known[file]


def _hint(text: str) -> int:
    """Whether a name is one of labels (1) or of images (-1)."""
    text = text.lower()
    return any(w in text for w in _LABEL_WORDS) - any(w in text for w in _IMAGE_WORDS)


def _some(files: Any, count: int = _LOOKED_INTO) -> list[str]:
    """A few of many, spread over them."""
    files = list(files)
    spread = np.unique(np.linspace(0, len(files) - 1, count).astype(int)) if files else []
    return [files[k] for k in spread]


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


# ---- Splits -------------------------------------------------------------------------------------


def _split_of(images: str, labels: str, there: Any) -> dict[str, Any] | None:
    """Fields with "{split}", if both paths have the word of a training split.

    Args:
        images: folder of the images.
        labels: folder or file of the labels.
        there: whether a pair of such paths is there.
    """
    for train in sorted(_TRAIN, key=len, reverse=True):
        if train not in images or train not in labels:
            continue
        for val in _VAL:
            if there(images.replace(train, val, 1), labels.replace(train, val, 1)):
                return {
                    "image_dir": images.replace(train, "{split}", 1),
                    "label_dir": labels.replace(train, "{split}", 1),
                    "train_split": train,
                    "eval_split": val,
                }
    return None


def _lists(root: Path, files: list[str], fields: dict[str, Any]) -> dict[str, Any] | None:
    """Fields of list files for two splits, if all their lines have images and labels."""
    data = ml_collections.ConfigDict({"label_name": "", "val_share": 0.0} | fields)
    data.list_file = ""

    def is_list(file: str) -> bool:
        data.list_file = file
        try:
            return bool(pairs_of(data, "", root, SUFFIXES))
        except UserError:
            return False

    lists = {file for file in files if file.endswith((".txt", ".csv")) and is_list(file)}
    for file in sorted(lists, key=len):
        if found := _split_of(file, file, lambda path, _: path in lists):
            splits = {key: found[key] for key in ("train_split", "eval_split")}
            return splits | {"list_file": found["image_dir"]}
    return None


def _share(root: Path, files: list[str], match: _Match | None = None) -> dict[str, Any]:
    """A share for evaluation that leaves images for both splits."""
    if match:
        below = _below(files, match.images), _below(files, match.labels)
        images = _count(*below, match.label_name, match.images == match.labels)
        prefix = "" if match.images == "." else f"{match.images}/"
        images = [f"{prefix}{image}" for image in images]
    else:
        images = [file for file in files if _is_image(file)]
    places = sorted(place_of(os.path.splitext(image)[0]) for image in images)
    if len(places) < 2:
        raise UserError(
            f"{root}: there is one image with a label, {images[0]}. Two are the least: one to "
            "train on, and one to evaluate on."
        )
    if places[0] < VAL_SHARE <= places[-1]:
        return {"val_share": VAL_SHARE}
    low, high = places[:2] if places[0] >= VAL_SHARE else places[-2:]
    return {"val_share": round((low + high) / 2, 6)}
