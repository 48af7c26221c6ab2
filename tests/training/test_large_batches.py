"""Steps with AdamW, a warm-up and scaled learning rates: resumed, skipped, and with the memory."""

import functools

import jax
import numpy as np
import optax
import pytest

from memseg_jax import checkpoint
from memseg_jax.models.cell_sums import MemorySums
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.training import guards, optimizer
from memseg_jax.training.state import TrainState, init_state
from memseg_jax.training.step import Losses, make_train_step
from tests import checkpoints, tiny
from tests.small_models import ThreeConvolutions, fast_jit, random_variables


def get_config():
    """Batch 8 with the recipe of batch 2, and two steps of warm-up."""
    config = tiny.get_config()
    config.optimizer.update({"name": "adamw", "lr": 1e-3, "min_lr": 0.0, "base_batch": 2})
    config.optimizer.update({"warmup_steps": 2, "warmup_start": 0.25})
    config.model.memory.base_lr = 1e-3
    config.train.on_nonfinite = "skip"
    return config


@functools.cache
def start():
    """The compiled step, and the state before it."""
    config = get_config()
    model = build_segmentor(config).clone(backbone=ThreeConvolutions())
    schedule = optimizer.schedule_from_config(config, 8)
    tx = optimizer.from_config(config, schedule)
    state = init_state(random_variables(model, 0), tx)
    return fast_jit(make_train_step(model, config, tx, schedule, 1)), state


def batch(number):
    images, labels = zip(*(tiny.picture(10 * number + index) for index in range(4)))
    return {"image": (np.stack(images) - 120) / np.float32(60), "label": np.stack(labels)}


def advance(state, first, last):
    """The state after some steps, and their metrics."""
    metrics = []
    for number in range(first, last):
        state, values = start()[0](state, batch(number))
        metrics.append(values)
    return state, metrics


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(tmp_path):
    straight, metrics = advance(start()[1], 0, 3)
    assert [float(values["lr"]) for values in metrics] == pytest.approx(
        [1e-3, 4e-3 * (7 / 8) ** 0.9 * 0.625, 4e-3 * (6 / 8) ** 0.9], rel=1e-6
    )
    halfway, _ = advance(start()[1], 0, 1)
    with checkpoint.Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(halfway, checkpoints.make_meta(1))
        restored, _ = checkpointer.resume(checkpoints.abstract(halfway))
    resumed, _ = advance(restored, 1, 3)
    checkpoints.assert_same(resumed, straight)
    adam = straight.opt_state[0]
    for means in (adam.mu, adam.nu):
        assert max(float(abs(x).max()) for x in jax.tree.leaves(means)) > 0
    assert int(adam.count) == 3


@pytest.mark.slow
def test_a_bad_batch_moves_the_warmup_and_nothing_else():
    state, _ = advance(start()[1], 0, 1)
    bad = batch(1)
    bad["image"][0, 3, 4] = np.nan
    after, metrics = start()[0](state, bad)
    assert metrics["nonfinite"] == 1
    checkpoints.assert_same(after, guards.at_step(state, 2))
    position = optax.tree_utils.tree_get(
        after.opt_state, "count", filtering=lambda path, _: "Schedule" in str(path)
    )
    assert int(position) == 2
    assert int(after.opt_state[0].count) == 1


@pytest.mark.parametrize(
    ("base_batch", "lr", "share"), [(0, 5e-4, 0.45), (2, 2e-3, 0.45), (2, 5e-4, 0.1125)]
)
def test_the_memory_moves_by_a_share_of_the_rate_that_was_given(base_batch, lr, share):
    config = get_config()  # momentum 0.9 at 1e-3, which base_batch 2 makes 4e-3
    config.optimizer.base_batch = base_batch
    sums = MemorySums(np.zeros((1, 3, 1, 2)), np.ones((1, 3, 1)), np.ones((1, 3, 1)))
    losses = Losses(build_segmentor(config), config, 0)
    memory = np.ones((3, 1, 2), np.float32)
    moved, _, _ = losses.move_memory(TrainState(0, {}, {}, memory, ()), sums, lr)
    np.testing.assert_allclose(moved, 1 - share, rtol=1e-6)
