"""Colour masks are read by their colours, exactly."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import camvid_resnet50, common
from memseg_jax.data import IGNORE_LABEL, open_split
from memseg_jax.data.pipeline import train_batches
from memseg_jax.errors import UserError
from tests import tiny

SKY, ROAD, KERB, CAR, VOID = (70, 130, 180), (128, 64, 128), (244, 35, 232), (0, 0, 142), (0, 0, 0)
MEANING = {SKY: 0, ROAD: 1, KERB: 1, CAR: 2, VOID: IGNORE_LABEL}
COLORS = np.array([*MEANING], np.uint8)


def data_config(root, **fields):
    data = common.get_config().data
    data.update(root=str(root), class_names=("sky", "road", "car"))
    data.update(label_colors=(SKY, (ROAD, KERB), CAR), ignore_colors=(VOID,))
    data.update(fields)
    return data


def read(root, mask, suffix=".png", **fields):
    """The classes that a mask gives."""
    pixels = mask.convert("RGB")
    tiny.write(root / "images/train/a.png", np.array(pixels))
    path = root / f"labels/train/a{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    mask.save(path)
    return open_split(data_config(root, **fields), "train")[0]["label"]


@pytest.fixture
def which():
    """Of each pixel, the number of its colour in COLORS."""
    return np.random.default_rng(0).integers(0, len(COLORS), (12, 16))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_colours_are_classes(tmp_path, which, mode, suffix):
    mask = Image.fromarray(COLORS[which])
    if mode == "RGBA":
        mask.putalpha(Image.fromarray((which * 60).astype(np.uint8)))
    elif mode == "P":
        mask = Image.fromarray(which.astype(np.uint8))
        mask.putpalette(COLORS.tobytes())
    label = read(tmp_path, mask, suffix)
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label, np.array([*MEANING.values()])[which])


def test_black_and_white_masks(tmp_path):
    object_there = np.eye(8, dtype=bool)
    for mask in (Image.fromarray(object_there), Image.fromarray(object_there).convert("L")):
        label = read(
            tmp_path, mask, label_colors=((0, 0, 0), (255, 255, 255), (1, 1, 1)), ignore_colors=()
        )
        np.testing.assert_array_equal(label, object_there)


def test_an_unknown_colour_is_named_with_the_nearest_one(tmp_path, which):
    pixels = COLORS[which]
    pixels[2, 3:6] = (0, 0, 140)
    pixels[4, 4] = (3, 3, 3)
    with pytest.raises(UserError) as caught:
        read(tmp_path, Image.fromarray(pixels))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/labels/train/a.png: 2 colours that")
    assert "(0, 0, 140) (3 pixels; the nearest known one is (0, 0, 142), 'car')" in message
    assert "(3, 3, 3) (1 pixels; the nearest known one is (0, 0, 0), not labelled)" in message
    assert message.index("140") < message.index("(3, 3, 3)")  # most pixels first
    assert "config.data.ignore_colors" in message
    assert "--config.data.unknown_color=nearest (or ignore)" in message


def test_unknown_colours_are_what_was_asked_for(tmp_path, which):
    pixels = COLORS[which]
    pixels[2, 3:6] = (0, 0, 140)
    pixels[4, 4] = (3, 3, 3)
    known = np.array([*MEANING.values()])[which]
    nearest = read(tmp_path, Image.fromarray(pixels), unknown_color="nearest")
    expected = known.copy()
    expected[2, 3:6], expected[4, 4] = 2, IGNORE_LABEL
    np.testing.assert_array_equal(nearest, expected)
    ignored = read(tmp_path, Image.fromarray(pixels), unknown_color="ignore")
    expected[2, 3:6] = IGNORE_LABEL
    np.testing.assert_array_equal(ignored, expected)


def test_masks_that_were_resized_say_so(tmp_path):
    pixels = np.stack([np.arange(120, dtype=np.uint8).reshape(10, 12)] * 3, -1) + 1
    pixels[..., 2] = 7
    with pytest.raises(UserError, match=r"120 colours .* and 117 more.*resizing with interpolatio"):
        read(tmp_path, Image.fromarray(pixels))
    label = read(tmp_path, Image.fromarray(pixels), unknown_color="nearest")
    distance = ((pixels[..., None, :].astype(int) - COLORS) ** 2).sum(-1)
    np.testing.assert_array_equal(label, np.array([*MEANING.values()])[distance.argmin(-1)])


def test_class_ids_are_recognised(tmp_path):
    mask = Image.fromarray((np.arange(48) % 3).astype(np.uint8).reshape(6, 8))
    with pytest.raises(UserError, match=r"a\.png: .*as dark as class ids .*label_colors empty"):
        read(tmp_path, mask, ignore_colors=())


def test_lossy_and_wide_masks_are_refused(tmp_path, which):
    mask = Image.fromarray(COLORS[which])
    tiny.write(tmp_path / "images/train/a.png", COLORS[which])
    (tmp_path / "masks").mkdir()
    mask.save(tmp_path / "masks/a.jpg")
    (tmp_path / "l.txt").write_text("images/train/a.png masks/a.jpg\n")
    source = open_split(data_config(tmp_path, list_file="l.txt"), "train")
    with pytest.raises(UserError, match=r"masks/a\.jpg: the label is a JPEG .*Export the masks as"):
        source[0]
    wide = Image.fromarray(which.astype(np.uint16))
    with pytest.raises(UserError, match=r"a\.png: the label has mode I;16, .*save it as an RGB"):
        read(tmp_path, wide)


def test_the_source_goes_to_other_processes_without_its_table(tmp_path, which):
    label = read(tmp_path, Image.fromarray(COLORS[which]))
    source = open_split(data_config(tmp_path), "train")
    np.testing.assert_array_equal(source[0]["label"], label)  # makes the table
    stored = pickle.dumps(source)
    assert len(stored) < 2000
    np.testing.assert_array_equal(pickle.loads(stored)[0]["label"], label)


def test_camvid_in_colour_is_camvid_in_ids(tmp_path):
    if "MEMSEG_DATA" not in os.environ:
        pytest.skip("needs MEMSEG_DATA: a folder that holds camvid/")
    camvid = Path(os.environ["MEMSEG_DATA"]) / "camvid"
    config = camvid_resnet50.get_config()
    void = (0, 0, 0)
    colors = np.array([*config.data.palette, void], np.uint8)
    names = (camvid / "train.txt").read_text().split()[::23]
    for name in names:
        tiny.write(
            tmp_path / f"trainannot/{name}.png",
            colors[np.array(Image.open(camvid / f"trainannot/{name}.png"))],
        )
    os.symlink(camvid / "train", tmp_path / "train")
    (tmp_path / "some.txt").write_text("\n".join(names))
    config.train.batch_size = 4
    config.data.list_file = str(tmp_path / "some.txt")
    sources, batches = [], []
    for root, fields in (
        (camvid, {}),
        (tmp_path, {"label_colors": config.data.palette, "ignore_colors": (void,)}),
    ):
        config.data.root = str(root)
        config.data.update(fields)
        sources.append(open_split(config.data, "train"))
        with train_batches(sources[-1], config, 0, 1) as stream:
            batches.append(next(stream))
    assert len(sources[0]) == len(sources[1]) == 16
    counts = [
        np.bincount(np.concatenate([s[k]["label"].ravel() for k in range(16)])) for s in sources
    ]
    np.testing.assert_array_equal(*counts)
    assert counts[0][:11].all()
    for key in ("image", "label", "index"):
        np.testing.assert_array_equal(batches[0][key], batches[1][key])
