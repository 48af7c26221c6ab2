"""Lists in all forms, labels with other names, and splits by a hash."""

import shutil

import numpy as np
import pytest

from configs import common
from memseg_jax.data import open_split, pairing
from memseg_jax.errors import UserError
from tests import tiny


def data_config(root, **fields):
    data = common.get_config().data
    data.update(root=str(root), class_names=("ground", "box", "disc"))
    data.update(fields)
    return data


def write(root, *paths):
    for path in paths:
        tiny.write(root / path, np.zeros((4, 4) if "label" in path else (4, 4, 3), np.uint8))


def samples(root, split="train", **fields):
    """(image, label) of every sample, relative to the root."""
    source = open_split(data_config(root, **fields), split)
    return [
        tuple(path.removeprefix(f"{root}/") for path in pair)
        for pair in zip(source.images, source.labels)
    ]


# ---- Lists --------------------------------------------------------------------------------------

FACADES = {"image_dir": "images", "label_dir": "labels", "list_file": "{split}.txt"}
A, B = ("images/a.jpg", "labels/a.png"), ("images/b c.jpg", "labels/b c.png")


@pytest.fixture
def facades(tmp_path):
    write(tmp_path, *A, *B)
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        "a\nb c\n",
        "a.jpg\nb c.jpg\n",
        "a.png\nb c.png\n",  # the labels' names
        "images/a.jpg\nimages/b c.jpg\n",
        "images/a\nimages/b c\n",
        "./images/a\nimages/../images/b c\n",
        "{root}/images/a.jpg\n{root}/images/b c.jpg\n",
        "images/a.jpg labels/a.png\nimages/b c.jpg labels/b c.png\n",
        "images/a.jpg\tlabels/a.png\nimages/b c.jpg\tlabels/b c.png\n",
        "a.jpg,a.png\nb c.jpg, b c.png\n",
        "a,a\nb c,b c\n",
        "images/a.jpg;labels/a.png\nimages/b c.jpg;labels/b c.png\n",
        "{root}/images/a.jpg {root}/labels/a.png\n{root}/images/b c.jpg {root}/labels/b c.png\n",
        "\ufeffimages\\a.jpg\r\n\r\n# the second\r\nimages\\b c.jpg\r\n",
        "images\\a.jpg labels\\a.png\r\nimages\\b c.jpg labels\\b c.png\r\n",
        "image,mask\nimages/a.jpg,labels/a.png\n'images/b c.jpg',labels/b c.png\n".replace(
            "'", '"'
        ),
        "id\tmask\tsize\tfile_name\n1\ta.png\t4\ta.jpg\n2\tb c.png\t4\tb c.jpg\n",
    ],
)
def test_what_a_line_may_be(facades, text):
    (facades / "train.txt").write_bytes(text.format(root=facades).encode())
    assert samples(facades, **FACADES) == [A, B]


def test_a_csv_file_may_name_images_alone(facades):
    (facades / "train.csv").write_text("filename,width\nb c.jpg,4\na.jpg,4\n")
    assert samples(facades, **FACADES | {"list_file": "train.csv"}) == [B, A]
    (facades / "train.csv").write_text("a.jpg,a.png\n")
    assert samples(facades, **FACADES | {"list_file": "train.csv"}) == [A]


def test_a_list_of_windows(facades):
    (facades / "train.txt").write_text("images\\a.jpg\r\n", encoding="utf-16")
    assert samples(facades, **FACADES) == [A]


def test_a_file_below_the_image_folder_comes_first(facades):
    write(facades, "images/images/a.jpg", "labels/images/a.png")
    (facades / "train.txt").write_text("images/a.jpg\n")
    assert samples(facades, **FACADES) == [("images/images/a.jpg", "labels/images/a.png")]


def test_the_message_says_how_lines_are_read(facades):
    (facades / "train.txt").write_text("a\nnowhere/x.jpg\n")
    with pytest.raises(UserError) as caught:
        samples(facades, **FACADES)
    message = str(caught.value)
    parts = ["train.txt: 1 of 2 lines", "line 2: there is no image 'nowhere/x.jpg'"]
    parts += ["an absolute path, then", f"image_dir ({facades}/images), then", "config.data.root"]
    parts += ["an image and a label with a tab, a comma or a space"]
    places = [message.index(part) for part in parts]
    assert places == sorted(places)


def test_a_label_that_a_list_names_has_to_be_there(facades):
    (facades / "train.txt").write_text("a.jpg,z.png\n")
    with pytest.raises(UserError, match=r"line 1: there is no label .*z\.png \(image .*a\.jpg\)"):
        samples(facades, **FACADES)


def test_two_files_that_a_stem_may_mean(facades):
    write(facades, "images/a.png")
    (facades / "train.txt").write_text("a.jpg\n")
    assert samples(facades, **FACADES) == [A]
    (facades / "train.txt").write_text("a\n")
    with pytest.raises(UserError, match=r"a\.jpg and a\.png: two image files with the same stem"):
        samples(facades, **FACADES)


def test_a_header_without_images(facades):
    (facades / "train.txt").write_text("mask,size\na.png,4\n")
    with pytest.raises(UserError, match=r"the header 'mask,size' names no column of images\. Exp"):
        samples(facades, **FACADES)
    (facades / "train.txt").write_text("image,mask\n")
    with pytest.raises(UserError, match=r"has a header and names no samples"):
        samples(facades, **FACADES)


# ---- Names of labels ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label_name", "image", "label"),
    [
        ("{stem}_mask.png", "images/x/a.jpg", "labels/x/a_mask.png"),
        ("{stem}_mask", "images/x/a.jpg", "labels/x/a_mask.tif"),
        ("mask_{name}.png", "images/x/a.jpg", "labels/x/mask_a.jpg.png"),
        ("{parent}_{stem}.png", "images/x/a.jpg", "labels/x_a.png"),
        ("{parent}/label/{stem}.png", "images/x/a.jpg", "labels/x/label/a.png"),
    ],
)
def test_label_name(tmp_path, label_name, image, label):
    write(tmp_path, image, label, "labels/x/label.png")
    fields = {"image_dir": "images", "label_dir": "labels", "label_name": label_name}
    assert samples(tmp_path, **fields) == [(image, label)]
    (tmp_path / "l.txt").write_text("x/a\n")
    assert samples(tmp_path, **fields, list_file="l.txt") == [(image, label)]


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_images_and_labels_in_one_folder(tmp_path, suffix):
    write(tmp_path, f"all/a{suffix}", "all/a_label.png", f"all/s/b{suffix}", "all/s/b_label.png")
    write(tmp_path, "all/gone_label.png")  # its image was removed
    fields = {"image_dir": "all", "label_dir": "all", "label_name": "{stem}_label.png"}
    expected = [(f"all/{name}{suffix}", f"all/{name}_label.png") for name in ("a", "s/b")]
    assert samples(tmp_path, **fields) == expected


def test_the_same_stems_in_one_folder(tmp_path):
    write(tmp_path, "all/a.jpg", "all/a.png")
    fields = {"image_dir": "all", "label_dir": "all"}
    with pytest.raises(UserError, match=r"same stem.*config\.data\.label_name = '{stem}\.png'"):
        samples(tmp_path, **fields)
    assert samples(tmp_path, **fields, label_name="{stem}.png") == [("all/a.jpg", "all/a.png")]
    (tmp_path / "l.txt").write_text("all/a.jpg\n")
    assert samples(tmp_path, **fields, list_file="l.txt") == [("all/a.jpg", "all/a.png")]


def test_folders_of_labels_between_those_of_images(tmp_path):
    write(tmp_path, "day/rgb/a.png", "day/label/a.png", "night/rgb/a.png", "night/label/a.png")
    fields = {"image_dir": ".", "label_dir": ".", "label_name": "{parent}/../label/{name}"}
    expected = [(f"{time}/rgb/a.png", f"{time}/label/a.png") for time in ("day", "night")]
    assert samples(tmp_path, **fields) == expected


def test_labels_below_the_folder_of_images(tmp_path):
    write(tmp_path, "a.png", "b.png", "labels/a.png", "labels/b.png")
    found = samples(tmp_path, image_dir=".", label_dir="labels")
    assert found == [("a.png", "labels/a.png"), ("b.png", "labels/b.png")]


def test_an_image_without_label_in_one_folder(tmp_path):
    write(tmp_path, "a.png", "a_label.png", "b.png")
    fields = {"image_dir": ".", "label_dir": ".", "label_name": "{stem}_label.png"}
    with pytest.raises(UserError, match=r"1 of 2 images .*b\.png.* file .*/b_label\.png was expe"):
        samples(tmp_path, **fields)


# ---- A share of the samples ---------------------------------------------------------------------


def place(name):
    return pairing.place_of(name)


def test_places_are_the_same_everywhere():
    assert place("images/a") == pytest.approx(0.0699, abs=1e-4)
    assert place("images/\u00e9") == place(
        "images/e\u0301"
    )  # one letter, or a letter and an accent
    places = np.array([place(f"images/{k}") for k in range(2000)])
    np.testing.assert_allclose(np.histogram(places, 10, (0, 1))[0], 200, atol=60)


def test_a_share_for_evaluation(tmp_path):
    write(tmp_path, *(f"{kind}s/{k}.png" for kind in ("image", "label") for k in range(20)))
    fields = {"image_dir": "images", "label_dir": "labels", "val_share": 0.3}
    train, val = samples(tmp_path, **fields), samples(tmp_path, "val", **fields)
    assert len(train) + len(val) == 20
    assert {name for pair in (train, val) for name, _ in pair} == {
        f"images/{k}.png" for k in range(20)
    }
    assert {image for image, _ in val} == {
        f"images/{k}.png" for k in range(20) if place(f"images/{k}") < 0.3
    }
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "images", moved / "images")
    shutil.copytree(tmp_path / "labels", moved / "labels")
    write(moved, *(f"{kind}s/new{k}.png" for kind in ("image", "label") for k in range(20)))
    assert set(val) < set(samples(moved, "val", **fields))
    assert set(train) < set(samples(moved, **fields))


def test_the_share_is_of_the_training_split(tmp_path):
    write(tmp_path, *(f"{kind}s/train/{k}.png" for kind in ("image", "label") for k in range(9)))
    (tmp_path / "train.txt").write_text("\n".join(map(str, range(9))))
    for fields in ({}, {"list_file": "{split}.txt"}):
        parts = [samples(tmp_path, split, val_share=0.4, **fields) for split in ("train", "val")]
        assert sum(map(len, parts)) == 9
        assert all(parts)


def test_a_share_that_leaves_nothing(tmp_path):
    write(tmp_path, *(f"{kind}s/{k}.png" for kind in ("image", "label") for k in range(4)))
    fields = {"image_dir": "images", "label_dir": "labels"}
    with pytest.raises(
        UserError, match=r"val_share = 0\.01 leaves 0 of 4 .* Set it to (0\.\d+),"
    ) as e:
        samples(tmp_path, **fields, val_share=0.01)
    share = float(str(e.value).split("Set it to ")[1].split(",")[0])
    assert len(samples(tmp_path, "val", **fields, val_share=share)) == 1
    with pytest.raises(UserError, match=r"split 'test': .*val_share=0 for a split with a folder"):
        samples(tmp_path, "test", **fields, val_share=0.3)
