"""Pictures of what was found, drawn with Pillow alone: heat maps and maps of points."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from memseg_jax.inspection.findings import Findings
from memseg_jax.inspection.maps import FlatMap
from memseg_jax.inspection.worth import AS_TRAINED

# From least to most, bright enough at the end for dark pages and dark enough for bright ones.
_RAMP = np.array([(24, 20, 48), (92, 34, 110), (196, 70, 90), (246, 160, 86), (252, 240, 190)])
_MARGIN = 16
_FONT = 14
_SIDE = 520  # of a heat map or a map of points, in pixels
_LABELLED = 40  # with more classes, their names would lie upon each other
_INK, _PAPER = (40, 40, 40), (255, 255, 255)
_FINER = 2  # maps are drawn so many times larger, and shrunk: smooth edges


def heat(values: np.ndarray) -> np.ndarray:
    """Colours of numbers.

    Args:
        values: [...]; below 0 counts as 0, above 1 as 1, NaN as 0.

    Returns:
        uint8 [..., 3].
    """
    place = np.nan_to_num(np.clip(values, 0, 1)) * (len(_RAMP) - 1)
    lower = np.minimum(place.astype(int), len(_RAMP) - 2)
    share = (place - lower)[..., None]
    return np.round(_RAMP[lower] * (1 - share) + _RAMP[lower + 1] * share).astype(np.uint8)


def similarity_shade(findings: Findings) -> np.ndarray:
    """Cosine similarities in the order of the classes, from the lowest (0) to the highest (1)."""
    ordered = findings.similarity[np.ix_(findings.order, findings.order)]
    lowest = min(float(ordered.min(initial=0)), 0)
    return (ordered - lowest) / (1 - lowest)


def confusion_shares(findings: Findings) -> np.ndarray:
    """Of the pixels of every class, the share that is taken for each; NaN: it has none."""
    matrix = findings.worth.matrices[AS_TRAINED].astype(np.float64)
    truth = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, truth, out=np.full_like(matrix, np.nan), where=truth > 0)
    return shares[:, : len(matrix)][np.ix_(findings.order, findings.order)]


def similarity_sheet(findings: Findings) -> np.ndarray:
    """Similarities beside confusions, classes in the same order: uint8 [height, width, 3]."""
    names = [findings.class_names[k] for k in findings.order]
    font = ImageFont.load_default(size=_FONT)
    labelled = len(names) <= _LABELLED
    left = round(max(font.getlength(_short(x)) for x in names)) + 8 if labelled else 0
    cell = max(_SIDE // len(names), 1)
    side = cell * len(names)
    width = 2 * (left + side) + 3 * _MARGIN
    top = _MARGIN + _FONT + 10
    sheet = Image.new("RGB", (width, top + side + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    # Confusions by their square root: what is not on the diagonal is small.
    panels = (
        ("similarity of the rows of the memory", similarity_shade(findings)),
        ("true class (row) taken for (column)", np.sqrt(confusion_shares(findings))),
    )
    for number, (title, shade) in enumerate(panels):
        x = _MARGIN + number * (left + side + _MARGIN) + left
        draw.text((x + side // 2, _MARGIN), title, _INK, font, anchor="mt")
        panel = Image.fromarray(heat(shade)).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(panel, (x, top))
        for row, name in enumerate(names if labelled else ()):
            where = (x - 6, top + row * cell + cell // 2)
            draw.text(where, _short(name), _INK, font, anchor="rm")
    return np.asarray(sheet)


def map_sheet(findings: Findings) -> np.ndarray | None:
    """The maps side by side: uint8 [height, width, 3]; None if there is no point."""
    if not findings.maps:
        return None
    panels = [_drawn_map(findings, flat) for flat in findings.maps]
    width = sum(panel.width for panel in panels) + _MARGIN * (len(panels) + 1)
    sheet = Image.new("RGB", (width, panels[0].height + 2 * _MARGIN), _PAPER)
    x = _MARGIN
    for panel in panels:
        sheet.paste(panel, (x, _MARGIN))
        x += panel.width + _MARGIN
    return np.asarray(sheet)


def in_frame(flat: FlatMap, width: float, height: float, margin: float) -> tuple[np.ndarray, ...]:
    """Rows and pixels of a map as places in a frame, x from the left and y from the top."""
    points = np.concatenate([flat.rows, flat.pixels])
    lowest, highest = points.min(axis=0), points.max(axis=0)
    extent = np.where(highest > lowest, highest - lowest, 1)
    room = np.array([width, height]) - 2 * margin
    places = (points - lowest) / extent
    places[:, 1] = 1 - places[:, 1]
    places = margin + places * room
    return places[: len(flat.rows)], places[len(flat.rows) :]


def _drawn_map(findings: Findings, flat: FlatMap) -> Image.Image:
    side = _SIDE * _FINER
    font = ImageFont.load_default(size=_FONT * _FINER)
    sheet = Image.new("RGB", (side, side + 2 * _FONT * _FINER), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((side // 2, 0), flat.name, _INK, font, anchor="mt")
    rows, pixels = in_frame(flat, side, side, 30 * _FINER)
    lower = 2 * _FONT * _FINER

    def disc(place: np.ndarray, radius: int, fill: tuple[int, ...], line: tuple | None) -> None:
        x, y = place[0], place[1] + lower
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, fill=fill, outline=line, width=_FINER)

    for place, k in zip(pixels, findings.map_pixels):
        # Paler than the rows, so that these stand out.
        disc(
            place, 2 * _FINER, tuple(((findings.palette[k].astype(int) + 255) // 2).tolist()), None
        )
    for place, k in zip(rows, findings.map_rows):
        disc(place, 7 * _FINER, tuple(findings.palette[k].tolist()), _INK)
    for place, k in zip(rows, findings.map_rows):
        if len(findings.class_names) <= _LABELLED:
            where = (place[0], place[1] + lower - 9 * _FINER)
            draw.text(
                where, _short(findings.class_names[k]), _INK, font, "mb",
                stroke_width=2 * _FINER, stroke_fill=_PAPER,
            )  # fmt: skip
    return sheet.resize((sheet.width // _FINER, sheet.height // _FINER), Image.Resampling.LANCZOS)


def _short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"
