"""ONNX files: onnxruntime computes what the predictor does; mistakes are answered."""

import sys

import numpy as np
import pytest

from converters import orbax_to_onnx
from memseg_jax import command_line
from memseg_jax.errors import UserError
from memseg_jax.exporting.agreement import Reference
from memseg_jax.models.segmentor import build_segmentor
from tests import tiny
from tests.small_models import random_variables, shallow_swin, small_config

PARTS = {
    "mcibi": ("resnet18", {"method": "mcibi"}),
    "plain": ("resnet18", {"memory": {"enabled": False}}),
    # 16 features: the draws of a class are one block of PyTorch's generator.
    "mcibi_plus_plus": ("resnet18", {"method": "mcibi_plus_plus"}),
    "swin, pyramids": (
        "swintiny",
        {"method": "mcibi_plus_plus", "context": "pyramid_pooling", "fpn": True, "fpn_dim": 16},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PARTS)
def test_onnxruntime_computes_the_same(case, monkeypatch, tmp_path):
    pytest.importorskip("onnxruntime")
    shallow_swin(monkeypatch)
    config = small_config()
    config.model.backbone, fields = PARTS[case]
    config.model.update(fields)
    variables = random_variables(build_segmentor(config), 1)
    decoder = variables["params"].get("decoder_stage2", variables["params"])
    classifier = decoder["classifier"]["conv"]
    # Otherwise one class wins everywhere.
    classifier["kernel"], classifier["bias"] = 0.1 * classifier["kernel"], 0 * classifier["bias"]
    image = np.random.default_rng(0).integers(0, 256, (49, 67, 3), dtype=np.uint8)
    network = orbax_to_onnx.picture_network(config, variables)
    orbax_to_onnx.save(network, image, file := tmp_path / "model.onnx")
    expected = Reference(config, variables).predict(image)
    for _ in range(2):  # no number is drawn when it runs
        labels, confidence = orbax_to_onnx.run(file, image)
        assert labels.dtype == np.uint8
        assert np.mean(labels != expected.label) < 2e-3
        np.testing.assert_allclose(confidence, expected.confidence, atol=5e-3)
    assert np.ptp(confidence) > 0.01


def start(*arguments):
    return command_line.run_main(orbax_to_onnx.main, ["orbax_to_onnx", *map(str, arguments)])


@pytest.mark.parametrize(
    ("output", "more", "answer"),
    [
        ("a.pb", (), "expected a name that ends in .onnx"),
        ("a.onnx", ("--size=512",), "--size: found '512'; expected HEIGHTxWIDTH"),
        ("there.onnx", (), "exists already"),
        ("a.onnx", ("--workdir=nowhere",), "nowhere"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, output, more, answer):
    monkeypatch.setattr(orbax_to_onnx, "import_onnx", lambda: None)
    (tmp_path / "there.onnx").touch()
    picture = tiny.write(tmp_path / "picture.png", tiny.picture(0)[0])
    paths = ["--workdir", tmp_path, "--input", picture, "--output", tmp_path / output]
    assert start(*paths, *more) == 1
    assert answer in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"there.onnx", "picture.png"}


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(orbax_to_onnx, "import_torch", lambda: None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r'pip install "memseg_jax\[onnx\]"'):
        orbax_to_onnx.import_onnx()
