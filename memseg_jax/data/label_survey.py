"""Guesses what label files mean: their form, the classes, and what is not labelled.

What is found is a dict of fields of `config.data`, and sentences about what was guessed.
"""

import collections
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memseg_jax.data.classes import IGNORE, Color
from memseg_jax.data.images import image_mode, read_colors, read_label
from memseg_jax.data.reading import map_ahead
from memseg_jax.data.scanning import IMAGE_SUFFIXES
from memseg_jax.errors import UserError
from memseg_jax.runtime.text import first_few

MOST_FILES = 5000  # that are read
_MOST_CLASSES = 254
_VOID = ("void", "ignore", "__ignore__", "unlabeled", "unlabelled", "unknown", "out of roi")
_BACKGROUND = ("background", "_background_", "__background__")
_LISTS = ("classes", "class_names", "names", "labels")  # keys of names in a JSON file
_HEADER = {"name", "class", "label", "r", "red"}  # words of a line that is no class
_MEANT = 1e-3  # share of all pixels from which on a colour is a class and not a smoothed edge
_COVERED = 0.95  # share of the pixels in polygons from which on the rest is not labelled


@dataclasses.dataclass
class Seen:
    """What is in the label files.

    Attributes:
        values: pixels per value, of files with one channel.
        colors: pixels per colour, of files with several.
        names: shapes per name, of LabelMe's files; annotations per category, of COCO's.
        files: number of files that were read.
        of: number of files that there are.
        unreadable: messages about files that could not be read.
    """

    values: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    colors: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    names: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    files: int = 0
    of: int = 0
    unreadable: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Found:
    """What the labels mean.

    Attributes:
        fields: of `config.data`.
        form: a sentence part, such as "class ids in PNG files".
        guesses: sentences about what may be otherwise.
    """

    fields: dict[str, Any]
    form: str
    guesses: list[str] = dataclasses.field(default_factory=list)


# ---- Looking ------------------------------------------------------------------------------------


def look(paths: Sequence[str], threads: int) -> Seen:
    """Reads label files; of very many, some that are spread over them.

    Args:
        paths: image files or LabelMe's.
        threads: number of files that are read at the same time.
    """
    spread = np.unique(np.linspace(0, len(paths) - 1, min(MOST_FILES, len(paths))).astype(int))
    seen = Seen(of=len(paths))
    for kind, found in map_ahead(_look_into, [paths[k] for k in spread], threads):
        if kind == "unreadable":
            seen.unreadable.append(found)
            continue
        seen.files += 1
        getattr(seen, kind).update(found)
    return seen


def _look_into(path: str) -> tuple[str, Any]:
    """Returns a field of `Seen`, and what a file adds to it."""
    try:
        if path.lower().endswith(".json"):
            shapes = json.loads(Path(path).read_bytes())["shapes"]
            return "names", collections.Counter(str(shape["label"]) for shape in shapes)
        if image_mode(path) in ("RGB", "RGBA", "LA", "PA"):
            wide = read_colors(path).astype(np.int32)
            codes, pixels = np.unique(
                wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2], return_counts=True
            )
            colors = [(c >> 16, c >> 8 & 255, c & 255) for c in codes.tolist()]
            return "colors", dict(zip(colors, pixels.tolist()))
        values, pixels = np.unique(read_label(path), return_counts=True)
        return "values", dict(zip(values.tolist(), pixels.tolist()))
    except UserError as error:
        return "unreadable", str(error)
    except (OSError, ValueError, TypeError, LookupError) as error:
        return "unreadable", f"{path}: {error}"


def look_into_coco(path: Path) -> Seen:
    """Counts the annotations of every category; those without any count, too."""
    content = json.loads(path.read_bytes())
    names = {category["id"]: str(category["name"]) for category in content["categories"]}
    seen = Seen(files=1, of=1, names=collections.Counter(dict.fromkeys(names.values(), 0)))
    for annotation in content["annotations"]:
        for one in annotation.get("segments_info", [annotation]):
            seen.names[names[one["category_id"]]] += 1
    return seen


# ---- What it means ------------------------------------------------------------------------------


def meaning_of(seen: Seen, root: Path, covered: float | None = None) -> Found:
    """Guesses what the labels mean.

    Args:
        seen: from `look`.
        root: folder of the data set, where a file with the names of classes may be.
        covered: share of pixels in polygons, if labels are polygons.

    Raises:
        UserError: there is nothing that could be classes, or more than one form.
    """
    kinds = {"files with one channel": seen.values, "colours": seen.colors, "names": seen.names}
    there = [kind for kind, found in kinds.items() if found]
    if len(there) != 1:
        first = f" {seen.unreadable[0]}" if seen.unreadable else ""
        raise UserError(
            f"{root}: of {seen.files + len(seen.unreadable)} labels, {len(seen.unreadable)} cannot "
            f"be read, and the others hold {' and '.join(there) or 'nothing'}; expected one form."
            f"{first} Correct or remove files that cannot be read, and put labels of each form "
            "into a folder of their own."
        )
    if seen.names:
        return _of_names(seen, covered or 0.0)
    table = class_table(root)
    if seen.colors:
        return _of_colors(seen.colors, table)
    return _of_values(seen.values, table)


def _of_names(seen: Seen, covered: float) -> Found:
    void = [name for name in seen.names if name.lower() in _VOID]
    names = sorted(name for name in seen.names if name not in void)
    background = [name for name in names if name.lower() in _BACKGROUND]
    guesses = []
    if background:
        outside = background[0]
        guesses.append(f"pixels in no polygon are {outside!r}")
    elif covered >= _COVERED and len(names) > 1:
        outside = IGNORE
        guesses.append(f"the {1 - covered:.1%} of pixels in no polygon are not labelled")
    else:
        outside = "background"
        names = [outside, *names]
        guesses.append(
            f"pixels in no polygon ({1 - covered:.0%}) are a class of their own, {outside!r}; "
            "outside_polygons = 'ignore' means that they are not labelled"
        )
    _check_count(names, "names")
    fields = {"class_names": tuple(names), "outside_polygons": outside}
    if void:
        fields["label_map"] = tuple((name, IGNORE) for name in void)
        guesses.append(f"{', '.join(map(repr, void))} means not labelled")
    return Found(fields, "polygons or masks in JSON files", guesses)


def _of_values(values: Mapping[int, int], table: Mapping[str, Any]) -> Found:
    ids = sorted(values)
    guesses = []
    void = [v for v in ids if v == 255 and len(ids) > 2]
    if void:
        guesses.append("255 means not labelled")
    ids = [v for v in ids if v not in void]
    if ids == [0, 255]:
        return Found(
            {
                "class_names": ("background", "object"),
                "label_map": ((0, "background"), (255, "object")),
            },
            "black and white masks",
            ["0 is the background and 255 an object, whose names you may change"],
        )
    names = table.get("names", ())
    if names and not void and ids[:-1] and ids[-2] < len(names) <= ids[-1]:
        void = [ids.pop()]
        guesses.append(f"{void[0]} means not labelled: {table['path']} has no name for it")
    last = len(names) - 1 if names else ids[-1] if ids else -1
    dense = ids and ids[0] >= 0 and ids[-1] <= last < _MOST_CLASSES
    if dense and (names or last + 1 <= 2 * len(ids)):
        if len(names) < 2:
            names = tuple(f"class {k}" for k in range(max(last + 1, 2)))
            guesses.append(f"the {len(names)} classes are called 'class 0' and so on: name them")
            if len(ids) <= last:
                absent = [str(k) for k in range(last + 1) if k not in ids]
                guesses.append(f"no label holds {', '.join(first_few(absent))}")
        else:
            guesses.append(f"the names of the classes are those of {table['path']}")
        fields: dict[str, Any] = {"class_names": tuple(names)}
        if void and void != [255]:
            fields["ignore_label"] = void[0]
        return Found(fields, "class ids 0, 1, 2, ...", guesses)
    _check_count(ids, "values")
    names = tuple(f"class {value}" for value in ids)
    guesses.append(
        "each value is a class of its own, called after it: name them; in label_map, several "
        f"values may have the same name, and {IGNORE!r} means not labelled"
    )
    return Found({"class_names": names, "label_map": tuple(zip(ids, names))}, "ids", guesses)


def _of_colors(colors: Mapping[Color, int], table: Mapping[str, Any]) -> Found:
    total = sum(colors.values())
    named: Mapping[Color, str] = table.get("colors", {})
    known = [color for color in named if color in colors]
    guesses, fields = [], {}
    if known and sum(colors[color] for color in known) >= 0.5 * total:
        chosen = list(named)
        guesses.append(f"colours and names are those of {table['path']}")
    else:
        named = {}
        chosen = sorted(colors, key=lambda color: -colors[color])
        if len(chosen) > _MOST_CLASSES or any(colors[c] < _MEANT * total / 10 for c in chosen):
            often = [color for color in chosen if colors[color] >= _MEANT * total]
            if len(chosen) > 2 * len(often):  # a few rare ones may be small objects
                chosen = often
    strange = [color for color in colors if color not in chosen]
    if strange:
        share = sum(colors[color] for color in strange) / total
        fields["unknown_color"] = "nearest"
        guesses.append(
            f"{len(strange)} other colours, {share:.2%} of the pixels, are smoothed edges: they "
            "count as the nearest known one"
        )
    void = [color for color in chosen if named.get(color, "").lower() in _VOID]
    chosen = [color for color in chosen if color not in void]
    by_name: dict[str, list[Color]] = collections.defaultdict(list)
    for color in chosen:
        by_name[named.get(color) or "color {}_{}_{}".format(*color)].append(color)
    if not named:
        guesses.append(
            "each colour is a class of its own, called after it, the most frequent first: name "
            "them; colours that mean not labelled belong into ignore_colors"
        )
    _check_count(list(by_name), "colours")
    fields["class_names"] = tuple(by_name)
    fields["label_colors"] = tuple(c[0] if len(c) == 1 else tuple(c) for c in by_name.values())
    if void:
        fields["ignore_colors"] = tuple(void)
        guesses.append(f"{', '.join(repr(named[color]) for color in void)} means not labelled")
    return Found(fields, "colour masks", guesses)


def _check_count(classes: Sequence[Any], what: str) -> None:
    if not 2 <= len(classes) <= _MOST_CLASSES:
        shown = ", ".join(first_few(list(map(str, classes))))
        raise UserError(
            f"the labels hold {len(classes)} different {what} ({shown}); expected 2 to "
            f"{_MOST_CLASSES} classes. Many are often the ids of instances, or a depth map that is "
            "no label."
        )


# ---- Files that name the classes ----------------------------------------------------------------


def class_table(root: Path) -> dict[str, Any]:
    """Finds a file in the root, or in a folder there, that names the classes.

    Args:
        root: folder of the data set.

    Returns:
        "path" of the file, and "names" in order, or "colors": the name of each; or nothing.
    """
    for path in sorted([*root.glob("*.*"), *root.glob("*/*.*")], key=lambda p: len(p.parts)):
        if path.suffix.lower() not in (".txt", ".csv", ".json", ".names") or path.name[0] == ".":
            continue
        if not re.search("class|label|name|colou?r|palette|categor", path.stem, re.IGNORECASE):
            continue
        try:
            text = path.read_text(encoding="utf-8-sig")
            rows = _rows_of_json(text) if path.suffix.lower() == ".json" else _rows_of_text(text)
        except (OSError, ValueError, TypeError, LookupError, AttributeError):
            continue
        colors = {color: name for name, color in rows if color}
        if len(colors) > 1:
            return {"path": path, "colors": colors, "names": ()}
        names = [name for name, _ in rows if Path(name).suffix.lower() not in IMAGE_SUFFIXES]
        if 2 <= len(names) <= _MOST_CLASSES and len(set(names)) == len(names):
            return {"path": path, "names": tuple(names)}
    return {}


def _rows_of_json(text: str) -> list[tuple[str, Color | None]]:
    """A list of names, or name -> id, id -> name, or name -> colour."""
    content = json.loads(text)
    if isinstance(content, dict):
        lists = (content[key] for key in _LISTS if isinstance(content.get(key), list))
        content = next(lists, content)
    if isinstance(content, list):
        return [(name, None) for name in content if isinstance(name, str)]
    rows = list(content.items())
    if all(isinstance(value, list) for _, value in rows):
        return [(name, _color(value)) for name, value in rows]
    if all(isinstance(value, int) for _, value in rows):
        names = {value: name for name, value in rows}
    else:
        names = {int(key): value for key, value in rows}
    return [(names[k], None) for k in range(len(names))]


def _rows_of_text(text: str) -> list[tuple[str, Color | None]]:
    """A name on each line, and often its colour: three numbers beside it."""
    rows = []
    for number, line in enumerate(text.splitlines()):
        line = line.strip()
        is_header = number == 0 and _HEADER & set(re.split(r"[\s,;:]+", line.lower()))
        if not line or line[0] == "#" or ("," in line and is_header):
            continue
        color = re.search(r"(?<!\d)(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})(?!\d)", line)
        name = line.replace(color[0], "") if color else re.sub(r"^\d+[\s,:;]+", "", line)
        if name := name.strip(" \t,:;\"'"):
            rows.append((name, _color(color.groups()) if color else None))
    return rows


def _color(numbers: Iterable[int | str]) -> Color:
    red, green, blue = map(int, numbers)
    if not all(0 <= value <= 255 for value in (red, green, blue)):
        raise ValueError("no colour")
    return red, green, blue
