import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import lip_resnet50
from memseg_jax.data import open_split
from memseg_jax.errors import UserError
from tests.official_trees import write_tree


def data_at(root):
    config = lip_resnet50.get_config()
    config.data.root = str(root)
    return config.data


def test_nested_and_flat_folders_are_the_same_data(tmp_path):
    flat = open_split(data_at(write_tree("lip", tmp_path / "flat")), "train")
    nested = open_split(data_at(write_tree("lip", tmp_path / "nested", nested=True)), "train")
    (tmp_path / "deeper/more").mkdir(parents=True)
    shutil.move(tmp_path / "nested/TrainVal_images", tmp_path / "deeper/more")
    shutil.move(tmp_path / "nested/TrainVal_parsing_annotations", tmp_path / "deeper/more")
    deeper = open_split(data_at(tmp_path / "deeper"), "train")
    assert flat.fingerprint() == nested.fingerprint() == deeper.fingerprint()
    np.testing.assert_array_equal(deeper[1]["label"], flat[1]["label"])


def test_values_are_classes_and_0_is_one(tmp_path):
    source = open_split(data_at(write_tree("lip", tmp_path, size=(5, 20))), "val")
    values = np.arange(20, dtype=np.uint8)[None].repeat(5, 0)
    Image.fromarray(values).save(source.labels[0])
    np.testing.assert_array_equal(source[0]["label"], values)
    Image.fromarray(np.full((5, 20), 255, np.uint8)).save(source.labels[0])
    with pytest.raises(UserError, match=r"255 \(100 pixels\).*LIP has 0\.\.19\."):
        source[0]


@pytest.mark.parametrize("nested", [False, True])
def test_list_of_ids(tmp_path, nested):
    config = data_at(write_tree("lip", tmp_path, {"train": 4, "val": 1}, nested=nested))
    path = tmp_path / ("TrainVal_images" if nested else "") / "train_id.txt"
    names = open_split(config, "train").names
    path.write_text(f"{names[2]}\n{names[1]}.jpg\n")
    assert open_split(config, "train").names == (names[2], names[1])
    path.unlink()
    assert open_split(config, "train").names == tuple(sorted(names))


def test_grey_image(tmp_path):
    source = open_split(data_at(write_tree("lip", tmp_path)), "train")
    Image.open(source.images[0]).convert("L").save(source.images[0])
    image = source[0]["image"]
    assert image.shape[2] == 3
    assert (image == image[..., :1]).all()


def test_folder_that_is_missing_or_there_twice(tmp_path):
    config = data_at(write_tree("lip", tmp_path, nested=True))
    shutil.copytree(tmp_path / "TrainVal_images", tmp_path / "backup")
    with pytest.raises(UserError, match=r"TrainVal_images/train_images and .*backup|one folder"):
        open_split(config, "train")
    shutil.rmtree(tmp_path / "backup")
    shutil.copytree(tmp_path / "TrainVal_images", tmp_path / "__MACOSX")
    assert len(open_split(config, "train")) == 2
    shutil.rmtree(tmp_path / "TrainVal_parsing_annotations")
    with pytest.raises(UserError, match=r"no folder train_segmentations.*TrainVal_images/.*Unpack"):
        open_split(config, "train")


def test_a_folder_of_test_images_without_the_others(tmp_path):
    shutil.copytree(
        write_tree("lip", tmp_path / "x") / "val_images",
        tmp_path / "lip/Testing_images/testing_images",
    )
    source = open_split(data_at(tmp_path / "lip"), "test", needs_labels=False)
    assert len(source) == 2
    assert not source.has_labels
    assert Path(source.images[0]).parent.name == "testing_images"
