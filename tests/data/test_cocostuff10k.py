import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from configs import cocostuff10k_resnet50
from memseg_jax.data import IGNORE_LABEL, open_split
from memseg_jax.errors import UserError
from tests.official_trees import write_tree

SIZE = (12, 16)


@pytest.fixture
def config(tmp_path):
    write_tree("cocostuff10k", tmp_path, {"train": 3, "test": 2}, size=SIZE)
    config = cocostuff10k_resnet50.get_config()
    config.data.root = str(tmp_path)
    return config.data


def write_mat(path, **fields):
    scipy.io.savemat(path, fields)


def test_the_lists_make_the_splits(config):
    train, test = (open_split(config, split) for split in ("train", "test"))
    # The order is that of the list, which the tree has backwards.
    assert train.names == tuple(sorted(train.names, reverse=True))
    assert len(train) == 3
    assert len(test) == 2
    assert not {*train.names} & {*test.names}
    with pytest.raises(UserError, match="no split 'val'"):
        open_split(config, "val")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float64])
def test_ids_move_down_and_0_and_255_are_ignored(config, dtype):
    source = open_split(config, "train")
    label = np.full(SIZE, 92, dtype)
    label[0, :4] = (0, 255, 1, 182)
    write_mat(source.labels[0], S=label)
    read = source[0]["label"]
    assert read[0, :4].tolist() == [IGNORE_LABEL, IGNORE_LABEL, 0, 181]
    assert (read[1:] == 91).all()


def test_id_beyond_the_classes_is_refused(config):
    source = open_split(config, "train")
    write_mat(source.labels[0], S=np.full(SIZE, 183))
    with pytest.raises(UserError, match=r"\.mat: .*183 \(192 pixels\).*0\.\.182, 255"):
        source[0]


def test_mat_without_its_field(config):
    source = open_split(config, "train")
    write_mat(source.labels[0], labels=np.zeros(SIZE), names=np.zeros(3))
    with pytest.raises(UserError, match=r"\.mat: there is no field 'S'.*holds labels, names"):
        source[0]


@pytest.mark.parametrize("value", ["text", np.zeros((2, 3, 4)), {"a": 1}])
def test_mat_with_another_kind_of_field(config, value):
    source = open_split(config, "train")
    write_mat(source.labels[0], S=value)
    with pytest.raises(UserError, match=r"\.mat: field 'S' holds .*expected a map of numbers"):
        source[0]


def test_label_of_another_size(config):
    source = open_split(config, "train")
    write_mat(source.labels[0], S=np.ones((12, 15)))
    with pytest.raises(UserError, match=r"12 x 16 .*\.mat is 12 x 15"):
        source[0]


@pytest.mark.parametrize("kept", [0, 1, 3, 64, 127, 128, 140, 200])
def test_cut_mat(config, kept):
    path = Path(open_split(config, "train").labels[0])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"\.mat: "):
        open_split(config, "train")[0]


def test_file_that_is_no_mat_or_vanishes(config):
    source = open_split(config, "train")
    Path(source.labels[0]).write_text("<html>404 not found</html>" * 20)
    with pytest.raises(UserError, match=r"\.mat: not a MATLAB file"):
        source[0]
    Path(source.labels[0]).unlink()
    with pytest.raises(UserError, match=r"\.mat: there is no such file"):
        source[0]


def test_missing_list(config):
    Path(config.root, "imageLists/test.txt").unlink()
    with pytest.raises(UserError, match=r"imageLists/test\.txt.*cannot be read.*Unpack"):
        open_split(config, "test")
    shutil.rmtree(Path(config.root, "imageLists"))
    with pytest.raises(UserError, match=r"imageLists: there is no such folder"):
        open_split(config, "train")


def test_reading_in_threads_leaves_the_filters_of_warnings_alone(config):
    source = open_split(config, "train")
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(source.__getitem__, [0, 1] * 20))
    assert warnings.filters == before
