import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from memseg_jax.errors import UserError
from memseg_jax.scoring import visualize
from memseg_jax.scoring.visualize import (
    colourise,
    comparison,
    comparison_sheet,
    contact_sheet,
    default_palette,
    overlay,
    resolve_palette,
    save_jpeg,
    save_palette_png,
    save_png,
)

PALETTE = default_palette(5)
NAMES = ("background", "circle", "square", "triangle", "star")


def label_map(height=6, width=8, values=(0, 1, 4, 255)):
    return np.random.default_rng(0).choice(np.array(values, np.uint8), (height, width))


def image_of(height=6, width=8):
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


def has_colour(picture, colour):
    return bool(np.any(np.all(picture == np.asarray(colour), axis=-1)))


@pytest.mark.parametrize("count", [1, 6, 19, 150, 182, 255])
def test_default_colours_differ_and_are_not_black(count):
    palette = default_palette(count)
    assert palette.shape == (count, 3)
    assert palette.dtype == np.uint8
    assert len(np.unique(palette, axis=0)) == count
    assert palette.max(axis=1).min() > 60
    np.testing.assert_array_equal(palette, default_palette(255)[:count])


def test_too_many_classes_for_colours():
    with pytest.raises(ValueError, match="256"):
        default_palette(256)


def test_resolve_palette():
    np.testing.assert_array_equal(resolve_palette((), 5), PALETTE)
    assert resolve_palette(((1, 2, 3), (4, 5, 6)), 2).tolist() == [[1, 2, 3], [4, 5, 6]]


def test_colourise():
    picture = colourise(np.array([[0, 4, 255, 7]], np.uint8), PALETTE)
    assert picture.tolist() == [[PALETTE[0].tolist(), PALETTE[4].tolist(), [0, 0, 0], [0, 0, 0]]]


def test_overlay_ends():
    image, label = image_of(), label_map()
    np.testing.assert_array_equal(overlay(image, label, PALETTE, alpha=0.0), image)
    expected = np.where((label == 255)[..., None], image, colourise(label, PALETTE))
    np.testing.assert_array_equal(overlay(image, label, PALETTE, alpha=1.0), expected)


def test_palette_png_holds_class_ids_and_colours(tmp_path):
    label = label_map()
    save_palette_png(tmp_path / "a.png", label, PALETTE)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.asarray(picture), label)
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), colourise(label, PALETTE))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_keeps_every_value(tmp_path, dtype):
    array = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (5, 7)).astype(dtype)
    save_png(tmp_path / "a.png", array)
    with Image.open(tmp_path / "a.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), array)


def test_jpeg_and_no_file_left_besides(tmp_path):
    image = np.full((16, 16, 3), 90, np.uint8)
    save_jpeg(tmp_path / "a.jpg", image)
    with Image.open(tmp_path / "a.jpg") as picture:
        assert picture.format == "JPEG"
        assert np.abs(np.asarray(picture).astype(int) - image).max() <= 2
    assert [p.name for p in tmp_path.iterdir()] == ["a.jpg"]


def test_failed_save_keeps_the_old_file(tmp_path):
    save_png(tmp_path / "a.png", image_of())
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(TypeError):
        save_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.float64))
    assert (tmp_path / "a.png").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_save_into_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match="gone"):
        save_jpeg(tmp_path / "gone" / "a.jpg", image_of())


def test_sheet_shows_present_classes_only():
    label = label_map(values=(0, 1))
    sheet = comparison(image_of(), label, np.full_like(label, 3), NAMES, PALETTE)
    assert sheet.dtype == np.uint8
    for k in range(5):
        assert has_colour(sheet, PALETTE[k]) == (k in (0, 1, 3))


def test_sheet_marks_ignored_pixels_in_the_legend():
    white = np.full((6, 8, 3), 255, np.uint8)
    label = np.zeros((6, 8), np.uint8)
    without = comparison(white, label, label, NAMES, PALETTE)
    assert not has_colour(without, (0, 0, 0))
    truth = label.copy()
    truth[0, 0] = 255
    with_ignored = comparison(white, truth, label, NAMES, PALETTE)
    legend = with_ignored[-40:]
    assert has_colour(legend, (0, 0, 0))


@given(st.integers(1, 700), st.integers(1, 700))
@settings(deadline=None, max_examples=15)
def test_sheet_of_any_size_fits_a_screen(height, width):
    label = np.zeros((height, width), np.uint8)
    image = np.zeros((height, width, 3), np.uint8)
    sheet = comparison(image, label, label, NAMES, PALETTE)
    assert 300 <= sheet.shape[1] <= 1500
    assert sheet.shape[0] <= 600


def test_sheet_rows_of_different_sizes():
    samples = [(image_of(h, w), label_map(h, w), label_map(h, w)) for h, w in ((6, 8), (90, 30))]
    one = comparison(*samples[0], NAMES, PALETTE)
    assert comparison_sheet(samples, NAMES, PALETTE).shape[0] > one.shape[0]


def test_legend_wraps_and_shortens_long_names():
    label = np.arange(60, dtype=np.uint8).reshape(6, 10)
    palette = default_palette(60)
    image = image_of(6, 10)
    short = comparison(image, label, label, [f"c{i}" for i in range(60)], palette)
    names = [f"class number {i}" for i in range(60)]
    names[3] = "a name without end " * 20
    long = comparison(image, label, label, names, palette)
    assert long.shape[1] == short.shape[1]
    assert long.shape[0] > short.shape[0]


def test_sheet_refuses_bad_samples():
    with pytest.raises(ValueError, match="at least one"):
        comparison_sheet([], NAMES, PALETTE)
    with pytest.raises(ValueError, match="differ in size"):
        comparison(image_of(6, 8), label_map(8, 6), label_map(6, 8), NAMES, PALETTE)


# ---- Contact sheets -----------------------------------------------------------------------------


def contact(label, image=None, caption="a.png"):
    image = np.zeros((*label.shape, 3), np.uint8) if image is None else image
    return contact_sheet([(caption, [image, label])], ("image", "label"), NAMES, PALETTE)


def place_of(sheet, panel):
    """Where a panel is in a sheet: (top, left) of its pixels, or None."""
    for top in range(sheet.shape[0] - panel.shape[0] + 1):
        at = sheet[top].tobytes().find(panel[0].tobytes())
        while at >= 0:
            left = at // 3
            area = sheet[top : top + panel.shape[0], left : left + panel.shape[1]]
            if at % 3 == 0 and np.array_equal(area, panel):
                return top, left
            at = sheet[top].tobytes().find(panel[0].tobytes(), at + 1)
    return None


@pytest.mark.parametrize(("size", "factor"), [((30, 40), 6), ((240, 200), 1), ((512, 512), 1)])
def test_contact_sheet_shows_every_pixel(size, factor):
    image, label = image_of(*size), label_map(*size, values=(0, 1, 4))
    sheet = contact(label, image)
    panels = [image.repeat(factor, 0).repeat(factor, 1)]
    panels.append(colourise(label, PALETTE).repeat(factor, 0).repeat(factor, 1))
    places = [place_of(sheet, panel) for panel in panels]
    assert None not in places
    assert places[0][0] == places[1][0]
    assert places[0][1] + panels[0].shape[1] <= places[1][1]


def test_contact_sheet_stripes_what_is_ignored():
    label = np.zeros((300, 300), np.uint8)
    label[:, 100:] = 255
    black = np.zeros((2, 3), np.uint8)
    sheet = contact_sheet([("", [label])], ("label",), NAMES[:2], black)  # as LIP's background
    top, left = place_of(sheet, np.zeros((300, 100, 3), np.uint8))
    ignored = sheet[top : top + 300, left + 100 : left + 300].reshape(-1, 3)
    colours, counts = np.unique(ignored, axis=0, return_counts=True)
    assert colours.tolist() == [[120, 120, 120], [255, 255, 255]]
    np.testing.assert_allclose(counts / counts.sum(), 0.5, atol=0.01)
    legend = sheet[-40:]
    stripes = visualize._stripes(16, 16)[1:-1, 1:-1]
    assert place_of(legend, stripes)
    without = contact_sheet([("", [label[:, :99]])], ("label",), NAMES, PALETTE)
    assert place_of(without, stripes) is None


@given(st.integers(1, 900), st.integers(1, 900))
@settings(deadline=None, max_examples=15)
def test_contact_sheet_of_any_size(height, width):
    sheet = contact(np.zeros((height, width), np.uint8))
    assert sheet.shape[0] <= 512 + 150
    assert 120 <= sheet.shape[1] <= 2 * 512 + 100


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (4000, 6000)])
def test_contact_sheet_of_extreme_sizes(size):
    assert max(contact(np.zeros(size, np.uint8)).shape) <= 1200


@pytest.mark.parametrize("caption", ["x" * 3000, "bytes \udcff\udc80", "Straße 街", "two\nlines"])
def test_contact_sheet_with_any_file_name(caption):
    plain = contact(label_map(values=(0,)))
    named = contact(label_map(values=(0,)), caption=caption)
    assert named.shape == plain.shape
    assert not np.array_equal(named, plain)


def test_contact_sheet_holds_few_samples_at_a_time():
    alive = []

    def rows():
        for _ in range(6):
            assert sum(reference() is not None for reference in alive) <= 1
            image = image_of(50, 60)
            alive.append(weakref.ref(image))
            yield "a", [image, label_map(50, 60)]
            del image

    contact_sheet(rows(), ("image", "label"), NAMES, PALETTE)
    assert len(alive) == 6


def test_contact_sheet_without_rows():
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet(iter(()), ("image",), NAMES, PALETTE)
