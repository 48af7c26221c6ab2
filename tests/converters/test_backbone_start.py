"""Training that starts from a file of ImageNet weights (config.init.backbone)."""

import sys

import numpy as np
import pytest
import torch

from converters import names, torch_files
from memseg_jax import checkpoint
from memseg_jax.errors import UserError
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.training import optimizer
from memseg_jax.training.state import abstract_state, abstract_variables, init_variables
from tests import tiny
from tests.backbone_weights import (
    assert_holds,
    torch_dict,
    with_extras,
)
from tests.small_models import small_config


def test_what_is_not_in_the_file_starts_as_without_it():
    model = build_segmentor(small_config())
    plain = names.flatten(init_variables(model, 3))
    path = "params/backbone/stem_0/conv/kernel"
    known = {path: np.full(plain[path].shape, 5, np.float32)}
    ours = names.flatten(init_variables(model, 3, known))
    assert ours.keys() == plain.keys()
    for name, value in plain.items():
        np.testing.assert_array_equal(ours[name], known.get(name, value), name)


def fail_at(last):
    """What a step does that fails at some number."""

    def during(number):
        if number == last:
            raise UserError(f"stopped at step {number}")

    return during


def weights(workdir):
    """The weights of the last checkpoint by path, and its step."""
    config = tiny.get_config()
    model = build_segmentor(config)
    tx = optimizer.from_config(config, optimizer.schedule_from_config(config, 16))
    with checkpoint.Checkpointer(workdir, 2) as checkpointer:
        state = checkpointer.restore(abstract_state(model, tx))[0]
    return names.flatten(state.variables), int(state.step)


@pytest.mark.usefixtures("quiet_entry", "compilations")
@pytest.mark.slow
def test_training_starts_from_the_file_and_goes_on_without_it(
    tmp_path, capsys, caplog, monkeypatch
):
    config = tiny.get_config()
    model = build_segmentor(config)
    tensors = torch_dict(abstract_variables(model))
    path, workdir = tmp_path / "imagenet.pth", tmp_path / "run"
    torch.save({"state_dict": with_extras(tensors)}, path)
    run = (f"--config.data.root={tiny.data_root()}", "--workdir", workdir)
    run += (f"--config.init.backbone={path}",)
    fresh = names.flatten(init_variables(model, config.seed))

    def check_weights(at_step):
        after, step = weights(workdir)
        assert step == at_step
        backbone = {name: np.asarray(x) for name, x in after.items() if "/backbone/" in name}
        assert_holds(backbone, tensors, abstract_variables(model))
        for name in after.keys() - backbone.keys():
            np.testing.assert_array_equal(after[name], fresh[name], name)

    tiny.count_steps(monkeypatch, fail_at(4))
    with caplog.at_level("INFO"):
        assert tiny.run(*run) == 1
    assert "stopped at step 4" in capsys.readouterr().err
    assert f"backbone from imagenet.pth (SHA-256 {first_digits(path)}" in caplog.text
    assert f"{len(tensors)} tensors taken" in caplog.text
    check_weights(3)

    path.unlink()
    caplog.clear()
    tiny.count_steps(monkeypatch, fail_at(7))
    with caplog.at_level("INFO"):
        assert tiny.run(*run) == 1
    assert "stopped at step 7" in capsys.readouterr().err
    assert "resuming at step 3 of 16" in caplog.text
    assert "imagenet.pth" not in caplog.text
    check_weights(6)

    # A new run needs the file.
    assert tiny.run(*run[:2], tmp_path / "new", *run[3:]) == 1
    assert "imagenet.pth cannot be read" in capsys.readouterr().err


def first_digits(path):
    return torch_files.sha256_of(path)[:12]


@pytest.mark.usefixtures("quiet_entry", "compilations")
def test_without_pytorch_the_message_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    path = tmp_path / "imagenet.pth"
    torch.save({}, path)
    monkeypatch.setitem(sys.modules, "torch", None)
    root = f"--config.data.root={tiny.data_root()}"
    assert tiny.run(root, "--workdir", tmp_path, f"--config.init.backbone={path}") == 1
    assert 'pip install -e ".[convert]"' in capsys.readouterr().err
