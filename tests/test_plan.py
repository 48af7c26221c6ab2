"""Mode plan: topologies, what is read from compiled programs, the estimates, and the report."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memseg_jax.errors import UserError
from memseg_jax.hlo import estimates, hlo_text, planned_programs, topologies
from memseg_jax.hlo.chips import CHIPS, Chip
from memseg_jax.hlo.hlo_text import Collective
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.modes import plan
from memseg_jax.training.state import abstract_variables
from tests import session, tiny

# ---- Topologies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", topologies.EXAMPLES)
def test_examples_are_topologies(text):
    topology = topologies.parse(text)
    assert topology.name == text
    assert topology.chips == np.prod(topology.shape)


def test_shapes_and_rings():
    assert topologies.parse(" V5E:2x4 ").shape == (2, 4)
    assert topologies.parse("v5e:16x8").rings == (True, False)
    assert topologies.parse("v4:2x4x8").rings == (False, True, True)
    assert not topologies.parse("h200:16").is_tpu


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v9:2x2", "there is no kind 'v9'"),
        ("v5e", "no shape"),
        ("v5e:", "no shape"),
        ("v5e:0x4", "no shape"),
        ("v5e:axb", "no shape"),
        ("v5e:8", "v5e takes 2 axes"),
        ("v4:4x4", "v4 takes 3 axes"),
        ("h200:2x4", "h200 takes one number"),
        ("h200:12", "whole hosts"),
    ],
)
def test_what_is_no_topology(text, words):
    with pytest.raises(UserError, match=words) as error:
        topologies.parse(text)
    if "hosts" not in words:
        assert all(example in str(error.value) for example in topologies.EXAMPLES)


def test_missing_compilers(monkeypatch):
    def no_package(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib.metadata, "version", no_package)
    assert topologies.missing("cpu") is None
    assert f'pip install "jax[tpu]=={jax.__version__}"' in topologies.missing("v5e")
    assert "jax-cuda13-plugin is not installed" in topologies.missing("h200")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1")
    assert f"jax-cuda13-pjrt=={jax.__version__}" in topologies.missing("h200")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: jax.__version__)
    assert topologies.missing("h200") is None


def test_too_many_cpu_devices():
    jax.devices()  # from now on their number cannot be changed
    assert len(topologies.open_devices(topologies.parse("cpu:3")).devices) == 3
    with pytest.raises(UserError, match=r"cpu:99999: this process has \d+ CPU device"):
        topologies.open_devices(topologies.parse("cpu:99999"))


# ---- Collectives in programs --------------------------------------------------------------------


def compiled_text(function, *shapes, devices=8, out=None):
    """The program of a function of arrays that are split over devices by their first axis."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    split = PartitionSpec("data")
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=split, out_specs=split if out is None else out,
        check_vma=False,
    )  # fmt: skip
    sharding = NamedSharding(mesh, split)
    args = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=sharding) for s in shapes]
    return jax.jit(mapped).lower(*args).compile().as_text()


def test_an_all_reduce_counts_its_array_on_one_device():
    text = compiled_text(lambda x: jax.lax.psum(x, "data"), (8 * 6, 100), out=PartitionSpec())
    assert hlo_text.collectives(text, 8) == [Collective("all-reduce", 6 * 100 * 4, 8, 1)]


def test_gathering_and_scattering_count_the_whole_array():
    text = compiled_text(
        lambda x: jax.lax.all_gather(x, "data", tiled=True), (8 * 6, 100), out=PartitionSpec()
    )
    assert hlo_text.collectives(text, 8) == [Collective("all-gather", 8 * 6 * 400, 8, 1)]
    text = compiled_text(
        lambda x: jax.lax.psum_scatter(x, "data", tiled=True), (8 * 16, 100), devices=8
    )
    assert hlo_text.collectives(text, 8) == [Collective("reduce-scatter", 16 * 400, 8, 1)]


def test_loops_count_as_often_as_they_run_and_one_branch_counts():
    def loop(x):
        def body(carry, _):
            return jax.lax.psum(carry * 0.5, "data"), None

        return jax.lax.scan(body, x, length=7)[0]

    found = hlo_text.collectives(compiled_text(loop, (8, 50)), 8)
    assert found == [Collective("all-reduce", 200, 8, 7)]

    def branch(x):
        def longer(x):
            return jax.lax.psum(jnp.sin(jax.lax.psum(x, "data")), "data")

        return jax.lax.cond(x[0, 0] > 0, longer, lambda x: jax.lax.psum(x, "data"), x)

    found = hlo_text.collectives(compiled_text(branch, (8, 50)), 8)
    assert found == [Collective("all-reduce", 200, 8, 2)]


TEXT = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %inside = bf16[8,128]{1,0:T(8,128)(2,1)} all-reduce(%p), replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main (x: f32[16], y: bf16[8,128]) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  %y = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(1)
  %start = (f32[16]{0}, pred[3]{0}) all-reduce-start(%x, %x), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  %done = (f32[16]{0}, pred[3]{0}) all-reduce-done(%start)
  %gather = (f32[2]{0}, f32[16]{0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %gathered = f32[16]{0} all-gather-done(%gather)
  %fusion = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%y), kind=kCustom, calls=%fused
  ROOT %result = f32[16]{0} negate(%gathered)
}
"""  # noqa: E501


def test_forms_that_gpus_and_tpus_use():
    assert hlo_text.collectives(TEXT, 8) == [
        Collective("all-reduce", 8 * 128 * 2, 2, 1, ((0, 1),)),
        Collective("all-reduce", 16 * 4 + 3, 4, 1, ((0, 1, 2, 3),)),
        Collective("all-gather", 16 * 4, 8, 1),
    ]


def test_traffic_of_the_text():
    # all-reduce: x twice and the results; all-gather: x and the tuple; fusion: y alone, as its
    # result is on the chip; negate: one array in, one out.
    expected = (64 + 64 + 67) + (64 + 72) + 2048 + (64 + 64)
    assert hlo_text.traffic(TEXT) == expected


def test_traffic_of_elementwise_work_and_of_slices():
    def one(function, *shapes):
        args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
        return hlo_text.traffic(jax.jit(function).lower(*args).compile().as_text())

    n = 1 << 16
    assert one(lambda x, y: jnp.sin(x) + y * 2, (n,), (n,)) == 3 * 4 * n
    # A loop over the rows of an array reads and writes each of them about once.
    rows = one(lambda x: jax.lax.map(jnp.sin, x), (64, 1024))
    assert 2 * 4 * n <= rows < 2.5 * 2 * 4 * n


# ---- Estimates ----------------------------------------------------------------------------------

CHIP = Chip(100e12, 50e12, 10e12, 16e9, 1000e9, 50e9, 25e9)


class Device:
    def __init__(self, *coords):
        self.coords = coords


def seconds_of(size, topology, group=None, kind="all-reduce", partners=None):
    topology = topologies.parse(topology)
    grid = [Device(*reversed(place)) for place in np.ndindex(topology.shape[::-1])]
    devices = topologies.Devices(topology, grid)
    collective = Collective(kind, size, group or topology.chips, 1, partners)
    return estimates.collective_seconds(collective, devices, CHIP)


def test_a_large_all_reduce_on_a_torus_sends_the_array_twice_over_all_links():
    # Four links of 50 GB/s; 16 hops of 1 us each way.
    expected = 2 * 1e9 * 255 / 256 / 200e9 + 2 * 16e-6
    assert seconds_of(1e9, "v5e:16x16") == pytest.approx(expected)
    assert seconds_of(1e9, "v5e:16x16", kind="all-gather") == pytest.approx(expected / 2)
    # Half of the bandwidth where the ends are not linked.
    expected = 2 * 1e9 * 7 / 8 / 100e9 + 2 * (1 + 3) * 1e-6
    assert seconds_of(1e9, "v5e:2x4") == pytest.approx(expected)
    assert seconds_of(1e9, "v5e:1x1") == 0


@pytest.mark.parametrize(
    ("topology", "partners", "links"),
    [
        ("v5e:8x8", ((0, 1), (1, 2), (8, 16)), (1, 1)),
        ("v5e:8x8", ((0, 1), (0, 9), (3, 4)), (2, 2)),
        ("v5e:8x8", ((0, 7),), (7, 1)),
        ("v5e:16x16", ((0, 15),), (1, 1)),  # around the ring
        ("v5e:16x16", ((0, 8),), (8, 1)),
    ],
)
def test_neighbours_wait_for_the_links_between_them(topology, partners, links):
    count, axes = links
    kw = {"partners": partners, "kind": "collective-permute"}
    expected = count * 1e-6 + 1e6 / (axes * 50e9)
    assert seconds_of(1e6, topology, **kw) == pytest.approx(expected)


def test_a_group_in_a_corner_of_the_torus():
    corner = ((0, 1, 8, 9),)
    expected = 2 * (1 + 1) * 1e-6 + 2 * 1e6 * 3 / 4 / 100e9
    assert seconds_of(1e6, "v5e:8x8", group=4, partners=corner) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups=[2,4]<=[8]", ((0, 1, 2, 3),)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ((0, 2, 4, 6),)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", ((0, 2, 4, 6),)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5),)),
        ("source_target_pairs={{0,1},{1,2}}", ((0, 1), (1, 2))),
    ],
)
def test_who_exchanges_with_whom(text, expected):
    line = f"ENTRY %main (x: f32[16]) -> f32[16] {{\n  ROOT %y = f32[16] all-reduce(%x), {text}\n}}"
    if "pairs" in text:
        line = line.replace("all-reduce", "collective-permute")
    assert hlo_text.collectives(line, 8)[0].partners == expected


def test_an_all_reduce_between_gpus():
    inside = 2 * 1e9 * 7 / 8 / 50e9
    assert seconds_of(1e9, "h200:8") == pytest.approx(inside + estimates.GPU_LATENCY)
    between = 2 * 1e9 / 8 * 3 / 4 / 25e9
    latency = estimates.GPU_LATENCY + estimates.NETWORK_LATENCY
    assert seconds_of(1e9, "h200:32") == pytest.approx(inside + between + latency)
    assert seconds_of(1e9, "h200:8", group=1) == pytest.approx(estimates.GPU_LATENCY)


def test_larger_arrays_and_more_devices_take_longer():
    times = [seconds_of(n, "v5e:8x8") for n in (0, 1e3, 1e6, 1e9)]
    assert times == sorted(set(times))
    times = [seconds_of(1e3, f"v5e:{n}x{n}") for n in (2, 4, 8)]
    assert times == sorted(set(times))


@pytest.mark.parametrize(
    ("flops", "traffic", "slowest"), [(1e15, 1e9, "compute"), (1e9, 1e12, "memory")]
)
def test_the_slowest_counts_and_small_collectives_are_added(flops, traffic, slowest):
    devices = topologies.Devices(topologies.parse("v5e:2x2"), jax.devices()[:4], True)
    small = Collective("all-reduce", 1000, 4, 100)
    large = Collective("all-reduce", 10**6, 4, 1)
    times = estimates.estimate(flops, traffic, [small, large], devices, 197e12)
    chip = CHIPS["TPU v5 lite"]
    assert times["compute"] == pytest.approx(flops / 197e12 / estimates.EFFICIENCY)
    assert times["memory"] == pytest.approx(traffic / chip.bandwidth)
    one = estimates.collective_seconds(small, devices, chip)
    assert times["small_collectives"] == pytest.approx(100 * one)
    assert times["step"] == pytest.approx(times[slowest] + 100 * one)


def test_what_xla_says_it_needs():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    )
    assert planned_programs.needed_bytes(message) == 20.5 * 2**30
    assert planned_programs.needed_bytes("RESOURCE_EXHAUSTED: no figures") is None


# ---- Configs ------------------------------------------------------------------------------------


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology", ["v4:2x2x1", "v5p:2x2x1", "v5e:2x4", "v6e:2x4", "v5e:8x8", "h200:8"]
)
def test_a_device_is_a_chip(topology):
    wanted = topologies.parse(topology)
    if reason := topologies.missing(wanted.kind):
        pytest.skip(reason)
    code = "from memseg_jax.hlo.topologies import open_devices, parse; "
    code += f"print(len(open_devices(parse({topology!r})).devices))"
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]  # the compilers' settings stay in that process
    found = subprocess.run(
        command, cwd=tiny.ROOT, env=env, check=True, timeout=300, capture_output=True, text=True
    )
    assert int(found.stdout) == wanted.chips


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
