"""The page about a memory: one file that asks no other host, or its parts for another page."""

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from memseg_jax.inspection.findings import Findings, Picture
from memseg_jax.inspection.maps import FlatMap
from memseg_jax.inspection.pictures import (
    confusion_shares,
    heat,
    in_frame,
    similarity_shade,
)
from memseg_jax.inspection.worth import AS_TRAINED, PERMUTED
from memseg_jax.reporting.page import environment, hashes
from memseg_jax.reporting.sections import Section

_TEMPLATES = Path(__file__).parent / "templates"
_GRID = 16  # pixels that can be clicked, along the longer side of a picture
_ATTENTION = 40  # positions of an attention map in the page, along its longer side
_PICTURE = 560  # pixels of the picture in the page, along its longer side
_MAP = (460, 380)  # of a map of points
_CHART = (640, 220)  # of the course
_LABELLED = 40  # with more classes, their names would lie upon each other


def sections(findings: Findings) -> list[Section]:
    """The parts of the page, to be put into any page, in this order.

    Args:
        findings: what was found.
    """
    alike, of_alike = _alike(findings)
    maps = {"maps": [_map(findings, flat) for flat in findings.maps]}
    parts = [
        ("holding", "What the memory holds", _holding(findings), "", None),
        ("alike", "Which classes look alike to the memory", alike, "alike.js", of_alike),
        ("map", "The memory as a map", maps, "highlight.js", None),
        ("worth", "What the memory is worth here", _worth(findings), "", None),
    ]
    if findings.picture:
        picture, data = _picture(findings, findings.picture)
        title = f"What {findings.picture.name} reads"
        parts.append(("picture", title, picture, "picture.js", data))
    shared: dict[str, Any] = {"names": findings.class_names, "colours": _colours(findings)}
    shared["drawn"] = findings.holding.drawn
    shared["style"] = _text("style.css")
    return [
        Section(
            f"memory-{name}",
            title,
            environment(_TEMPLATES).get_template(f"{name}.html").render(values | shared),
            _text(script) if script else "",
            data,
        )
        for name, title, values, script, data in parts
    ]


def whole_page(findings: Findings) -> str:
    """One HTML file, which runs no script but ours and asks no host.

    Args:
        findings: what was found.
    """
    parts = sections(findings)
    scripts = [_text("data.js"), *(part.script for part in parts if part.script)]
    return (
        environment(_TEMPLATES)
        .get_template("memory.html")
        .render(
            parts=parts,
            data={part.anchor: part.data for part in parts},
            scripts=scripts,
            hashes=hashes(scripts),
            step=findings.step,
            split=findings.split,
            classes=len(findings.class_names),
            seen=int(findings.holding.seen.sum()),
        )
    )


def _text(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def in_words(findings: Findings) -> str:
    """The main results, for the terminal."""
    worth, names = findings.worth, findings.class_names
    lines = ["mIoU with the memory of this checkpoint, and with wrong ones:"]
    for name in worth.matrices:
        scores = worth.scores(name)
        groups = "  ".join(f"{group} {_number(scores[group])}" for group in worth.groups)
        lines.append(f"  {name:<16}{_number(scores['mIoU'])}  {groups}".rstrip())
    agreement = findings.agreement
    lines.append(
        f"Similarity of rows and confusion of classes: rank correlation "
        f"{_number(agreement.correlation, 2)} over {agreement.pairs} pairs"
    )
    for pair in agreement.confused[:3]:
        one, two = (names[k] for k in pair.classes)
        lines.append(f"  {one} / {two}: similarity {pair.similarity:.2f}, {pair.confusion:.1%}")
    return "\n".join(lines)


# ---- What the templates show --------------------------------------------------------------------


def _number(value: float, digits: int = 4) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _colours(findings: Findings) -> list[str]:
    return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in findings.palette.tolist()]


def _holding(findings: Findings) -> dict[str, Any]:
    record, course, holding = findings.record, findings.course, findings.holding
    iou = findings.worth.iou(AS_TRAINED)
    rows = []
    for k, name in enumerate(findings.class_names):
        moved = course.moved[-1, k] if len(course.steps) else np.nan
        rows.append(
            {
                "class": k,
                "name": name,
                "seen": bool(holding.seen[k]),
                "norm": ", ".join(f"{norm:.3g}" for norm in holding.norms[k]),
                "pixels": f"{record.pixels[k]:,}" if record else "-",
                "steps": f"{record.steps[k]:,}" if record else "-",
                "age": f"{record.ages[k]:,}" if record else "-",
                "moved": "-" if np.isnan(moved) else f"{moved:.1%}",
                "iou": _number(iou[k], 3),
            }
        )
    return {
        "rows": rows,
        "since": record.since if record else 0,
        "recorded": record is not None,
        "chart": _course_chart(findings) if len(course.steps) > 1 else None,
    }


def _course_chart(findings: Findings) -> dict[str, Any]:
    """Lines of the likeness with the last row, one a class, in the coordinates of an SVG."""
    course = findings.course
    width, height = _CHART
    left, right, top, bottom = 44, width - 12, 10, height - 30
    first, last = course.steps[0], course.steps[-1]
    lowest = min(float(np.nanmin(course.likeness, initial=0.9)), 0.9)
    lines = []
    for k, name in enumerate(findings.class_names):
        known = ~np.isnan(course.likeness[:, k])
        if known.sum() < 2:
            continue
        x = left + (course.steps[known] - first) / (last - first) * (right - left)
        share = (course.likeness[known, k] - lowest) / (1 - lowest)
        y = bottom - share * (bottom - top)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
        lines.append({"class": k, "name": name, "points": points})
    return {
        "width": width,
        "height": height,
        "frame": (left, right, top, bottom),
        "lines": lines,
        "first": int(first),
        "last": int(last),
        "lowest": f"{lowest:.2f}",
    }


def _alike(findings: Findings) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the template shows, and what the script reads."""
    order = findings.order
    ordered = findings.similarity[np.ix_(order, order)]
    shares = confusion_shares(findings)

    def pairs(found: list) -> list[dict[str, Any]]:
        return [
            {
                "classes": pair.classes,
                "similarity": f"{pair.similarity:.2f}",
                "confusion": f"{pair.confusion:.2%}",
            }
            for pair in found
        ]

    agreement = findings.agreement
    shown = {
        "order": order.tolist(),
        "labelled": len(order) <= _LABELLED,
        "similarity": _png(heat(similarity_shade(findings))),
        "confusion": _png(heat(np.sqrt(shares))),
        "defined": not math.isnan(agreement.correlation),
        "correlation": _number(agreement.correlation, 2),
        "chance": _number(agreement.chance, 3),
        "sense": _sense(agreement.correlation, agreement.chance),
        "count": agreement.pairs,
        "confused": pairs(agreement.confused),
        "alike": pairs(agreement.alike),
    }
    data = {
        "names": [findings.class_names[k] for k in order],
        "similarity": _plain(ordered),
        "confusion": _plain(shares),
    }
    return shown, data


def _sense(correlation: float, chance: float) -> str:
    """What a correlation says, in words."""
    if math.isnan(correlation):
        return "There are too few pairs of classes to say."
    if chance > 0.05:
        return "No connection that could not be chance: what looks alike is not what is confused."
    strength = "strongly" if correlation > 0.6 else "clearly" if correlation > 0.3 else "slightly"
    return f"Classes that look alike to the memory are {strength} more often confused."


def _map(findings: Findings, flat: FlatMap) -> dict[str, Any]:
    rows, pixels = in_frame(flat, *_MAP, 30)

    def points(places: np.ndarray, classes: np.ndarray) -> list[tuple[str, str, int]]:
        return [(f"{x:.1f}", f"{y:.1f}", int(k)) for (x, y), k in zip(places, classes)]

    return {
        "name": flat.name,
        "axes": flat.axes,
        "width": _MAP[0],
        "height": _MAP[1],
        "rows": points(rows, findings.map_rows),
        "pixels": points(pixels, findings.map_pixels),
        "labelled": len(findings.class_names) <= _LABELLED,
    }


def _worth(findings: Findings) -> dict[str, Any]:
    worth = findings.worth
    trained = worth.scores(AS_TRAINED)
    rows = []
    for name in worth.matrices:
        scores = worth.scores(name)
        cells = [
            {
                "value": _number(value, 3),
                "share": 0 if math.isnan(value) else round(100 * value, 1),
                "change": ""
                if name == AS_TRAINED or math.isnan(value - trained[key])
                else f"{value - trained[key]:+.3f}",
            }
            for key, value in scores.items()
        ]
        rows.append({"name": name, "cells": cells})
    loss = worth.iou(AS_TRAINED) - worth.iou(PERMUTED)
    most = [int(k) for k in np.argsort(-np.nan_to_num(loss, nan=-np.inf)) if loss[k] > 0][:5]
    return {
        "columns": list(trained),
        "rows": rows,
        "groups": {name: members.tolist() for name, members in worth.groups.items()},
        "most": [{"class": k, "loss": f"{loss[k]:.3f}"} for k in most],
        "split": findings.split,
    }


def _picture(findings: Findings, picture: Picture) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the template shows, and what the script reads."""
    height, width = picture.image.shape[:2]
    scale = min(_PICTURE / max(height, width), 1)
    small = Image.fromarray(picture.image)
    small = small.resize((max(round(width * scale), 1), max(round(height * scale), 1)))
    step = max(height, width) / _GRID
    rows, columns = (max(round(side / step), 1) for side in (height, width))
    cells = []
    for i in range(rows):
        for j in range(columns):
            pixel = (2 * i + 1) * height // (2 * rows), (2 * j + 1) * width // (2 * columns)
            cells.append(_cell(findings, picture, pixel))
    first_row = picture.pixel[0] * rows // height
    first_column = picture.pixel[1] * columns // width
    cells[first_row * columns + first_column] = _cell(findings, picture, picture.pixel)
    look = picture.look.at(*picture.pixel)
    of_image = look.image_attention
    shown = {
        "name": picture.name,
        "image": _jpeg(small),
        "size": small.size,
        "canvas": [side * -(-_PICTURE // max(small.size)) for side in small.size],
        "has_image_attention": of_image is not None,
    }
    data = {
        "rows": rows,
        "columns": columns,
        "first": first_row * columns + first_column,
        "names": list(findings.class_names),
        "colours": _colours(findings),
        "ramp": heat(np.arange(256) / 255).ravel().tolist(),
        "cells": cells,
        "shapes": {
            "memory": _small_map(look.memory_attention.mean(axis=0)).shape,
            "image": None if of_image is None else _small_map(of_image).shape,
        },
    }
    return shown, data


def _cell(findings: Findings, picture: Picture, pixel: tuple[int, int]) -> dict[str, Any]:
    """What the page says of one pixel: classes and shares, and attention maps as bytes."""
    look = picture.look.at(*pixel)
    best = int(np.argmax(look.prediction))
    maps = {"memory": look.memory_attention.mean(axis=0), "image": look.image_attention}
    return {
        "pixel": pixel,
        "read": [[k, round(float(look.weights[k]), 3)] for k in look.rows[:6]],
        "says": [best, round(float(look.prediction[best]), 3)],
    } | {kind: _packed(attention) for kind, attention in maps.items() if attention is not None}


def _small_map(attention: np.ndarray) -> np.ndarray:
    """Means over blocks of positions, so that the map fits the page."""
    factor = -(-max(attention.shape) // _ATTENTION)
    height, width = (-(-side // factor) * factor for side in attention.shape)
    room = [(0, height - len(attention)), (0, width - attention.shape[1])]
    blocks = np.pad(attention, room, constant_values=np.nan)
    blocks = blocks.reshape(height // factor, factor, width // factor, factor)
    return np.nanmean(blocks, axis=(1, 3))


def _packed(attention: np.ndarray) -> dict[str, Any]:
    """A map in bytes, 255 the most, row by row, in base 64; and how the most compares to the mean.

    Positions are those of `_small_map`.
    """
    small = _small_map(attention)
    shares = np.round(255 * small / small.max()).astype(np.uint8)
    peak = float(attention.max() * attention.size)
    return {"map": base64.b64encode(shares.tobytes()).decode(), "peak": f"{peak:.1f}"}


def _plain(matrix: np.ndarray) -> list[list[float | None]]:
    return [[None if math.isnan(x) else round(x, 4) for x in row] for row in matrix.tolist()]


def _png(array: np.ndarray) -> str:
    return _encoded(Image.fromarray(array), "PNG")


def _jpeg(picture: Image.Image) -> str:
    return _encoded(picture, "JPEG", quality=88)


def _encoded(picture: Image.Image, form: str, **options: Any) -> str:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
