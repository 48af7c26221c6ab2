"""The command that measures an accelerator: its plan, its steps, goals and report."""

import contextlib
import dataclasses
import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.accelerator import __main__ as accelerator
from benchmarks.accelerator import goals, plan, process, report, run
from benchmarks.accelerator.plan import Step
from memseg_jax import command_line, main
from memseg_jax.errors import UserError

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def step(name, code, seconds=1.0, files=()):
    """A step that runs a line of Python."""
    return Step(name, (("-c", code),), seconds, "a test", files)


def printing(values):
    return f"print({json.dumps(json.dumps(values))})"


def statuses(outcomes):
    return {outcome.name: outcome.status for outcome in outcomes}


# ---- The plan -----------------------------------------------------------------------------------


def test_what_matters_most_comes_first():
    names = [x.name for x in plan.steps(plan.FULL)]
    assert names[:2] == ["machine", "goldens-resnet50os8"]
    reached, total = set(), 0.0
    for x in plan.steps(plan.FULL):
        total += x.seconds
        if total < 20 * 60:
            reached.add(x.name)
    assert reached >= {
        "parity-resnet50",
        "training-resnet50",
        "benchmark-resnet50-bfloat16",
        "benchmark-large-images",
    }
    assert {f"benchmark-{x}-{y}" for x in plan.FULL.models for y in plan.FULL.dtypes} <= set(names)


def test_camvid_is_trained_on_where_there_is_camvid():
    without = [x.name for x in plan.steps(plan.FULL)]
    with_it = [x.name for x in plan.steps(plan.FULL, "/camvid")]
    assert [name for name in with_it if not name.startswith("camvid-")] == without
    trained = [name for name in with_it if name.startswith("camvid-")]
    assert trained[:3] == ["camvid-memory-0", "camvid-baseline-0", "camvid-memory-1"]
    assert len(trained) == 2 * plan.SEEDS
    first, last = (with_it.index(name) for name in (trained[0], trained[-1]))
    assert first < with_it.index("benchmark-resnet101-bfloat16") < last == len(with_it) - 1


def test_reduced_steps_fit_into_ten_minutes():
    assert sum(x.seconds for x in plan.steps(plan.REDUCED)) < 600


@pytest.mark.parametrize("sizes", [plan.FULL, plan.REDUCED], ids=lambda x: x.name)
def test_every_program_accepts_its_arguments(sizes, monkeypatch):
    """The plan is not tried at full size here: at least its flags and configs are right."""
    pytest.importorskip("torch")
    seen = set()
    for x in plan.steps(sizes, "/camvid"):
        for _, module, *arguments in x.commands:
            if module == "benchmarks.accelerator.machine":
                continue
            found = importlib.import_module(module)
            flags = {name: value[0] for name, value in found.FLAGS.items()}
            if module == "memseg_jax.main":
                assert found is main
                flags = {name: (value[0], value[-1]) for name, value in found.FLAGS.items()}
            else:
                flags = dict(found.FLAGS) | {"seconds": ""}
            with_config = command_line.names_config(arguments)
            command_line.parse([module, *arguments], flags, with_config=with_config)
            seen.add(module.rpartition(".")[2])
    assert seen >= {"device_parity", "training_step", "convolutions", "longest_kernels", "main"}


def test_only_some_steps():
    steps = plan.steps(plan.FULL, "/camvid")
    chosen = plan.choose(steps, "camvid-*-0, loss")
    assert [x.name for x in chosen] == ["machine", "loss", "camvid-memory-0", "camvid-baseline-0"]
    assert plan.choose(steps, None) == steps
    with pytest.raises(UserError, match="--only los: there is no step of that name. Did you mean"):
        plan.choose(steps, "los")


# ---- Running it ---------------------------------------------------------------------------------


def test_a_failed_step_does_not_end_the_run_and_is_tried_again(tmp_path):
    here = tmp_path / "ran.txt"
    count = f"open({str(here)!r}, 'a').write('x'); "
    mended = tmp_path / "mended"
    steps = [
        step("good", count + printing({"benchmark": "a", "x": 1})),
        step("bad", f"import os, sys; sys.exit(0 if os.path.exists({str(mended)!r}) else 3)"),
        step("other", printing({"benchmark": "b"}) + "; print('{broken'); print('{}')"),
    ]
    steps[1] = dataclasses.replace(steps[1], commands=(*steps[1].commands, *steps[2].commands))
    calls = []
    outcomes = run.run_all(steps, tmp_path / "all", 1e6, lambda x: calls.append(len(x)))
    assert statuses(outcomes) == {"good": run.ENDED, "bad": run.FAILED, "other": run.ENDED}
    assert calls == [1, 2, 3]
    results = run.read_all(tmp_path / "all")
    assert list(results) == ["good", "bad", "other"]
    assert results["good"]["results"] == [{"benchmark": "a", "x": 1}]
    assert (results["bad"]["exit_status"], results["bad"]["results"]) == (3, [])
    assert results["other"]["results"] == [{"benchmark": "b"}]  # other lines are no results

    mended.touch()
    outcomes = run.run_all(steps, tmp_path / "all", 1e6)
    assert statuses(outcomes) == dict.fromkeys(("good", "bad", "other"), run.ENDED)
    assert [outcome.before for outcome in outcomes] == [True, False, True]
    assert here.read_text() == "x"
    steps[0] = step("good", count + count + printing({"benchmark": "a"}))  # another command
    run.run_all(steps, tmp_path / "all", 1e6)
    assert here.read_text() == "xxx"


def test_what_does_not_fit_into_the_time_is_left_out(tmp_path):
    code, lines = printing({"benchmark": "a"}), []
    steps = [step("short", code, 1), step("long", code, 2e6), step("last", code, 1)]
    outcomes = run.run_all(steps, tmp_path, 1e6, say=lines.append)
    assert statuses(outcomes) == {"short": run.ENDED, "long": run.SKIPPED, "last": run.ENDED}
    assert any("long: left out, takes about" in line for line in lines)
    assert run.read_all(tmp_path)["long"]["status"] == run.SKIPPED
    assert statuses(run.run_all(steps[1:2], tmp_path, 4e6)) == {"long": run.ENDED}


def test_files_are_results_too(tmp_path):
    code = "import os, sys; os.makedirs(sys.argv[1]); open(sys.argv[1] + '/m.json', 'w').write('{\"x\": 2}')"
    good = Step("good", (("-c", code, f"{plan.STEP_FOLDER}/run"),), 1, "", ("run/m.json",))
    assert run.run_step(good, tmp_path / "good", 1e6)["results"] == [{"x": 2}]
    # A program that says nothing has not measured anything, whatever its status.
    missing = Step("none", (("-c", "pass"),), 1, "", ("run/m.json",))
    assert run.run_step(missing, tmp_path / "none", 1e6)["status"] == run.FAILED
    assert run.run_step(step("dumb", "pass"), tmp_path / "dumb", 1e6)["status"] == run.FAILED


@linux
def test_a_late_program_is_ended_with_children_that_ignore_the_request(tmp_path, monkeypatch):
    """Time is over as soon as the child is there: nothing depends on how fast this machine is."""
    log = tmp_path / "log.txt"
    child = "trap '' TERM; echo child $$; while true; do sleep 1; done"
    code = f"trap '' TERM; bash -c \"{child.replace('$$', '$BASHPID')}\" & wait"

    class Late(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is None:
                return super().wait()
            while not re.search(rb"child \d+\n", log.read_bytes()):
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(process, "_GRACE", 0.2)
    monkeypatch.setattr(process.subprocess, "Popen", Late)
    with open(log, "wb") as file:
        assert (
            process.run(("bash", "-c", code), file, 1e6, tmp_path, {"PATH": "/usr/bin:/bin"})
            is None
        )
    pid = int(re.search(rb"child (\d+)\n", log.read_bytes())[1])
    deadline = time.monotonic() + 60
    while running(pid):  # a signal takes its time to arrive
        assert time.monotonic() < deadline
        time.sleep(0.01)


def running(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_late_step_keeps_what_it_printed(tmp_path, monkeypatch):
    def late(command, log, limit, folder, environment):
        log.write(b'{"benchmark": "a"}\n{"benchmark": "b"')

    monkeypatch.setattr(process, "run", late)
    result = run.run_step(step("late", ""), tmp_path / "late", 1e6)
    assert (result["status"], result["results"]) == (run.LATE, [{"benchmark": "a"}])


# ---- The command --------------------------------------------------------------------------------


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


def found(device="NVIDIA H200", **facts):
    """The result of the step that looks at the machine."""
    values = {
        "benchmark": "machine", "platform": "gpu", "device": device, "devices": 1, "cores": 16,
        "system": "Linux", "python": "3.11", "versions": {"jax": "0.10.2"}, "nvidia_smi": None,
        "commit": "0123456789abcdef", "torch_sees_the_device": True,
    }  # fmt: skip
    return result("machine", [values | facts])


def result(name, results, status=run.ENDED, command=("-m", "x")):
    return {
        "name": name, "commands": [list(command)], "status": status, "began": 0.0,
        "seconds": 61.0, "exit_status": 0, "results": results,
    }  # fmt: skip


def test_a_folder_belongs_to_one_device(tmp_path, monkeypatch, capsys):
    devices = iter(["NVIDIA H200", "TPU v4"])

    def look(chosen, folder, left):
        run.write_result(folder, value := found(next(devices)))
        return value

    monkeypatch.setattr(run, "run_step", look)
    monkeypatch.setattr(run, "run_all", lambda *_: [])
    line = ["accelerator", f"--output={tmp_path}"]
    assert command_line.run_main(accelerator.main, line) == 0
    assert command_line.run_main(accelerator.main, line) == 1
    message = capsys.readouterr().err
    assert "has figures of 'NVIDIA H200', and JAX finds 'TPU v4' here" in message
    assert run.machine_of(run.read_all(tmp_path))["device"] == "NVIDIA H200"


def test_a_gpu_that_jax_does_not_see_is_no_cpu(tmp_path, monkeypatch, capsys):
    value = found("cpu", platform="cpu", nvidia_smi="NVIDIA L4, 570.1")
    monkeypatch.setattr(run, "run_step", lambda *_: value)
    line = ["accelerator", f"--output={tmp_path}"]
    assert command_line.run_main(accelerator.main, line) == 1
    assert (
        "this machine has 'NVIDIA L4, 570.1', but JAX finds only its CPU" in capsys.readouterr().err
    )


def test_a_cpu_gets_reduced_sizes(tmp_path, monkeypatch, capsys):
    taken = []
    monkeypatch.setattr(run, "run_step", lambda *_: found("cpu", platform="cpu"))
    monkeypatch.setattr(run, "run_all", lambda steps, *_: taken.extend(steps) or [])
    assert command_line.run_main(accelerator.main, ["accelerator", f"--output={tmp_path}"]) == 0
    assert taken == plan.steps(plan.REDUCED)
    assert "no accelerator here" in capsys.readouterr().err


# ---- Goals and report ---------------------------------------------------------------------------


def benchmark(**values):
    return {
        "backbone": "resnet50", "compute_dtype": "bfloat16", "precision": "highest",
        "batch_size": 16, "crop": [512, 512], "images_per_second": 200.0, "peak_bytes": 12.9e9,
        "device_peak_bytes": 15e9, "flops_per_second": 3.4e14, "share_of_nominal_peak": 0.35,
        "compile_seconds": 61.0, "compiled_before": False, "evaluation_image": [1024, 2048],
        "evaluation_mode": "whole", "evaluation_seconds_per_image": 0.02,
    } | values  # fmt: skip


def compared(ratio, theirs):
    rows = [
        {"name": "JAX", "seconds": 0.08, "ratio": 1, "memory": 12e9},
        {"name": "PyTorch", "seconds": 0.3, "ratio": 3.75, "memory": 20e9},
        {"name": "PyTorch, torch.compile", "seconds": 0.2, "ratio": ratio, "memory": theirs},
    ]
    what = "training step: resnet50, 150 classes, 16 x 512x512, bfloat16"
    return {"benchmark": "training_step", "what": what, "results": rows}


def trainings(memory, baseline):
    command = ("-m", "memseg_jax.main", "--config=configs/camvid_resnet50.py")
    for variant, scores in (("memory", memory), ("baseline", baseline)):
        for seed, score in enumerate(scores):
            yield result(f"camvid-{variant}-{seed}", [{"mIoU": score}], command=command)


def folder_of(path, *results):
    for value in results:
        (path / value["name"]).mkdir(parents=True)
        run.write_result(path / value["name"], value)
    return path


def test_goals_that_are_met(tmp_path):
    folder = folder_of(
        tmp_path,
        found(),
        result("training-resnet50", [compared(2.5, 12e9)]),
        result("benchmark-resnet50-bfloat16", [benchmark()]),
        result("benchmark-large-images", [benchmark()]),
        *trainings([0.60, 0.62, 0.64], [0.59, 0.60, 0.64]),
    )
    verdicts = goals.check(run.read_all(folder))
    assert [x.status for x in verdicts] == [goals.MET] * 6
    assert [x.found for x in verdicts] == [
        "200 images/s, 35% of the maker's peak",
        "2.5 times",
        "12 GB and 12 GB",
        "50 images/s",
        "0.6200, mean of 3 seeds",
        "mIoU +0.0100, 95 % interval -0.0148 to +0.0348, 3 seeds",
    ]


def test_goals_that_are_missed(tmp_path):
    folder = folder_of(
        tmp_path,
        found(),
        result("training-resnet50", [compared(1.99, 11.9e9)]),
        result("benchmark-resnet50-bfloat16", [benchmark(images_per_second=171.9)]),
        result("benchmark-large-images", [benchmark(evaluation_seconds_per_image=1 / 39.9)]),
        *trainings([0.572], []),
    )
    verdicts = goals.check(run.read_all(folder))
    assert [x.status for x in verdicts] == [goals.MISSED] * 5 + [goals.NOT_MEASURED]


@pytest.mark.parametrize(
    "other",
    [
        [found("NVIDIA A100-SXM4-80GB"), result("benchmark-resnet50-bfloat16", [benchmark()])],
        [found(), result("benchmark-resnet50-bfloat16", [benchmark()], run.LATE)],
        [found(), result("benchmark-resnet50-bfloat16", [benchmark(batch_size=8)])],
        [found(), result("training-resnet50", [compared(3, 2e10) | {"what": "2 x 64x64"}])],
        [
            found(),
            result("camvid-memory-0", [{"mIoU": 0.9}], command=("configs/camvid_resnet18.py",)),
        ],
    ],
)
def test_figures_of_something_else_are_no_measurement(other, tmp_path):
    verdicts = goals.check(run.read_all(folder_of(tmp_path, *other)))
    assert {x.status for x in verdicts} == {goals.NOT_MEASURED}


def test_report_of_all_parts(tmp_path):
    def times(**seconds):
        return [{"name": name, "seconds": x} for name, x in seconds.items()]

    def gradient(dilation, folding, shifts):
        return {
            "convolution": f"3x3, dilation {dilation}, /8", "pass": "filter", "map": [64, 64],
            "dilation": dilation,
            "results": times(**{"in use": 0.004, "PyTorch": 0.001}, folding=folding, shifts=shifts),
        }  # fmt: skip

    differences = {"float32 highest": {"logits": 2e-6}, "bfloat16": {"logits": 3e-2}}
    kernel = {
        "name": "gemm | a",
        "operations": ["fusion.1"],
        "seconds": 0.05,
        "share": 0.5,
        "times": 5,
    }
    folder = folder_of(
        tmp_path,
        found(),
        result("goldens-resnet50os8", [
            {"rows": [{"case": "resnet50_x", "holds": True, "differences": differences}]}
        ]),
        result("parity-resnet50", [
            {"what": "resnet50, 2 x 64x96", "holds": False,
             "differences": differences | {"float32 high": {"logits": 1e-3}}}
        ]),
        result("training-resnet50", [compared(2.5, 13e9)]),
        result("benchmark-resnet50-bfloat16", [benchmark()]),
        result("convolutions-forms", [
            {"batch": 16, "crop": [512, 512],
             "rows": [gradient(2, 0.001, 0.002), gradient(12, 0.003, 0.002)]}
        ]),
        result("kernels-resnet50", [
            {"what": "5 training steps: resnet50", "steps": 5, "seconds": 0.1, "rows": [kernel]}
        ]),
        result("input-pipeline", [
            {"config": "configs/a.py", "files": "generated", "core_seconds_per_image": 0.005,
             "images_per_second": {"4 threads": 700.0}}
        ]),
        result("quickstart", [{"mIoU": 0.91}]),
        *trainings([0.60], [0.59]),
        result("loss", [], run.SKIPPED),
    )  # fmt: skip
    report.write(folder)
    section = (folder / report.SECTION).read_text()
    for line in (
        "## On an accelerator: NVIDIA H200",
        "| training, ResNet-50, 16 x 512x512, bfloat16: at least 172 images/s | met | 200 images/s, "
        "35% of the maker's peak |",
        "| stored numbers, resnet50_x | logits | 2.0e-06 | 3.0e-02 | - | yes |",
        "| the CPU, resnet50, 2 x 64x96 | logits | 2.0e-06 | 3.0e-02 | 1.0e-03 | NO |",
        "| resnet50, 16 x 512x512, bfloat16 | 200 | 340 | 35% | 12.9 GB | 15 GB | 61 "
        "| 1024x2048 whole | 50 |",
        "PyTorch, torch.compile | 2.5 | 80 / 200 | 12 GB / 13 GB |",
        "| 3x3, dilation 2, /8, 16 x 512x512 | filter | folding | in use 4, PyTorch 1, folding 1, "
        "shifts 2 |",
        "| 32 | 3x3, dilation 2, /8 | 0.5 |",
        "Folding wins from 32 dilations in the map on, shifts below.",
        "5 training steps: resnet50, 20 ms in kernels each:",
        "| gemm \\| a | fusion.1 | 50.0% |",
        "200 images/s of one core; arriving from 16 cores: 700 with 4 threads images/s.",
        "The device takes 200 images/s at most (resnet50, bfloat16): 1.0 cores.",
        "Quickstart: mIoU 0.9100, 1m01s from its start to its end.",
        "| memory | 0.6000 | 0: 0.6000 |",
        "Memory less baseline: +0.0100 (one seed).",
    ):
        assert line in section
    whole = (folder / report.REPORT).read_text()
    assert whole.startswith(section.rstrip("\n"))
    assert "| loss | no time left | 0s | `python -m x` |" in whole


def test_a_report_needs_results(tmp_path):
    with pytest.raises(UserError, match="holds no results"):
        report.main(["report", f"--folder={tmp_path}"])
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / run.RESULT).write_text("{half")
    with pytest.raises(UserError, match="holds no results"):
        report.write(tmp_path)
    run.write_result(tmp_path / "loss", result("loss", []))
    with pytest.raises(UserError, match="does not say what machine"):
        report.write(tmp_path)


# ---- The whole command --------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_command_on_a_cpu(tmp_path, monkeypatch, capsys):
    """Every kind of step but those that `test_benchmarks.py` runs, at the smallest sizes."""
    pytest.importorskip("torch")
    tiny = dataclasses.replace(
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
    monkeypatch.setattr(plan, "REDUCED", tiny)
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


# ---- Kernels of a trace -------------------------------------------------------------------------


def event(name, start, duration, **stats):
    return SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=stats.items())


def test_time_of_a_kernel_is_without_what_is_inside_it():
    pytest.importorskip("torch")
    from benchmarks.longest_kernels import own_times

    events = [
        event("inner", 10, 30), event("loop", 0, 100), event("innermost", 15, 5),
        event("beside", 90, 40), event("after", 200, 7),
    ]  # fmt: skip
    found = {x.name: own for x, own in own_times(events)}
    expected = {"loop": 70, "inner": 25, "innermost": 5, "beside": 40, "after": 7}
    assert found == expected


def test_lines_of_devices():
    pytest.importorskip("torch")
    from benchmarks.longest_kernels import device_lines

    def plane(name, **lines):
        lines = [SimpleNamespace(name=x.replace("_", " "), events=y) for x, y in lines.items()]
        return SimpleNamespace(name=name, lines=lines)

    kernel, host = event("k", 0, 1), event("python", 0, 1)
    operation = event("dot.1", 0, 1, hlo_op="dot.1")
    data = SimpleNamespace(
        planes=[
            plane("/device:GPU:0", **{"Stream #7(Compute)": [kernel], "XLA Modules": [host]}),
            plane("/device:TPU:0", XLA_Ops=[operation], Steps=[host]),
            plane("/host:CPU", thread=[host, operation]),
            plane("Task Environment", x=[host]),
        ]
    )
    assert list(device_lines(data)) == [[kernel], [operation], [operation]]


def test_no_trace(tmp_path):
    pytest.importorskip("torch")
    from benchmarks.longest_kernels import kernels

    with pytest.raises(UserError, match="holds no trace"):
        kernels(tmp_path)


# ---- Parity -------------------------------------------------------------------------------------


def test_differences_are_shares_of_the_standard_deviation():
    pytest.importorskip("torch")
    np = pytest.importorskip("numpy")
    from benchmarks.device_parity import difference, differences, table

    x = np.array([1.0, 3.0])
    assert difference(x, x + [0, 0.5]) == 0.5
    assert difference(np.float64(4), np.float64(5)) == 0.25
    assert difference(np.zeros(3), np.zeros(3)) == 0
    assert difference(np.zeros(3), np.ones(3)) == np.inf
    groups = {"a": {"x": x, "y": x}}
    assert differences(groups, {"a": {"x": x, "y": x + 2}}) == {"a": 2.0}
    assert np.isnan(differences(groups, {"a": {"x": x * np.nan, "y": x}})["a"])
    assert (
        table({"one": {"a": 0.5}, "two": {"a": 1e-7}}).splitlines()[2]
        == "| a | 5.0e-01 | 1.0e-07 |"
    )


def test_weights_of_golden_numbers_are_those_of_the_tests():
    pytest.importorskip("torch")
    np = pytest.importorskip("numpy")
    from benchmarks.device_goldens import rule_array
    from tests import goldens

    cases = {
        "backbone_net.layer1.0.conv1.weight": (8, 4, 3, 3),
        "backbone_net.layer1.0.bn1.weight": (8,),
        "backbone_net.layer1.0.bn3.weight": (8,),
        "backbone_net.stage2.0.fuse_layers.0.1.1.weight": (8,),
        "backbone_net.bn1.bias": (8,),
        "backbone_net.bn1.running_mean": (8,),
        "backbone_net.bn1.running_var": (8,),
        "backbone_net.pos_embed": (1, 5, 4),
        "context_within_image_module.correlate_net.query_project.0.0.weight": (8, 4, 1, 1),
        "decoder_stage1.4.weight": (5, 4, 1, 1),
        "decoder_stage1.4.bias": (5,),
        "memory_module.memory": (5, 1, 8),
    }
    for key, shape in cases.items():
        expected = goldens.rule_array(key, shape)
        np.testing.assert_array_equal(rule_array(key, shape, goldens.seed_string()), expected, key)


def test_golden_files_name_their_configs():
    pytest.importorskip("torch")
    from benchmarks.device_goldens import _config

    assert _config(Path("forward/resnet50os8_lip__2x3x64x96.npz")) == "configs/lip_resnet50.py"
    assert _config(Path("hrnetv2w48_lip__1x3x97x129.npz")) == "configs/lip_hrnet.py:2025"
    name = "vitlarge_cocostuff10k_2021__2x3x64x96.npz"
    assert _config(Path(name)) == "configs/cocostuff10k_vit.py"
