"""Where arrays live: the same numbers on every arrangement of devices, and checkpoints for all."""

import functools
import math
import re

import jax
import numpy as np
import pytest

from memseg_jax import checkpoint
from memseg_jax.errors import UserError
from memseg_jax.runtime import compilation, sharding, sharding_rules
from memseg_jax.training.step import make_train_step
from tests import tiny
from tests.small_models import FAST_COMPILE
from tests.training.test_step import batch, build, initial

LAYOUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]


@pytest.fixture(autouse=True)
def small_arrays_are_split_too(monkeypatch):
    monkeypatch.setattr(sharding, "_SMALL", 64)


@pytest.fixture
def double(double_precision):
    """float64, for numbers that can be compared to the last digits."""


def mesh_of(layout):
    return sharding.make_mesh(layout=dict(zip(("data", "fsdp", "rows"), layout)))


# ---- The arrangement ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (None, (8, 1, 1)),
        ({"data": -1, "fsdp": 1}, (8, 1, 1)),
        ({"data": -1, "fsdp": 4}, (2, 4, 1)),
        ({"data": 4, "fsdp": -1}, (4, 2, 1)),
        ({"data": 1, "fsdp": 8}, (1, 8, 1)),
        ({"data": -1, "rows": 4}, (2, 1, 4)),
        ({"data": 2, "rows": 2, "fsdp": 2}, (2, 2, 2)),
        ({"data": 1, "rows": -1}, (1, 1, 8)),
    ],
)
def test_layouts(layout, expected):
    mesh = sharding.make_mesh(layout=layout)
    assert mesh.axis_names == ("data", "fsdp", "rows")
    assert mesh.devices.shape == expected
    assert list(mesh.devices.flat) == jax.devices()


@pytest.mark.parametrize(
    "layout",
    [
        {"data": -1, "fsdp": 3},
        {"data": 2, "fsdp": 2},
        {"data": -1, "fsdp": -1},
        {"data": 0, "fsdp": 8},
        {"data": -1, "fsdp": 16},
        {"data": -1, "rows": 3},
        {"data": -1, "rows": -1},
    ],
)
def test_layouts_that_cannot_be(layout):
    with pytest.raises(UserError, match=r"config\.sharding is \{'data': "):
        sharding.make_mesh(layout=layout)


def test_devices_of_a_process_lie_side_by_side():
    class Device:
        def __init__(self, index, process):
            self.id, self.process_index = index, process

    devices = [Device(index, index % 2) for index in range(4)]

    def processes(**layout):
        mesh = sharding.make_mesh(devices, layout)
        return [d.process_index for d in mesh.devices.flat], mesh.devices.shape

    assert processes(data=2, fsdp=2) == ([0, 0, 1, 1], (2, 2, 1))
    assert processes(data=2, rows=2) == ([0, 0, 1, 1], (2, 1, 2))
    assert processes(data=1, rows=4) == ([0, 0, 1, 1], (1, 1, 4))


def test_images_that_processes_cannot_share():
    class Device:
        def __init__(self, index):
            self.id, self.process_index = index, index // 2

    devices = [Device(index) for index in range(6)]
    with pytest.raises(UserError, match=r"have 2 devices each.* 3 parts; use rows = 1, 2, 6"):
        sharding.make_mesh(devices, {"data": 2, "rows": 3})


def test_images_of_fewer_rows_than_parts():
    mesh = mesh_of((1, 1, 8))
    sharding_rules.check_rows(250, 32, mesh)
    with pytest.raises(UserError, match=r"rows is 8, but images of 224 rows have 7 .* at most 7"):
        sharding_rules.check_rows(224, 32, mesh)


def test_a_batch_for_images_in_parts():
    mesh = mesh_of((-1, 1, 4))
    sharding_rules.check_batch_size(2, mesh, 1)
    with pytest.raises(
        UserError, match=r"8 devices \(config.sharding.rows = 4: 2 images at a time"
    ):
        sharding_rules.check_batch_size(3, mesh, 1)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 16, 32), (None, None, None, "fsdp")),
        ((3, 3, 32, 16), (None, None, "fsdp")),
        ((16, 16), (None, "fsdp")),
        ((150, 16), (None, "fsdp")),  # 150 is larger but cannot be divided by 4
        ((150, 15), ()),
        ((63,), ()),
        ((64,), ("fsdp",)),
        ((), ()),
    ],
)
def test_the_largest_axis_that_fits_is_split(shape, spec):
    assert sharding.split_array(shape, mesh_of((2, 4))).spec == jax.sharding.PartitionSpec(*spec)


def test_where_all_devices_cannot_share_an_array_some_do():
    def split(*shape):
        return tuple(sharding.split_array(shape, mesh_of((2, 2, 2)), sharding.AXES).spec)

    assert split(3, 3, 16, 32) == (None, None, None, ("data", "fsdp", "rows"))
    assert split(4, 20) == (None, ("data", "fsdp"))
    assert split(9, 14) == (None, "data")
    assert split(9, 15) == ()


def test_what_a_device_holds(double):
    def held(layout):
        state = sharding.with_sharding(initial(), mesh_of(layout))
        sizes = [math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state)]
        return sum(sizes)

    assert held((2, 4)) < 0.4 * held((8, 1))
    assert held((1, 8)) < 0.25 * held((8, 1))
    shared = sharding.with_sharding(initial(), mesh_of((2, 2, 2)), "shared")
    shared = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(shared))
    assert shared == held((1, 8))
    state = sharding.shardings_of(initial(), mesh_of((1, 8)))
    assert all(x.is_fully_replicated for x in jax.tree.leaves((state.batch_stats, state.memory)))


def test_adams_means_are_split_like_the_parameters(double):
    state = sharding.shardings_of(initial(name="adamw"), mesh_of((1, 8)))
    adam = state.opt_state[0]
    assert adam.mu == adam.nu == state.params
    assert not all(x.is_fully_replicated for x in jax.tree.leaves(adam.nu))


# ---- The same numbers ---------------------------------------------------------------------------


@functools.cache
def compiled(layout, update="each", name="sgd"):
    """Returns the mesh, the compiled step, and the shapes of the state."""
    config, model, schedule, tx = build(groups=4, name=name)
    mesh = mesh_of(layout)
    state = sharding.with_sharding(initial(name=name), mesh, update)
    shares = sharding.shares_of(state.params)
    step = sharding.jit_step(make_train_step(model, config, tx, schedule, 1, shares), state, mesh)
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in sharding.place_batch(batch(0), mesh).items()
    }
    return mesh, step.lower(state, shapes).compile(compiler_options=FAST_COMPILE), state


def steps(layout, update="each", name="sgd"):
    mesh, step, shapes = compiled(layout, update, name)
    state = sharding.place(initial(name=name), shapes)
    for number in range(2):
        state, metrics = step(state, sharding.place_batch(batch(number), mesh))
    return state, metrics


def assert_same_numbers(layout, update="each", name="sgd"):
    """Two steps, in double precision, equal those with the state replicated."""
    _, _, shapes = compiled(layout, update, name)
    expected, state = steps((8, 1), name=name), steps(layout, update, name)
    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(state), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    for x, shape in zip(jax.tree.leaves(state[0]), jax.tree.leaves(shapes), strict=True):
        assert x.sharding.is_equivalent_to(shape.sharding, x.ndim)


@pytest.mark.slow
def test_split_parameters_give_the_same_numbers(double):
    assert_same_numbers((2, 4))


@pytest.mark.slow
def test_split_images_and_a_shared_update_give_the_same_numbers(double):
    assert_same_numbers((2, 1, 4), "shared")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(4, 2), (1, 8), (2, 1, 4), (4, 1, 2), (1, 1, 8), (2, 2, 2)])
def test_other_layouts_give_the_same_numbers(double, layout):
    assert_same_numbers(layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(8, 1, 1), (2, 2, 2)])
def test_a_shared_update_gives_the_same_numbers(double, layout):
    assert_same_numbers(layout, "shared")


@pytest.mark.slow
def test_lars_gives_the_same_numbers(double):
    """Its norms are over parameters that no device has as a whole."""
    assert_same_numbers((2, 1, 4), "shared", "lars")


@pytest.mark.slow
def test_the_report_of_memory(double):
    _, step, shapes = compiled((2, 4))
    report = sharding.memory_report(step, shapes)
    found = re.fullmatch(
        r"memory of a step on each device: (\S+ \w+) \(state (\S+) kB, batch (\S+) kB, "
        r"intermediate (\S+ \w+)\)",
        report,
    )
    sizes = [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
             for x in jax.tree.leaves(shapes)]  # fmt: skip
    assert float(found[2]) == pytest.approx(sum(sizes) / 1000, rel=5e-3)
    one_image = sum(x.nbytes for x in batch(0).values()) / 8
    assert float(found[3]) == pytest.approx(one_image / 1000, rel=0.05)
    assert sharding.memory_report(lambda: None, shapes) is None


# ---- Elsewhere ----------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 8])
def test_variables_for_inference_are_whole(double, devices):
    state = sharding.place(initial(), mesh_of((2, 4)))
    mesh = sharding.make_mesh(jax.local_devices()[:devices])
    variables = sharding.on_own_devices(state.variables, mesh)
    for x, expected in zip(jax.tree.leaves(variables), jax.tree.leaves(initial().variables)):
        assert x.sharding == sharding.replicated(mesh)
        np.testing.assert_array_equal(x, expected)


def test_a_checkpoint_of_one_layout_is_restored_on_any_other(double, tmp_path):
    config = build()[0]
    state = sharding.place(initial(), mesh_of((2, 4)))
    meta = checkpoint.make_meta(config, 0, ("a", "b", "c"), tiny.COLOURS, "any")
    with checkpoint.Checkpointer(tmp_path, 2) as checkpointer:
        checkpointer.save(state, meta)
        checkpointer.wait_until_finished()
        one = sharding.make_mesh(jax.devices()[:1])
        for mesh in (one, *map(mesh_of, [*LAYOUTS, (2, 1, 4), (2, 2, 2)])):
            shapes = sharding.with_sharding(initial(), mesh)
            restored, _ = checkpointer.resume(shapes, lambda meta: None)
            for x, wanted, expected in zip(
                *map(jax.tree.leaves, (restored, shapes, initial())), strict=True
            ):
                assert x.sharding.is_equivalent_to(wanted.sharding, x.ndim)
                np.testing.assert_array_equal(x, expected)


@pytest.mark.slow
def test_a_run_with_split_parameters_goes_on_with_others(
    quiet_entry, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(compilation, "compile_with_notice", tiny.compile_quickly)
    common = (f"--config.data.root={tiny.data_root()}", "--workdir", tmp_path)
    common += ("--config.train.epochs=1", "--config.model.memory.enabled=false")
    assert tiny.run(*common, "--config.sharding.fsdp=8") == 0, capsys.readouterr().err
    assert checkpoint.read_meta(tmp_path, "best")[0] == 4
    assert tiny.run(*common, "--config.sharding.fsdp=2") == 0, capsys.readouterr().err
    assert "This run is complete (4 steps)" in capsys.readouterr().out
    assert tiny.run(*common, "--config.sharding.fsdp=3") == 1
    assert "config.sharding is {'data': -1, 'rows': 1, 'fsdp': 3}" in capsys.readouterr().err
