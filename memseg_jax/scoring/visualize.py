"""Pictures of labels: colours, overlays and sheets. NumPy and Pillow only."""

import bisect
import colorsys
import functools
import os
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from memseg_jax.runtime.files import replacing

# Dimensions of a sheet in pixels.
_PANEL_MAX = 480
_PANEL_MIN = 240
_CONTACT_MAX = 512  # crops of the published size are shown pixel by pixel
_GAP = 6
_MARGIN = 16
_SWATCH = 16
_FONT_SIZE = 15
_BACKGROUND = (255, 255, 255)
_TEXT = (40, 40, 40)
_FRAME = (170, 170, 170)
_STRIPES = ((255, 255, 255), (120, 120, 120))  # of ignored pixels, where a class may be black
_STRIPE_WIDTH = 4
_OVERLAY_ROWS = 64  # that are blended at a time, in double precision
JPEG_SIDE = 65500  # pixels; its longest
# The first generated colours, chosen by eye to sit well side by side.
_FIRST_COLOURS = (
    (70, 92, 130),
    (228, 90, 74),
    (86, 170, 100),
    (246, 196, 68),
    (142, 98, 200),
    (70, 186, 214),
    (220, 112, 176),
    (150, 102, 66),
    (178, 208, 84),
    (22, 112, 108),
    (246, 160, 112),
    (158, 40, 80),
)


@functools.cache
def _distinct_colours() -> np.ndarray:
    """Returns uint8 [255, 3]: after the first few, each is as far as possible from those before."""
    candidates = np.array(
        [
            colorsys.hsv_to_rgb(hue / 36, saturation, value)
            for value in (0.95, 0.78, 0.6, 0.42)
            for saturation in (0.85, 0.65, 0.48, 0.32)
            for hue in range(36)
        ]
    )
    candidates = np.round(candidates * 255).astype(np.uint8)
    lab = _to_lab(candidates)
    # Black means "ignored" and white is the background: the colours keep clear of both.
    chosen = _to_lab(np.array([(0, 0, 0), (255, 255, 255), *_FIRST_COLOURS], np.uint8))
    distance = np.linalg.norm(lab[:, None] - chosen[None], axis=-1).min(axis=1)
    order = []
    for _ in range(255 - len(_FIRST_COLOURS)):
        order.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[order[-1]], axis=-1))
    return np.concatenate([np.array(_FIRST_COLOURS, np.uint8), candidates[order]])


def _to_lab(rgb: np.ndarray) -> np.ndarray:
    """Converts sRGB uint8 [n, 3] to CIE L*a*b* (D65), float64 [n, 3]."""
    linear = rgb / 255.0
    linear = np.where(linear > 0.04045, ((linear + 0.055) / 1.055) ** 2.4, linear / 12.92)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = linear @ to_xyz.T / (0.9505, 1.0, 1.089)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = f.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def default_palette(num_classes: int) -> np.ndarray:
    """Returns generated colours, uint8 [num_classes, 3] RGB.

    All are different and none is black. Class k has the same colour however many classes follow.

    Raises:
        ValueError: more than 255 classes.
    """
    if not 0 <= num_classes <= 255:
        raise ValueError(f"num_classes must be in 0..255, not {num_classes}")
    return _distinct_colours()[:num_classes].copy()


def resolve_palette(palette: Sequence[Sequence[int]], num_classes: int) -> np.ndarray:
    """Returns the palette of a config as uint8 [num_classes, 3]; generated if it is empty."""
    if len(palette) == 0:
        return default_palette(num_classes)
    return np.array([list(colour) for colour in palette], np.uint8)


def _colour_table(palette: np.ndarray) -> np.ndarray:
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    return table


def colourise(label: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Returns the colours of a label map, uint8 [height, width, 3].

    Args:
        label: uint8 [height, width].
        palette: uint8 [num_classes, 3]. Values without a colour, such as 255, become black.
    """
    return _colour_table(palette)[label]


def overlay(
    image: np.ndarray, label: np.ndarray, palette: np.ndarray, alpha: float = 0.5
) -> np.ndarray:
    """Lays the colours of a label map over an image; pixels without a class stay as they are.

    Args:
        image: uint8 [height, width, 3] RGB.
        label: uint8 [height, width].
        palette: uint8 [num_classes, 3].
        alpha: weight of the colours, 0..1.

    Returns:
        uint8 [height, width, 3].
    """
    result = np.empty_like(image)
    for first in range(0, len(image), _OVERLAY_ROWS):
        rows = np.s_[first : first + _OVERLAY_ROWS]
        colours = colourise(label[rows], palette)
        blended = np.round(image[rows] * (1 - alpha) + colours * alpha).astype(np.uint8)
        result[rows] = np.where((label[rows] < len(palette))[..., None], blended, image[rows])
    return result


def pixels_per_value(label: np.ndarray) -> np.ndarray:
    """How often each value occurs in a uint8 label map, int64 [256]; no copy, however large."""
    return np.array(Image.fromarray(label).histogram(), np.int64)


def save_palette_png(path: str | os.PathLike, label: np.ndarray, palette: np.ndarray) -> None:
    """Writes a PNG whose pixel values are the class ids and that viewers show in colour.

    Args:
        path: file to write.
        label: uint8 [height, width].
        palette: uint8 [num_classes, 3].

    Raises:
        UserError: the file cannot be written.
    """
    picture = Image.fromarray(label)
    picture.putpalette(_colour_table(palette).tobytes())
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def save_png(path: str | os.PathLike, array: np.ndarray) -> None:
    """Writes uint8 [height, width, 3], or uint8 or uint16 [height, width], as PNG.

    Raises:
        UserError: the file cannot be written.
    """
    with replacing(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG")


def save_jpeg(path: str | os.PathLike, image: np.ndarray, quality: int = 92) -> None:
    """Writes uint8 [height, width, 3] as JPEG.

    Raises:
        UserError: the file cannot be written.
    """
    with replacing(path) as temporary:
        Image.fromarray(image).save(temporary, format="JPEG", quality=quality)


def comparison(
    image: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    class_names: Sequence[str],
    palette: np.ndarray,
) -> np.ndarray:
    """Returns one image, its truth and its prediction side by side; see `comparison_sheet`."""
    return comparison_sheet([(image, truth, prediction)], class_names, palette)


def comparison_sheet(
    samples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    class_names: Sequence[str],
    palette: np.ndarray,
) -> np.ndarray:
    """Draws "image | truth | prediction", one row per sample, with titles and a legend.

    Large images are shrunk and small ones enlarged to panels that fit a screen. The legend holds
    only classes that are in a truth or a prediction.

    Args:
        samples: at least one (image uint8 [h, w, 3] RGB, truth uint8 [h, w], prediction uint8 [h,
            w]); the sizes of different samples may differ.
        class_names: K names.
        palette: uint8 [K, 3].

    Returns:
        uint8 [height, width, 3].

    Raises:
        ValueError: there is no sample, or an image and its labels differ in size.
    """
    if not samples:
        raise ValueError("a comparison sheet needs at least one sample")
    rows = []
    present = np.zeros(256, bool)
    for image, truth, prediction in samples:
        if not image.shape[:2] == truth.shape == prediction.shape:
            raise ValueError(
                f"image {image.shape}, truth {truth.shape} and prediction {prediction.shape} "
                "differ in size"
            )
        present |= _values_of(truth) | _values_of(prediction)
        labels = (colourise(truth, palette), colourise(prediction, palette))
        size = _panel_size(*truth.shape)
        panels = [_scaled(image, size, Image.Resampling.BICUBIC)]
        panels += [_scaled(x, size, Image.Resampling.NEAREST) for x in labels]
        rows.append(("", panels))
    entries = _legend_entries(present, class_names, palette, (0, 0, 0))
    return _laid_out(rows, ("image", "truth", "prediction"), entries)


def overlay_sheet(
    image: np.ndarray, label: np.ndarray, class_names: Sequence[str], palette: np.ndarray
) -> np.ndarray:
    """Draws an image beside its overlay, as small as `comparison_sheet` does, with a legend.

    Args:
        image: uint8 [h, w, 3] RGB.
        label: uint8 [h, w].
        class_names: K names.
        palette: uint8 [K, 3].

    Returns:
        uint8 [height, width, 3].
    """
    size = _panel_size(*label.shape)
    panel = _scaled(image, size, Image.Resampling.BICUBIC)
    classes = np.asarray(_scaled(label, size, Image.Resampling.NEAREST))
    covered = Image.fromarray(overlay(np.asarray(panel), classes, palette))
    entries = _legend_entries(_values_of(label), class_names, palette, (0, 0, 0))
    return _laid_out([("", [panel, covered])], ("image", "classes"), entries)


def contact_sheet(
    rows: Iterable[tuple[str, Sequence[np.ndarray]]],
    titles: Sequence[str],
    class_names: Sequence[str],
    palette: np.ndarray,
) -> np.ndarray:
    """Draws images and label maps, one row per sample, with titles, captions and a legend.

    Large ones are shrunk to panels of at most 512 pixels; small ones are enlarged by whole factors,
    pixel by pixel. Ignored pixels are striped. One row at a time is requested, and only its panels
    kept.

    Args:
        rows: (caption, one array per title): images are uint8 [h, w, 3] RGB, label maps
            uint8 [h, w]; all sizes may differ.
        titles: of the columns.
        class_names: K names.
        palette: uint8 [K, 3].

    Returns:
        uint8 [height, width, 3].

    Raises:
        ValueError: there is no row.
    """
    drawn = []
    present = np.zeros(256, bool)
    for caption, arrays in rows:
        for label in arrays:
            if label.ndim == 2:
                present |= _values_of(label)
        # File names may hold bytes that are not text.
        caption = caption.encode("utf-8", "replace").decode()
        drawn.append((caption, [_contact_panel(array, palette) for array in arrays]))
    if not drawn:
        raise ValueError("a contact sheet needs at least one row")
    return _laid_out(drawn, titles, _legend_entries(present, class_names, palette, None))


def _contact_panel(array: np.ndarray, palette: np.ndarray) -> Image.Image:
    """An image, or a label map in colours, at the size of a contact sheet."""
    size = _panel_size(*array.shape[:2], _CONTACT_MAX)
    if array.ndim == 3 and size[0] < array.shape[1]:
        return _scaled(array, size, Image.Resampling.BICUBIC)
    panel = _scaled(array, size, Image.Resampling.NEAREST)
    if array.ndim == 3:
        return panel
    label = np.asarray(panel)
    stripes = _stripes(*label.shape)
    return Image.fromarray(
        np.where((label < len(palette))[..., None], colourise(label, palette), stripes)
    )


def _stripes(height: int, width: int) -> np.ndarray:
    """Diagonal stripes, uint8 [height, width, 3]."""
    y, x = np.ogrid[:height, :width]
    return np.array(_STRIPES, np.uint8)[(x + y) // _STRIPE_WIDTH % 2]


def _values_of(label: np.ndarray) -> np.ndarray:
    """Which values a uint8 label map holds, bool [256]."""
    return pixels_per_value(label) > 0


def _legend_entries(
    present: np.ndarray,
    class_names: Sequence[str],
    palette: np.ndarray,
    ignored: tuple[int, int, int] | None,
) -> list[tuple[str, tuple[int, int, int] | None]]:
    """Names and colours of the values that are present, bool [256]; None means striped."""
    entries = [(class_names[k], tuple(palette[k])) for k in np.flatnonzero(present[: len(palette)])]
    return entries + [("ignored", ignored)] * bool(present[len(palette) :].any())


def _laid_out(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    titles: Sequence[str],
    entries: Sequence[tuple[str, tuple[int, int, int] | None]],
) -> np.ndarray:
    """Puts panels in columns under their titles, captions over the rows, and a legend below."""
    font = ImageFont.load_default(size=_FONT_SIZE)
    column = max(120, *(panel.width for _, panels in rows for panel in panels))
    width = 2 * _MARGIN + len(titles) * column + (len(titles) - 1) * _GAP
    lefts = [_MARGIN + i * (column + _GAP) for i in range(len(titles))]
    legend = _legend(entries, width - 2 * _MARGIN, font)

    title_height = _MARGIN + _FONT_SIZE + 8
    caption_heights = [(_FONT_SIZE + 8) * bool(caption) for caption, _ in rows]
    body_height = sum(max(panel.height for panel in panels) for _, panels in rows)
    body_height += sum(caption_heights) + _GAP * (len(rows) - 1)
    height = title_height + body_height + _MARGIN + legend.height + _MARGIN
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for left, title in zip(lefts, titles):
        where = (left + column // 2, title_height - 8)
        draw.text(where, title, fill=_TEXT, font=font, anchor="ms")
    top = title_height
    for (caption, panels), caption_height in zip(rows, caption_heights):
        if caption:
            text = _shortened(caption, width - 2 * _MARGIN, font)
            draw.text((_MARGIN, top + caption_height // 2), text, _TEXT, font, anchor="lm")
        top += caption_height
        for left, panel in zip(lefts, panels):
            sheet.paste(panel, (left + (column - panel.width) // 2, top))
        top += max(panel.height for panel in panels) + _GAP
    sheet.paste(legend, (_MARGIN, height - _MARGIN - legend.height))
    return np.asarray(sheet)


def _panel_size(height: int, width: int, largest: int = _PANEL_MAX) -> tuple[int, int]:
    """Returns the (width, height) at which an image is shown; small ones grow by whole factors."""
    longest = max(height, width)
    factor = min(1.0, largest / longest)
    if longest < _PANEL_MIN:
        factor = -(-_PANEL_MIN // longest)
    return max(round(width * factor), 1), max(round(height * factor), 1)


def _scaled(array: np.ndarray, size: tuple[int, int], method: Image.Resampling) -> Image.Image:
    return Image.fromarray(array).resize(size, method)


def _legend(
    entries: Sequence[tuple[str, tuple[int, int, int] | None]],
    width: int,
    font: ImageFont.FreeTypeFont,
) -> Image.Image:
    """Draws colour swatches with names in columns, as many as fit, filled line by line."""
    names = [_shortened(name, width - _SWATCH - 8, font) for name, _ in entries]
    cell = _SWATCH + 8 + round(max((font.getlength(name) for name in names), default=0)) + 20
    columns = max((width + 20) // cell, 1)
    line = _SWATCH + 8
    picture = Image.new("RGB", (width, max(-(-len(names) // columns), 1) * line), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for i, (name, (_, colour)) in enumerate(zip(names, entries)):
        left, top = i % columns * cell, i // columns * line
        swatch = (left, top, left + _SWATCH - 1, top + _SWATCH - 1)
        if colour is None:
            picture.paste(Image.fromarray(_stripes(_SWATCH, _SWATCH)), (left, top))
        fill = colour and tuple(int(c) for c in colour)
        draw.rectangle(swatch, fill=fill, outline=_FRAME)
        where = (left + _SWATCH + 8, top + _SWATCH // 2)
        draw.text(where, name, fill=_TEXT, font=font, anchor="lm")
    return picture


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(text) <= width:
        return text
    too_long = bisect.bisect_right(
        range(len(text)), width, key=lambda length: font.getlength(text[:length] + "...")
    )
    return text[: max(too_long - 1, 0)] + "..."
