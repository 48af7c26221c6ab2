"""PASCAL VOC and PASCAL-Context: where their folders are, and how many samples lists have."""

import numpy as np
import pytest
from PIL import Image

from memseg_jax.data import IGNORE_LABEL, official, open_split, pascalcontext59
from memseg_jax.errors import UserError
from tests.official_trees import recipe_of, write_tree


def data_at(name, root):
    config = recipe_of(name)
    config.data.root = str(root)
    return config.data


@pytest.mark.parametrize("name", ["voc", "pascalcontext59"])
def test_the_root_may_be_a_folder_above(name, tmp_path):
    write_tree(name, tmp_path / "deep", {"val": 2}, nested=True)
    write_tree(name, tmp_path / "flat", {"val": 2})
    places = tmp_path / "flat", tmp_path / "deep", tmp_path / "deep/VOCdevkit"
    flat, *others = (open_split(data_at(name, place), "val") for place in places)
    for other in others:
        assert other.names == flat.names
        np.testing.assert_array_equal(other[1]["label"], flat[1]["label"])


def test_labels_are_the_ids_of_palette_images(tmp_path):
    write_tree("voc", tmp_path, {"trainaug": 1}, size=(2, 3))
    source = open_split(data_at("voc", tmp_path), "trainaug")
    image = Image.fromarray(np.array([[0, 20, 255], [1, 1, 0]], np.uint8), "P")
    image.putpalette([*range(256)] * 3)
    image.save(source.labels[0])
    assert source[0]["label"].tolist() == [[0, 20, IGNORE_LABEL], [1, 1, 0]]


@pytest.mark.parametrize("name", ["voc", "pascalcontext59"])
def test_a_list_that_is_missing(name, tmp_path):
    write_tree(name, tmp_path, {"val": 2})
    split = data_at(name, tmp_path).train_split
    with pytest.raises(UserError, match=rf"{split}\.txt: the list file cannot be read.*Unpack"):
        open_split(data_at(name, tmp_path), split)


@pytest.mark.parametrize(
    ("split", "count", "official_size"),
    [("train", 4996, 4996), ("train", 4998, 4998), ("train", 4997, 4998), ("val", 5104, 5104)],
)
def test_either_list_of_context_is_complete(split, count, official_size):
    ids = {f"{k:04}": k for k in range(count)}
    files = official.Files("", ids)
    source = official.make_source(pascalcontext59.DATA_SET, split, files, files)
    assert source.official_size == official_size
