"""Writes tiny data sets in the official layouts of the published ones."""

from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

# Values that occur in the label files written here, the first of them outside every box. 0 is
# "not labelled" in all but LIP and VOC.
VALUES = {
    "ade20k": (1, 0, 2, 75, 150),
    "cityscapes": (7, 0, 11, 23, 33),
    "cocostuff10k": (1, 0, 12, 92, 182),
    "lip": (0, 5, 14, 15, 19),
    "pascalcontext59": (1, 0, 12, 30, 59),
    "voc": (0, 255, 5, 14, 20),
    "vspw": (1, 0, 254, 60, 124),
}
SPLITS = {
    "ade20k": ("training", "validation"),
    "cityscapes": ("train", "val", "test"),
    "cocostuff10k": ("train", "test"),
    "lip": ("train", "val"),
    "pascalcontext59": ("train", "val"),
    "voc": ("trainaug", "val"),
    "vspw": ("train", "val"),
}
# The recipe of each, as a module.
RECIPES = dict.fromkeys(("ade20k", "cityscapes", "cocostuff10k", "lip"), "configs.{}_resnet50") | {
    "pascalcontext59": "configs.plus.{}_upernet_resnet101",
    "voc": "configs.plus.{}_upernet_resnet50",
    "vspw": "configs.plus.{}_upernet_resnet50",
}
FRAMES = 2  # of a video of VSPW
_CITIES = ("aachen", "zurich")


def write_tree(
    name: str,
    root: Path,
    counts: dict[str, int] | None = None,
    size: tuple[int, int] = (48, 64),
    *,
    nested: bool = False,
) -> Path:
    """Writes a data set as it is after unpacking the official archives.

    Images show boxes whose colours tell the class; sample i of a split is the same in every run.

    Args:
        name: as in `config.data.name`.
        root: becomes `config.data.root`.
        counts: images by split; two of each official split if it is not given.
        size: height, width.
        nested: LIP, VOC, Context and VSPW only: deeper, as the archives have them.

    Returns:
        `root`.
    """
    counts = dict.fromkeys(SPLITS[name], 2) if counts is None else counts
    for split, count in counts.items():
        for index in range(count):
            seed = 1000 * SPLITS[name].index(split) + index
            image, label = _picture(seed, size, VALUES[name])
            _WRITERS[name](root, split, index, image, label, nested)
    if name == "cocostuff10k":
        lists = root / "imageLists"
        lists.mkdir(parents=True, exist_ok=True)
        for split, count in counts.items():
            ids = [_coco_id(split, index) for index in reversed(range(count))]
            (lists / f"{split}.txt").write_text("".join(f"{i}\n" for i in ids))
    return root


def _picture(seed: int, size: tuple[int, int], values: tuple[int, ...]):
    """An image uint8 [height, width, 3] and its label file's values uint8 [height, width]."""
    rng = np.random.default_rng(seed)
    height, width = size
    which = np.zeros(size, np.uint8)
    for k in range(1, len(values)):
        top, left = rng.integers(0, max(height // 2, 1)), rng.integers(0, max(width // 2, 1))
        which[top : top + height // 3 + 1, left : left + width // 3 + 1] = k
    colours = np.random.default_rng(7).integers(40, 216, (len(values), 3))
    noise = rng.integers(-30, 31, (*size, 3))
    return (colours[which] + noise).astype(np.uint8), np.array(values, np.uint8)[which]


def _save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def _ade20k(root, split, index, image, label, nested):
    stem = f"ADE_{'val' if split == 'validation' else 'train'}_{index + 1:08d}"
    folder = root / "ADEChallengeData2016"
    _save(folder / f"images/{split}/{stem}.jpg", image)
    _save(folder / f"annotations/{split}/{stem}.png", label)


def _cityscapes(root, split, index, image, label, nested):
    city = _CITIES[index % 2] + split.removeprefix("train")  # a city is in one split only
    stem = f"{city}/{city}_{index:06d}_000019"
    if split == "test":
        label = np.zeros_like(label)  # the archive's labels of this split are dummies
    _save(root / f"leftImg8bit/{split}/{stem}_leftImg8bit.png", image)
    fine = root / f"gtFine/{split}"
    _save(fine / f"{stem}_gtFine_labelIds.png", label)
    # What the archive has besides.
    _save(fine / f"{stem}_gtFine_instanceIds.png", label.astype(np.uint16) * 1000)
    _save(fine / f"{stem}_gtFine_color.png", image)
    (fine / f"{stem}_gtFine_polygons.json").write_text("{}")


def _coco_id(split: str, index: int) -> str:
    return f"COCO_train2014_{index + (500_000 if split == 'test' else 77):012d}"


def _cocostuff10k(root, split, index, image, label, nested):
    stem = _coco_id(split, index)
    _save(root / f"images/{stem}.jpg", image)
    annotations = root / "annotations"
    annotations.mkdir(parents=True, exist_ok=True)
    names = np.array(["unlabeled", "person"], object)[:, None]
    fields = {"S": label, "names": names, "captions": np.array(["boxes"], object)}
    scipy.io.savemat(annotations / f"{stem}.mat", fields, do_compression=True)


def _lip(root, split, index, image, label, nested):
    stem = f"{index + 77}_{471474 + 1000 * len(split)}"
    images = root / "TrainVal_images" if nested else root
    labels = root / "TrainVal_parsing_annotations" if nested else root
    _save(images / f"{split}_images/{stem}.jpg", image)
    _save(labels / f"{split}_segmentations/{stem}.png", label)
    with open(images / f"{split}_id.txt", "a") as file:
        file.write(f"{stem}\n")


def _add_line(path, line):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(f"{line}\n")


def _voc(root, split, index, image, label, nested, lists="Segmentation", labels=""):
    base = root / "VOCdevkit" / f"VOC20{10 if labels else 12}" if nested else root
    stem = f"2007_{index + 1000 * len(split):06d}"
    _save(base / f"JPEGImages/{stem}.jpg", image)
    _save(base / f"SegmentationClass{labels}/{stem}.png", label)
    _add_line(base / f"ImageSets/{lists}/{split}.txt", stem)


def _pascalcontext59(*sample):
    _voc(*sample, "SegmentationContext", "Context")


def _vspw(root, split, index, image, label, nested):
    base = root / "VSPW_480p" if nested else root
    video = f"{index // FRAMES}_{split:_>11}"
    if index % FRAMES == 0:
        _add_line(base / f"{split}.txt", video)
    _save(base / f"data/{video}/origin/{index % FRAMES:08d}.jpg", image)
    _save(base / f"data/{video}/mask/{index % FRAMES:08d}.png", label)


_WRITERS = {
    "ade20k": _ade20k,
    "cityscapes": _cityscapes,
    "cocostuff10k": _cocostuff10k,
    "lip": _lip,
    "pascalcontext59": _pascalcontext59,
    "voc": _voc,
    "vspw": _vspw,
}
