"""Any ids in label files, by a map to class names."""

import numpy as np
import pytest

from configs import common
from memseg_jax.data import IGNORE_LABEL, open_split
from memseg_jax.errors import UserError
from tests import tiny

NAMES = ("road", "car", "sky")


def read(root, values, pairs, **fields):
    tiny.write(root / "images/train/a.png", np.zeros((*values.shape, 3), np.uint8))
    suffix = ".tif" if values.dtype == np.int32 else ".png"
    tiny.write(root / f"labels/train/a{suffix}", values)
    data = common.get_config().data
    data.update(root=str(root), class_names=NAMES, label_map=pairs)
    data.update(fields)
    return open_split(data, "train")[0]["label"]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_values_mean_what_the_map_says(tmp_path, dtype):
    values = np.array([[7, 8, 26], [23, 0, 255]], dtype)
    pairs = ((0, "ignore"), (7, "road"), (8, "road"), (26, "car"), (23, "sky"))
    label = read(tmp_path, values, pairs)
    assert label.dtype == np.uint8
    expected = [[0, 0, 1], [2, IGNORE_LABEL, IGNORE_LABEL]]  # 255: config.data.ignore_label
    np.testing.assert_array_equal(label, expected)


def test_wide_values(tmp_path):
    values = np.array([[26001, 26], [40000, 7]], np.uint16)
    pairs = ((26001, "car"), (26, "car"), (40000, "sky"), (7, "road"))
    np.testing.assert_array_equal(read(tmp_path, values, pairs), [[1, 1], [2, 0]])


def test_the_map_wins_over_the_ignore_value(tmp_path):
    values = np.array([[0, 255]], np.uint8)  # the masks of one object that most programs write
    np.testing.assert_array_equal(read(tmp_path, values, ((0, "road"), (255, "car"))), [[0, 1]])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_values_that_the_map_lacks_are_named(tmp_path, dtype):
    values = np.array([[7, 9, 9], [7, 7, 255]], dtype)
    with pytest.raises(UserError) as caught:
        read(tmp_path, values, ((7, "road"),), ignore_label=-1)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/labels/train/a.png: label values that config.data.label")
    assert "9 (2 pixels), 255 (1 pixels). It has 7." in message
    assert "Add the pair (9, 'CLASS NAME') or (9, 'ignore')" in message
