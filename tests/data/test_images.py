import builtins
import errno
import io
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from memseg_jax.data import IGNORE_LABEL
from memseg_jax.data.images import (
    LabelValueError,
    exif_orientation,
    image_size,
    map_ids,
    read_image,
    read_label,
    value_advice,
)
from memseg_jax.errors import UserError


def random_rgb(height=7, width=5, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, array, mode=None, **options):
    image = Image.fromarray(array)
    if mode is not None:
        image = image.convert(mode)
    image.save(path, **options)
    return path


def write_png(path, samples, bit_depth, colour_type=0, width=None):
    """A PNG written by hand, for kinds that Pillow cannot write. `samples` is a list of rows."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    if bit_depth == 16:
        rows = [np.asarray(row, ">u2").tobytes() for row in samples]
    else:
        rows = []
        for row in samples:
            bits = "".join(format(value, f"0{bit_depth}b") for value in row)
            bits += "0" * (-len(bits) % 8)
            rows.append(bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)))
    width = width or len(samples[0])
    header = struct.pack(">IIBBBBB", width, len(samples), bit_depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
    return path


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm"])
def test_rgb_is_read_unchanged(tmp_path, suffix):
    rgb = random_rgb()
    image = read_image(save(tmp_path / f"a{suffix}", rgb))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, rgb)
    image[0, 0] = 0  # the caller owns the array


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_kinds_are_read(tmp_path, suffix):
    rgb = np.full((16, 24, 3), (200, 100, 50), np.uint8)
    image = read_image(save(tmp_path / f"a{suffix}", rgb))
    assert image.shape == (16, 24, 3)
    assert np.abs(image.astype(int) - rgb).max() <= 6


def test_greyscale_gives_three_equal_channels(tmp_path):
    grey = random_rgb()[:, :, 0]
    np.testing.assert_array_equal(
        read_image(save(tmp_path / "a.png", grey)), np.stack([grey] * 3, axis=2)
    )


@pytest.mark.parametrize("channels", [2, 4])
def test_transparency_is_dropped_not_composited(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, channels), dtype=np.uint8)
    pixels[..., -1] = 0  # fully transparent
    image = read_image(save(tmp_path / "a.png", pixels))
    colour = pixels[..., :-1] if channels == 4 else np.repeat(pixels[..., :1], 3, axis=2)
    np.testing.assert_array_equal(image, colour)


def test_palette_image_gives_colours(tmp_path):
    indexed = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "L").convert("P")
    indexed.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    indexed.save(tmp_path / "a.png", transparency=0)
    image = read_image(tmp_path / "a.png")
    assert image[:, :, 0].tolist() == [[10, 40], [70, 40]]
    assert image[1, 0].tolist() == [70, 80, 90]


def test_cmyk_jpeg_is_converted(tmp_path):
    rgb = np.full((16, 16, 3), (250, 10, 10), np.uint8)
    image = read_image(save(tmp_path / "a.jpg", rgb, mode="CMYK", quality=95))
    assert image.shape == (16, 16, 3)
    assert np.abs(image.astype(int) - rgb).max() <= 12


def test_16_bit_greyscale_is_scaled_to_8(tmp_path):
    values = np.array([[0, 255, 256], [32768, 65279, 65535]], np.uint16)
    for name in ("a.png", "a.tif"):
        image = read_image(save(tmp_path / name, values))
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image[:, :, 0], values >> 8)
        np.testing.assert_array_equal(image[:, :, 0], image[:, :, 2])


def test_16_bit_rgb_is_scaled_like_16_bit_greyscale(tmp_path):
    rows = [[0, 65535, 32768, 511, 512, 256]]
    path = write_png(tmp_path / "a.png", rows, 16, colour_type=2, width=2)
    assert read_image(path).tolist() == [[[0, 255, 128], [1, 2, 1]]]


def test_bilevel_image_is_black_and_white(tmp_path):
    path = save(tmp_path / "a.png", np.array([[0, 255]], np.uint8), mode="1")
    assert read_image(path).tolist() == [[[0, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_image_is_refused(tmp_path, dtype):
    path = save(tmp_path / "a.tif", np.zeros((3, 3), dtype))
    with pytest.raises(UserError, match=r"a\.tif.*32-bit"):
        read_image(path)


@pytest.mark.parametrize("size", [(1, 1), (9, 1), (1, 9)])
def test_one_pixel_wide_images_are_read(tmp_path, size):
    rgb = random_rgb(*size)
    path = save(tmp_path / "a.png", rgb)
    np.testing.assert_array_equal(read_image(path), rgb)
    assert image_size(path) == size


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    rgb = np.zeros((16, 32, 3), np.uint8)
    rgb[:8, :16] = 255  # one bright corner tells all eight orientations' corners apart
    picture = Image.fromarray(rgb)
    exif = picture.getexif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == ".webp" else {}
    path = tmp_path / f"a{suffix}"
    picture.save(path, exif=exif, **options)
    picture.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(picture)).astype(int)
    image = read_image(path)
    assert image.shape == expected.shape
    assert np.abs(image - expected).max() <= 40  # JPEG
    assert image_size(path) == image.shape[:2]
    assert exif_orientation(path) == orientation
    assert image.shape[:2] == ((32, 16) if orientation >= 5 else (16, 32))


def test_orientation_out_of_range_counts_as_upright(tmp_path):
    picture = Image.fromarray(random_rgb())
    exif = picture.getexif()
    exif[0x0112] = 77
    picture.save(tmp_path / "a.png", exif=exif)
    assert exif_orientation(tmp_path / "a.png") == 1
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), random_rgb())


# ---------------------------------------------------------------- damaged files


@pytest.mark.parametrize("read", [read_image, read_label, image_size])
def test_missing_empty_and_other_files_are_named(tmp_path, read):
    with pytest.raises(UserError, match=r"gone\.png.*no such file"):
        read(tmp_path / "gone.png")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty\.png.*empty \(0 bytes\)"):
        read(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"text\.png.*not an image file"):
        read(tmp_path / "text.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"folder\.png"):
        read(tmp_path / "folder.png")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".bmp"])
def test_truncated_image_is_named(tmp_path, suffix):
    path = save(tmp_path / f"cut{suffix}", random_rgb(64, 64))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(UserError, match=rf"cut\{suffix}"):
        read_image(path)


def test_truncated_label_is_named(tmp_path):
    path = save(tmp_path / "cut.png", random_rgb(64, 64)[:, :, 0])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cut\.png.*cannot be decoded"):
        read_label(path)


@pytest.mark.parametrize("error", [ImportError("x"), MemoryError(), RecursionError("x")])
def test_an_error_of_the_process_is_not_the_files(tmp_path, monkeypatch, error):
    path = save(tmp_path / "good.png", random_rgb())
    of_pillow = {"__name__": "PIL.Image", "error": error}
    exec("def load(*args): raise error", of_pillow)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", of_pillow["load"])
    with pytest.raises(type(error)) as found:
        read_image(path)
    assert found.value is error
    of_pillow["error"] = IndexError("of the decoder")
    with pytest.raises(UserError, match=r"good\.png.*cannot be decoded \(of the decoder\)"):
        read_image(path)


def test_an_import_that_another_thread_replaced_is_not_the_files(tmp_path, monkeypatch):
    """As etils does for the whole process while it imports lazily; Pillow imports as it decodes."""
    plain = builtins.__import__

    def absolute_only(name, globals=None, locals=None, fromlist=(), level=0):
        if level:
            raise ValueError(f"Relative import statements not supported ({name}).")
        return plain(name, globals, locals, fromlist, level)

    path = save(tmp_path / "good.png", random_rgb(), mode="P")
    monkeypatch.setattr(builtins, "__import__", absolute_only)
    with pytest.raises(ValueError, match="Relative import") as found:
        read_image(path)
    monkeypatch.undo()
    assert type(found.value) is ValueError
    assert read_image(path).shape == (7, 5, 3)


def test_an_error_of_the_system_is_not_damage(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    path = save(tmp_path / "good.png", random_rgb())
    monkeypatch.setattr(io, "open", fail)
    monkeypatch.setattr(builtins, "open", fail)
    with pytest.raises(UserError, match=r"good\.png: the file cannot be read \(Too many open fi"):
        read_image(path)


COLD_THREADS = """
import concurrent.futures, sys
from memseg_jax.data.images import read_image
with concurrent.futures.ThreadPoolExecutor(32) as pool:
    shapes = list(pool.map(lambda path: read_image(path).shape, sys.argv[1:] * 20))
assert set(shapes) == {(7, 5, 3)}
"""


def test_many_threads_of_a_fresh_process_read_every_kind(tmp_path):
    kinds = ("png", "jpg", "bmp", "webp", "tif", "gif", "ppm")
    paths = [str(save(tmp_path / f"a.{kind}", random_rgb())) for kind in kinds]
    command = [sys.executable, "-c", COLD_THREADS, *paths]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files_give_an_array_or_a_user_error(tmp_path_factory, data):
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"]))
    buffer = io.BytesIO()
    Image.fromarray(random_rgb(12, 12)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "x.bin"
    path.write_bytes(bytes(content[: data.draw(st.integers(1, len(content)))]))
    for read in (read_image, read_label):
        message = ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert read(path).ndim in (2, 3)
            except UserError as error:
                message = str(error)
        assert not message or "x.bin" in message


def test_far_too_large_image_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "large.png", random_rgb(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"large\.png.*far too large"):
        read_image(path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_named(tmp_path):
    path = save(tmp_path / "a.png", random_rgb())
    path.chmod(0)
    with pytest.raises(UserError, match=r"a\.png.*Permission"):
        read_image(path)


# ---------------------------------------------------------------- labels


def test_grey_label_is_read_unchanged(tmp_path):
    label = np.arange(256, dtype=np.uint8).reshape(16, 16)
    read = read_label(save(tmp_path / "a.png", label))
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, label)


@pytest.mark.parametrize("num_colours", [2, 3, 200])  # 1, 2 and 8 bits a pixel
def test_palette_label_gives_indices_never_colours(tmp_path, num_colours):
    indices = (np.arange(400) % num_colours).astype(np.uint8).reshape(20, 20)
    image = Image.fromarray(indices, "L").convert("P")
    image = Image.new("P", (20, 20))
    image.putdata(indices.ravel().tolist())
    image.putpalette(np.random.default_rng(0).integers(0, 256, 3 * num_colours).tolist())
    image.save(tmp_path / "a.png")
    read = read_label(tmp_path / "a.png")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, indices)


def test_bilevel_label_is_0_and_1(tmp_path):
    path = save(tmp_path / "a.png", np.array([[0, 255, 255]], np.uint8), mode="1")
    read = read_label(path)
    assert read.dtype == np.uint8
    assert read.tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("bit_depth", [1, 2, 4, 8])
def test_low_bit_depth_label_gives_the_stored_numbers(tmp_path, bit_depth):
    rows = [[k % 2**bit_depth for k in range(5)], [2**bit_depth - 1] * 5]
    assert read_label(write_png(tmp_path / "a.png", rows, bit_depth)).tolist() == rows


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_label_keeps_its_values(tmp_path, suffix):
    label = np.array([[0, 1, 255], [256, 26001, 65535]], np.uint16)
    read = read_label(save(tmp_path / f"a{suffix}", label))
    np.testing.assert_array_equal(read, label)
    assert read.dtype == np.uint16


def test_32_bit_label_keeps_its_values(tmp_path):
    label = np.array([[-1, 70000]], np.int32)
    np.testing.assert_array_equal(read_label(save(tmp_path / "a.tif", label)), label)


def test_orientation_of_a_label_is_applied(tmp_path):
    label = np.array([[0, 1, 2]], np.uint8)
    picture = Image.fromarray(label)
    exif = picture.getexif()
    exif[0x0112] = 6  # turn clockwise by a quarter to show
    picture.save(tmp_path / "a.png", exif=exif)
    assert read_label(tmp_path / "a.png").tolist() == [[0], [1], [2]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colour_mask_is_refused(tmp_path, mode):
    mask = np.zeros((4, 4, 3), np.uint8)
    mask[2:] = (128, 64, 32)
    path = save(tmp_path / "mask.png", mask, mode=mode)
    with pytest.raises(UserError, match=r"mask\.png.*colour mask.*\(128, 64, 32\).*class id"):
        read_label(path)


def test_grey_label_with_three_channels_is_refused_with_its_own_advice(tmp_path):
    path = save(tmp_path / "a.png", np.ones((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match=r"a\.png.*channels are equal.*Save one"):
        read_label(path)


def test_float_and_jpeg_labels_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.tif.*floating-point"):
        read_label(save(tmp_path / "a.tif", np.zeros((3, 3), np.float32)))
    with pytest.raises(UserError, match=r"a\.jpg.*JPEG changes pixel values"):
        read_label(save(tmp_path / "a.jpg", np.zeros((8, 8), np.uint8)))


# ---------------------------------------------------------------- class ids


@given(
    num_classes=st.integers(1, 254),
    ignore_label=st.one_of(st.just(-1), st.integers(0, 300)),
    dtype=st.sampled_from([np.uint8, np.uint16, np.int32]),
    seed=st.integers(0, 1000),
)
def test_map_ids_keeps_classes_and_maps_the_ignore_value(num_classes, ignore_label, dtype, seed):
    allowed = list(range(num_classes))
    if 0 <= ignore_label <= np.iinfo(dtype).max:
        allowed.append(ignore_label)
    label = np.random.default_rng(seed).choice(allowed, (6, 5)).astype(dtype)
    mapped = map_ids(label, num_classes, ignore_label, "a.png")
    assert mapped.dtype == np.uint8
    np.testing.assert_array_equal(mapped, np.where(label == ignore_label, IGNORE_LABEL, label))


@given(
    num_classes=st.integers(1, 254),
    ignore_label=st.integers(-1, 255),
    value=st.integers(-300, 70000),
)
def test_map_ids_refuses_every_other_value(num_classes, ignore_label, value):
    label = np.zeros((3, 4), np.int32)
    label[1, 2] = value
    labels = [label] + ([label.astype(np.uint8)] if 0 <= value < 256 else [])
    allowed = 0 <= value < num_classes or (value == ignore_label and value >= 0)
    for label in labels:
        if allowed:
            map_ids(label, num_classes, ignore_label, "a.png")
        else:
            with pytest.raises(LabelValueError, match=rf"a\.png.*: {value} \(1 pixels\)"):
                map_ids(label, num_classes, ignore_label, "a.png")


def test_label_value_error_names_file_values_and_allowed_set():
    label = np.zeros((4, 4), np.uint8)
    label[0] = 200
    label[1] = np.arange(100, 104)
    label[2] = np.arange(110, 114)
    with pytest.raises(LabelValueError) as caught:
        map_ids(label, 3, 255, "x/labels/b.png")
    message = str(caught.value)
    assert message.startswith("x/labels/b.png: ")
    assert "100 (1 pixels)" in message
    assert "and 4 more" in message
    assert "0..2 (3 classes) and 255 (not labelled)" in message
    assert caught.value.values[200] == 4
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.values) == (message, caught.value.values)


def test_user_error_survives_pickling():
    error = pickle.loads(pickle.dumps(UserError("a.png: broken")))
    assert isinstance(error, UserError)
    assert str(error) == "a.png: broken"


@pytest.mark.parametrize(
    ("values", "num_classes", "ignore_label", "advice"),
    [
        ([0, 255], 2, -1, "config.data.label_map = ((0, 'background'), (255, 'object'))"),
        ([0, 1, 255], 2, -1, "set config.data.ignore_label=255"),
        ([0, 3, 11], 11, 255, "set config.data.ignore_label=11"),
        ([1, 2, 3], 3, 255, "count from 1"),
        ([0, 1, 2, 3], 3, 0, "count from 1"),
        ([0, 26001], 19, 255, "instance ids"),
        (range(0, 250, 5), 3, 255, "interpolation"),
        ([0, 7, 9], 3, 255, "config.data.class_names"),
    ],
)
def test_advice_fits_the_values(values, num_classes, ignore_label, advice):
    assert advice in value_advice(dict.fromkeys(values, 10), num_classes, ignore_label)
