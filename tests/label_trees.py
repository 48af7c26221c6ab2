"""Data sets as people have them: the same pictures with labels in every form, and laid out so."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests import tiny
from tests.tiny_config import CLASSES, COLOURS

SIZE = (40, 48)
TRAIN, VAL = 6, 3
NAMES = [f"{'train' if k < TRAIN else 'val'}{k}" for k in range(TRAIN + VAL)]
VOID = (0, 0, 0)
IDS = np.array([7, 11, 26] + [0] * 253, np.uint8)  # of the classes, and 0 for what is ignored


def picture(k: int) -> tuple[np.ndarray, np.ndarray]:
    """An image uint8 [height, width, 3], and its label: 0, 1, 2, and 255 in the first row."""
    return tiny.picture(k, *SIZE)


def _save(path: Path, array: np.ndarray) -> None:
    tiny.write(path, array)


def in_folders(root: Path) -> None:
    """images/train, labels/train, and the same for val; class ids."""
    for k, name in enumerate(NAMES):
        image, label = picture(k)
        split = "train" if k < TRAIN else "val"
        _save(root / f"images/{split}/{name}.jpg", image)
        _save(root / f"labels/{split}/{name}.png", label)


def camvid_like(root: Path) -> None:
    """train, trainannot, val, valannot; colour masks and a table of colours."""
    colors = np.array([*COLOURS] + [VOID] * 253, np.uint8)
    for k, name in enumerate(NAMES):
        image, label = picture(k)
        split = "train" if k < TRAIN else "val"
        _save(root / f"{split}/{name}.png", image)
        _save(root / f"{split}annot/{name}.png", colors[label])
    rows = ["name,r,g,b"]
    rows += [",".join(map(str, (n, *c))) for n, c in zip((*CLASSES, "Void"), (*COLOURS, VOID))]
    (root / "class_dict.csv").write_text("\n".join(rows))


def with_lists(root: Path) -> None:
    """images, labels, train.txt and test.txt with paths below the root; colours without names."""
    colors = np.array([*COLOURS] + [VOID] * 253, np.uint8)
    for k, name in enumerate(NAMES):
        image, label = picture(k)
        _save(root / f"images/{name}.jpg", image)
        _save(root / f"labels/{name}.png", colors[label])
    for split, names in (("train", NAMES[:TRAIN]), ("test", NAMES[TRAIN:])):
        (root / f"{split}.txt").write_text("".join(f"images/{name}.jpg\r\n" for name in names))


def in_one_folder(root: Path) -> None:
    """All in one folder, labels with an ending; any ids in palette files."""
    for k, name in enumerate(NAMES):
        image, label = picture(k)
        _save(root / f"{name}.jpg", image)
        mask = Image.fromarray(IDS[label])
        mask.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
        mask.save(root / f"{name}_mask.png")


def black_and_white(root: Path) -> None:
    """photos and masks, the same names; the disc is white."""
    for k, name in enumerate(NAMES):
        image, label = picture(k)
        _save(root / f"photos/{name}.png", image)
        _save(root / f"masks/{name}.png", np.where(label == 2, 255, 0).astype(np.uint8))


def voc_like(root: Path) -> None:
    """JPEGImages, of which some have a label in SegmentationClass, and lists of several kinds."""
    for k, name in enumerate([*NAMES, "unlabelled"]):
        image, label = picture(k)
        _save(root / f"JPEGImages/{name}.jpg", image)
        if k < len(NAMES):
            _save(root / f"SegmentationClass/{name}.png", label)
    for split, names in (("train", NAMES[:TRAIN]), ("val", NAMES[TRAIN:])):
        for list_file, ending in (("Main/box_{}", " -1"), ("Segmentation/{}", "")):
            path = root / "ImageSets" / f"{list_file.format(split)}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{name}{ending}\n" for name in names))
    (root / "classes.json").write_text(json.dumps({"title": "ours", "classes": CLASSES}))


def _box(k: int) -> list[tuple[int, int]]:
    return [(3 + k, 4), (20 + k, 4), (20 + k, 22), (3 + k, 22)]


def labelme(root: Path) -> None:
    """JSON files of LabelMe beside the images."""
    for k, name in enumerate(NAMES):
        _save(root / f"{name}.jpg", picture(k)[0])
        shapes = [
            {"label": "box", "points": _box(k), "shape_type": "polygon"},
            {"label": "disc", "points": [(30, 30), (30, 24)], "shape_type": "circle"},
        ]
        content = {"shapes": shapes, "imagePath": f"{name}.jpg", "imageData": None}
        content |= {"imageHeight": SIZE[0], "imageWidth": SIZE[1]}
        (root / f"{name}.json").write_text(json.dumps(content))


def coco(root: Path) -> None:
    """train2017, val2017 and annotations/instances_{train,val}2017.json."""
    (root / "annotations").mkdir(parents=True)
    for split, numbers in (("train", range(TRAIN)), ("val", range(TRAIN, TRAIN + VAL))):
        images, annotations = [], []
        for k in numbers:
            _save(root / f"{split}2017/{NAMES[k]}.jpg", picture(k)[0])
            images.append(
                {"id": k, "file_name": f"{NAMES[k]}.jpg", "height": SIZE[0], "width": SIZE[1]}
            )
            polygon = [float(number) for point in _box(k) for number in point]
            for category, shape in ((3, polygon), (8, [25.0, 25, 40, 25, 40, 36, 25, 36])):
                annotations.append(
                    {"id": 2 * k + category, "image_id": k, "category_id": category,
                     "segmentation": [shape], "area": 99.0, "iscrowd": 0}
                )  # fmt: skip
        categories = [{"id": 3, "name": "box"}, {"id": 8, "name": "disc"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))


def coco_panoptic(root: Path) -> None:
    """train2017, val2017 and annotations/panoptic_{train,val}2017 with PNG files and JSON."""
    for split, numbers in (("train", range(TRAIN)), ("val", range(TRAIN, TRAIN + VAL))):
        images, annotations = [], []
        for k in numbers:
            image, label = picture(k)
            _save(root / f"{split}2017/{NAMES[k]}.jpg", image)
            ids = np.array([0, 300, 70_000] + [0] * 253)[label]  # the ground has no segment
            colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
            _save(root / f"annotations/panoptic_{split}2017/{NAMES[k]}.png", colors)
            size = {"height": SIZE[0], "width": SIZE[1]}
            images.append({"id": k, "file_name": f"{NAMES[k]}.jpg"} | size)
            there = [(n, category) for n, category in ((300, 3), (70_000, 8)) if (ids == n).any()]
            segments = [{"id": n, "category_id": category} for n, category in there]
            annotations.append(
                {"image_id": k, "file_name": f"{NAMES[k]}.png", "segments_info": segments}
            )
        categories = [{"id": 3, "name": "box"}, {"id": 8, "name": "disc"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"annotations/panoptic_{split}2017.json").write_text(json.dumps(content))


TREES = {
    tree.__name__: tree
    for tree in (
        in_folders, camvid_like, with_lists, voc_like, in_one_folder, black_and_white, labelme,
        coco, coco_panoptic,
    )
}  # fmt: skip
