"""Steps of all backbones on images whose rows are split over devices, in double precision."""

import functools

import jax
import numpy as np
import pytest

from memseg_jax.models import resnest
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import sharding
from memseg_jax.training import optimizer
from memseg_jax.training.program import random_batch
from memseg_jax.training.state import TrainState
from memseg_jax.training.step import make_train_step
from tests.small_models import (
    FAST_COMPILE,
    random_variables,
    shallow_hrnet,
    shallow_swin,
    small_config,
)

pytestmark = pytest.mark.usefixtures("double_precision", "small_arrays_are_split_too")
STEPS = 3  # with a shared update
BATCH = 8
# Heights of which no part is like another, with eight rows or more on the coarsest map.
CROPS = {
    "hrnetv2w48": (228, 32),
    "vitbase": (117, 48),
    "vitlarge": (117, 48),
    "swintiny": (230, 32),
}
NARROW = {"hrnetv2w48": 1 / 12, "vitbase": 1 / 12}
BACKBONES = ("resnet50", "resnet101", "resnest101", "hrnetv2w48", "vitbase", "vitlarge", "swintiny")
LAYOUTS = ({"data": 4, "rows": 2}, {"data": 2, "rows": 4}, {"data": 1, "rows": 8})


@pytest.fixture
def small_arrays_are_split_too(monkeypatch):
    monkeypatch.setattr(sharding, "_SMALL", 64)


@functools.cache
def setting(backbone, accumulate):
    """Config, initial state, and a function that makes the step for shares of the parameters."""
    config = small_config()
    config.model.backbone = backbone
    config.model.backbone_width = NARROW.get(backbone, 1 / 16)
    config.model.auxiliary = backbone != "hrnetv2w48"
    config.model.dropout = 0.1
    config.model.drop_path = 0.1 if backbone == "swintiny" else 0.0
    config.augment.crop = CROPS.get(backbone, (67, 32))
    config.train.batch_size = BATCH
    config.train.accumulate = accumulate
    config.replica_groups = 2
    config.loss.consistency = 1.0
    # A tenth of the usual: steps from random weights then multiply rounding errors by less.
    config.optimizer.lr, config.optimizer.min_lr, config.model.memory.base_lr = 1e-3, 1e-5, 1e-3
    config.loss.consistency_from_epoch = 2  # from the second step on
    model = build_segmentor(config)
    model = model.clone(dtype=np.float64, backbone=model.backbone.clone(dtype=np.float64))
    schedule = optimizer.schedule_from_config(config, STEPS + 1)
    tx = optimizer.from_config(config, schedule)
    variables = jax.tree.map(lambda x: x.astype(np.float64), random_variables(model, 0))
    state = TrainState(step=np.int64(0), opt_state=tx.init(variables["params"]), **variables)
    return config, state, functools.partial(make_train_step, model, config, tx, schedule, 1)


def run(backbone, layout, accumulate=1):
    """What is known after each of a few steps: metrics and state."""
    config, state, make_step = setting(backbone, accumulate)
    count = 8 if layout else 1
    mesh = sharding.make_mesh(jax.devices()[:count], layout)
    shapes = sharding.with_sharding(state, mesh, "shared")
    step = make_step(sharding.shares_of(shapes.params))
    step = sharding.jit_step(step, shapes, mesh, config.augment.crop[0])
    state, found, compiled = sharding.place(state, shapes), [], None
    for number in range(STEPS):
        batch = random_batch(BATCH, config.augment.crop, 5, seed=number)
        batch["image"] = batch["image"].astype(np.float64)
        batch["label"][::2, :20] = 255  # images and rows differ in how much is labelled
        batch = sharding.place_batch(batch, mesh)
        compiled = compiled or step.lower(state, batch).compile(compiler_options=FAST_COMPILE)
        state, metrics = compiled(state, batch)
        found.append(jax.device_get({"metrics": metrics, "state": state}))
    return found


@functools.cache
def on_one_device(backbone, accumulate=1):
    return run(backbone, None, accumulate)


def assert_same(backbone, layout, accumulate=1):
    expected, found = on_one_device(backbone, accumulate), run(backbone, layout, accumulate)
    assert expected[2]["metrics"]["loss_memory"] > expected[0]["metrics"]["loss_memory"] == 0
    # Every step multiplies rounding errors by a thousand, as in the reference (`test_goldens.py`).
    for number, limit in enumerate((1e-9, 1e-7, 1e-5)):
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(expected[number]),
            jax.tree.leaves(found[number]),
            strict=True,
        )
        for (path, a), b in pairs:
            worst = np.abs(np.asarray(a) - b).max() / max(np.abs(a).max(), 1e-6)
            name = jax.tree_util.keystr(path)
            assert worst < limit, f"after step {number + 1}, {name}: {worst:.1e}"


# Three backbones in one layout each, and a ResNet with parts of the batch; the rest is
# `exhaustive`. What a ResNeSt has besides, pooling, is in tests/runtime/test_rows.py.
CHOSEN = {"hrnetv2w48": 2, "vitbase": 1, "swintiny": 1}
CASES = [
    pytest.param(
        backbone,
        layout,
        id=f"{backbone}-{layout['data']}x{layout['rows']}",
        marks=[] if CHOSEN.get(backbone) == number else pytest.mark.exhaustive,
    )
    for backbone in BACKBONES
    for number, layout in enumerate(LAYOUTS)
]


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "layout"), CASES)
def test_split_images_give_the_numbers_of_one_device(monkeypatch, backbone, layout):
    # Two blocks of every stage have all of its exchanges; the rest is more of the same.
    if backbone == "hrnetv2w48":
        shallow_hrnet(monkeypatch)
    if backbone == "resnest101":
        block, _ = resnest.VARIANTS[backbone]
        monkeypatch.setitem(resnest.VARIANTS, backbone, (block, (2, 2, 2, 2)))
    shallow_swin(monkeypatch)
    assert_same(backbone, layout)


@pytest.mark.slow
def test_with_parts_of_the_batch():
    assert_same("resnet18", {"data": 2, "rows": 2, "fsdp": 2}, accumulate=2)
