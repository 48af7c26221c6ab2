"""Steps of all methods and contexts: their losses, parts of a batch, devices, the memory."""

import functools

import jax
import numpy as np
import pytest

from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.models.statistics_memory import update_statistics
from memseg_jax.runtime import sharding
from memseg_jax.training import optimizer
from memseg_jax.training.program import random_batch
from memseg_jax.training.state import TrainState, init_variables
from memseg_jax.training.step import make_train_step
from tests.small_models import (
    FAST_COMPILE,
    ThreeConvolutions,
    fast_jit,
    random_variables,
    small_config,
)
from tests.training.test_accumulation import WithRunningStatistics
from tests.training.test_step import assert_close, largest_difference

pytestmark = pytest.mark.usefixtures("double_precision")
BATCH, CROP, STEPS = 8, (67, 32), 2
PLUS_PLUS = {"method": "mcibi_plus_plus", "memory.momentum": 0.1, "memory.base_lr": 0.0}
PYRAMID = {"context": "pyramid_pooling", "fpn": True, "fpn_dim": 12}
CASES = {
    "upernet": {
        **PLUS_PLUS,
        **PYRAMID,
        "memory.fuse_before_fpn": True,
        "remat": "blocks",
    },
    "late fusion": {**PLUS_PLUS, **PYRAMID, "memory.within_image_context": False},
    "aspp": {**PLUS_PLUS, "memory.downsample": 2, "memory.read_by": "pixels"},
    "fcn": {**PLUS_PLUS, "context": "none", "memory.read_by": "pixels", "memory.hard": True},
    "mcibi pspnet": {"context": "pyramid_pooling"},
    "mcibi fcn": {"context": "none"},
    "residual": {"memory.fusion": "residual", "memory.slots": 2, "remat": "blocks"},
    "residual fcn": {"memory.fusion": "residual", "context": "none", "memory.hard": True},
    "plain upernet": {**PYRAMID, "memory.enabled": False},
    "plain fcn": {"context": "none", "memory.enabled": False},
}


class ThreeMaps(ThreeConvolutions):
    """Maps at strides 2, 4 and 8."""

    finest_stride = 2


def config_of(case):
    config = small_config()
    for field, value in CASES[case].items():
        group, _, name = field.rpartition(".")
        (config.model[group] if group else config.model)[name] = value
    config.model.dropout = 0.1
    config.augment.crop = CROP
    config.train.batch_size = BATCH
    config.replica_groups = 2
    return config


@functools.cache
def setting(case, parts=1, frozen=False):
    """Config, model, initial state, and a function that makes the step."""
    config = config_of(case)
    config.train.accumulate = parts
    config.model.dropout = 0.0 if frozen else 0.1
    model = build_segmentor(config)
    model = model.clone(dtype=np.float64, backbone=ThreeMaps(np.float64))
    schedule = optimizer.schedule_from_config(config, STEPS + 1)
    tx = optimizer.from_config(config, schedule)
    variables = jax.tree.map(lambda x: x.astype(np.float64), random_variables(model, 0))
    state = TrainState(step=np.int64(0), opt_state=tx.init(variables["params"]), **variables)
    stepped = WithRunningStatistics(model) if frozen else model
    return (
        config,
        model,
        state,
        functools.partial(make_train_step, stepped, config, tx, schedule, 1),
    )


def batch_of(number):
    batch = random_batch(BATCH, CROP, 5, seed=number)
    batch["label"][::2, :20] = 255  # images and rows differ in how much is labelled
    batch["label"][:4][batch["label"][:4] == 3] = 255  # the first group does not see class 3
    return batch | {"image": batch["image"].astype(np.float64)}


@functools.cache
def run(case, rows=1, parts=1, frozen=False):
    """Metrics and state after each of a few steps, on one device or on eight."""
    _, _, state, make_step = setting(case, parts, frozen)
    count = 1 if rows == 1 else 8
    mesh = sharding.make_mesh(jax.devices()[:count], {"data": count // rows, "rows": rows})
    shapes = sharding.with_sharding(state, mesh, "shared")
    step = make_step(sharding.shares_of(shapes.params))
    step = sharding.jit_step(step, shapes, mesh, CROP[0])
    state, found, compiled = sharding.place(state, shapes), [], None
    for number in range(STEPS):
        batch = sharding.place_batch(batch_of(number), mesh)
        compiled = compiled or step.lower(state, batch).compile(compiler_options=FAST_COMPILE)
        state, metrics = compiled(state, batch)
        found.append(jax.device_get({"metrics": metrics, "state": state}))
    return found


def slow_but(*quick, in_ci=tuple(CASES)):
    """All cases but the quick ones are slow; those that are not in CI, exhaustive as well."""

    def marks(case):
        slow = [] if case in quick else [pytest.mark.slow]
        return slow + [pytest.mark.exhaustive] * (case not in (*quick, *in_ci))

    return [pytest.param(case, marks=marks(case), id=case) for case in CASES]


@pytest.mark.parametrize("case", slow_but("upernet"))
def test_losses_and_memory(case):
    config, model, start, _ = setting(case)
    names = {"loss_stage2", "loss_aux"}
    names |= {"loss_stage1"} if model.memory_enabled else set()
    if config.model.method == "mcibi_plus_plus" and config.model.context != "none":
        names |= {"loss_context"}
    for found in run(case):
        metrics = found["metrics"]
        losses = {name for name in metrics if name.startswith("loss_")}
        assert losses == names
        assert metrics["loss"] == pytest.approx(sum(metrics[name] for name in losses), rel=1e-12)
        assert metrics["nonfinite"] == 0
    after = run(case)[-1]["state"]
    assert largest_difference(after.params, start.params) > 1e-3
    if model.memory_enabled:
        assert largest_difference(after.memory, start.memory) > 1e-3


def test_the_memory_of_statistics_moves_by_its_rule():
    _, model, start, _ = setting("upernet")
    batch = batch_of(0)
    encode = functools.partial(
        model.apply,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(0)},
        method="encode",
    )
    weights = {"params": start.params, "batch_stats": start.batch_stats}
    encoded, _ = fast_jit(encode)(weights, batch["image"])
    expected, local = update_statistics(
        start.memory, encoded["memory_input"], batch["label"], 0.1, groups=2
    )
    found = run("upernet")[0]["state"].memory
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(local[0, 3], start.memory[3])
    assert np.abs(local[1, 3] - start.memory[3]).max() > 1e-3


def test_a_memory_of_statistics_starts_at_zero_and_one():
    model = build_segmentor(config_of("fcn"))
    memory = init_variables(model, 0)["memory"]
    assert memory.dtype == np.float32
    np.testing.assert_array_equal(memory, [[0, 1]] * 5)


@pytest.mark.parametrize("case", slow_but(in_ci=("late fusion", "residual")))
def test_parts_are_the_whole_batch(case):
    whole, parts = run(case, frozen=True), run(case, parts=4, frozen=True)
    for expected, found in zip(whole, parts):
        assert_close(found["metrics"], expected["metrics"], 1e-9)
        for name in ("params", "memory", "opt_state"):
            assert_close(getattr(found["state"], name), getattr(expected["state"], name), 1e-9)


@pytest.mark.parametrize("case", slow_but(in_ci=("upernet", "mcibi pspnet", "plain fcn")))
def test_devices_that_share_images_by_rows(case):
    for number, limit in enumerate((1e-9, 1e-7)):
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(run(case)[number]),
            jax.tree.leaves(run(case, rows=4)[number]),
            strict=True,
        )
        for (path, a), b in pairs:
            if not np.size(a):
                continue  # the memory of a baseline
            worst = np.abs(np.asarray(a) - b).max() / max(np.abs(a).max(), 1e-6)
            name = jax.tree_util.keystr(path)
            assert worst < limit, f"after step {number + 1}, {name}: {worst:.1e}"
