"""A run with the residual form of the memory: every mode takes it from the config alone."""

import json

import numpy as np
import pytest

import memseg_jax
from memseg_jax.exporting import load
from tests import tiny

pytestmark = pytest.mark.usefixtures("quiet_entry", "compilations", "three_convolutions")


@pytest.mark.slow
def test_every_mode(tmp_path):
    data, field = f"--config.data.root={tiny.data_root()}", "--config.model.memory.fusion=residual"
    run, export, picture = tmp_path / "run", tmp_path / "export", tmp_path / "picture.png"
    tiny.write(picture, tiny.picture(5)[0])
    on_run = [field, data, "--workdir", run]
    assert tiny.run(*on_run, "--config.train.epochs=2") == 0
    scores = json.loads((run / "metrics.json").read_text())
    assert scores["step"] == 8

    assert tiny.run(*on_run, "--mode=evaluate", "--config.train.epochs=2") == 0
    assert json.loads((run / "metrics.json").read_text())["mIoU"] == scores["mIoU"]

    model = memseg_jax.load(run)
    scale = model.variables["params"]["memory_module"]["bottleneck_ms"]["norm"]["scale"]
    assert np.abs(scale).min() > 0
    assert model.memory.any()
    found = model.predict(picture)
    assert model.look(picture).at(3, 4).rows

    assert tiny.run(*on_run, "--mode=export", "--input", picture, "--output", export) == 0
    labels, _ = load.Model(export)(tiny.picture(5)[0])
    assert np.mean(labels != found.labels) < 1e-2
    assert tiny.run(*on_run, "--mode=memory", "--input", picture) == 0
    assert (run / "memory" / "memory.html").is_file()
