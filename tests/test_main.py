"""The command line: what is dispatched, and what is answered to mistakes."""

import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

from memseg_jax import main as entry
from memseg_jax.errors import UserError
from memseg_jax.runtime import compilation

ROOT = Path(entry.__file__).resolve().parents[1]
CONFIG = """
from configs import common

def get_config(arg=None):
    config = common.get_config()
    config.data.class_names = ("background", "road")
    if arg is not None:
        config.seed = int(arg)
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "configs" / "tiny.py"
    path.parent.mkdir()
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def calls(monkeypatch):
    """Replaces the modes; returns the list of their calls."""
    made = []

    def fake(mode):
        module = types.ModuleType(mode)
        module.run = lambda *args: made.append((mode, *args)) or 5
        return module

    for mode in entry.MODES:
        monkeypatch.setitem(sys.modules, f"memseg_jax.modes.{mode}", fake(mode))
    monkeypatch.setattr(entry, "set_up_logging", lambda: None)
    monkeypatch.setattr(compilation, "keep_programs", lambda: made.append("cache"))
    return made


def run(*arguments):
    return entry.main(["main", *arguments])


# ---------------------------------------------------------------------------------- dispatch


def test_train_is_the_default(config_file, calls):
    assert run("--config", config_file) == 0
    (mode, config, workdir) = calls[1]
    assert calls[0] == "cache"
    assert (mode, workdir) == ("train", "runs/tiny")
    assert config.is_locked
    assert config.train.is_locked


def test_overrides_argument_and_order(config_file, calls):
    run(
        "--config.train.batch_size=8",
        "--workdir=here",
        f"--config={config_file}:7",
        "--config.augment.crop=(64,48)",
        "--noconfig.model.auxiliary",
        "--config.loss.stage1=1",
    )
    (_, config, workdir) = calls[1]
    assert (config.seed, config.train.batch_size, workdir) == (7, 8, "here")
    assert (config.augment.crop, config.model.auxiliary) == ((64, 48), False)
    assert config.loss.stage1 == 1.0


def test_workdir_of_a_config_with_an_argument(config_file, calls):
    run("--config", f"{config_file}:7")
    assert calls[1][2] == "runs/tiny_7"


def test_evaluate(config_file, calls):
    run("--config", config_file, "--mode", "evaluate")
    run("--config", config_file, "--mode=evaluate", "--checkpoint=300")
    assert [call[2:] for call in calls if call != "cache"] == [
        ("runs/tiny", "best"),
        ("runs/tiny", 300),
    ]


def test_predict(config_file, calls):
    common = ("--config", config_file, "--mode", "predict", "--input", "photos")
    run(*common)
    more = ("--save_ids", "--checkpoint", "last", "--save_confidence=false", "--overwrite")
    run(*common, "--output", "out", *more)
    assert [call[2:] for call in calls if call != "cache"] == [
        ("runs/tiny", "best", "photos", "runs/tiny/predictions", False, False, False),
        ("runs/tiny", "last", "photos", "out", False, True, True),
    ]


def test_export(config_file, calls):
    common = ("--config", config_file, "--mode", "export", "--input", "photo.jpg")
    run(*common)
    run(*common, "--output", "out", "--sizes", "512x512", "--weights=int8", "--checkpoint=last")
    assert [call[2:] for call in calls if call != "cache"] == [
        ("runs/tiny", "best", "photo.jpg", "runs/tiny/export", "", "float32"),
        ("runs/tiny", "last", "photo.jpg", "out", "512x512", "int8"),
    ]


def test_report(config_file, calls, monkeypatch):
    run("--mode", "report", "--workdir", "runs/a")  # with the config of the checkpoint
    run("--mode=report", "--config", config_file, "--checkpoint=300", "--overwrite")
    (_, *first), (_, config, workdir, *second) = (call for call in calls if call != "cache")
    assert first == [None, "runs/a", "best", False]
    assert (workdir, config.data.class_names[1], *second) == ("runs/tiny", "road", 300, True)
    compared = []
    module = sys.modules["memseg_jax.modes.report"]
    monkeypatch.setattr(module, "compare", lambda *args: compared.append(args), raising=False)
    assert run("--mode", "report", "--compare", "a,b", "--output", "page.html") == 0
    assert compared == [("a,b", "page.html")]


def test_check_data_returns_its_status(config_file, calls):
    assert run("--config", config_file, "--mode", "check_data") == 5
    run("--config", config_file, "--mode", "check_data", "--output", "pictures")
    assert [(call[0], *call[2:]) for call in calls] == [
        ("check_data", "runs/tiny/check_data"),
        ("check_data", "pictures"),
    ]


# ---------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--mode", "evalute"], "no mode 'evalute'. Did you mean evaluate?"),
        (["--workdri=x"], "no flag --workdri. Did you mean --workdir?"),
        (["--zzz"], "no flag --zzz. There are: --config, --workdir, --mode"),
        (["--config.train.batchsize=8"], "Did you mean --config.train.batch_size"),
        (["--config.lr=8"], "no field 'lr'. Did you mean --config.optimizer.lr?"),
        (["--noconfig.model.auxilliary"], "Did you mean --config.model.auxiliary"),
        (["--config.train.batch_size=abc"], "batch_size=abc: expected a whole number such as 16"),
        (["--config.train.batch_size", "8.5"], "expected a whole number such as 16"),
        (["--config.loss.stage1=x"], "expected a number such as 0.4"),
        (["--config.model.auxiliary=maybe"], "expected true or false"),
        (["--config.augment.crop=96x96"], "expected a tuple such as --config.augment.crop='(512"),
        (["--config.train=3"], "a group of fields. Override one of them: --config.train."),
        (["--config.train.batch_size"], "Missing value"),
        (["extra"], "unexpected argument 'extra'"),
        (["--input", "x"], "--input is only for --mode predict"),
        (["--checkpoint", "best"], "--checkpoint is only for --mode evaluate and predict"),
        (["--mode", "predict"], "needs --input"),
        (["--mode", "export"], "--mode export needs --input"),
        (["--weights", "int8"], "--weights is only for --mode export"),
        (["--mode", "evaluate", "--checkpoint", "bets"], "expected best, last or a step"),
        (["--save_ids=maybe"], "--save_ids=maybe: expected true or false"),
    ],
)
def test_mistakes(config_file, calls, capsys, arguments, answer):
    assert run("--config", config_file, *arguments) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert answer in shown
    assert "Traceback" not in shown
    assert shown.count("\n") == 1
    assert calls == []


@pytest.mark.parametrize("arguments", [[], ["--mode=train"], ["--config.train.batch_size=3"]])
def test_config_is_required(calls, capsys, arguments):
    assert run(*arguments) == 1
    assert "error: --config FILE is required" in capsys.readouterr().err


def test_missing_config_file(config_file, calls, capsys):
    assert run("--config", config_file.replace("tiny", "tinny")) == 1
    shown = capsys.readouterr().err
    assert "no config file" in shown
    assert f"Did you mean {config_file}?" in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("import no_such_module", "No module named 'no_such_module'"),
        ("def get_config(): return open('/no/file')", "/no/file"),
        ("x = (", "SyntaxError"),
        ("y = 1", "get_config"),
    ],
)
def test_failing_config_file_is_named(config_file, calls, capsys, text, shown):
    Path(config_file).write_text(text)
    assert run("--config", config_file) == 1
    error = capsys.readouterr().err
    assert f"the config file {config_file} failed" in error
    assert shown in error


def test_config_of_another_type(config_file, calls, capsys):
    Path(config_file).write_text("def get_config(): return {'a': 1}")
    assert run("--config", config_file) == 1
    assert "returned dict; it must return an ml_collections.ConfigDict" in capsys.readouterr().err


def test_user_errors_of_a_mode(config_file, calls, monkeypatch, capsys):
    def fail(*args):
        raise UserError("label.png holds 200")

    monkeypatch.setattr(sys.modules["memseg_jax.modes.train"], "run", fail)
    assert run("--config", config_file) == 1
    assert capsys.readouterr().err == "error: label.png holds 200\n"

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["memseg_jax.modes.train"], "run", stop)
    assert run("--config", config_file) == 130


# -------------------------------------------------------------------------- the real program


def program(*arguments, cwd=ROOT):
    command = [sys.executable, "-m", "memseg_jax.main", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_help():
    result = program("--help")
    assert result.returncode == 0
    assert result.stderr == ""
    for name in ("config", *entry.FLAGS):
        assert f"\n  --{name} " in result.stdout
    assert "examples:" in result.stdout
    assert "verbosity" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) < 100


def test_mistake_in_the_real_program(config_file):
    result = program("--config", config_file, "--config.train.batchsize=8")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: the config has no field 'train.batchsize'.")
    assert result.stderr.count("\n") == 1


def test_starting_does_not_import_jax():
    code = "import sys, memseg_jax.main; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_logging_shows_our_messages_and_not_those_of_libraries():
    # In a process of its own, because logging is global.
    code = """
        import memseg_jax.main as entry
        from memseg_jax import errors
        from absl import logging
        entry.flags.FLAGS.mark_as_parsed()
        entry.set_up_logging()
        entry.set_up_logging()
        exec(compile("logging.info('ours %d', 1)", errors.__file__, "exec"))
        logging.info("of a library")
        logging.warning("warned")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("", "ours 1\nwarned\n")
