"""Predicting: which pictures are found, what is written, and what happens to bad ones."""

import contextlib
import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from memseg_jax.data import videos
from memseg_jax.data.images import read_image
from memseg_jax.errors import UserError
from memseg_jax.modes import predict as predicting
from memseg_jax.modes.predict import find_images
from memseg_jax.scoring import visualize
from memseg_jax.scoring.summary import Summary
from tests import tiny
from tests.tiny_config import CLASSES, COLOURS, get_config

pytestmark = [
    pytest.mark.usefixtures("quiet_entry", "compilations"),
]

OUT = Path("somewhere/else")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tiny.save_random_model(tmp_path_factory.mktemp("random_model"))


@pytest.fixture
def predict(workdir, tmp_path):
    """Runs the mode on a pattern; returns the exit status."""

    def run(pattern, *arguments, output=tmp_path / "out"):
        return tiny.run(
            "--mode=predict", "--workdir", workdir, "--input", pattern, "--output", output,
            "--config.eval.exact_sizes=0", "--config.eval.size_multiple=64", *arguments,
        )  # fmt: skip

    return run


def picture(path, *size, seed=0, **options):
    return tiny.write(path, tiny.picture(seed, *size)[0], **options)


def results(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def ids(path):
    """The values that a PNG file stores."""
    with Image.open(path) as image:
        assert image.mode in ("P", "L")
        return np.array(image)


# ---- What is found ------------------------------------------------------------------------------


def test_file_folder_and_glob(tmp_path):
    for name in ("a.jpg", "b/c.PNG", "b/d/e.webp", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(pattern):
        return [
            (str(path.relative_to(tmp_path)), str(name))
            for path, name in find_images(str(tmp_path / pattern), OUT)
        ]

    assert found("a.jpg") == [("a.jpg", "a")]
    assert found("") == [("a.jpg", "a"), ("b/c.PNG", "b/c"), ("b/d/e.webp", "b/d/e")]
    assert found("b") == [("b/c.PNG", "c"), ("b/d/e.webp", "d/e")]
    assert found("*.jpg") == [("a.jpg", "a")]
    assert found("b/*") == [("b/c.PNG", "c")]
    assert found("b/**/*") == [("b/c.PNG", "c"), ("b/d/e.webp", "d/e")]
    assert found("?/*/e.*") == [("b/d/e.webp", "b/d/e")]


def test_a_relative_glob_and_a_name_with_brackets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x[1].png").touch()
    (tmp_path / "y.png").touch()
    assert [str(name) for _, name in find_images("*.png", OUT)] == ["x[1]", "y"]
    assert [str(name) for _, name in find_images("x[1].png", OUT)] == ["x[1]"]


def test_every_result_has_a_name_of_its_own(tmp_path):
    for name in ("a.jpg", "a.png", "a.jpg.png", "a_ids.png", "b/a.jpg", "c.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    endings = (".png", "_overlay.jpg", "_confidence.png", "_ids.png", "_overlay.mp4")
    names = [
        str(name) + ending
        for _, name in find_images(str(tmp_path), tmp_path / "out")
        for ending in endings
    ]
    assert len(names) == 6 * len(endings)
    assert len(set(names)) == len(names)
    assert "c.png" in names


@pytest.mark.parametrize("pattern", ["empty", "missing", "missing/*.png", "notes.*", "em*"])
def test_nothing_found(tmp_path, predict, capsys, pattern):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    assert predict(tmp_path / pattern) == 1
    error = capsys.readouterr().err
    assert f"--input={tmp_path / pattern}: no picture found" in error
    assert ".jpg" in error
    assert not (tmp_path / "out").exists()


# ---- What is written ----------------------------------------------------------------------------


def test_sizes_and_kinds_of_pictures(tmp_path, predict, capsys):
    pictures = tmp_path / "pictures"
    picture(pictures / "odd.png", 33, 47)
    picture(pictures / "portrait.jpg", 61, 35)
    picture(pictures / "deep/er/column.png", 40, 1)
    picture(pictures / "row.png", 1, 40)
    picture(pictures / "dot.png", 1, 1)
    tiny.write(pictures / "grey.png", tiny.picture(1, 20, 30)[0][..., 0])
    rgba = np.concatenate([tiny.picture(2, 20, 30)[0], np.full((20, 30, 1), 9, np.uint8)], 2)
    tiny.write(pictures / "rgba.png", rgba)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture(pictures / "turned.jpg", 24, 50, exif=exif)
    assert predict(pictures) == 0
    assert "8 pictures segmented" in capsys.readouterr().out
    sizes = {
        "odd": (33, 47), "portrait": (61, 35), "deep/er/column": (40, 1), "row": (1, 40),
        "dot": (1, 1), "grey": (20, 30), "rgba": (20, 30), "turned": (50, 24),
    }  # fmt: skip
    out = tmp_path / "out"
    files = [f"{name}{ending}" for name in sizes for ending in (".png", "_overlay.jpg")]
    assert results(out) == sorted([*files, "summary.csv"])
    seen = set()
    for name, size in sizes.items():
        label = ids(out / f"{name}.png")
        assert label.shape == size
        seen |= set(np.unique(label).tolist())
        assert read_image(out / f"{name}_overlay.jpg").shape == (*size, 3)
    assert seen == {0, 1, 2}


def test_label_maps_hold_class_ids_and_the_checkpoints_colours(tmp_path, predict):
    picture(tmp_path / "a.png", 40, 50)
    assert predict(tmp_path / "a.png", "--save_ids", "--save_confidence") == 0
    out = tmp_path / "out"
    files = ["a.png", "a_confidence.png", "a_ids.png", "a_overlay.jpg", "summary.csv"]
    assert results(out) == files
    label = ids(out / "a.png")
    assert len(np.unique(label)) > 1
    np.testing.assert_array_equal(ids(out / "a_ids.png"), label)
    with Image.open(out / "a.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.array(image.convert("RGB")), np.array(COLOURS)[label])
    with Image.open(out / "a_ids.png") as image:
        assert image.mode == "L"
    confidence = ids(out / "a_confidence.png")
    assert confidence.shape == label.shape
    assert confidence.min() >= 255 // 3  # the best of three classes
    assert len(np.unique(confidence)) > 3
    overlay = visualize.overlay(read_image(tmp_path / "a.png"), label, np.array(COLOURS, np.uint8))
    difference = np.abs(read_image(out / "a_overlay.jpg").astype(int) - overlay)
    assert difference.mean() < 10  # JPEG


def test_classes_are_those_of_the_checkpoint(tmp_path, predict, caplog):
    picture(tmp_path / "a.png", 40, 50)
    assert predict(tmp_path / "a.png") == 0
    first = (tmp_path / "out" / "a.png").read_bytes()
    caplog.set_level("INFO")
    changes = ["--config.data.class_names=('x','y','z','more')", "--config.data.palette=()"]
    assert predict(tmp_path / "a.png", *changes, "--overwrite") == 0
    assert (tmp_path / "out" / "a.png").read_bytes() == first
    summary = next(m for m in caplog.messages if m.startswith(str(tmp_path / "a.png")))
    summary = summary.removeprefix(f"{tmp_path / 'a.png'}: ")
    assert {part.split()[0] for part in summary.split(", ")} <= set(CLASSES)


def test_batches_change_nothing(tmp_path, predict):
    for index in range(5):
        picture(tmp_path / "in" / f"{index}.png", 40 + index, 50, seed=index)
    outputs = [tmp_path / "one", tmp_path / "three"]
    for size, output in zip((1, 3), outputs):
        flag = f"--config.eval.batch_size={size}"
        assert predict(tmp_path / "in", flag, "--save_ids", output=output) == 0
    for index in range(5):
        one, three = (ids(output / f"{index}_ids.png") for output in outputs)
        assert (one != three).mean() < 0.005  # ties


def test_sliding_windows(tmp_path, predict):
    picture(tmp_path / "in" / "large.png", 70, 90)
    picture(tmp_path / "in" / "small.png", 20, 24)
    slide = ["--config.eval.mode=slide", "--config.eval.window=(32,32)"]
    assert predict(tmp_path / "in", *slide, "--config.eval.stride=(24,24)") == 0
    assert ids(tmp_path / "out" / "large.png").shape == (70, 90)
    assert ids(tmp_path / "out" / "small.png").shape == (20, 24)


def test_the_default_output(tmp_path, workdir):
    picture(tmp_path / "a.png", 40, 50)
    assert tiny.run("--mode=predict", "--workdir", workdir, "--input", tmp_path / "a.png") == 0
    assert results(workdir / "predictions") == ["a.png", "a_overlay.jpg", "summary.csv"]


def test_large_pictures_in_blended_windows(tmp_path, predict, compilations):
    picture(tmp_path / "large.png", 70, 190)  # more than four crops of 32x32
    assert predict(tmp_path / "large.png") == 0
    assert ids(tmp_path / "out" / "large.png").shape == (70, 190)
    assert "the network for 32x32 inputs" in compilations


# ---- What is done, and what is done again -------------------------------------------------------


def test_what_is_done_is_skipped(tmp_path, predict, capsys, monkeypatch):
    picture(tmp_path / "in" / "a.png", 40, 50)
    assert predict(tmp_path / "in") == 0
    before = (tmp_path / "out" / "summary.csv").read_text()
    monkeypatch.setattr(predicting.trained_model, "load", None)  # nothing is loaded
    capsys.readouterr()
    assert predict(tmp_path / "in") == 0
    assert "0 pictures segmented, 1 skipped" in capsys.readouterr().out
    assert (tmp_path / "out" / "summary.csv").read_text() == before


def test_what_counts_as_done(tmp_path):
    source, name, out = picture(tmp_path / "a.png", 4, 5), Path("sub", "a"), tmp_path / "out"
    endings = [predicting.LABELS, predicting.OVERLAY]

    def is_done(made_by="step 7, 01", endings=endings):
        table = Summary(out, CLASSES, made_by)
        return predicting._is_done((source, name), out, table, endings)

    assert not is_done()
    files = [picture(out / "sub" / f"a{ending}", 4, 5) for ending in (".png", "_overlay.jpg")]
    assert not is_done()  # somebody else's
    table = Summary(out, CLASSES, "step 7, 01")
    table.begin([])
    table.add(str(source), "sub/a", (4, 5), np.array([20, 0, 0]))
    table.close()
    assert is_done()
    assert not is_done("step 8, 01")
    assert not is_done(endings=[*endings, predicting.IDS])
    os.utime(source, (2**32, 2**32))  # changed since
    assert not is_done()
    os.utime(source, (1, 1))
    files[1].unlink()
    assert not is_done()


def test_what_changes_results_is_in_their_name():
    meta = {"step": 7, "checksums": {"a": "1"}}
    first = predicting._made_by(get_config(), meta)
    assert first.startswith("step 7, ")

    def after(field, value):
        config = get_config()
        config.update_from_flattened_dict({field: value})
        return predicting._made_by(config, meta)

    for field, value in (("eval.flip", True), ("augment.crop", (8, 8)), ("eval.mode", "whole")):
        assert after(field, value) != first
    assert predicting._made_by(get_config(), meta | {"checksums": {"a": "2"}}) != first
    assert after("eval.batch_size", 7) == after("train.epochs", 1) == first


def summary(folder):
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_summary_has_the_share_of_every_class(tmp_path, predict):
    picture(tmp_path / "in" / "a, b.png", 40, 50)
    assert predict(tmp_path / "in") == 0
    (row,) = summary(tmp_path / "out")
    assert (row["input"], row["result"]) == (str(tmp_path / "in" / "a, b.png"), "a, b")
    assert (row["frames"], row["height"], row["width"]) == ("1", "40", "50")
    label = ids(tmp_path / "out" / "a, b.png")
    for number, name in enumerate(CLASSES):
        assert float(row[name]) == pytest.approx((label == number).mean(), abs=1e-6)


# ---- Videos -------------------------------------------------------------------------------------


def test_a_video_becomes_a_video_of_overlays(tmp_path, predict, capsys):
    (tmp_path / "in").mkdir()
    with contextlib.closing(videos.VideoWriter(tmp_path / "in" / "clip.mp4", 12.0)) as writer:
        for number in range(5):
            writer.add(tiny.picture(number, 48, 64)[0])
    picture(tmp_path / "in" / "clip.png", 40, 50)
    assert predict(tmp_path / "in", "--config.eval.batch_size=2") == 0
    assert "2 pictures segmented" in capsys.readouterr().out
    made = videos.open_video(tmp_path / "out" / "clip_overlay.mp4")
    frames = list(made.read())
    assert (made.rate, made.frames, len(frames)) == (12.0, 5, 5)
    assert {frame.shape for frame in frames} == {(48, 64, 3)}
    given = list(videos.open_video(tmp_path / "in" / "clip.mp4").read())
    for frame, plain in zip(frames, given):  # in order, and each a mixture of colours with its own
        distances = [abs(frame.astype(int) - other).mean() for other in given]
        assert np.argmin(distances) == [x is plain for x in given].index(True)
    rows = {row["result"]: row for row in summary(tmp_path / "out")}
    assert {name: row["frames"] for name, row in rows.items()} == {"clip": "5", "clip.png": "1"}


def test_a_damaged_video_does_not_stop_the_others(tmp_path, predict, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.mp4").write_bytes(b"no video")
    picture(tmp_path / "in" / "a.png", 40, 50)
    assert predict(tmp_path / "in") == 1
    assert f"{tmp_path / 'in' / 'bad.mp4'}: no frame of this video" in capsys.readouterr().err
    assert results(tmp_path / "out") == ["a.png", "a_overlay.jpg", "summary.csv"]


# ---- What goes wrong ----------------------------------------------------------------------------


def test_unreadable_pictures_do_not_stop_the_others(tmp_path, predict, capsys):
    picture(tmp_path / "in" / "a.png", 40, 50)
    picture(tmp_path / "in" / "c.jpg", 40, 50)
    picture(tmp_path / "in" / "d.png", 40, 50)
    content = (tmp_path / "in" / "c.jpg").read_bytes()
    (tmp_path / "in" / "b.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "in" / "e.png").write_bytes(b"no picture")
    assert predict(tmp_path / "in") == 1
    shown = capsys.readouterr()
    assert "3 pictures segmented" in shown.out
    assert "2 of 5 pictures could not be read" in shown.err
    for name in ("b.jpg", "e.png"):
        assert str(tmp_path / "in" / name) in shown.err
    written = [f"{name}{ending}" for name in "acd" for ending in (".png", "_overlay.jpg")]
    assert results(tmp_path / "out") == sorted([*written, "summary.csv"])


def test_a_picture_that_is_too_large_names_the_field(tmp_path, predict, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # it is set
    picture(tmp_path / "a.png", 40, 50)
    assert predict(tmp_path / "a.png", "--config.eval.max_megapixels=0.001") == 1
    assert "Scale it down. Or raise config.eval.max_megapixels." in capsys.readouterr().err
    assert predict(tmp_path / "a.png", "--config.eval.max_megapixels=0.002") == 0


def test_pictures_are_never_overwritten(tmp_path, predict, capsys):
    path = picture(tmp_path / "a.png", 40, 50)
    before = path.read_bytes()
    status = predict(tmp_path / "a.png", output=tmp_path)
    assert path.read_bytes() == before
    if status:
        assert "--output" in capsys.readouterr().err


def test_results_are_no_input_the_next_time(tmp_path, predict, capsys):
    picture(tmp_path / "a.png", 40, 50)
    for _ in range(2):
        assert predict(tmp_path, "--overwrite", output=tmp_path / "out") == 0
        assert "1 picture segmented" in capsys.readouterr().out


def test_output_that_cannot_be_written(tmp_path, predict, capsys):
    picture(tmp_path / "a.png", 40, 50)
    (tmp_path / "file").touch()
    assert predict(tmp_path / "a.png", output=tmp_path / "file" / "out") == 1
    error = capsys.readouterr().err
    assert "--output" in error
    assert str(tmp_path / "file") in error


def test_no_checkpoint(tmp_path, capsys):
    path = picture(tmp_path / "a.png", 40, 50)
    workdir = tmp_path / "nothing"
    assert tiny.run("--mode=predict", "--workdir", workdir, "--input", path) == 1
    error = capsys.readouterr().err
    assert f"there is no checkpoint in {workdir}" in error
    assert "--workdir" in error
    assert not workdir.exists()


def test_no_such_step(tmp_path, predict, capsys):
    path = picture(tmp_path / "a.png", 40, 50)
    assert predict(path, "--checkpoint=5") == 1
    assert "There are: 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", ["model.feature_dim=24", "model.backbone_width=0.25", "model.memory.enabled=false"]
)
def test_checkpoint_of_another_model(tmp_path, predict, capsys, change):
    path = picture(tmp_path / "a.png", 40, 50)
    assert predict(path, f"--config.{change}") == 1
    error = capsys.readouterr().err
    assert "is a checkpoint of another model" in error
    assert f"{change.partition('=')[0]} = " in error
    assert not (tmp_path / "out").exists()


def test_an_output_that_may_not_be_written_is_named_before_anything_is_done(
    door, tmp_path, predict, capsys, caplog
):
    path = picture(tmp_path / "a.png", 40, 50)
    door.answer = lambda method, path: 403 if method == "POST" else None
    assert predict(path, output=door.folder / "out") == 1
    error = capsys.readouterr().err
    assert f"cannot write to the folder for the results {door.folder / 'out'}: " in error
    assert "storage.objects.create" in error
    assert "segmenting" not in caplog.text


def test_an_empty_input_is_refused():
    with pytest.raises(UserError, match="--input"):
        find_images("", OUT)
