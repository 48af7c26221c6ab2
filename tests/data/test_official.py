"""What holds for all published data sets: tables, layouts, and what is refused."""

import hashlib
import importlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from memseg_jax.data import IGNORE_LABEL, official, open_split
from memseg_jax.errors import UserError
from tests.official_trees import RECIPES, SPLITS, VALUES, write_tree

FACTS = json.loads((Path(__file__).parents[1] / "facts" / "data_sets.json").read_text())
DATA_SETS = sorted(FACTS)
LABELLED = [(name, split) for name in DATA_SETS for split in SPLITS[name] if split != "test"]
LABELLED.append(("cocostuff10k", "test"))
IMAGES = {
    "ade20k": "ADEChallengeData2016/images",
    "cityscapes": "leftImg8bit",
    "cocostuff10k": "images",
    "lip": "train_images",
    "pascalcontext59": "JPEGImages",
    "voc": "JPEGImages",
    "vspw": "data",
}


def config_at(name, root):
    config = importlib.import_module(RECIPES[name].format(name)).get_config()
    config.data.root = str(root)
    return config.lock()


def opened(name, root, split=None):
    return open_split(config_at(name, root).data, split or SPLITS[name][0])


def sha256(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# ---- Tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA_SETS)
def test_names_colours_and_label_map_are_those_of_the_reference(name):
    module, facts = importlib.import_module(f"memseg_jax.data.{name}"), FACTS[name]
    assert len(module.CLASS_NAMES) == len(module.PALETTE) == facts["num_classes"]
    for index, class_name in facts["some_names"].items():
        assert module.CLASS_NAMES[int(index)] == class_name
    assert sha256(module.CLASS_NAMES) == facts["class_names_sha256"]
    assert facts["palette_sha256"] in (None, sha256(module.PALETTE))
    expected = dict.fromkeys(facts["ignored"], IGNORE_LABEL)
    expected |= {value: k for k, value in enumerate(facts["classes"])}
    table = module.DATA_SET.table
    allowed = {value: table[value] for value in range(256) if table[value] != 254}
    assert allowed == expected
    assert facts["sizes"].items() <= module.SPLIT_SIZES.items()


def test_flip_pairs_are_those_of_the_reference():
    ours = importlib.import_module("memseg_jax.data.lip").FLIP_PAIRS
    assert {frozenset(p) for p in ours} == {frozenset(p) for p in FACTS["lip"]["flip_pairs"]}


# ---- Reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "split"), LABELLED)
def test_reads_a_tree_of_the_official_layout(name, split, tmp_path):
    write_tree(name, tmp_path, dict.fromkeys(SPLITS[name], 3), size=(20, 30))
    source = opened(name, tmp_path, split)
    assert len(source) == len(set(source.names)) == 3
    assert source.has_labels
    table = np.full(256, 254, np.uint8)
    table[FACTS[name]["ignored"]] = IGNORE_LABEL
    table[FACTS[name]["classes"]] = range(FACTS[name]["num_classes"])
    seen = set()
    for index in range(3):
        sample = source[index]
        assert sample["image"].shape == (20, 30, 3)
        assert sample["image"].dtype == sample["label"].dtype == np.uint8
        assert sample["label"].shape == (20, 30)
        assert sample["name"] == source.names[index]
        seen |= set(np.unique(sample["label"]).tolist())
    assert seen <= set(table[list(VALUES[name])].tolist())
    assert len(seen) >= 4


@pytest.mark.parametrize("name", DATA_SETS)
def test_source_is_picklable_and_independent_of_where_the_data_are(name, tmp_path):
    write_tree(name, tmp_path / "here")
    source = opened(name, tmp_path / "here")
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[1]["label"], source[1]["label"])
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = opened(name, tmp_path / "there")
    assert moved.fingerprint() == copy.fingerprint() == source.fingerprint()
    assert source.images[0] in source.describe(0)
    assert source.labels[0] in source.describe(0)


@pytest.mark.parametrize(("name", "split"), [("cityscapes", "test"), ("lip", "test")])
def test_split_without_public_labels(name, split, tmp_path):
    write_tree("cityscapes", tmp_path, {"test": 2})
    if name == "lip":
        shutil.copytree(tmp_path / "leftImg8bit/test", tmp_path / "Testing_images/testing_images")
    with pytest.raises(UserError, match=rf"split 'test' of {name}: its labels are not public"):
        opened(name, tmp_path, split)
    shutil.rmtree(tmp_path / "gtFine")  # not read, if it is there
    source = open_split(config_at(name, tmp_path).data, split, needs_labels=False)
    assert len(source) == 2
    sample = source[0]
    assert sample["label"].shape == sample["image"].shape[:2]
    assert (sample["label"] == IGNORE_LABEL).all()
    assert "label not public" in source.describe(0)


# ---- Refused when opened ------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA_SETS)
def test_root_that_is_not_there_or_empty(name, tmp_path):
    title = importlib.import_module(f"memseg_jax.data.{name}").DATA_SET.title
    for root in ("", tmp_path / "nowhere"):
        with pytest.raises(UserError, match=rf"config\.data\.root is .*Expected {title}.*Unpack"):
            opened(name, root)
    with pytest.raises(UserError, match=rf"there is no .*is empty.*Expected {title}.*Unpack"):
        opened(name, tmp_path)


@pytest.mark.parametrize("name", DATA_SETS)
def test_unknown_split(name, tmp_path):
    with pytest.raises(UserError, match=rf"no split 'dev'.*{SPLITS[name][0]}.*config\.data\."):
        opened(name, write_tree(name, tmp_path), "dev")


@pytest.mark.parametrize("name", DATA_SETS)
def test_class_names_of_another_data_set(name, tmp_path):
    config = config_at(name, tmp_path).unlock().data
    config.class_names = ("a", "b")
    with pytest.raises(UserError, match=rf"2 names.*data\.{name}\.CLASS_NAMES"):
        open_split(config, SPLITS[name][0])


@pytest.mark.parametrize("name", DATA_SETS)
def test_labels_that_are_missing(name, tmp_path):
    source = opened(name, write_tree(name, tmp_path))
    Path(source.labels[1]).unlink()
    with pytest.raises(UserError, match=f"1 of 2 images .* have no label here: {source.names[1]}"):
        opened(name, tmp_path)
    shutil.rmtree(Path(source.labels[1]).parent)
    with pytest.raises(UserError, match=r"have no label|there is no"):
        opened(name, tmp_path)


@pytest.mark.parametrize("name", DATA_SETS)
def test_images_that_are_missing(name, tmp_path):
    source = opened(name, write_tree(name, tmp_path))
    Path(source.images[0]).unlink()
    with pytest.raises(UserError, match=f"(1 of 2|no image).*{source.names[0]}"):
        opened(name, tmp_path)
    for image in (tmp_path / IMAGES[name]).rglob("*.jpg" if name != "cityscapes" else "*.png"):
        image.unlink(missing_ok=True)
    with pytest.raises(UserError, match="no images"):
        opened(name, tmp_path)


@pytest.mark.parametrize("name", ["ade20k", "cityscapes"])
def test_list_of_ids_chooses_and_orders(name, tmp_path):
    write_tree(name, tmp_path, {SPLITS[name][0]: 4})
    ids = opened(name, tmp_path).names
    path = tmp_path / ("ADEChallengeData2016/train.txt" if name == "ade20k" else "train.txt")
    path.write_text(f"{ids[2]}\n\n# comment\n{ids[0]}.png,1\n")
    assert opened(name, tmp_path).names == (ids[2], ids[0])
    path.write_text(f"{ids[2]}\n{ids[2]}\n")
    with pytest.raises(UserError, match=rf"train\.txt: line 2: {ids[2]} is named in line 1"):
        opened(name, tmp_path)
    path.write_text(f"{ids[2]}\nother\n")
    with pytest.raises(UserError, match=r"train\.txt: 1 of 2 samples .* no image .*other \(line 2"):
        opened(name, tmp_path)
    path.write_text("\n")
    with pytest.raises(UserError, match=r"train\.txt.*names no samples"):
        opened(name, tmp_path)


def test_file_that_is_there_twice(tmp_path):
    source = opened("ade20k", write_tree("ade20k", tmp_path))
    first = Path(source.images[0])
    (first.parent / "copy").mkdir()
    shutil.copy(first, first.parent / "copy" / first.name)
    with pytest.raises(UserError, match=r"have the same name"):
        opened("ade20k", tmp_path)


# ---- Refused when read --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.array([[1, 3, 3, 7]], np.uint8), r"3 \(2 pixels\)"),
        (np.array([[257, 1, 1, 1]], np.uint16), r"257 \(1 pixels\)"),
        (np.array([[-1, 1, 1, 1]], np.int32), r"-1 \(1 pixels\)"),
        (np.array([[1.5, 1, 1, np.nan]]), r"1\.5 \(1 pixels\), nan"),
        (np.arange(254, dtype=np.uint8)[None], r"and \d+ more\."),
    ],
)
def test_values_outside_the_table(values, found):
    table = official.label_table({1: 0, 2: 1}, ignored=(0, 7, 255))
    source = official.OfficialSource((), (), (), "Streets", table, None)
    with pytest.raises(UserError, match=rf"x\.png: .*{found}.*Streets has 0\.\.2, 7, 255\."):
        source.map_values(values, "x.png")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float64])
def test_values_of_any_type_are_mapped(dtype):
    table = official.label_table({1: 0, 2: 1}, ignored=(0, 255))
    source = official.OfficialSource((), (), (), "Streets", table, None)
    label = source.map_values(np.array([[0, 1, 2, 255]], dtype), "x.png")
    assert label.tolist() == [[255, 0, 1, 255]]
    assert label.dtype == np.uint8


# ---- Real images --------------------------------------------------------------------------------


@pytest.mark.skipif("MEMSEG_DATA" not in os.environ, reason="MEMSEG_DATA names no folder of data")
@pytest.mark.parametrize(
    ("name", "split", "ids"),
    [
        ("cocostuff10k", "train", ["COCO_train2014_000000197384"]),
        ("cocostuff10k", "test", ["COCO_train2014_000000475177"]),
        ("lip", "train", ["684_2150041"]),
        ("lip", "val", ["86_185913"]),
        ("ade20k", "validation", [f"ADE_val_0000000{k}" for k in (1, 2, 3)]),
    ],
)
def test_official_files(name, split, ids):
    root = Path(os.environ["MEMSEG_DATA"]) / "official_layouts" / name
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    source = opened(name, root, split)
    assert list(source.names) == ids
    for index in range(len(ids)):
        sample = source[index]
        assert sample["image"].shape[:2] == sample["label"].shape
        assert sample["image"].std() > 10
        values = np.unique(sample["label"])
        assert len(values) > 3
        assert all(v < FACTS[name]["num_classes"] or v == IGNORE_LABEL for v in values)
