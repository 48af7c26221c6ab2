import dataclasses
import importlib
import re

import numpy as np
import pytest
from PIL import Image

from configs import ade20k_resnet50, common
from memseg_jax import check_data
from memseg_jax.data import ade20k
from tests.official_trees import SPLITS, write_tree


class MemorySource:
    """Samples in memory; entries that are exceptions are raised."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        label = self.labels[index]
        if isinstance(label, Exception):
            raise label
        image = np.zeros((*label.shape[:2], 3), np.uint8)
        return {"image": image, "label": label, "name": str(index)}

    def describe(self, index):
        return f"memory/{index}.png (label memory/{index}_label.png)"


def uniform(value, size=(4, 6)):
    return np.full(size, value, np.uint8)


@pytest.fixture
def config(tmp_path):
    config = common.get_config()
    config.data.root = str(tmp_path)
    config.data.class_names = ("background", "road", "car")
    config.data.threads = 2
    for split, count in (("train", 5), ("val", 2)):
        for k in range(count):
            label = np.zeros((6, 8 + k), np.uint8)
            label[0], label[1], label[2] = 1, 2, 255
            for kind, array in (("images", np.stack([label] * 3, axis=2)), ("labels", label)):
                path = tmp_path / kind / split / f"s{k}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return config


def test_good_data_gives_0_and_a_histogram(config, capsys):
    assert check_data.run(config) == 0
    captured = capsys.readouterr()
    text = captured.out
    assert "train: 5 images" in text
    assert "val: 2 images" in text
    assert "smallest 6 x 8, median 6 x 10, largest 6 x 12; 5 different" in text
    assert "not labelled: 16.67% of all pixels" in text
    assert re.search(r"0  background +60\.00% +5  #{20}\n", text)
    assert re.search(r"2  car +20\.00% +5  #{7}\n", text)
    assert "All 7 samples" in text
    assert "warning" not in text
    assert captured.err == ""  # no progress bar where there is no terminal


def test_every_bad_file_is_named_and_gives_1(config, tmp_path, capsys):
    def label(name, array):
        Image.fromarray(array).save(tmp_path / f"labels/train/{name}.png")

    label("s0", np.full((6, 8), 200, np.uint8))
    label("s1", np.zeros((6, 8), np.uint8))
    label("s2", np.zeros((6, 10, 3), np.uint8))
    (tmp_path / "labels/train/s3.png").write_bytes(b"")
    path = tmp_path / "images/val/s1.png"
    path.write_bytes(path.read_bytes()[:60])
    assert check_data.run(config) == 1
    text = capsys.readouterr().out
    assert "bad files: 4 of 5 samples" in text
    assert "bad files: 1 of 2 samples" in text
    for name in ("s0", "s1", "s2", "s3"):
        assert len(re.findall(rf"^    \S.*labels/train/{name}\.png", text, re.MULTILINE)) == 1
    assert str(path) in text
    assert "5 of 7 samples are bad" in text
    # The sample that can be read is still counted.
    assert re.search(r"1  road +20\.00% +1 ", text)


def test_split_that_cannot_be_opened_does_not_hide_the_other(config, tmp_path, capsys):
    (tmp_path / "labels/train/s3.png").unlink()
    assert check_data.run(config) == 1
    text = capsys.readouterr().out
    assert "train: this split cannot be opened" in text
    assert "1 of 5 images of split 'train' have no label: s3.png" in text
    assert "val: 2 images" in text


def test_one_split_for_both_is_read_once(config, capsys):
    config.data.train_split = "val"
    assert check_data.run(config) == 0
    assert "All 2 samples" in capsys.readouterr().out


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_report_does_not_depend_on_threads(threads):
    labels = [uniform(k % 3, (k + 1, 5)) for k in range(20)]
    labels[7] = ValueError("broken")
    report = check_data.check_split(MemorySource(labels), "train", 3, threads)
    assert report.images == 20
    assert report.num_bad == 1
    assert report.images_with[:3].tolist() == [7, 6, 6]
    good = [label for label in labels if isinstance(label, np.ndarray)]
    expected = np.bincount(np.concatenate([label.ravel() for label in good]), minlength=256)
    np.testing.assert_array_equal(report.pixels, expected)


def test_sources_that_break_their_promise_are_reported():
    labels = [
        uniform(7),
        uniform(0).astype(np.int32),
        np.zeros((4, 6, 3), np.uint8),
        KeyError("name"),
        uniform(0),
    ]
    report = check_data.check_split(MemorySource(labels), "train", 3)
    assert report.num_bad == 4
    for index, text in enumerate(report.bad):
        assert f"memory/{index}.png" in text
    assert "label values [7]" in report.bad[0]
    assert "int32" in report.bad[1]
    assert "KeyError" in report.bad[3]


def test_messages_are_bounded():
    labels = [ValueError("broken")] * 2000
    report = check_data.check_split(MemorySource(labels), "train", 2)
    text = check_data.format_report(report, ("a", "b"))
    assert report.num_bad == 2000
    assert text.startswith("train: 2000 images, 2000 bad")
    assert text.count("broken") == 20
    assert len(text.splitlines()) < 200
    assert "... and 1880 more" in text


def warnings_of(labels, names, ignore_label=255):
    report = check_data.check_split(MemorySource(labels), "train", len(names))
    lines = check_data.format_report(report, names, ignore_label).splitlines()
    return "\n".join(line for line in lines if "warning: " in line)


def test_classes_never_seen_are_named():
    warning = warnings_of([uniform(0), uniform(2)], ("sky", "road", "car", "tree"))
    assert "2 of 4 classes are never seen: road, tree" in warning
    assert "shifted" not in warning


def test_hint_on_shifted_ids():
    assert "must count from 0" in warnings_of([uniform(1), uniform(2)], ("sky", "road", "car"))


def test_hint_on_an_ignore_value_that_is_a_class_id():
    warning = warnings_of([uniform(1), uniform(255)], ("void", "road"), ignore_label=0)
    assert "void (its id 0 is the ignore value)" in warning


def test_hint_on_binary_masks_with_255():
    mask = uniform(0)
    mask[0] = 255
    assert "save object pixels as 1" in warnings_of([mask], ("background", "object"))


def test_hint_on_too_much_ignore():
    label = uniform(255)
    label[0] = np.arange(6) % 2
    assert "is config.data.ignore_label = 9 meant?" in warnings_of([label], ("a", "b"), 9)
    assert "no pixel is labelled" in warnings_of([uniform(255)], ("a", "b"), 9)


@pytest.mark.parametrize(
    ("values", "ignore_label", "hint"),
    [
        ((0, 1, 2, 3), 255, "set config.data.ignore_label=3"),
        ((1, 2, 3), 255, "count from 1"),
        ((0, 1, 2, 255), -1, "set config.data.ignore_label=255"),
        ((0, 255), -1, "object's pixels as 1"),
    ],
)
def test_hint_on_values_that_are_not_allowed(config, tmp_path, capsys, values, ignore_label, hint):
    # The ids of a data set are spread over its files: the hint needs all of them.
    config.data.ignore_label = ignore_label
    for k in range(5):
        label = np.full((6, 8 + k), values[k % len(values)], np.uint8)
        Image.fromarray(label).save(tmp_path / f"labels/train/s{k}.png")
    assert check_data.run(config) == 1
    (train, _) = capsys.readouterr().out.split("val: 2 images")
    warning = train[train.index("warning:") :]
    assert hint in warning


def test_table_of_many_classes_is_aligned():
    names = tuple(f"class {k} " + "x" * (k % 50) for k in range(200))
    labels = [uniform(k) for k in range(200)] + [uniform(255)]
    report = check_data.check_split(MemorySource(labels), "train", 200)
    lines = check_data.format_report(report, names).splitlines()
    rows = [line for line in lines if re.search(r"class \d+ .* 0\.50% ", line)]
    assert len(rows) == 200
    assert len({line.index("0.50%") for line in rows}) == 1
    assert max(map(len, rows)) <= 80
    assert "images without any labelled pixel: 1" in "\n".join(lines)


@pytest.mark.parametrize(("official", "warns"), [(None, False), (2, False), (3, True)])
def test_published_split_of_another_size_is_reported(tmp_path, official, warns):
    write_tree("ade20k", tmp_path, {"training": 2})
    config = ade20k_resnet50.get_config().data
    config.root = str(tmp_path)
    source = dataclasses.replace(ade20k.open_split(config, "training"), official_size=official)
    report = check_data.check_split(source, "training", 150)
    text = check_data.format_report(report, config.class_names)
    assert ("the published split has 3 images, and here are 2" in text) == warns


@pytest.mark.parametrize("name", sorted(SPLITS))
def test_check_of_a_published_data_set(name, tmp_path, capsys):
    config = importlib.import_module(f"configs.{name}_resnet50").get_config()
    config.data.root = str(write_tree(name, tmp_path))
    assert check_data.run(config) == 0
    out = capsys.readouterr().out
    assert "samples can be read and have allowed labels" in out
    assert out.count("warning: the published split has ") == 2
