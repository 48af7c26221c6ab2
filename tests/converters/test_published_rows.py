"""All 18 published models at full size, from a file of PyTorch to scores and back."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch

from converters import (
    check_parity,
    orbax_to_torch,
    taps,
    torch_files,
    torch_to_orbax,
)
from memseg_jax import command_line, main
from memseg_jax.command_line import load_config
from memseg_jax.models.segmentor import build_segmentor
from tests import tiny
from tests.converters import files
from tests.goldens import manifest, rule_array
from tests.official_trees import write_tree
from tests.small_models import FAST_COMPILE

MODELS = {  # the end of a config's name -> name in the reference
    "resnet50": "resnet50os8",
    "resnet101": "resnet101os8",
    "resnest101": "resnest101os8",
    "hrnet": "hrnetv2w48",
    "vit": "vitlarge",
}
ROWS = [
    f"{data}_{model}"
    for data in ("ade20k", "cityscapes", "cocostuff10k", "lip")
    for model in MODELS
    if model != "vit" or data in ("ade20k", "cocostuff10k")
]
# The others take longer, and their training steps go through the same names
# (test_torch_training.py); the rest differ in the number of classes or of blocks.
ALWAYS = ("lip_resnet50",)
SMALL = (  # images and windows are tiny: all of the network, little of its arithmetic
    "--config.eval.base_size=(64, 48)",
    "--config.eval.window=(48, 48)",
    "--config.eval.stride=(32, 32)",
    "--config.eval.exact_sizes=1",
)


def reference_name(row: str) -> str:
    data, model = row.split("_")
    era = "_2021" if row == "cocostuff10k_vit" else ""  # the one whose shapes have changed
    return f"{MODELS[model]}_{data}{era}"


def test_there_are_18_rows():
    assert len(ROWS) == 18


@pytest.mark.slow
@pytest.mark.golden
@pytest.mark.usefixtures("quiet_entry", "compilations")
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=() if row in ALWAYS else pytest.mark.exhaustive, id=row)
        for row in ROWS
    ],
)
def test_a_published_model_converts_evaluates_and_comes_back(row, tmp_path, capsys, monkeypatch):
    data, _ = row.split("_")
    flag = f"configs/{row}.py"
    monkeypatch.chdir(tiny.ROOT)
    tensors = {
        key: torch.from_numpy(rule_array(key, shape))
        for key, shape, _ in manifest(reference_name(row))
    }

    # Both eras' files give the same variables.
    old = files.save_2021(tmp_path / "old.pth", tensors)
    config = load_config(flag)
    model = build_segmentor(config)
    wanted, _ = torch_to_orbax.to_variables(torch_files.read(old), model, config)
    new = files.save_now(tmp_path / "new.pth", tensors)
    found, _ = torch_to_orbax.to_variables(torch_files.read(new), model, config)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    del found, wanted
    old.unlink()

    # The program converts, and the converted checkpoint evaluates.
    run = tmp_path / "run"
    arguments = ["x", "--config", flag, "--checkpoint", str(new), "--output", str(run)]
    assert command_line.run_main(torch_to_orbax.main, arguments) == 0
    write_tree(data, tmp_path / "data", size=(48, 64))
    split = "validation" if data == "ade20k" else "test" if data == "cocostuff10k" else "val"
    arguments = ["main", "--config", flag, *SMALL, f"--config.data.root={tmp_path / 'data'}"]
    arguments += [f"--config.data.eval_split={split}", "--workdir", str(run), "--mode", "evaluate"]
    assert main.main(arguments) == 0, capsys.readouterr().err
    scores = json.loads((run / "metrics.json").read_text())
    assert scores["images"] == 2
    assert 0 <= scores["mIoU"] <= 1

    # The way back gives every bit, in the order of the reference.
    back = orbax_to_torch.convert(run, "best", tmp_path / "back.pth")
    shutil.rmtree(run)
    returned = torch.load(back, weights_only=True, mmap=True)["model"]
    assert list(returned) == list(tensors)
    assert all(torch.equal(returned[key], tensors[key]) for key in tensors)
    back.unlink()
    del returned, tensors

    # Both implementations compute the same.
    capsys.readouterr()
    monkeypatch.setattr(taps, "COMPILER_OPTIONS", FAST_COMPILE)
    arguments = ["x", "--config", flag, "--checkpoint", str(new), "--size", "49x65"]
    status = command_line.run_main(check_parity.main, [*arguments, "--nobfloat16"])
    assert status == 0, capsys.readouterr()
    new.unlink()  # pytest would keep it, and those of the other 17 rows
