"""Mode init, and with what it writes the other modes, on data in all forms."""

import json

import numpy as np
import pytest
from PIL import Image

from configs import common
from memseg_jax import checkpoint, command_line, main
from memseg_jax.data import IGNORE_LABEL, open_split
from memseg_jax.data import official as official_data
from memseg_jax.modes import init
from tests import label_trees, official_trees, tiny
from tests.label_trees import TREES
from tests.tiny_config import CLASSES, COLOURS

pytestmark = pytest.mark.usefixtures("quiet_entry")
BOXES = ("background", "box", "disc")
# Of every tree: names of the classes, and fields of config.data that are not the default.
FREE = {"with_lists": ("label_colors",)}  # in an order that the pixels decide
EXPECTED = {
    "in_folders": (("class 0", "class 1", "class 2"), {}),
    "camvid_like": (
        CLASSES,
        {
            "image_dir": "{split}", "label_dir": "{split}annot", "label_colors": COLOURS,
            "ignore_colors": (label_trees.VOID,),
        },
    ),
    "with_lists": (
        None,  # by the frequency of their colours
        {
            "image_dir": "images", "label_dir": "labels", "list_file": "{split}.txt",
            "eval_split": "test",
        },
    ),
    "voc_like": (
        CLASSES,
        {
            "image_dir": "JPEGImages", "label_dir": "SegmentationClass",
            "list_file": "ImageSets/Segmentation/{split}.txt",
        },
    ),
    "in_one_folder": (
        ("class 0", "class 7", "class 11", "class 26"),
        {
            "image_dir": ".", "label_dir": ".", "label_name": "{stem}_mask.png",
            "label_map": ((0, "class 0"), (7, "class 7"), (11, "class 11"), (26, "class 26")),
            "val_share": 0.15,
        },
    ),
    "black_and_white": (
        ("background", "object"),
        {
            "image_dir": "photos", "label_dir": "masks", "val_share": 0.15,
            "label_map": ((0, "background"), (255, "object")),
        },
    ),
    "labelme": (
        BOXES,
        {
            "image_dir": ".", "label_dir": ".", "outside_polygons": "background",
            "label_name": "{stem}.json", "val_share": 0.15,
        },
    ),
    "coco_panoptic": (
        BOXES,
        {
            "image_dir": "{split}2017", "label_dir": "annotations/panoptic_{split}2017.json",
            "outside_polygons": "background",
        },
    ),
    "coco": (
        BOXES,
        {
            "image_dir": "{split}2017", "label_dir": "annotations/instances_{split}2017.json",
            "outside_polygons": "background",
        },
    ),
}  # fmt: skip


def run(*arguments):
    return main.main(["main", *map(str, arguments)])


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A function that makes a tree and its config file, and returns both."""
    monkeypatch.chdir(tmp_path)

    def make(name):
        if name == "coco":
            pytest.importorskip("pycocotools")
        TREES[name](tmp_path / "my data")
        assert run("--mode", "init", "--root", "my data", "--output", "configs/mine.py") == 0
        return tmp_path / "my data", tmp_path / "configs" / "mine.py"

    return make


@pytest.mark.parametrize("name", TREES)
def test_every_form_goes_through_init_and_check_data(made, name, capsys):
    root, path = made(name)
    shown = capsys.readouterr().out
    assert "--config configs/mine.py --mode check_data" in shown
    config = command_line.load_config(str(path))
    names, fields = EXPECTED[name]
    assert names is None or config.data.class_names == names
    assert config.data.root == str(root)
    default = common.get_config().data
    differences = {
        field: value
        for field, value in config.data.items()
        if value != default[field] and field not in ("root", "class_names", *FREE.get(name, ()))
    }
    assert differences == fields
    assert config.augment.crop == (32, 32)
    assert run("--config", path, "--mode", "check_data", "--output", root.parent / "out") == 0
    report = capsys.readouterr().out
    assert "All 9 samples can be read" in report
    assert (root.parent / "out" / f"{config.data.train_split}.png").exists()


def test_init_writes_the_classes_of_the_trees(made):
    _, path = made("camvid_like")
    data = command_line.load_config(str(path)).data
    for split, first in (("train", 0), ("val", label_trees.TRAIN)):
        np.testing.assert_array_equal(
            open_split(data, split)[0]["label"], label_trees.picture(first)[1]
        )
    assert IGNORE_LABEL in open_split(data, "val")[0]["label"]


@pytest.mark.parametrize("name", [n for n in official_trees.SPLITS if n != "lip"])
def test_a_published_data_set_is_known_by_its_folders(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    expected = official_trees.recipe_of(name).data
    splits = expected.train_split, expected.eval_split
    if name in ("voc", "cityscapes"):  # whose recipes train on more than the download's split
        splits = "train", "val"
    official_trees.write_tree(name, tmp_path / "there", dict.fromkeys(splits, 2), nested=True)
    assert run("--mode", "init", "--root", "there") == 0
    shown = capsys.readouterr().out
    title = official_data.data_set_at(tmp_path / "there")[1].DATA_SET.title
    assert f"guessed  the folder is that of {title}, with" in shown
    assert f"images   2 {splits[0]}, 2 {splits[1]}; 48 x 64 pixels" in shown
    config = command_line.load_config("configs/there.py")
    assert (config.data.name, config.data.train_split, config.data.eval_split) == (name, *splits)
    assert config.data.class_names == expected.class_names
    assert config.data.palette == expected.palette


# ---- Refusals -----------------------------------------------------------------------------------


def refused(capsys, *arguments):
    capsys.readouterr()
    assert run("--mode", "init", *arguments) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    return shown


def test_no_file_is_replaced(made, capsys):
    root, path = made("in_folders")
    text = path.read_text()
    message = refused(capsys, "--root", root, "--output", path)
    assert f"{path} exists, and is never replaced. Give another file: --output" in message
    assert path.read_text() == text
    path.rename(path.with_name("my_data.py"))
    assert "configs/my_data.py exists" in refused(capsys, "--root", root)


def test_what_init_needs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--mode init needs --root" in refused(capsys)
    assert "--root: " in refused(capsys, "--root", "nowhere")
    assert "leave out --config" in refused(capsys, "--config", "a.py", "--root", ".")
    assert "--workdir is only for --mode" in refused(capsys, "--root", ".", "--workdir", "run")
    message = refused(capsys, "--root", ".", "--output", "mine.txt")
    assert "expected the name of a config file" in message
    message = refused(capsys, "--root", ".")
    assert "no images with labels were found among 0 files" in message
    assert list(tmp_path.iterdir()) == []


def test_labels_that_mean_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    label_trees.in_folders(tmp_path / "data")
    folder = tmp_path / "data" / "labels" / "train"
    for path in sorted(folder.iterdir())[:3]:
        colours = np.array(COLOURS, np.uint8)[np.minimum(np.array(Image.open(path)), 2)]
        tiny.write(path, colours)
    message = refused(capsys, "--root", "data")
    assert "the others hold files with one channel and colours; expected one form" in message
    tiny.write(folder / "train0.png", np.zeros((4, 4), np.uint8))
    for path in (tmp_path / "data" / "labels").rglob("*.png"):
        size = np.array(Image.open(path)).shape[:2]
        tiny.write(path, np.full(size, 3, np.uint8))
    assert "labels hold 1 different values (3)" in refused(capsys, "--root", "data")
    assert not (tmp_path / "configs").exists()


def test_what_training_would_refuse(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    label_trees.in_folders(tmp_path / "data")
    (tmp_path / "data/labels/train/train2.png").unlink()
    message = refused(capsys, "--root", "data")
    assert "labels/train: 1 of 6 images of split 'train' have no label: train2.jpg" in message
    tiny.write(tmp_path / "data/labels/train/train2.png", np.zeros(label_trees.SIZE, np.uint8))
    tiny.write(tmp_path / "data/labels/train/train0.png", np.zeros((3, 3), np.uint8))
    assert "train0.png is 3 x 3" in refused(capsys, "--root", "data")


# ---- Sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sides", "images", "kind", "memory", "crop", "batch", "base_size"),
    [
        ([(360, 480)] * 9, 300, "cpu", None, 256, 8, ()),
        ([(360, 480)] * 9, 300, "other", 80e9, 352, 16, ()),
        ([(3000, 4000)] * 9, 300, "cpu", 16e9, 256, 8, (2048, 512)),
        ([(360, 480)] * 9, 3, "cpu", None, 256, 2, ()),
        ([(20, 30)] * 9, 300, "cpu", None, 32, 8, ()),
        ([(360, 480)] * 9, 300, "cpu", 5e9, 256, 4, ()),
        ([(360, 480)] * 9, 300, "cpu", 1e9, 96, 2, ()),
    ],
)
def test_sizes(sides, images, kind, memory, crop, batch, base_size):
    sizes = init.choose_sizes(sides, images, kind, memory)
    assert (sizes.crop, sizes.batch_size, sizes.base_size) == (crop, batch, base_size)
    assert 10 <= sizes.epochs <= 100


# ---- The other modes ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("compilations", "three_convolutions")
@pytest.mark.parametrize("name", ["with_lists", "labelme"])
def test_train_evaluate_and_predict(made, name, tmp_path, capsys):
    root, path = made(name)
    flags = ["--config", path, "--workdir", tmp_path / "run", "--config.train.epochs=1"]
    flags += ["--config.train.batch_size=2", "--config.model.feature_dim=16"]
    flags += ["--config.model.aspp_dim=16", "--config.loss.class_weights=balanced"]
    assert run(*flags) == 0
    assert run(*flags, "--mode", "evaluate") == 0
    pictures = sorted(root.rglob("*0.jpg"))
    assert run(*flags, "--mode", "predict", "--input", pictures[0]) == 0
    predicted = np.array(Image.open(tmp_path / "run/predictions" / f"{pictures[0].stem}.png"))
    assert predicted.shape == label_trees.SIZE
    data = command_line.load_config(str(path)).data
    recorded = checkpoint.read_meta(tmp_path / "run")[1]["config"]["data"]
    for field in ("label_colors", "label_map", "outside_polygons", "label_name", "list_file"):
        assert recorded[field] == json.loads(json.dumps(data[field]))
    if data.label_colors:  # the pictures have the colours of the labels
        with Image.open(tmp_path / "run/predictions" / f"{pictures[0].stem}.png") as image:
            assert image.getpalette()[:3] == list(data.label_colors[0])
