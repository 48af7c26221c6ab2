import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import common
from memseg_jax.data import IGNORE_LABEL, folder, open_split
from memseg_jax.errors import UserError

CAMVID_CLASSES = (
    "Sky",
    "Building",
    "Pole",
    "Road",
    "Pavement",
    "Tree",
    "SignSymbol",
    "Fence",
    "Car",
    "Pedestrian",
    "Bicyclist",
)


def data_config(root, **fields):
    config = common.get_config().data
    config.root = str(root)
    config.class_names = ("background", "road", "car")
    config.update(fields)
    return config


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def write_image(path, size=(6, 8), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return write(path, pixels)


def write_label(path, size=(6, 8), value=None):
    label = (np.arange(size[0] * size[1]) % 3).astype(np.uint8).reshape(size)
    return write(path, label if value is None else np.full(size, value, np.uint8))


@pytest.fixture
def root(tmp_path):
    for split, names in (("train", ("b", "a", "street/c")), ("val", ("d",))):
        for name in names:
            write_image(tmp_path / f"images/{split}/{name}.png", seed=ord(name[-1]))
            write_label(tmp_path / f"labels/{split}/{name}.png")
    return tmp_path


def test_finds_and_reads_samples(root):
    source = open_split(data_config(root), "train")
    assert len(source) == 3
    assert [source[i]["name"] for i in range(3)] == [
        "images/train/a",
        "images/train/b",
        "images/train/street/c",
    ]
    sample = source[np.int64(2)]
    assert sample["image"].shape == (6, 8, 3)
    assert sample["image"].dtype == sample["label"].dtype == np.uint8
    assert np.unique(sample["label"]).tolist() == [0, 1, 2]
    for part in ("images/train/street/c.png", "labels/train/street/c.png"):
        assert str(root / part) in source.describe(2)


def test_source_survives_pickling(root):
    source = open_split(data_config(root), "train")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint()
    np.testing.assert_array_equal(copy[1]["image"], source[1]["image"])


def test_fingerprint_changes_with_names_and_not_with_the_root(root, tmp_path_factory):
    before = open_split(data_config(root), "train").fingerprint()
    other = tmp_path_factory.mktemp("moved") / "data"
    os.rename(root, other)
    assert open_split(data_config(other), "train").fingerprint() == before
    write_image(other / "images/train/e.png")
    write_label(other / "labels/train/e.png")
    assert open_split(data_config(other), "train").fingerprint() != before


def test_every_suffix_and_hidden_files(root):
    for suffix in (".jpg", ".JPEG", ".bmp", ".webp", ".tif", ".TIFF"):
        write_image(root / f"images/more/x{suffix[1:]}{suffix}")
        write_label(root / f"labels/more/x{suffix[1:]}.png")
    (root / "images/more/._xjpg.jpg").write_bytes(b"resource fork")
    (root / "images/more/notes.txt").write_text("not an image")
    source = open_split(data_config(root), "more")
    assert len(source) == 6
    for index in range(6):
        assert source[index]["image"].shape == (6, 8, 3)


def test_linked_folders_are_followed_once(root):
    (root / "images/all").mkdir()
    (root / "labels/all").mkdir()
    os.symlink(root / "images/train", root / "images/all/t")
    os.symlink(root / "labels/train", root / "labels/all/t")
    os.symlink(root / "images/all", root / "images/all/loop")
    assert open_split(data_config(root), "all").names[0] == "images/all/t/a"
    assert len(open_split(data_config(root), "all")) == 3


def test_labels_without_image_are_fine(root):
    write_label(root / "labels/val/extra.png")
    assert len(open_split(data_config(root), "val")) == 1


@pytest.mark.parametrize(("in_file", "ignore"), [(255, 255), (11, 11), (0, 0), (700, 700)])
def test_ignore_value_is_mapped(root, in_file, ignore):
    label = np.ones((6, 8), np.uint8 if in_file < 256 else np.uint16)
    label[:2] = in_file
    write(root / "labels/val/d.png", label)
    read = open_split(data_config(root, ignore_label=ignore), "val")[0]["label"]
    assert (read[:2] == IGNORE_LABEL).all()
    assert (read[2:] == 1).all()


def test_one_pixel_wide_sample(root):
    write_image(root / "images/val/d.png", (9, 1))
    write_label(root / "labels/val/d.png", (9, 1))
    assert open_split(data_config(root), "val")[0]["image"].shape == (9, 1, 3)


# ---------------------------------------------------------------- list files


def test_list_of_stems_keeps_its_order(root):
    (root / "train.txt").write_text("\ufeffstreet/c\n\n# comment\n  a.png \n", encoding="utf-8")
    source = open_split(data_config(root, list_file="{split}.txt"), "train")
    assert source.names == ("images/train/street/c", "images/train/a")


def test_list_of_pairs(root):
    write_image(root / "photos/my cat.png")
    (root / "l.txt").write_text(
        "images/train/a.png labels/train/b.png\nphotos/my cat.png\tlabels/train/a.png\n"
    )
    # The folders of stems need not exist.
    config = data_config(root, list_file="l.txt", image_dir="none", label_dir="none")
    source = open_split(config, "train")
    assert source.names == ("images/train/a", "photos/my cat")
    assert source.labels[0] == str(root / "labels/train/b.png")


def test_list_of_stems_with_spaces(root):
    write_image(root / "images/train/my cat.png")
    write_label(root / "labels/train/my cat.png")
    (root / "l.txt").write_text("my cat\n")
    source = open_split(data_config(root, list_file="l.txt"), "train")
    assert source.names == ("images/train/my cat",)


def test_image_outside_the_root_has_a_relative_name(root, tmp_path_factory):
    path = write_image(tmp_path_factory.mktemp("other") / "x.png")
    (root / "l.txt").write_text(f"{path} labels/train/a.png\n")
    (name,) = open_split(data_config(root, list_file="l.txt"), "train").names
    assert not name.startswith("/")
    assert name.endswith("/x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no samples"),
        ("# nothing\n", "names no samples"),
        ("a\nq\n", r"1 of 2 lines.*line 2: there is no image 'q'"),
        ("images/train/a.png labels/train/q.png\n", r"line 1: there is no label .*q\.png"),
        ("images/train/q.png labels/train/a.png\n", r"line 1: there is no image .*q\.png"),
        ("a\nb\na\n", "line 3: images/train/a is named in line 1"),
        ("one two three\n", "line 1.*'one two three'"),
    ],
)
def test_bad_list_is_refused(root, content, message):
    (root / "train.txt").write_text(content)
    with pytest.raises(UserError, match=rf"train\.txt.*{message}"):
        open_split(data_config(root, list_file="{split}.txt"), "train")


def test_stem_without_label_is_refused(root):
    (root / "labels/train/a.png").unlink()
    (root / "train.txt").write_text("b\na\n")
    with pytest.raises(UserError, match=r"line 2: there is no label .*labels/train/a\.png"):
        open_split(data_config(root, list_file="train.txt"), "train")


def test_missing_list_file_is_refused(root):
    with pytest.raises(UserError, match=r"val\.txt.*cannot be read.*list_file"):
        open_split(data_config(root, list_file="{split}.txt"), "val")


def test_list_file_in_another_encoding_is_refused(root):
    (root / "l.txt").write_bytes("stra\xdfe\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"l\.txt.*UTF-8"):
        open_split(data_config(root, list_file="l.txt"), "train")


# ---------------------------------------------------------------- refused when opened


def test_wrong_root(root):
    with pytest.raises(UserError, match=r"config\.data\.root is not set"):
        open_split(data_config(""), "train")
    with pytest.raises(UserError, match=r"config\.data\.root: .*nowhere does not exist"):
        open_split(data_config(root / "nowhere"), "train")
    with pytest.raises(UserError, match="is not a folder"):
        open_split(data_config(root / "images/train/a.png"), "train")
    with pytest.raises(UserError, match=r"images.images/train: there is no such folder.*train/"):
        open_split(data_config(root / "images"), "train")


def test_missing_folder_says_what_is_there(root):
    with pytest.raises(UserError, match=r"images/test.*image_dir.*'test'.*holds images/, labels/"):
        open_split(data_config(root), "test")
    with pytest.raises(UserError, match=r"masks/val.*label_dir"):
        open_split(data_config(root, label_dir="masks/{split}"), "val")


def test_empty_split(root):
    (root / "images/empty").mkdir()
    (root / "labels/empty").mkdir()
    (root / "images/empty/a.heic").write_bytes(b"x")
    with pytest.raises(UserError, match=r"images/empty: no images.*holds a\.heic"):
        open_split(data_config(root), "empty")


def test_missing_labels_are_counted_and_named(root):
    for k in range(7):
        write_image(root / f"images/train/x{k}.png")
    with pytest.raises(UserError) as caught:
        open_split(data_config(root), "train")
    message = str(caught.value)
    assert "7 of 10 images of split 'train' have no label" in message
    assert "x0.png, x1.png, x2.png, x3.png, x4.png, and" in message
    assert str(root / "labels/train/x0.png") in message


def test_missing_label_hints(root):
    write_image(root / "labels/val/d.jpg")
    (root / "labels/val/d.png").unlink()
    with pytest.raises(UserError, match=r"d\.jpg is no label file"):
        open_split(data_config(root), "val")
    os.rename(root / "labels/val/d.jpg", root / "labels/val/d_mask.png")
    with pytest.raises(UserError, match=r"holds for example d_mask\.png.*list_file"):
        open_split(data_config(root), "val")


def test_two_images_with_one_stem(root):
    write_image(root / "images/val/d.jpg")
    with pytest.raises(UserError, match=r"d\.jpg and d\.png: two image files with the same stem"):
        open_split(data_config(root), "val")


# ---------------------------------------------------------------- refused when read


def test_label_200(root):
    write_label(root / "labels/val/d.png", value=200)
    source = open_split(data_config(root), "val")
    with pytest.raises(UserError, match=r"labels/val/d\.png.*200 \(48 pixels\).*0\.\.2.*255"):
        source[0]


def test_16_bit_label_values_do_not_wrap(root):
    write(root / "labels/val/d.png", np.full((6, 8), 257, np.uint16))  # 257 as uint8 is 1
    with pytest.raises(UserError, match=r"labels/val/d\.png.*257 \(48 pixels\)"):
        open_split(data_config(root), "val")[0]


def test_no_ignore_value(root):
    write_label(root / "labels/val/d.png", value=255)
    with pytest.raises(UserError, match="no ignore value"):
        open_split(data_config(root, ignore_label=-1), "val")[0]


def test_label_of_another_size(root):
    write_label(root / "labels/val/d.png", (6, 9))
    with pytest.raises(UserError) as caught:
        open_split(data_config(root), "val")[0]
    message = str(caught.value)
    for part in ("images/val/d.png", "6 x 8", "labels/val/d.png", "6 x 9", "height x width"):
        assert part in message


def test_label_of_an_image_that_exif_turns(root):
    (root / "images/val/d.png").unlink()
    picture = Image.fromarray(np.zeros((6, 8, 3), np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(root / "images/val/d.jpg", exif=exif)
    with pytest.raises(UserError, match=r"8 x 6 .*EXIF orientation 6.*before it was turned"):
        open_split(data_config(root), "val")[0]
    write_label(root / "labels/val/d.png", (8, 6))
    assert open_split(data_config(root), "val")[0]["image"].shape == (8, 6, 3)


def test_truncated_jpeg_zero_byte_png_and_colour_mask(root):
    source = open_split(data_config(root), "train")
    (root / "labels/train/a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"labels/train/a\.png.*0 bytes"):
        source[0]
    write_image(root / "labels/train/b.png")
    with pytest.raises(UserError, match=r"labels/train/b\.png.*colour mask"):
        source[1]
    (root / "images/val/d.png").unlink()
    path = write_image(root / "images/val/d.jpg", (60, 80))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"images/val/d\.jpg.*truncated"):
        open_split(data_config(root), "val")[0]


def test_file_that_vanishes_after_opening(root):
    source = open_split(data_config(root), "val")
    (root / "images/val/d.png").unlink()
    with pytest.raises(UserError, match=r"images/val/d\.png: there is no such file"):
        source[0]


# ---------------------------------------------------------------- real images


def test_camvid():
    if "MEMSEG_DATA" not in os.environ:
        pytest.skip("needs MEMSEG_DATA: a folder that holds camvid/")
    camvid = Path(os.environ["MEMSEG_DATA"]) / "camvid"
    config = data_config(
        camvid,
        image_dir="{split}",
        label_dir="{split}annot",
        list_file="{split}.txt",
        ignore_label=11,
        class_names=CAMVID_CLASSES,
    )
    sizes = {split: len(folder.open_split(config, split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 367, "val": 101, "test": 233}
    source = open_split(config, "train")
    assert source.names[0] == "train/0001TP_006690"
    for index in (0, 100, 366):
        sample = source[index]
        assert sample["image"].shape == (360, 480, 3)
        assert set(np.unique(sample["label"])) <= {*range(11), IGNORE_LABEL}
    # The sky is above the road.
    rows = np.arange(360)[:, None]
    label = source[0]["label"]
    assert (rows * (label == 0)).sum() / (label == 0).sum() < 150
    assert (rows * (label == 3)).sum() / (label == 3).sum() > 200
