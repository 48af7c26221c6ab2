"""The command that measures an accelerator: what it refuses, and a whole run at small sizes."""

import dataclasses
import os
import re
import shutil
import subprocess

import pytest

from benchmarks.accelerator import __main__ as accelerator
from benchmarks.accelerator import plan, report, run
from memseg_jax import command_line
from tests import tiny
from tests.accelerator.made_up import found
from tests.small_models import FAST_COMPILE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes=0"], "--minutes 0: expected a positive number"),
        (["--minutes=soon"], "--minutes soon: expected a positive number"),
        (["--batch=-2"], "--batch -2: expected a positive number"),
        (["--only=quickstrat"], "Did you mean quickstart?"),
        (["--camvid=nowhere"], "--camvid nowhere: there is no train.txt"),
        (["--minute=3"], "there is no flag --minute. Did you mean --minutes?"),
    ],
)
def test_mistakes(arguments, message, tmp_path, capsys):
    line = ["accelerator", f"--output={tmp_path / 'out'}", *arguments]
    assert command_line.run_main(accelerator.main, line) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "benchmarks/accelerator.sh VENV"),
        (["--minutes=3"], {}, "benchmarks/accelerator.sh VENV"),
        (["new"], {"ACCELERATOR": "gpu"}, "ACCELERATOR=gpu: expected cuda, tpu or cpu"),
    ],
)
def test_the_script_refuses_before_it_installs(arguments, environment, message, tmp_path):
    bash = shutil.which("bash") or pytest.skip("no bash here")
    script = tiny.ROOT / "benchmarks" / "accelerator.sh"
    assert script.stat().st_mode & 0o111
    found = [str(tmp_path / x) if x == "new" else x for x in arguments]
    done = subprocess.run(
        [bash, str(script), *found], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_page_names_flags_that_there_are():
    text = (tiny.ROOT / "docs" / "accelerator.md").read_text(encoding="utf-8")
    lines = re.findall(r"benchmarks\.accelerator( [^\n#`]*)", text)
    named = {name for line in lines for name in re.findall(r"--(\w+)", line)}
    assert named == {"minutes", "camvid", "list", "only"}
    assert named <= accelerator.FLAGS.keys()


def looks(monkeypatch, *values):
    """Lets each call find another machine."""
    values = iter(values)

    def look(chosen, folder, left):
        run.write_result(folder, value := next(values))
        return value

    monkeypatch.setattr(run, "run_step", look)


def test_a_folder_belongs_to_one_device(tmp_path, monkeypatch, capsys):
    looks(monkeypatch, found("NVIDIA H200"), found("TPU v4"))
    monkeypatch.setattr(run, "run_all", lambda *_: [])
    line = ["accelerator", f"--output={tmp_path}"]
    assert command_line.run_main(accelerator.main, line) == 0
    assert command_line.run_main(accelerator.main, line) == 1
    message = capsys.readouterr().err
    assert "has figures of 'NVIDIA H200', and JAX finds 'TPU v4' here" in message
    assert run.machine_of(run.read_all(tmp_path))["device"] == "NVIDIA H200"


def test_a_gpu_that_jax_does_not_see_is_no_cpu(tmp_path, monkeypatch, capsys):
    looks(monkeypatch, found("cpu", platform="cpu", nvidia_smi="NVIDIA L4, 570.1"))
    line = ["accelerator", f"--output={tmp_path}"]
    assert command_line.run_main(accelerator.main, line) == 1
    assert (
        "this machine has 'NVIDIA L4, 570.1', but JAX finds only its CPU" in capsys.readouterr().err
    )


def test_a_cpu_gets_reduced_sizes(tmp_path, monkeypatch, capsys):
    taken = []
    looks(monkeypatch, found("cpu", platform="cpu"))
    monkeypatch.setattr(run, "run_all", lambda steps, *_: taken.extend(steps) or [])
    assert command_line.run_main(accelerator.main, ["accelerator", f"--output={tmp_path}"]) == 0
    assert taken == plan.steps(plan.REDUCED)
    assert "no accelerator here" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_command_on_a_cpu(tmp_path, monkeypatch, capsys):
    """Every kind of step but those that `test_benchmarks.py` runs, at the smallest sizes."""
    pytest.importorskip("torch")
    small = dataclasses.replace(
        plan.REDUCED,
        models={"resnet18": "tests/tiny_config.py"},
        goldens={},
        small=("--config.model.auxiliary=False",),
        crop="32x32",
        large=("tests/tiny_config.py", "32x32"),
        seconds=0,
        parity="32x32",
        quickstart=(
            "--config.data.num_train=32",
            "--config.data.num_val=2",
            *plan.REDUCED.quickstart,
        ),
        duration=20,  # of patience, whatever else runs
    )
    monkeypatch.setattr(plan, "REDUCED", small)
    # One device, not the eight of the tests, and programs that compile quickly.
    options = (f"--{name}={int(value)}" for name, value in FAST_COMPILE.items())
    monkeypatch.setenv("XLA_FLAGS", " ".join(options))
    line = ["accelerator", f"--output={tmp_path}", "--reduced", "--minutes=1000"]
    line.append("--only=parity-resnet18,kernels-resnet18,benchmark-resnet18-float32,memory-update")
    assert accelerator.main(line) == 0
    text = (tmp_path / report.REPORT).read_text()
    assert "| the CPU, resnet18, 3 classes, 2 x 32x32 | logits | 0.0e+00 |" in text
    assert "5 training steps: resnet18" in text
    assert "| resnet18, 2 x 32x32, float32 |" in text
    assert "not measured" in text
    capsys.readouterr()
    assert accelerator.main(line) == 0  # and nothing is measured again
    assert capsys.readouterr().err.count(": ended before") == 5
