"""Annotations in the format of COCO: one JSON file for all images of a split.

`config.data.label_dir` names the file, such as "annotations/instances_{split}.json". Two kinds are
read: instances (polygons, and masks in either run-length encoding) and panoptic (a PNG file of
segment ids for each image, in the folder beside the JSON file that has its name).

All images that the file names are samples. Where instances overlap, the smaller one counts.
"""

import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memseg_jax.data.file_source import FileSource
from memseg_jax.data.images import read_colors
from memseg_jax.data.labels.names import meanings_of, outside_of, unknown_names
from memseg_jax.data.pairing import Pair, part_of, sample_name, searched_split
from memseg_jax.data.scanning import IMAGE_SUFFIXES, Finder, holds
from memseg_jax.errors import PROCESS_ERRORS, UserError
from memseg_jax.runtime.text import first_few


@dataclasses.dataclass(frozen=True)
class Segment:
    """One annotated region.

    Attributes:
        number: the id of its annotation, or of the segment in the panoptic PNG file.
        value: its class, or `IGNORE_LABEL`.
        shape: of instances: polygons or a run-length encoding, as in the file.
        area: in pixels; of instances.
    """

    number: int
    value: int
    shape: Any = None
    area: float = 0.0


@dataclasses.dataclass(frozen=True)
class Annotated:
    """What the file says of one image.

    Attributes:
        height: of the image, in pixels.
        width: of the image, in pixels.
        segments: its regions.
        png: path of the panoptic PNG file; "" for instances.
    """

    height: int
    width: int
    segments: tuple[Segment, ...]
    png: str = ""


@dataclasses.dataclass(frozen=True, repr=False)
class CocoSource(FileSource):
    """Samples of one split; their `labels` are keys of `annotated`, made for messages.

    Attributes:
        path: the JSON file.
        annotated: what it says of every image.
        outside: the class of pixels in no segment.
    """

    path: str
    annotated: Mapping[str, Annotated]
    outside: int

    def files(self, index: int) -> tuple[str, ...]:
        """Returns the files that a sample is made of."""
        return self.images[index], self.annotated[self.labels[index]].png or self.path

    def read_values(self, path: str) -> np.ndarray:
        """Returns the classes of an image's annotations: uint8 `[height, width]`."""
        one = self.annotated[path]
        return self._panoptic(one) if one.png else self._instances(one, path)

    def map_values(self, values: np.ndarray, path: str) -> np.ndarray:
        """Returns what `read_values` gave."""
        return values

    def _instances(self, one: Annotated, where: str) -> np.ndarray:
        masks = _masks()
        label = np.full((one.height, one.width), self.outside, np.uint8)
        for segment in sorted(one.segments, key=lambda s: -s.area):  # of equal ones the later wins
            try:
                inside = _inside(masks, segment.shape, one.height, one.width)
                label[inside] = segment.value
            except PROCESS_ERRORS:
                raise
            except Exception as error:  # pycocotools raises many kinds, Exception itself, too
                raise UserError(
                    f"{where}: annotation {segment.number} cannot be drawn ({error}). Expected "
                    f"polygons, or a run-length encoding of {one.height} x {one.width} pixels "
                    "(height x width): correct or remove it."
                ) from None
        return label

    def _panoptic(self, one: Annotated) -> np.ndarray:
        wide = read_colors(one.png).astype(np.int32)
        numbers = wide[..., 0] + 256 * wide[..., 1] + 65536 * wide[..., 2]
        meanings = {0: self.outside} | {s.number: s.value for s in one.segments}
        found, inverse = np.unique(numbers, return_inverse=True)
        unknown = [str(number) for number in found.tolist() if number not in meanings]
        if unknown:
            raise UserError(
                f"{one.png}: segments that {self.path} does not have: "
                f"{', '.join(first_few(unknown))}. Export both again, so that they belong together."
            )
        values = np.array([meanings[number] for number in found.tolist()], np.uint8)
        return values[inverse].reshape(numbers.shape)


def open_json(data_config: Any, split: str, root: Path) -> CocoSource:
    """Opens the split whose annotations are in one file; no image is read yet.

    Args:
        data_config: `config.data`; `label_dir` is the file.
        split: replaces "{split}" in the file's name and in the folder of images.
        root: `config.data.root`.

    Returns:
        The source, sorted by name.

    Raises:
        UserError: the file cannot be used, an image is missing, or a category means nothing.
    """
    for field in ("list_file", "label_name", "label_colors"):
        if data_config[field]:
            raise UserError(
                f"config.data.{field} is {data_config[field]!r}, which has no meaning beside "
                f"config.data.label_dir = {data_config.label_dir!r}: that file says which labels "
                "belong to which images. Leave it empty."
            )
    searched = searched_split(data_config, split)
    path = root / data_config.label_dir.replace("{split}", searched)
    content = _read(path, root)
    image_dir = Path(os.path.normpath(root / data_config.image_dir.replace("{split}", searched)))
    try:
        annotated = _annotated(content, path, meanings_of(data_config))
    except (ValueError, TypeError, LookupError) as error:
        raise _no_coco(path, f"{type(error).__name__}: {error}") from None
    pairs, missing, finder, by_label = [], [], Finder(), {}
    for number, (file_name, one) in annotated.items():
        image = finder.find((image_dir, root), file_name, IMAGE_SUFFIXES, "image")
        if image is None:
            missing.append(file_name)
            continue
        label = f"{path}, image {number}"
        by_label[label] = one
        pairs.append(Pair(sample_name(image, root), image, label))
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(annotated)} images are neither below config.data."
            f"image_dir ({image_dir}) nor below config.data.root: {', '.join(first_few(missing))}. "
            "Add them, correct config.data.image_dir, or remove them from the file."
        )
    if not pairs:
        raise UserError(f"{path}: the file names no images. Export the annotations again.")
    pairs = part_of(sorted(pairs), data_config, split)
    return CocoSource(
        names=tuple(pair.name for pair in pairs),
        images=tuple(str(pair.image) for pair in pairs),
        labels=tuple(pair.label for pair in pairs),
        path=str(path),
        annotated={pair.label: by_label[pair.label] for pair in pairs},
        outside=outside_of(data_config),
    )


def _read(path: Path, root: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{path}: the annotations cannot be read ({error.strerror}; config.data.label_dir). "
            f"{holds(root)} Correct config.data.root, config.data.label_dir or the name of the "
            "split."
        ) from None
    except ValueError as error:
        raise _no_coco(path, str(error)) from None


def _no_coco(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: not annotations in the format of COCO, or damaged ({reason}). Expected JSON with "
        "images, categories and annotations. If there is one JSON file for each image, set "
        "config.data.label_dir to their folder."
    )


def _annotated(
    content: Mapping[str, Any], path: Path, meanings: Mapping[str, int]
) -> dict[int, tuple[str, Annotated]]:
    """Image id -> file name and what the file says of it."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    used: dict[str, None] = {}

    def value_of(category: int) -> int:
        used.setdefault(names[category])
        return meanings.get(names[category], 0)

    segments, pngs = defaultdict(list), {}
    for annotation in content["annotations"]:
        image = annotation["image_id"]
        if "segments_info" in annotation:
            pngs[image] = str(path.with_suffix("") / annotation["file_name"])
            segments[image] = [
                Segment(info["id"], value_of(info["category_id"]))
                for info in annotation["segments_info"]
            ]
        elif annotation.get("segmentation"):
            value = value_of(annotation["category_id"])
            area = float(annotation.get("area") or 0)
            shape = annotation["segmentation"]
            segments[image].append(Segment(annotation.get("id", 0), value, shape, area))
    if unknown := [name for name in used if name not in meanings]:
        raise unknown_names(path, unknown, meanings)
    panoptic = bool(pngs)
    found = {}
    for image in content["images"]:
        number = image["id"]
        if panoptic and number not in pngs:
            raise ValueError(f"image {number} has no segments_info")
        found[number] = (
            image["file_name"],
            Annotated(
                int(image["height"]),
                int(image["width"]),
                tuple(segments[number]),
                pngs.get(number, ""),
            ),
        )
    return found


# ---- Masks of instances -------------------------------------------------------------------------


def _masks() -> Any:
    """The module that draws polygons and decodes masks as COCO does."""
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError(
            "instances in the format of COCO need the package pycocotools: install it with "
            "pip install 'memseg_jax[coco]' or pip install pycocotools"
        ) from None
    return mask


def _inside(masks: Any, shape: Any, height: int, width: int) -> np.ndarray:
    """The pixels of a region: bool `[height, width]`."""
    if isinstance(shape, Mapping):
        if list(shape["size"]) != [height, width]:
            raise ValueError(f"its size is {shape['size']}")
        encode: Callable[..., Any] = masks.frPyObjects
        encoded = encode(shape, height, width) if isinstance(shape["counts"], list) else shape
    else:
        encoded = masks.merge(masks.frPyObjects(shape, height, width))
    return masks.decode(encoded).astype(bool)
