import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import ade20k_resnet50
from memseg_jax.data import IGNORE_LABEL, open_split
from memseg_jax.data.pipeline import steps_per_epoch
from memseg_jax.errors import UserError


def config_at(root):
    config = ade20k_resnet50.get_config()
    config.data.root = str(root)
    return config.lock()


def write_sample(root, split, name, label):
    for kind, array, suffix in (
        ("images", np.zeros((*label.shape, 3), np.uint8), "jpg"),
        ("annotations", label, "png"),
    ):
        folder = root / "ADEChallengeData2016" / kind / split
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / f"{name}.{suffix}")


def test_zero_is_ignored_and_the_classes_move_down(tmp_path):
    label = np.array([[0, 1, 150], [2, 2, 0]], np.uint8)
    write_sample(tmp_path, "training", "ADE_train_00000001", label)
    sample = open_split(config_at(tmp_path).data, "training")[0]
    expected = [[IGNORE_LABEL, 0, 149], [1, 1, IGNORE_LABEL]]
    np.testing.assert_array_equal(sample["label"], expected)
    assert sample["label"].dtype == np.uint8


def test_value_beyond_the_classes_is_refused(tmp_path):
    write_sample(tmp_path, "training", "ADE_train_00000001", np.full((4, 4), 151, np.uint8))
    with pytest.raises(UserError, match="151"):
        open_split(config_at(tmp_path).data, "training")[0]


def test_wrong_root_says_what_is_expected(tmp_path):
    with pytest.raises(UserError, match=r"config\.data\.root .* ADEChallengeData2016"):
        open_split(config_at(tmp_path / "nowhere").data, "training")


def test_recipe_of_the_published_row():
    config = ade20k_resnet50.get_config()
    steps = steps_per_epoch(20210, config.train.batch_size, config.replica_groups)
    assert (steps, steps * config.train.epochs) == (1263, 164190)
    assert len(config.data.class_names) == len(config.data.palette) == 150


@pytest.mark.skipif("MEMSEG_DATA" not in os.environ, reason="MEMSEG_DATA names no folder of data")
def test_official_files():
    root = Path(os.environ["MEMSEG_DATA"]) / "official_layouts" / "ade20k"
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    for split, count in (("training", 1), ("validation", 3)):
        source = open_split(config_at(root).data, split)
        assert len(source) == count
        for index in range(count):
            sample = source[index]
            assert sample["image"].shape[:2] == sample["label"].shape
            assert len(np.unique(sample["label"])) > 3
