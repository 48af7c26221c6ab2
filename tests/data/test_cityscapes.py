import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import cityscapes_resnet50
from memseg_jax.data import IGNORE_LABEL, cityscapes, open_split
from memseg_jax.data.pipeline import steps_per_epoch
from memseg_jax.errors import UserError
from tests.official_trees import write_tree


@pytest.fixture
def config(tmp_path):
    write_tree("cityscapes", tmp_path, {"train": 3, "val": 2, "test": 2}, size=(16, 32))
    config = cityscapes_resnet50.get_config()
    config.data.root = str(tmp_path)
    return config.data


def test_label_ids_become_train_ids(config):
    source = open_split(config, "train")
    ids = np.arange(34, dtype=np.uint8)[None].repeat(16, 0)
    ids = np.pad(ids, ((0, 0), (0, 1)), constant_values=255)
    Image.fromarray(ids).save(source.labels[0])
    Image.fromarray(np.zeros((16, 35, 3), np.uint8)).save(source.images[0])
    label = source[0]["label"][0]
    expected = dict(zip(range(19), cityscapes.LABEL_IDS))
    assert {int(k): int(np.flatnonzero(label == k)[0]) for k in range(19)} == expected
    assert (label == IGNORE_LABEL).sum() == 34 + 1 - 19


def test_trainval_is_both_without_copies(config):
    train, val, both = (open_split(config, split) for split in ("train", "val", "trainval"))
    assert both.names == tuple(sorted(train.names + val.names))
    assert set(both.labels) == set(train.labels + val.labels)
    assert len({*train.names} & {*val.names}) == 0
    for source in (train, val):
        for k, name in enumerate(source.names):
            np.testing.assert_array_equal(source[k]["label"], both[both.names.index(name)]["label"])


def test_list_of_trainval_and_of_lists_with_folders(config):
    names = open_split(config, "trainval").names
    city = names[3].split("_")[0]
    Path(config.root, "trainval.txt").write_text(f"{city}/{names[3]}_leftImg8bit\n{names[0]}\n")
    assert open_split(config, "trainval").names == (names[3], names[0])
    assert len(open_split(config, "train")) == 3


def test_id_beyond_the_official_ones_is_refused(config):
    source = open_split(config, "val")
    Image.fromarray(np.full((16, 32), 34, np.uint8)).save(source.labels[1])
    with pytest.raises(UserError, match=r"34 \(512 pixels\).*Cityscapes has 0\.\.33, 255"):
        source[1]


def test_one_archive_unpacked_only(config):
    shutil.rmtree(Path(config.root, "gtFine"))
    with pytest.raises(UserError, match=r"gtFine/train.*no such folder.*holds leftImg8bit/"):
        open_split(config, "trainval")


def test_other_label_files_do_not_count(config):
    source = open_split(config, "train")
    Path(source.labels[0]).unlink()  # its instanceIds and color files are there
    with pytest.raises(UserError, match="1 of 3 images of split 'train' have no label"):
        open_split(config, "train")


def test_recipe_of_the_published_row():
    config = cityscapes_resnet50.get_config()
    images = cityscapes.SPLIT_SIZES[config.data.train_split]
    steps = steps_per_epoch(images, config.train.batch_size, config.replica_groups)
    assert (steps, steps * config.train.epochs) == (217, 95480)
