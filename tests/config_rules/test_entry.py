"""Whoever takes a config asks the rules first: nothing is made, and no data are opened before."""

import importlib

import pytest

from memseg_jax import command_line, main
from memseg_jax.errors import UserError
from tests import tiny

pytestmark = [
    pytest.mark.usefixtures("quiet_entry"),
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
]
EXTRA = {"predict": ("--input=nowhere",), "plan": ("--topology=cpu:8",)}
# What comes after the config in the calls of `run`; the first is a folder.
ARGUMENTS = {
    "plan": ("cpu:8",),
    "pack": (),
    "predict": ("best", "nowhere"),
    "export": ("best", "nowhere", "out"),
}


@pytest.fixture
def in_empty_folder(tmp_path, monkeypatch):
    """The current folder; fails if there is anything in it at the end."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [mode for mode in main.MODES if mode != "init"])
def test_every_mode_of_the_program(in_empty_folder, capsys, mode):
    flags = ("--mode", mode, *EXTRA.get(mode, ()), "--config.data.packed=packed")
    assert tiny.run(*flags, "--config.optimizer.lr=-1") == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: config.optimizer.lr is -1.0; expected a number above 0")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


@pytest.mark.parametrize("mode", [mode for mode in main.MODES if mode not in ("verify", "init")])
def test_every_mode_from_python(in_empty_folder, mode):
    config = tiny.get_config()
    config.optimizer.lr = float("nan")
    module = importlib.import_module(f"memseg_jax.modes.{mode}")
    arguments = [] if mode in ("plan", "pack") else ["run"]
    with pytest.raises(UserError, match=r"^config.optimizer.lr is nan; expected a number above 0"):
        module.run(config, *arguments, *ARGUMENTS.get(mode, ()))


def test_the_converters_and_benchmarks(in_empty_folder):
    argv = ["converter", "--config", str(tiny.CONFIG), "--config.model.feature_dim=0"]
    with pytest.raises(UserError, match=r"^config.model.feature_dim is 0; expected a whole number"):
        command_line.parse(argv, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.lr=-1", "optimizer.lr is -1.0; expected a number above 0"),
        ("optimizer.lr=nan", "optimizer.lr is nan; expected a number above 0"),
        (
            "optimizer.power=-3",
            "optimizer.power is -3.0; expected a number from 0 to 100",
        ),
        ("model.dropout=1.5", "model.dropout is 1.5; expected a number of 0 or more, below 1"),
        ("model.backbone_width=0", "model.backbone_width is 0.0; expected a number above 0"),
        ("loss.class_weights=(1,2)", "loss.class_weights is (1, 2); expected as many as"),
        ("augment.crop=(96,)", "augment.crop is (96,); expected (height, width)"),
        ("augment.scale_range=(2,1)", "augment.scale_range is (2, 1); expected (least, most)"),
        ("model.feature_dim=0", "model.feature_dim is 0; expected a whole number from 1"),
        ("eval.scales=()", "eval.scales is (); expected 1 to 100 factors"),
        ("model.backbone=resnet51", "model.backbone is 'resnet51'; expected one of 'hrnetv2w48',"),
    ],
)
def test_values_that_mean_nothing(in_empty_folder, capsys, change, message):
    assert tiny.run(f"--config.{change}") == 1
    assert capsys.readouterr().err.startswith(f"error: config.{message}")
