"""Mode plan: what it takes from a config, and what it says."""

import json
import os
import subprocess
import sys

import jax
import pytest

from memseg_jax.hlo import planned_programs, topologies
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.modes import plan
from memseg_jax.runtime import compilation
from memseg_jax.training.state import abstract_variables
from tests import session, tiny


def test_the_largest_input_of_the_evaluation():
    config = tiny.get_config()
    config.augment.crop = (40, 56)
    assert planned_programs.largest_input(config) == (40, 56)  # no limits: only the crop is known
    config.eval.base_size = (2048, 1024)
    assert planned_programs.largest_input(config) == (40, 56)  # in windows
    config.eval.mode = "whole"
    assert planned_programs.largest_input(config) == (1024, 2048)
    config.eval.scales = (0.5, 1.25)
    assert planned_programs.largest_input(config) == (1280, 2560)
    config.eval.mode = "slide"
    config.eval.window = (30, 20)
    assert planned_programs.largest_input(config) == (30, 20)


def test_the_length_of_an_epoch():
    config = tiny.get_config()
    assert plan.epoch_images(config.data) is None
    config.data.root = str(tiny.data_root())
    assert plan.epoch_images(config.data) == len(tiny.TRAIN_SIZES)
    config.data.name, config.data.root, config.data.train_split = "ade20k", "", "training"
    assert plan.epoch_images(config.data) == 20210


def test_advice_is_of_fields_that_change_something():
    config = tiny.get_config()
    training = {"state_bytes": 4e9, "limit": 16e9}
    config.train.batch_size = 32
    lines = plan.advice(config, 8, training)
    fields = [line.split("=")[0].removeprefix("--config.") for line in lines if "=" in line]
    assert fields[:2] == ["model.compute_dtype", "model.remat"]
    assert "sharding.fsdp" in fields
    assert "train.accumulate" in fields
    config.model.compute_dtype, config.model.remat = "bfloat16", "blocks"
    config.train.batch_size = 8
    lines = plan.advice(config, 8, training | {"state_bytes": 1e8})
    assert [line for line in lines if "=" in line] == []
    assert "--config.augment.crop" in lines[-1]


# ---- The mode -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--mode plan needs --topology"),
        (("--topology", "v7:2"), "there is no kind 'v7'"),
        (("--topology", "cpu:3"), "8, which 3 devices cannot share evenly; use 6 or 9"),
        (("--topology", "cpu:8", "--config.eval.mode=tiles"), "config.eval.mode is 'tiles'"),
    ],
)
def test_mistakes(quiet_entry, capsys, arguments, words):
    assert tiny.run("--mode", "plan", *arguments) == 1
    assert words in capsys.readouterr().err


def test_topology_is_of_no_other_mode(quiet_entry, capsys):
    assert tiny.run("--mode", "train", "--topology", "cpu:8") == 1
    assert "--topology is only for --mode plan" in capsys.readouterr().err


def test_programs_of_devices_that_are_not_here_are_not_kept(quiet_entry, monkeypatch):
    """They cannot be read again; JAX warns of each."""
    called = []
    monkeypatch.setattr(compilation, "keep_programs", lambda: called.append("keep"))
    monkeypatch.setattr(plan, "run", lambda *_: called.append("plan") or 0)
    assert tiny.run("--mode", "plan", "--topology", "v5e:2x4") == 0
    assert called == ["plan"]


PLAIN = {
    "model.memory.enabled": False,  # less work for the compiler
    "model.auxiliary": False,
    "loss.consistency": 0.0,
    "augment.crop": (64, 64),  # on smaller maps some taps of dilated kernels have no gradient
}


def plain_config():
    config = tiny.get_config()
    config.update_from_flattened_dict(PLAIN)
    return config


@pytest.fixture
def no_compilers(monkeypatch):
    """There are no compilers but that of this machine."""
    monkeypatch.setattr(topologies, "missing", lambda kind: f"no compiler for {kind}")


def test_a_plan_without_the_compiler(
    no_compilers, quiet_entry, three_convolutions, capsys, caplog, tmp_path
):
    arguments = [f"--config.{name}={value}" for name, value in PLAIN.items()]
    arguments += ["--workdir", tmp_path / "run", f"--config.data.root={tiny.data_root()}"]
    with caplog.at_level("WARNING"):
        assert tiny.run("--mode", "plan", "--topology", "v5e:2x4", *arguments) == 0
    assert "no compiler for v5e" in caplog.text
    printed = capsys.readouterr().out
    assert "COMPILED FOR CPU DEVICES" in printed
    result = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert result["compiled_for_stand_ins"] is True
    assert (result["devices"], result["topology"]) == (8, "v5e:2x4")
    training, evaluation = result["training"], result["evaluation"]
    # The gradient of every parameter is summed over all devices, and little else is exchanged.
    variables = abstract_variables(build_segmentor(plain_config()))
    parameters = 4 * sum(x.size for x in jax.tree.leaves(variables["params"]))
    exchanged = sum(c["size"] * c["count"] for c in training["collectives"])
    assert {c["kind"] for c in training["collectives"]} == {"all-reduce"}
    assert parameters <= exchanged < 1.5 * parameters
    assert evaluation["collectives"] == []
    # State: parameters and momenta, statistics, memory.
    assert 2 * parameters < training["state_bytes"] < 2.2 * parameters
    assert training["memory"]["total"] > training["state_bytes"]
    assert training["limit"] == 16 * 2**30
    assert training["fits"] is True
    assert training["images_per_second"] == pytest.approx(8 / training["seconds"]["step"])
    steps = len(tiny.TRAIN_SIZES) // 8
    assert training["epoch_hours"] == pytest.approx(steps * training["seconds"]["step"] / 3600)
    assert 2.5 < training["flops"] / evaluation["flops"] < 4.5  # 3 times the forward pass
    for what in (
        "memory",
        "arithmetic",
        "small all-reduce",
        "estimate",
        "images/s",
        "32.83 TFLOP/s",
    ):
        assert what in printed


def made_up_plan(config, model, mesh, devices, images):
    """Four parts of an image are fastest, but do not fit; an update by each device takes longer."""
    assert [d.id for d in devices.devices] == [d.id for d in mesh.devices.flat]
    rows = mesh.shape["rows"]
    each = config.sharding.weight_update == "each"
    step = {1: 9e-3, 2: 5e-3, 4: 4e-3, 8: 6e-3}[rows] + 5e-4 * each
    seconds = dict.fromkeys(("compute", "memory", "large_collectives", "small_collectives"), 1e-3)
    seconds |= {"step": step, "step_by_xla": 2 * step}
    return {"seconds": seconds, "fits": rows != 4, "flops": 1e9, "memory": {"total": 2e9}}


def test_the_search_for_a_layout(no_compilers, quiet_entry, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "plan_training", made_up_plan)
    arguments = ["--mode", "plan", "--topology", "v5e:2x4", "--layout", "search"]
    arguments += ["--workdir", tmp_path, "--config.augment.crop=(64,64)"]
    assert tiny.run(*arguments) == 0
    printed = capsys.readouterr().out
    layouts = json.loads((tmp_path / "plan.json").read_text())["layouts"]
    found = [(*(x["sharding"][name] for name in ("data", "rows", "fsdp")),
              x["sharding"]["weight_update"]) for x in layouts]  # fmt: skip
    assert found == [
        (4, 2, 1, "shared"),
        (4, 2, 1, "each"),
        (1, 8, 1, "shared"),
        (8, 1, 1, "shared"),
        (2, 4, 1, "shared"),
    ]
    assert "2 GB: DOES NOT FIT" in printed
    best = "--config.sharding.data=4 --config.sharding.rows=2 --config.sharding.fsdp=1"
    assert f"The fastest: {best} --config.sharding.weight_update=shared" in printed
    row = next(line for line in printed.splitlines() if line.split()[:2] == ["4", "2"])
    assert row.split()[4:8] == ["|", "5", "10", "800"]


def test_a_search_leaves_out_what_cannot_be(no_compilers, quiet_entry, capsys, monkeypatch):
    """Six images, which eight devices share in parts; three rows on the coarsest map."""
    monkeypatch.setattr(plan, "plan_training", made_up_plan)
    arguments = ["--mode", "plan", "--topology", "v5e:2x4", "--layout", "search"]
    arguments.append("--config.train.batch_size=6")
    assert tiny.run(*arguments, "--config.augment.crop=(56,64)") == 1  # only four parts: too much
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert tiny.run(*arguments, "--config.augment.crop=(24,64)") == 1
    assert "8 devices cannot share this batch" in capsys.readouterr().err
    arguments[5] = "find"
    assert tiny.run(*arguments) == 1
    assert "--layout find: expected search" in capsys.readouterr().err


@pytest.mark.slow
def test_a_search_with_this_machines_compiler(no_compilers, three_convolutions, capsys):
    config = plain_config()
    assert plan.run(config, "v5e:2x2", layout="search") == 0
    printed = capsys.readouterr().out
    assert "The fastest: --config.sharding.data=" in printed
    rows = {line.split()[1] for line in printed.splitlines() if " shared |" in line}
    assert rows == {"1", "2", "4"}


@pytest.mark.slow
def test_what_does_not_fit_is_said_with_advice(no_compilers, quiet_entry, capsys, monkeypatch):
    def refuse(*args, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20.5G of 15.75G hbm")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    assert tiny.run("--mode", "plan", "--topology", "v5e:2x4") == 1
    printed = capsys.readouterr().out
    assert "22 GB per device, 128% of 17.2 GB: DOES NOT FIT" in printed
    assert "--config.model.remat=blocks" in printed


PLANS = [("v4:2x2x1", 4), ("v5e:2x4", 8), ("v5e:8x8", 64), ("h200:8", 8)]


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "count"), PLANS)
def test_a_plan_by_the_real_compiler(topology, count, tmp_path):
    if reason := topologies.missing(topologies.parse(topology).kind):
        pytest.skip(reason)
    command = [sys.executable, "-m", "memseg_jax.main", "--config", str(tiny.CONFIG)]
    command += ["--mode", "plan", "--topology", topology, "--workdir", str(tmp_path)]
    command += [f"--config.{name}={value}" for name, value in PLAIN.items()]
    command += [f"--config.train.batch_size={count}"]
    env = os.environ | {"MEMSEG_CACHE": session.cache(), "XLA_FLAGS": ""}
    subprocess.run(command, cwd=tiny.ROOT, env=env, check=True, timeout=1800)
    result = json.loads((tmp_path / "plan.json").read_text())
    assert result["compiled_for_stand_ins"] is False
    assert result["devices"] == count
    assert {c["kind"] for c in result["training"]["collectives"]} == {"all-reduce"}
    assert {c["group"] for c in result["training"]["collectives"]} == {count}
    variables = abstract_variables(build_segmentor(plain_config()))
    parameters = 4 * sum(x.size for x in jax.tree.leaves(variables["params"]))
    exchanged = sum(c["size"] * c["count"] for c in result["training"]["collectives"])
    assert parameters <= exchanged < 1.5 * parameters
    assert result["training"]["fits"] is True
