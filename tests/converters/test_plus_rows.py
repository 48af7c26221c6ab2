"""All 37 published models of MCIBI++ at full size: a file of PyTorch to ours and back, compared."""

import pathlib

import pytest
import torch

from converters import check_parity, orbax_to_torch, taps, torch_files, torch_to_orbax
from converters.torch_model import build_torch_model
from memseg_jax import command_line
from memseg_jax.command_line import load_config
from memseg_jax.models.segmentor import build_segmentor
from tests import tiny
from tests.small_models import FAST_COMPILE
from tests.torch_models_plus import rule_weights

ROWS = sorted(path.stem for path in (pathlib.Path(tiny.ROOT) / "configs" / "plus").glob("*_*.py"))
# Each context, with and without a pyramid, and of the backbones those that compile quickly.
ALWAYS = ("ade20k_fcn_resnet50", "lip_ppm_resnet50", "vspw_upernet_swinlarge")


def test_there_are_37_rows():
    assert len(ROWS) == 37


@pytest.mark.slow
@pytest.mark.golden
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=() if row in ALWAYS else pytest.mark.exhaustive, id=row)
        for row in ROWS
    ],
)
def test_a_published_model_converts_comes_back_and_computes_the_same(
    row, tmp_path, capsys, monkeypatch
):
    flag = f"configs/plus/{row}.py"
    monkeypatch.chdir(tiny.ROOT)
    config = load_config(flag)
    with torch.device("meta"):
        tensors = rule_weights(build_torch_model(config))
    path = tmp_path / "model.pth"
    torch.save({"cur_epoch": 130, "model": tensors}, path)

    variables, conversion = torch_to_orbax.to_variables(
        torch_files.read(path), build_segmentor(config), config
    )
    everything = {*conversion.taken, *conversion.kept_beside, *conversion.derived}
    assert everything == tensors.keys()
    returned = orbax_to_torch.state_dict(variables, config, conversion.kept_beside)
    assert list(returned) == list(tensors)
    assert all(torch.equal(returned[key], tensors[key]) for key in tensors)
    del variables, returned, tensors

    monkeypatch.setattr(taps, "COMPILER_OPTIONS", FAST_COMPILE)
    arguments = ["x", "--config", flag, "--checkpoint", str(path), "--size", "49x65"]
    status = command_line.run_main(check_parity.main, [*arguments, "--nobfloat16"])
    assert status == 0, capsys.readouterr()
    path.unlink()  # pytest would keep it, and those of the other rows
