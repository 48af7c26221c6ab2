"""Bad input through the entry point: the exit status, and what the message names."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from memseg_jax import checkpoint
from tests import tiny

pytestmark = [
    pytest.mark.usefixtures("quiet_entry"),
]
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


# Each damages a data set and returns what the message must hold.


@case
def label_200(root, split):
    path = root / "labels" / split / "02.png"
    label = np.array(Image.open(path))
    label[3:5, 4:10] = 200
    tiny.write(path, label)
    return [str(path), "200 (12 pixels)", "0..2 (3 classes) and 255 (not labelled)", "Correct the"]


@case
def truncated_jpeg(root, split):
    path = root / "images" / split / "02.jpg"
    with Image.open(path.with_suffix(".png")) as image:
        image.save(path)
    path.with_suffix(".png").unlink()
    path.write_bytes(path.read_bytes()[:-200])
    return [str(path), "truncated", "replace or remove it"]


@case
def not_an_image(root, split):
    path = root / "images" / split / "02.png"
    path.write_bytes(b"<html>404</html>")
    return [str(path), "not an image file", "Expected one of JPEG, PNG", "Replace or remove it"]


@case
def label_of_another_size(root, split):
    image, path = (root / kind / split / "02.png" for kind in ("images", "labels"))
    label = np.array(Image.open(path))
    tiny.write(path, label[:-1])
    height, width = label.shape
    return [
        f"{image} is {height} x {width}",
        f"{path} is {height - 1} x {width}",
        "Expected equal sizes",
        "export the label again",
    ]


@case
def colour_mask(root, split):
    path = root / "labels" / split / "02.png"
    with Image.open(path) as image:
        colours = np.array(tiny.COLOURS, np.uint8)[np.minimum(np.array(image), 2)]
    tiny.write(path, colours)
    return [str(path), "colour mask", "Expected one channel", "config.data.label_colors"]


@case
def missing_label(root, split):
    path = root / "labels" / split / "02.png"
    path.unlink()
    return [
        f"of split '{split}' have no label: 02.png",
        f"{path} was expected",
        "Add the labels",
    ]


@case
def empty_split(root, split):
    folder = root / "images" / split
    for path in folder.iterdir():
        path.unlink()
    return [f"{folder}: no images (split '{split}'", ".jpg", "add images"]


@case
def missing_split(root, split):
    folder = root / "images" / split
    shutil.rmtree(folder)
    return [f"{folder}: there is no such folder", "config.data.image_dir", "Correct"]


@pytest.fixture
def root(tmp_path):
    return shutil.copytree(tiny.data_root(), tmp_path / "data")


@pytest.fixture
def counting_step(monkeypatch):
    """Trains with a step that only counts: everything but the numbers is real."""
    tiny.count_steps(monkeypatch)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tiny.save_random_model(tmp_path_factory.mktemp("random_model"))


def assert_explained(text, parts):
    assert "Traceback" not in text
    for part in parts:
        assert part in text


# ---- Data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_training(root, tmp_path, capsys, counting_step, name, workers):
    parts = CASES[name](root, "train")
    run = (f"--config.data.root={root}", "--workdir", tmp_path / "run")
    assert tiny.run(*run, f"--config.data.workers={workers}") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert_explained(error, parts)


@pytest.mark.parametrize("name", CASES)
def test_evaluation(root, workdir, capsys, compilations, name):
    parts = CASES[name](root, "val")
    run = (f"--config.data.root={root}", "--workdir", workdir)
    assert tiny.run(*run, "--mode=evaluate", "--config.eval.batch_size=8") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert_explained(error, parts)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", CASES)
def test_check_data(root, tmp_path, capsys, name, split):
    parts = CASES[name](root, split)
    flags = [f"--config.data.root={root}", "--output", tmp_path / "pictures"]
    assert tiny.run(*flags, "--mode=check_data") == 1
    shown = capsys.readouterr()
    assert_explained(shown.out, [part for part in parts if part != "Correct the"])
    if name not in ("missing_label", "empty_split", "missing_split"):
        assert "1 of 36 samples are bad" in shown.out


def test_several_bad_files_are_all_listed(root, tmp_path, capsys):
    parts = label_200(root, "train")[:2] + label_of_another_size(root, "val")[:2]
    flags = [f"--config.data.root={root}", "--output", tmp_path / "pictures"]
    assert tiny.run(*flags, "--mode=check_data") == 1
    assert_explained(capsys.readouterr().out, [*parts, "2 of 36 samples are bad"])


@pytest.mark.parametrize("mode", ["train", "evaluate", "check_data"])
@pytest.mark.parametrize("wrong", ["", "missing", "file"])
def test_wrong_root(tmp_path, workdir, capsys, mode, wrong):
    (tmp_path / "file").touch()
    flags = [f"--config.data.root={tmp_path / wrong}"] if wrong else []
    flags += ["--workdir", workdir if mode == "evaluate" else tmp_path / "run"]
    assert tiny.run(f"--mode={mode}", *flags) == 1
    shown = capsys.readouterr()
    reason = {"missing": "does not exist", "file": "is not a folder"}.get(wrong, "is not set")
    text = shown.out + shown.err
    assert_explained(text, ["config.data.root", reason])
    assert "give the folder of the data set" in text.lower()
    if wrong:
        assert str(tmp_path / wrong) in text


@pytest.mark.slow
def test_training_is_stopped_by_the_real_program(root, tmp_path):
    # Found while it trains, in a worker process; what was trained before stays.
    parts = label_200(root, "train")
    tiny.trained()  # has compiled the training step
    result = tiny.program(
        f"--config.data.root={root}", "--workdir", tmp_path / "run", "--config.data.workers=2"
    )
    assert result.returncode == 1
    assert_explained(result.stderr, parts)
    assert result.stderr.count("error: ") == 1


@pytest.mark.slow
def test_one_pixel_wide_images_are_used(tmp_path, workdir, capsys, counting_step, compilations):
    sizes = {"train": [(32, 1), (1, 32), (1, 1)] + [(20, 36)] * 5, "val": [(32, 1), (1, 1)]}
    root = tiny.write_folder(tmp_path / "data", sizes)
    for path in (root / "labels").rglob("*.png"):
        label = np.array(Image.open(path))
        if label.shape[0] == 1:
            tiny.write(path, np.zeros_like(label))  # the first row of pictures is not labelled
    flag = f"--config.data.root={root}"
    assert tiny.run(flag, "--mode=check_data", "--output", tmp_path / "pictures") == 0
    assert tiny.run(flag, "--workdir", workdir, "--mode=evaluate") == 0
    output = tmp_path / "out"
    pictures = root / "images" / "train"
    assert (
        tiny.run("--workdir", workdir, "--mode=predict", "--input", pictures, "--output", output)
        == 0
    )
    for index, (height, width) in enumerate(sizes["train"]):
        with Image.open(output / f"{index:02d}.png") as image:
            assert image.size == (width, height)
    assert "Traceback" not in capsys.readouterr().err


def test_one_pixel_wide_images_are_trained_on(tmp_path, capsys, compilations, counting_step):
    root = tiny.write_folder(tmp_path / "data", {"train": [(32, 1)] * 8, "val": [(32, 1)]})
    status = tiny.run(f"--config.data.root={root}", "--workdir", tmp_path / "run")
    assert status == 0, capsys.readouterr().err


# ---- Workdir and checkpoint ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_workdir_that_cannot_be_written(tmp_path, capsys, mode):
    (tmp_path / "file").touch()
    flags = [f"--config.data.root={tiny.data_root()}", "--workdir", tmp_path / "file" / "run"]
    assert tiny.run(f"--mode={mode}", *flags) == 1
    error = capsys.readouterr().err
    if mode == "train":
        assert f"cannot write to the workdir {tmp_path / 'file' / 'run'}" in error
        assert "Not a directory" in error
    assert_explained(error, [str(tmp_path / "file" / "run"), "--workdir"])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_workdir_without_permission(tmp_path, capsys):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    flags = [f"--config.data.root={tiny.data_root()}", "--workdir", folder / "run"]
    assert tiny.run(*flags) == 1
    assert_explained(capsys.readouterr().err, [str(folder / "run"), "Permission denied"])


@pytest.mark.parametrize("mode", ["evaluate", "predict"])
@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (["model.feature_dim=24"], ["model.feature_dim = 16"]),
        (["model.backbone=resnet50"], ['model.backbone = "resnet18"']),
        (["model.memory.enabled=false"], ["model.memory.enabled = true"]),
        (["model.memory.slots=2"], ["model.memory.slots = 1"]),
        (["model.auxiliary=false"], ["model.auxiliary = true"]),
    ],
)
def test_checkpoint_of_another_model(workdir, capsys, tmp_path, mode, changes, parts):
    path = tiny.write(tmp_path / "a.png", tiny.picture(0)[0])
    flags = [f"--config.{change}" for change in changes] + [f"--mode={mode}"]
    if mode == "predict":
        flags += ["--input", path, "--output", tmp_path / "out"]
    else:
        flags += [f"--config.data.root={tiny.data_root()}"]
    assert tiny.run("--workdir", workdir, *flags) == 1
    error = capsys.readouterr().err
    step = Path(workdir) / checkpoint.FOLDER / "7"
    assert_explained(
        error,
        [
            str(step),
            "another model",
            "in the checkpoint",
            "in this model",
            "Use the config",
            *parts,
        ],
    )


def test_checkpoint_with_other_classes(workdir, capsys):
    flags = ["--config.data.class_names=('a','b')", "--config.data.palette=()", "--mode=evaluate"]
    root = f"--config.data.root={tiny.data_root()}"
    assert tiny.run(root, "--workdir", workdir, *flags) == 1
    assert_explained(capsys.readouterr().err, ["saved with 3 classes", "data.class_names"])


def test_training_on_a_checkpoint_of_another_model(workdir, capsys, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "run")
    root = f"--config.data.root={tiny.data_root()}"
    assert tiny.run(root, "--workdir", copy, "--config.model.feature_dim=24") == 1
    error = capsys.readouterr().err
    assert_explained(error, ["model.feature_dim: 16 in the checkpoint, 24 now", "--workdir"])


def test_unreadable_input_in_the_real_program(workdir, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    result = tiny.program(
        "--mode=predict", "--workdir", workdir, "--input", tmp_path / "a.jpg",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 1
    assert_explained(result.stderr, [f"{tmp_path / 'a.jpg'}: not an image file"])
    assert "0 pictures segmented" in result.stdout


def test_an_image_that_turns_unreadable_in_the_middle_of_a_run(
    root, tmp_path, capsys, monkeypatch, three_convolutions
):
    path = root / "images" / "train" / "05.png"
    content = path.read_bytes()

    def damage(number):
        if number == 5:  # at once: a reader must not find the file while it is still empty
            half = path.with_suffix(".half")
            half.write_bytes(content[: len(content) // 2])
            half.replace(path)

    tiny.count_steps(monkeypatch, damage)
    run = (f"--config.data.root={root}", "--workdir", tmp_path / "run")
    assert tiny.run(*run) == 1
    assert_explained(capsys.readouterr().err, [str(path), "replace or remove it"])
    assert checkpoint.all_steps(tmp_path / "run")[-1] in (3, 6)  # the one before it
    path.write_bytes(content)
    assert tiny.run(*run) == 0, capsys.readouterr().err
    assert checkpoint.all_steps(tmp_path / "run")[-1] == 16
