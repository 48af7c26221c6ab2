"""Label maps as files, and what the server of a benchmark takes."""

import json

import numpy as np
import pytest
from PIL import Image

from memseg_jax.data import cityscapes
from memseg_jax.errors import UserError
from memseg_jax.scoring.prediction_files import PredictionWriter, check_benchmark_files
from tests import tiny
from tests.official_trees import write_tree

NAMES = ("aachen_000000_000019", "zurich_000001_000019")
LABEL = np.arange(24, dtype=np.uint8).reshape(4, 6) % 19
PALETTE = np.array(cityscapes.PALETTE, np.uint8)


def read(path):
    with Image.open(path) as image:
        return image.mode, np.array(image)


@pytest.fixture
def written(tmp_path):
    """A folder for the server with two files, and the sizes of their images."""
    writer = PredictionWriter(str(tmp_path / "out"), "", PALETTE, cityscapes.BENCHMARK)
    for name in NAMES:
        writer.save(name, LABEL)
    assert "2 label maps" in writer.finish()
    return tmp_path / "out" / "benchmark", dict.fromkeys(NAMES, LABEL.shape)


# ---- Writing ------------------------------------------------------------------------------------


def test_class_ids_with_colours_and_the_servers_ids(written):
    folder, _ = written
    assert sorted(path.name for path in folder.iterdir()) == [
        "aachen_000000_000019_leftImg8bit.png", "zurich_000001_000019_leftImg8bit.png",
    ]  # fmt: skip
    mode, ids = read(folder / f"{NAMES[0]}_leftImg8bit.png")
    assert mode == "L"
    assert ids[0].tolist() == [7, 8, 11, 12, 13, 17]  # road, sidewalk, building, wall, fence, pole
    assert ids[3].tolist() == [33, 7, 8, 11, 12, 13]
    # The reader of the labels takes them back to classes.
    table = np.frombuffer(cityscapes.DATA_SET.table, np.uint8)
    np.testing.assert_array_equal(table[ids], LABEL)
    mode, classes = read(folder.parent / f"{NAMES[0]}.png")
    assert mode == "P"
    np.testing.assert_array_equal(classes, LABEL)
    with Image.open(folder.parent / f"{NAMES[0]}.png") as image:
        np.testing.assert_array_equal(np.array(image.convert("RGB")), PALETTE[LABEL])


def test_names_make_folders_but_never_leave_theirs(tmp_path):
    writer = PredictionWriter(str(tmp_path / "out"), str(tmp_path / "data"), PALETTE, None)
    writer.save("images/val/a.b", LABEL)
    writer.save("../elsewhere/c", LABEL)
    assert writer.finish() == f"2 label maps in {tmp_path / 'out'}"
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert found == ["out/elsewhere/c.png", "out/images/val/a.b.png"]


def test_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to the folder .*file/out.*save_predictions"):
        PredictionWriter(str(tmp_path / "file/out"), "", PALETTE, None)
    for folder in (tmp_path, tmp_path / "out"):
        with pytest.raises(UserError, match="whose files it could replace"):
            PredictionWriter(str(folder), str(tmp_path), PALETTE, None)
    assert not (tmp_path / "out").exists()


def test_nothing_half_written(tmp_path, monkeypatch):
    writer = PredictionWriter(str(tmp_path / "out"), "", PALETTE, None)

    def half(self, path, **options):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(UserError, match=r"cannot write .*a\.png: No space left on device"):
        writer.save("a", LABEL)
    assert not list((tmp_path / "out").iterdir())


# ---- The check ----------------------------------------------------------------------------------


def spoil(folder, sizes, fault):
    path = folder / f"{NAMES[0]}_leftImg8bit.png"
    label = read(path)[1]
    if fault == "missing":
        path.unlink()
    elif fault == "extra":
        (folder / "zurich_000001_000019.png").touch()
    elif fault == "size":
        sizes[NAMES[0]] = (1024, 2048)
    elif fault == "classes":
        Image.fromarray(LABEL).save(path)
    elif fault == "colours":
        Image.fromarray(PALETTE[LABEL]).save(path)
    elif fault == "jpeg":
        Image.fromarray(label).save(path, format="JPEG")
    elif fault == "broken":
        path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("fault", "answer"),
    [
        ("missing", "1 files missing: aachen_000000_000019_leftImg8bit.png"),
        ("extra", "1 files of no image of this split: zurich_000001_000019.png"),
        ("size", "4x6 pixels; expected 1024x2048"),
        ("classes", r"values 0, 1, 2, 3, 4, and \d+ more; expected some of \[7, 8, 11,"),
        ("colours", "PNG in Pillow's mode RGB; expected PNG with one channel"),
        ("jpeg", "JPEG in Pillow's mode L; expected PNG"),
        ("broken", "cannot be read as an image"),
    ],
)
def test_check_finds(written, fault, answer):
    folder, sizes = written
    check_benchmark_files(folder, cityscapes.BENCHMARK, sizes)
    spoil(folder, sizes, fault)
    with pytest.raises(UserError, match=answer):
        check_benchmark_files(folder, cityscapes.BENCHMARK, sizes)


# ---- From the mode ------------------------------------------------------------------------------

entry = pytest.mark.usefixtures("quiet_entry", "compilations")


@entry
def test_split_without_labels_is_segmented_for_the_server(tmp_path, capsys):
    config = tiny.get_config()
    config.data.class_names, config.data.palette = cityscapes.CLASS_NAMES, cityscapes.PALETTE
    workdir = tiny.save_random_model(tmp_path / "run", config)
    root = write_tree("cityscapes", tmp_path / "data", size=(40, 56))
    flags = [
        f"--config.data.class_names={cityscapes.CLASS_NAMES}",
        f"--config.data.palette={cityscapes.PALETTE}",
        f"--config.data.root={root}", "--workdir", workdir, "--mode=evaluate",
        "--config.data.name=cityscapes", "--config.data.eval_split=test",
    ]  # fmt: skip
    assert tiny.run(*flags) == 1
    assert "--config.eval.save_predictions=FOLDER segments its images" in capsys.readouterr().err
    out = tmp_path / "out"
    flags.append(f"--config.eval.save_predictions={out}")
    assert tiny.run(*flags) == 0
    shown = capsys.readouterr().out
    assert "no scores: the labels of split 'test' are not public" in shown
    assert f"2 label maps in {out}; for the benchmark server of Cityscapes, checked" in shown
    assert "mIoU" not in shown
    assert not (workdir / "metrics.json").exists()
    names = [f"{city}test_{n:06d}_000019" for n, city in enumerate(("aachen", "zurich"))]
    check_benchmark_files(out / "benchmark", cityscapes.BENCHMARK, dict.fromkeys(names, (40, 56)))
    for name in names:
        classes = read(out / f"{name}.png")[1]
        ids = read(out / f"benchmark/{name}_leftImg8bit.png")[1]
        np.testing.assert_array_equal(np.array(cityscapes.LABEL_IDS)[classes], ids)
        assert np.unique(classes).size > 1


@entry
@pytest.mark.slow
def test_label_maps_of_a_scored_split_give_the_scores(tmp_path, capsys):
    workdir = tiny.save_random_model(tmp_path / "run")
    root, out = tiny.data_root(), tmp_path / "out"
    flags = [f"--config.data.root={root}", "--workdir", workdir, "--mode=evaluate"]
    several = ["--config.eval.scales=(0.5, 1.0)", "--config.eval.flip"]
    assert tiny.run(*flags, *several, f"--config.eval.save_predictions={out}") == 0
    assert f"4 label maps in {out}\n" in capsys.readouterr().out
    scores = json.loads((workdir / "metrics.json").read_text())
    assert (scores["scales"], scores["flip"]) == ([0.5, 1.0], True)
    right = total = 0
    for index in range(4):
        found = read(out / f"images/val/{index:02d}.png")[1]
        truth = read(root / f"labels/val/{index:02d}.png")[1]
        right += (found == truth).sum()
        total += (truth != 255).sum()
    assert scores["aAcc"] == pytest.approx(right / total)

    # --mode predict follows the same settings.
    flags = ["--workdir", workdir, "--mode=predict", "--save_ids", "--output", tmp_path / "own"]
    assert tiny.run(*flags, "--input", root / "images/val", *several) == 0
    for index in range(4):
        np.testing.assert_array_equal(
            read(tmp_path / f"own/{index:02d}_ids.png")[1],
            read(out / f"images/val/{index:02d}.png")[1],
        )
