"""Every benchmark runs at a tiny size and prints its figures; which ones they are says nothing."""

import importlib
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from memseg_jax.errors import UserError
from memseg_jax.runtime import compilation
from tests import gcs, tiny
from tests.small_models import FAST_COMPILE
from tests.tiny import CONFIG, data_root

pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("keep_threads")
MODEL = (f"--config={CONFIG}", "--crop=32x32", "--batch=2")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a benchmark; returns the lines of JSON, and everything that it printed."""
    from benchmarks import measure

    def compile_quickly(function, *args):
        jitted = function if hasattr(function, "lower") else jax.jit(function)
        compiled = jitted.lower(*args).compile(FAST_COMPILE)
        return compiled, measure.program_bytes(compiled)

    monkeypatch.setattr(measure, "compiled", compile_quickly)
    monkeypatch.setattr(compilation, "keep_programs", lambda: None)

    def start(name, *arguments):
        module = importlib.import_module(f"benchmarks.{name}")
        assert module.main([name, *arguments, "--seconds=0"]) == 0
        printed = capsys.readouterr()
        lines = (printed.out + printed.err).splitlines()
        return [json.loads(x) for x in lines if x.startswith("{")], printed.out

    return start


def check(results, names):
    """The candidates in their order, each measured in the three rounds of --seconds=0.

    Whether figures are right is for the tests of `measure`, with a clock of their own.
    """
    assert [result["name"] for result in results] == names
    assert results[0]["ratio"] == 1
    for result in results:
        assert result["rounds"] == 3
        assert result["name"] == "PyTorch" or result["memory"] > 0


class Clock:
    """Takes the place of `time`: it stands still but for what candidates and pauses take."""

    def __init__(self):
        self.now, self.cores, self.slowness = 1000.0, 0.0, 1.0

    def perf_counter(self):
        return self.now

    def process_time(self):
        return self.cores

    def sleep(self, seconds):
        self.now += seconds

    def work(self, seconds, cores):
        self.now += seconds * self.slowness
        self.cores += seconds * self.slowness * cores


@pytest.fixture
def clock(monkeypatch):
    from benchmarks import measure

    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setattr(measure, "peak_memory", lambda candidate: (candidate.call(), None))
    return clock


# ---- What all of them measure with --------------------------------------------------------------


def test_time_is_that_of_one_call_and_compared_within_a_round(clock):
    from benchmarks.measure import Candidate, compare

    rounds = []

    def slow():
        rounds.append(clock.now)
        clock.slowness = 3.0 if len(rounds) % 3 == 0 else 1.0  # the machine is busy now and then
        clock.work(2.0, cores=2)

    # 5 ms are too short to measure: ten calls a round.
    quick = Candidate("quick", lambda: clock.work(0.005, cores=1))
    first, second = compare([Candidate("slow", slow), quick], seconds=30)
    assert (first["name"], second["name"]) == ("slow", "quick")
    assert (first["seconds"], second["seconds"]) == pytest.approx((2.0, 0.005))
    assert (first["core_seconds"], second["core_seconds"]) == pytest.approx((4.0, 0.005))
    assert first["ratio"] == 1
    # Every third round takes three times as long, for both alike.
    assert second["ratio"] == pytest.approx(0.0025)
    assert first["rounds"] == second["rounds"] == len(rounds) - 2
    assert 30 < clock.now - rounds[2] < 30 + 8


def test_three_rounds_at_least(clock):
    from benchmarks.measure import Candidate, compare

    (found,) = compare([Candidate("long", lambda: clock.work(100, cores=1))], seconds=0)
    assert found["rounds"] == 3
    assert found["seconds"] == 100


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_a_call_takes_is_seen():
    from benchmarks.measure import Candidate, peak_memory

    kept = []
    rise = 64 << 20
    on_torch = Candidate("t", lambda: kept.append(np.ones(rise, np.uint8)), held=5, on_torch=True)
    peak, grown = peak_memory(on_torch)
    assert rise <= grown < 2 * rise
    assert peak == grown + 5  # what was there before the call counts too
    assert peak_memory(Candidate("j", lambda: None, memory=7))[0] == 7  # the program's own account


# ---- The benchmarks -----------------------------------------------------------------------------


def test_memory_update(run):
    ((found,), _) = run("memory_update", "--features=2x4x4x8", "--labels=16x16", "--classes=3")
    check(found["results"], ["JAX", "PyTorch"])
    assert found["largest_difference"] < 1e-5


def test_loss(run):
    ((found,), _) = run("loss", "--logits=2x4x4x3", "--labels=16x16")
    check(found["results"], ["JAX", "JAX, plain form", "PyTorch"])
    ours, *others = found["losses"].values()
    np.testing.assert_allclose(others, ours, rtol=1e-5)


def test_attention(run):
    (found, printed) = run("attention", "--tokens=8,16", "--dim=4", "--plain_up_to=8")
    check(found[0]["results"], ["JAX", "JAX, plain form", "PyTorch"])
    check(found[1]["results"], ["JAX", "PyTorch"])
    assert "attention and gradients: 1 x 16 x 4, float32" in printed


@pytest.mark.slow
def test_convolutions(run):
    options = ("--crop=40x48", "--batch=1", "--only=3x3 256 -> 512, dilation 2", "--all")
    ((found,), printed) = run("convolutions", *options, "--pass=filter")
    (row,) = found["rows"]
    forms = ["in use", "XLA's own", "group by group", "shifts", "tiles", "folding", "PyTorch"]
    check(row["results"], forms)
    assert "| 3x3 256 -> 512, dilation 2, groups 2, /8 | filter | " in printed


@pytest.mark.slow
def test_training_step(run):
    ((found,), printed) = run("training_step", *MODEL)
    check(found["results"], ["JAX", "PyTorch"])
    ours, theirs = found["losses"].values()
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert "resnet18, 3 classes, 2 x 32x32, float32" in printed


@pytest.mark.slow
def test_evaluation_forward(run):
    ((network, maps), _) = run("evaluation_forward", *MODEL)
    check(network["results"], ["JAX", "PyTorch"])
    check(maps["results"], ["JAX", "PyTorch"])
    assert network["largest_difference"] < 1e-3


def test_input_pipeline(run):
    ((found,), printed) = run(
        "input_pipeline", f"--config={CONFIG}", "--size=40x48", "--images=9", "--format=png"
    )
    assert found["core_seconds_per_image"] > 0
    parts = found["core_seconds_of"]
    assert list(parts) == ["read, decode", "scale", "crop, flip, rotate", "photometric", "rest"]
    assert all(seconds > 0 for seconds in list(parts.values())[:-1])
    assert list(found["images_per_second"]) == ["2 threads"]
    assert "generated 40x48 png" in printed


def test_reading_packed_data(run):
    flags = ("--size=40x48", "--images=9", "--format=png", "--packed")
    ((found,), printed) = run("input_pipeline", f"--config={CONFIG}", *flags)
    assert found["core_seconds"].keys() == {"folders", "packed"}
    assert min(found["core_seconds"].values()) > 0
    assert "generated 40x48 png" in printed


@pytest.mark.slow
@pytest.mark.exhaustive  # many starts of the real program
def test_start_up(run, tmp_path):
    data = f"--config.data.root={data_root()}"
    ((found,), printed) = run(
        "start_up", f"--config={CONFIG}", data, "--rounds=1", f"--caches={tmp_path}"
    )
    assert [(place, state) for place, state, _ in found["rounds"]] == [
        (str(tmp_path), "empty"),
        (str(tmp_path), "filled"),
    ]
    for *_, (seconds,) in found["rounds"]:
        assert list(seconds) == ["until compiling", "compiling", "first step"]
        assert min(seconds.values()) > 0
    assert "| compiling, times that of empty |" in printed
    assert any(path.name.startswith("jit_step-") for path in tmp_path.rglob("*-cache"))


@pytest.mark.slow
def test_data_in_a_bucket():
    """In a process of its own: the client of buckets keeps what it was told first."""
    gcs.server_or_skip()
    command = [sys.executable, "-m", "benchmarks.bucket_data", f"--config={CONFIG}", "--seconds=1"]
    command += ["--size=40x48", "--crop=32x32", "--images=9", "--batch=2", "--rounds=1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tiny.ROOT)
    assert result.returncode == 0, result.stderr
    found = json.loads(next(line for line in result.stderr.splitlines() if line[0:1] == "{"))
    ways = ("on a disk", "copied from the bucket", "in the bucket")
    assert tuple(found["rounds"]) == ways
    assert all(min(map(min, pairs)) > 0 for pairs in found["rounds"].values())
    assert all(f"| {way} | " in result.stdout for way in ways)


def test_many_sizes(run):
    config = "--config=configs/ade20k_resnet50.py:ms_flip"
    ((found,), printed) = run("many_sizes", config, "--images=50", "--plan=6")
    assert found["networks"] <= 6
    assert found["networks"] + found["small"] <= 12
    assert found["sizes"] > 50
    assert found["padding"] > 0
    assert printed.startswith("config.eval.canvases = ((")


@pytest.mark.slow
def test_saving(run, tmp_path):
    flags = (f"--config={CONFIG}", "--saves=3", f"--folder={tmp_path}")
    ((found,), printed) = run("saving", *flags)
    assert len(found["waits"]) == 3
    assert all(0 < wait <= total for wait, total in zip(found["waits"], found["totals"]))
    assert found["bytes"] > 100_000
    assert "| median of the others | " in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_scaling(run):
    sweeps = ("--batches=1,2", "--crops=32", "--classes=3")
    ((found,), _) = run("scaling", f"--config={CONFIG}", *sweeps)
    points = [(row["batch"], row["crop"], row["classes"]) for row in found["results"]]
    assert points == [(1, 32, 3), (2, 32, 3)]
    check(found["results"], ["step"] * 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--features=2x4x4",), "--features 2x4x4: expected positive numbers such as 2x64x64x512"),
        (("--labels=ten",), "--labels ten: expected whole numbers such as 512x512"),
        (("--classes=many",), "--classes many: expected a number such as 150"),
        (("--classes=0",), "--classes 0: expected a positive number such as 150"),
        (("--seconds=-1",), "--seconds -1: expected a positive number such as 60.0"),
    ],
)
def test_mistakes(run, arguments, message):
    module = importlib.import_module("benchmarks.memory_update")
    with pytest.raises(UserError) as error:
        module.main(["memory_update", *arguments])
    assert str(error.value) == message


@pytest.mark.slow
def test_large_photograph(run):
    results = []
    for side in ("jax", "torch"):
        found, printed = run(
            "large_photograph", f"--config={CONFIG}", "--size=70x100", f"--only={side}"
        )
        assert f"{side}: " in printed
        results += found
    assert [result["name"] for result in results] == ["jax", "torch"]
    assert all(result["size"] == [70, 100] for result in results)
    assert all(result["cpu_seconds"] > 0 for result in results)
    assert all(result["peak_bytes"] > 1e8 for result in results)  # the interpreter's alone is more


@pytest.mark.slow
def test_seams(run, tmp_path):
    workdir = tiny.save_random_model(tmp_path / "run")
    tiny.write(tmp_path / "a.png", tiny.picture(0, 70, 100)[0])
    flags = (f"--config={CONFIG}", f"--workdir={workdir}", f"--input={tmp_path}/*.png")
    results, printed = run("seams", *flags, "--config.eval.base_size=()")
    assert [result["overlap"] for result in results] == [0.5, 0.75]
    assert all(0 <= share < 1 for result in results for share in result["changed"])
    assert "overlap 50%: " in printed
    with pytest.raises(UserError, match="no photograph"):
        run("seams", *flags[:2], f"--input={tmp_path}/*.jpg")


@pytest.mark.slow
def test_serving(run, tmp_path):
    pytest.importorskip("uvicorn")
    workdir = tiny.save_random_model(tmp_path)
    (result,), printed = run(
        "serving", f"--config={CONFIG}", f"--workdir={workdir}", "--requests=8", "--clients=2",
        "--rounds=1", "--config.serve.batch_size=1",
    )  # fmt: skip
    assert (result["requests"], result["lost"], result["size"]) == (8, 0, [32, 32])
    assert 0 < result["p50"] <= result["p95"]
    assert "8 requests of 2 clients, 0 lost" in printed
