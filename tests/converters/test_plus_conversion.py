"""MCIBI++ from PyTorch's files and back: names, shapes, buffers, and what is refused."""

import jax
import numpy as np
import pytest
import torch

from converters import check_parity, orbax_to_torch, torch_files, torch_to_orbax
from memseg_jax.errors import UserError
from memseg_jax.models import swin
from memseg_jax.models.segmentor import build_segmentor
from tests.small_models import FAST_COMPILE, random_variables, small_config

INDEX = "backbone_net.stages.0.blocks.1.attn.w_msa.relative_position_index"


def plus_config(**fields):
    """A small MCIBI++ with everything: Swin, a context, a second attention, a pyramid."""
    config = small_config()
    config.model.method = "mcibi_plus_plus"
    config.model.backbone = "swintiny"
    config.model.backbone_width = 0.01  # one head
    config.model.context = "pyramid_pooling"
    config.model.fpn = True
    config.model.fpn_dim = 8
    config.model.memory.fuse_before_fpn = True
    config.model.memory.base_lr = 0.0
    config.model.memory.momentum = 0.1
    for name, value in fields.items():
        config.model[name] = value
    return config


@pytest.fixture(scope="module", autouse=True)
def shallow():
    """Swin with two blocks in the first stage, of which one is shifted, and one in each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(swin.VARIANTS, "swintiny", ((2, 1, 1, 1), 1, 3))
        yield


@pytest.fixture(scope="module")
def config(shallow):
    return plus_config()


@pytest.fixture(scope="module")
def variables(config):
    variables = random_variables(build_segmentor(config), 0)
    variables["memory"][:, 1] = np.abs(variables["memory"][:, 1])
    return variables


def read(path, tensors):
    torch.save({"model": tensors}, path)
    return torch_files.read(path)


def test_there_and_back_every_value_is_the_same(tmp_path, config, variables):
    tensors = orbax_to_torch.state_dict(variables, config)
    assert tensors["memory_module.memory"].shape == (5, 2)
    file = read(tmp_path / "x.pth", tensors)
    found, conversion = torch_to_orbax.to_variables(file, build_segmentor(config), config)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    assert len(conversion.derived) == 5
    assert "5 that follow from others" in conversion.summary()
    everything = {*conversion.taken, *conversion.kept_beside, *conversion.derived}
    assert everything == tensors.keys()
    assert f"derived  {INDEX}" in torch_to_orbax.report(file, conversion)


def test_both_implementations_compute_the_same(tmp_path, config, variables, monkeypatch):
    monkeypatch.setattr(check_parity.taps, "COMPILER_OPTIONS", FAST_COMPILE)
    file = read(tmp_path / "x.pth", orbax_to_torch.state_dict(variables, config))
    images = np.random.default_rng(1).standard_normal((1, 3, 75, 90)).astype(np.float32)
    rows, _ = check_parity.check(file, config, images, bfloat16=False)
    compared = {row.name for row in rows}
    taps = "patch_embed stage0_block1 backbone.3 context cwi_logits pr_logits selfatt_context"
    taps += " lateral.2 fpn.2 memory_output cls_logits labels"
    assert compared >= set(taps.split())
    assert check_parity.first_exceeding(rows) is None, rows
    assert "the logits differ by at most" in check_parity.verdict(rows)


@pytest.mark.parametrize("change", ["values", "type", "missing", "unknown"])
def test_buffers_are_checked(tmp_path, config, variables, change):
    tensors = orbax_to_torch.state_dict(variables, config)
    message = f"{INDEX} .* is not what it is in the PyTorch reference"
    if change == "values":
        tensors[INDEX] = tensors[INDEX].flip(0)
    elif change == "type":
        tensors[INDEX] = tensors[INDEX].int()
    elif change == "missing":
        del tensors[INDEX]
        message = f"1 missing in the file:\n    {INDEX}"
    else:
        tensors[INDEX.replace("blocks.1", "blocks.2")] = tensors[INDEX]
        message = "1 not in the model"
    file = read(tmp_path / "x.pth", tensors)
    with pytest.raises(UserError, match=message):
        torch_to_orbax.to_variables(file, build_segmentor(config), config)


def test_the_other_method_and_another_backbone_are_recognised(tmp_path, config, variables):
    other = small_config()
    other.model.backbone = "swintiny"
    other.model.backbone_width = 0.01
    tensors = {key: torch.zeros(3) for key in orbax_to_torch.state_dict(variables, config)}
    tensors["backbone_net.stages.0.blocks.0.norm1.bias"] = torch.zeros(96)
    file = read(tmp_path / "x.pth", tensors)
    with pytest.raises(UserError, match=r"config\.model\.method = 'mcibi_plus_plus', the config's"):
        torch_to_orbax.to_variables(file, build_segmentor(other), other)
    resnet = plus_config(backbone="resnet18")
    with pytest.raises(UserError, match="the file has the backbone swintiny"):
        torch_to_orbax.to_variables(file, build_segmentor(resnet), resnet)
