import dataclasses
import importlib
import os
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from configs import ade20k_resnet50, common
from memseg_jax.data import ade20k, open_split, pipeline, transforms
from memseg_jax.modes import check_data
from memseg_jax.scoring import visualize
from tests.official_trees import SPLITS, recipe_of, write_tree


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


def warnings_of(labels, names, ignore_label=255, ignoring=""):
    report = check_data.check_split(MemorySource(labels), "train", len(names))
    lines = check_data.format_report(report, names, ignore_label, ignoring).splitlines()
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
    assert "label_map = ((0, 'background'), (255, 'object'))" in warnings_of(
        [mask], ("background", "object")
    )


def test_hint_on_too_much_ignore():
    label = uniform(255)
    label[0] = np.arange(6) % 2
    assert "is config.data.ignore_label = 9 meant?" in warnings_of([label], ("a", "b"), 9)
    assert "no pixel is labelled" in warnings_of([uniform(255)], ("a", "b"), 9)


def test_hints_on_colours_maps_and_polygons_name_their_fields():
    label = uniform(255)
    label[0] = 1
    field = "config.data.outside_polygons"
    warning = warnings_of([label], ("a", "b"), ignoring=field)
    assert f"is {field} meant?" in warning
    assert "shifted" not in warning  # they hold no ids that could be
    warning = warnings_of([uniform(255)], ("a", "b"), ignoring=field)
    assert f"no pixel is labelled. Correct {field} or the files." in warning
    data = common.get_config().data
    for name, value in (
        ("label_colors", ((0, 0, 0), (1, 1, 1))),
        ("label_map", ((0, "a"), (1, "b"))),
        ("outside_polygons", "a"),
        ("label_dir", "a.json"),
    ):
        changed = data.copy_and_resolve_references()
        changed[name] = value
        assert check_data.ignoring_field(changed).startswith("config.data.")
    assert check_data.ignoring_field(data) == ""


@pytest.mark.parametrize(
    ("values", "ignore_label", "hint"),
    [
        ((0, 1, 2, 3), 255, "set config.data.ignore_label=3"),
        ((1, 2, 3), 255, "count from 1"),
        ((0, 1, 2, 255), -1, "set config.data.ignore_label=255"),
        ((0, 255), -1, "label_map = ((0, 'background'), (255, 'object'))"),
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
    assert ("the published split has 3 images, this one 2" in text) == warns


@pytest.mark.parametrize("name", sorted(SPLITS))
def test_check_of_a_published_data_set(name, tmp_path, capsys):
    config = recipe_of(name)
    config.data.root = str(write_tree(name, tmp_path))
    assert check_data.run(config) == 0
    out = capsys.readouterr().out
    assert "samples can be read and have allowed labels" in out
    assert out.count("warning: the published split has ") == 2


def official_config(name, root):
    config = recipe_of(name)
    config.data.root = str(root)
    config.data.threads = 2
    return config


def cut_file(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def write_label(path, value):
    if path.suffix == ".mat":
        scipy.io.savemat(path, {"S": np.full((48, 64), value, np.uint8)})
    else:
        Image.fromarray(np.full((48, 64), value, np.uint8)).save(path)


# What is done to one image and its label, and what the report says about it.
DAMAGES = {
    "image without label": (lambda image, label: label.unlink(), "have no label here"),
    "label without image": (lambda image, label: image.unlink(), "(have no image|no image in)"),
    "damaged image": (lambda image, label: cut_file(image), "bad files: 1 of 2 samples"),
    "damaged label": (lambda image, label: cut_file(label), "bad files: 1 of 2 samples"),
    "other value": (
        lambda image, label: write_label(label, 200),
        r"not allowed: 200 \(3072",
    ),
    "no field": (
        lambda image, label: scipy.io.savemat(label, {"T": np.zeros((48, 64), np.uint8)}),
        "there is no field 'S'",
    ),
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (name, damage)
        for name in sorted(SPLITS)
        for damage in DAMAGES
        if damage != "no field" or name == "cocostuff10k"
    ],
)
def test_check_of_a_damaged_published_data_set(name, damage, tmp_path, capsys):
    config = official_config(name, write_tree(name, tmp_path))
    split = config.data.eval_split
    source = open_split(config.data, split)
    do, said = DAMAGES[damage]
    do(Path(source.images[1]), Path(source.labels[1]))
    assert check_data.run(config) == 1
    out = capsys.readouterr().out
    report = out[out.rindex(f"\n{split}: ") :]
    assert re.search(said, report)
    assert all(part in report for part in source.names[1].split("/"))  # folder and file of VSPW


@pytest.mark.parametrize("kind", ["images", "labels"])
@pytest.mark.parametrize("name", sorted(SPLITS))
def test_check_of_a_half_downloaded_split(name, kind, tmp_path, capsys):
    config = official_config(name, tmp_path)
    write_tree(name, tmp_path, dict.fromkeys(SPLITS[name], 6))
    source = open_split(config.data, config.data.eval_split)
    for path in getattr(source, kind)[3:]:
        Path(path).unlink()
    assert check_data.run(config) == 1
    out = capsys.readouterr().out
    assert f"{config.data.eval_split}: this split cannot be opened" in out
    assert "3 of 6" in out
    assert source.names[3] in out
    assert importlib.import_module(f"memseg_jax.data.{name}").DATA_SET.download in out


@pytest.mark.parametrize("name", sorted(SPLITS))
def test_check_says_how_many_samples_the_published_splits_have(name, tmp_path, capsys):
    config = official_config(name, write_tree(name, tmp_path))
    assert check_data.run(config) == 0
    out = capsys.readouterr().out
    sizes = importlib.import_module(f"memseg_jax.data.{name}").SPLIT_SIZES
    for split in (config.data.train_split, config.data.eval_split):
        here = 4 if split == "trainval" else 2
        assert f"the published split has {sizes[split]} images, this one {here}" in out


# ---- Pictures -----------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """Collects the rows of the contact sheets that are drawn."""
    sheets = []
    draw = visualize.contact_sheet

    def collect(rows, titles, *rest):
        sheets.append((titles, list(rows)))
        return draw(sheets[-1][1], titles, *rest)

    monkeypatch.setattr(visualize, "contact_sheet", collect)
    return sheets


def test_picture_shows_the_samples_of_the_first_training_step(config, tmp_path, drawn, capsys):
    config.augment.crop, config.augment.base_size = (40, 50), (60, 60)
    config.train.batch_size = 8
    assert check_data.run(config, str(tmp_path / "new" / "pictures")) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/new/pictures/train.png shows the first samples of the training" in out
    assert f"{tmp_path}/new/pictures/val.png shows some samples" in out
    source = open_split(config.data, "train")
    with pipeline.train_batches(source, config, 0, 1) as batches:
        batch = next(batches)
    (titles, rows), (val_titles, val_rows) = drawn
    assert titles == ("image", "label", "image for the network", "label for the network")
    assert len(rows) == 6
    for k, (caption, (image, label, seen_image, seen_label)) in enumerate(rows):
        stored = source[int(batch["index"][k])]
        assert caption == f"{stored['name']}   6 x {stored['label'].shape[1]}"
        np.testing.assert_array_equal(image, stored["image"])
        np.testing.assert_array_equal(label, stored["label"])
        np.testing.assert_array_equal(seen_label, batch["label"][k])
        normalised = transforms.normalise(seen_image)
        inside = batch["image"][k] != 0  # the padding is the mean colour, which is no grey level
        np.testing.assert_array_equal(normalised[inside], batch["image"][k][inside])
        np.testing.assert_allclose(normalised, batch["image"][k], atol=0.01)
    assert val_titles == ("image", "label")
    assert [caption for caption, _ in val_rows] == [
        "images/val/s0   6 x 8",
        "images/val/s1   6 x 9",
    ]
    # What is drawn is what is in the file: a crop of 40 x 50 is shown five times as large.
    sheet = np.asarray(Image.open(tmp_path / "new" / "pictures" / "train.png"))
    shown = rows[0][1][2].repeat(5, 0).repeat(5, 1)
    assert any(shown[0].tobytes() in line.tobytes() for line in sheet)


def test_pictures_depend_on_the_seed_alone(config, tmp_path):
    def picture(folder):
        check_data.run(config, str(tmp_path / folder))
        return (tmp_path / folder / "train.png").read_bytes()

    first = picture("a")
    assert picture("b") == first
    config.seed = 1
    assert picture("c") != first


def test_picture_of_one_image_shows_several_augmentations(config, tmp_path, drawn):
    for kind in ("images", "labels"):
        for path in sorted((tmp_path / kind / "train").iterdir())[1:]:
            path.unlink()
    assert check_data.run(config, str(tmp_path / "pictures")) == 0
    rows = drawn[0][1]
    assert len({caption for caption, _ in rows}) == 1
    assert len(rows) == len({arrays[2].tobytes() for _, arrays in rows}) == 6


def test_bad_samples_are_left_out_of_the_picture(config, tmp_path, drawn, capsys):
    (tmp_path / "labels/train/s3.png").write_bytes(b"")
    for path in (tmp_path / "images/val").iterdir():
        path.write_bytes(b"nothing")
    assert check_data.run(config, str(tmp_path / "pictures")) == 1
    captions = [caption for caption, _ in drawn[0][1]]
    assert len(captions) == 6
    assert not any("s3" in caption for caption in captions)
    out = capsys.readouterr().out
    assert "no picture of this split: none of the samples it would show can be read" in out
    assert os.listdir(tmp_path / "pictures") == ["train.png"]


def test_no_picture_is_no_failure(config, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert check_data.run(config, str(tmp_path / "file" / "pictures")) == 0
    out = capsys.readouterr().out
    assert out.count("no picture of this split: cannot make the folder") == 2
    assert "Not a directory. Choose another one with --output." in out
    (tmp_path / "pictures" / "train.png").mkdir(parents=True)
    assert check_data.run(config, str(tmp_path / "pictures")) == 0
    assert "no picture of this split: cannot write" in capsys.readouterr().out


def test_split_without_public_labels(tmp_path, drawn, capsys):
    config = official_config("cityscapes", write_tree("cityscapes", tmp_path / "data"))
    config.data.eval_split = "test"
    assert check_data.run(config, str(tmp_path / "pictures")) == 0
    out = capsys.readouterr().out
    test = out[out.index("test: 2 images") :]
    assert "the labels of this split are not public: only its images were checked" in test
    assert "never seen" not in test
    assert "no pixel is labelled" not in test
    assert "the published split has 1525 images, this one 2" in test
    assert "pictures/test.png shows some samples" in test
    assert all((label == 255).all() for _, (_, label) in drawn[1][1])
    config.data.train_split = "test"
    assert check_data.run(config) == 1
    assert "its labels are not public" in capsys.readouterr().out
