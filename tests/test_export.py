"""The export mode: what is in the folder, that it runs without this project, what is refused."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from memseg_jax import main
from memseg_jax.errors import UserError
from memseg_jax.exporting import load
from memseg_jax.models import segmentor
from memseg_jax.modes import export
from memseg_jax.runtime import compilation
from tests import tiny
from tests.small_models import ThreeConvolutions
from tests.tiny_config import CLASSES, COLOURS

SIZE = (33, 47)
# Runs a loader where this project cannot be imported.
ALONE = """
import json, runpy, sys
import numpy as np
sys.modules.update(memseg_jax=None, configs=None)
model = runpy.run_path("load.py")["Model"](".")
found = []
for height, width in ((33, 47), (40, 24)):
    labels, confidence = model(np.full((height, width, 3), 90, np.uint8))
    found.append([labels.shape, str(labels.dtype), confidence.shape, str(confidence.dtype)])
print(json.dumps(found))
runpy.run_path("load.py", run_name="__main__")
"""


def run(workdir, picture, output, *arguments):
    return tiny.run(
        "--mode=export", "--workdir", workdir, "--input", picture, "--output", output, *arguments
    )


@pytest.fixture(scope="module")
def small_network():
    """Three convolutions for a backbone, and quick compilations, for all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentor, "build_backbone", lambda *args: ThreeConvolutions())
        patch.setattr(compilation, "compile_with_notice", tiny.compile_quickly)
        patch.setattr(main, "set_up_logging", lambda: None)
        patch.setattr(compilation, "keep_programs", lambda: None)
        yield


@pytest.fixture(scope="module")
def workdir(small_network, tmp_path_factory):
    return tiny.save_random_model(tmp_path_factory.mktemp("random_model"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A picture with a palette, of odd sides."""
    image = Image.fromarray(tiny.picture(5, *SIZE)[0]).quantize(64)
    image.save(path := tmp_path_factory.mktemp("picture") / "palette.png")
    return path


@pytest.fixture(scope="module")
def exported(workdir, picture, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "export"
    assert run(workdir, picture, folder) == 0
    return folder


def test_files_and_description(exported):
    files = {"33x47.stablehlo", "any_size.stablehlo", "check.npz", "load.py", "weights.npz"}
    assert {path.name for path in exported.iterdir()} == files | {"model.json"}
    assert [path.name for path in exported.parent.iterdir()] == ["export"]
    text = (exported / "model.json").read_text()
    description = json.loads(text)
    assert set(description["sha256"]) == files
    assert description["class_names"] == list(CLASSES)
    assert description["palette"] == [list(color) for color in COLOURS]
    assert description["platforms"] == ["cpu", "cuda", "tpu"]
    assert (description["step"], description["loss"]) == (7, None)
    assert [check["size"] for check in description["checked"]] == [[33, 47], [32, 46]]
    for check in description["checked"]:
        assert check["labels"] <= description["tolerance"]["labels"]
        assert 0 < check["confidence"] <= description["tolerance"]["confidence"]
    assert str(exported.parent) not in text
    assert len((exported / "load.py").read_text().splitlines()) < 60


def test_what_predict_writes(exported, workdir, picture, tmp_path):
    assert tiny.run(
        "--mode=predict", "--workdir", workdir, "--input", picture, "--output", tmp_path,
        "--save_ids",
    ) == 0  # fmt: skip
    with Image.open(tmp_path / "palette_ids.png") as written, Image.open(picture) as image:
        labels, _ = load.Model(exported)(np.asarray(image.convert("RGB")))
        assert np.mean(labels != np.asarray(written)) < 1e-3
        assert len(np.unique(labels)) > 1


def alone(python, folder, flags=""):
    """Runs an export with a Python that cannot import this project."""
    command = [python, "-c", ALONE]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found, checked = result.stdout.splitlines()
    sizes = ([33, 47], [40, 24])
    assert json.loads(found) == [[size, "uint8", size, "float32"] for size in sizes]
    assert checked.startswith("cpu: labels differ at 0.0")


def test_without_this_project(exported):
    alone(sys.executable, exported, tiny.FLAGS)


@pytest.mark.slow
def test_in_a_fresh_environment(exported, tmp_path):
    venv.create(tmp_path, with_pip=True)
    python = str(tmp_path / "bin" / "python")
    needed = ["jax", "numpy", "flatbuffers"]
    subprocess.run([python, "-m", "pip", "install", "-q", *needed], check=True)
    alone(python, exported)


@pytest.mark.parametrize("name", ["weights.npz", "any_size.stablehlo", "33x47.stablehlo"])
def test_damage_is_named(exported, tmp_path, name):
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    size = (40, 40) if name.startswith("any") else SIZE
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        load.Model(tmp_path)(np.zeros((*size, 3), np.uint8))


def test_another_kind_of_image(exported):
    with pytest.raises(ValueError, match=r"image is float32 \(8, 8, 3\); expected RGB uint8"):
        load.Model(exported)(np.zeros((8, 8, 3), np.float32))


@pytest.mark.slow
def test_int8_and_what_it_costs(workdir, picture, exported, tmp_path, capsys):
    root = f"--config.data.root={tiny.data_root()}"
    folder = tmp_path / "int8"
    assert run(workdir, picture, folder, root, "--weights=int8", "--sizes=16x16,33x47") == 0
    description = json.loads((folder / "model.json").read_text())
    loss = description["loss"]
    assert loss["lost"] == loss["mIoU"]["float32"] - loss["mIoU"]["int8"]
    assert abs(loss["lost"]) < 0.1
    assert "lost" in capsys.readouterr().out
    assert [check["size"] for check in description["checked"]] == [[16, 16], [33, 47], [32, 46]]
    sizes = [(path / "weights.npz").stat().st_size for path in (folder, exported)]
    assert sizes[0] < 0.6 * sizes[1]  # small arrays, each with a header, are much of these files


# ---- What is refused ----------------------------------------------------------------------------


class Wrong:
    """Stands for a program of another network."""

    def __init__(self, folder):
        assert (Path(folder) / "model.json").is_file()

    def __call__(self, image):
        return np.full(image.shape[:2], 2, np.uint8), np.zeros(image.shape[:2], np.float32)


def test_a_difference_leaves_nothing(workdir, picture, tmp_path, monkeypatch, capsys):
    empty = type("Empty", (), {"serialize": lambda self: b"program"})
    monkeypatch.setattr(export.program, "exported", lambda *args: empty())
    monkeypatch.setattr(load, "Model", Wrong)
    assert run(workdir, picture, tmp_path / "out" / "export") == 1
    shown = capsys.readouterr().err
    assert "33x47.stablehlo at 33x47: labels differ from the predictor's at" in shown
    assert "Nothing was written" in shown
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--weights=int4"], "--weights int4: there is no such form. Did you mean int8?"),
        (["--sizes=512"], "--sizes=512: found '512'; expected HEIGHTxWIDTH"),
        (["--sizes=512x0"], "found '512x0'"),
        (["--checkpoint=3"], "step 3"),
    ],
)
def test_mistakes(workdir, picture, tmp_path, capsys, arguments, answer):
    assert run(workdir, picture, tmp_path / "export", *arguments) == 1
    assert answer in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(workdir, picture, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("kept")
    assert run(workdir, picture, tmp_path) == 1
    assert "exists already: remove it, or choose another --output" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_sizes():
    assert export.parse_sizes("") == []
    assert export.parse_sizes("512x512, 480x640,512x512") == [(512, 512), (480, 640)]
    with pytest.raises(UserError):
        export.parse_sizes("512x512,")
