"""Part by part (`config.train.accumulate`): the numbers of the whole batch in less memory.

In double precision, as in `test_step`. Batch statistics are what parts do not share, so there
are two arrangements: parts that hold the same images, whose statistics are equal, and a model that
normalises with the running statistics, for which the images may be anything.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memseg_jax.errors import UserError
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import sharding, sharding_rules
from memseg_jax.training import optimizer
from memseg_jax.training.state import abstract_state, init_state, init_variables
from memseg_jax.training.step import make_train_step
from tests import tiny
from tests.compiled_program import collectives
from tests.small_models import FAST_COMPILE, ThreeConvolutions
from tests.training.test_step import assert_close, double, largest_difference

pytestmark = pytest.mark.usefixtures("double_precision")
BATCH = 16
UNLABELLED_PART = 1  # of the four parts of `labels()`


class WithRunningStatistics:
    """A segmentor that never looks at batch statistics nor moves the running ones."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def apply(self, variables, *args, train, mutable, rngs, method):
        del train, mutable, rngs
        out = self.model.apply(variables, *args, train=False, method=method)
        return out, {"batch_stats": variables["batch_stats"]}


@functools.cache
def labels(number):
    """Every image has labels of its own; one part in four has none at all."""
    of_batch = np.stack([tiny.picture(100 * number + k)[1] for k in range(BATCH)])
    of_batch[:5, :16] = 255
    of_batch[UNLABELLED_PART::4] = 255
    return of_batch


@functools.cache
def batch(number, repeated):
    """`repeated`: the four parts of the batch hold the same images."""
    images = [tiny.picture(100 * number + (k // 4 if repeated else k))[0] for k in range(BATCH)]
    return {"image": (np.stack(images) - 120.0) / 60, "label": labels(number)}


@functools.cache
def build(parts, groups=1, frozen=False, memory=True, weights=()):
    config = tiny.get_config()
    config.replica_groups = groups
    config.train.accumulate = parts
    config.model.dropout = 0.0
    config.model.memory.enabled = memory
    config.loss.class_weights = weights
    model = build_segmentor(config).clone(
        backbone=ThreeConvolutions(jnp.float64), dtype=jnp.float64
    )
    schedule = optimizer.schedule_from_config(config, 4)
    tx = optimizer.from_config(config, schedule)
    state = double(init_state(init_variables(model, 0), tx))
    if frozen:
        model = WithRunningStatistics(model)
    return make_train_step(model, config, tx, schedule, 1), state


@functools.cache
def compiled(devices=1, **options):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    step, state = build(**options)
    state = sharding.place(state, mesh)
    arrays = sharding.place_batch(batch(0, True), mesh)
    step = jax.jit(step).lower(state, arrays).compile(compiler_options=FAST_COMPILE)
    return step, state, mesh


@functools.cache
def run(repeated=False, **options):
    """States after each of two steps, the second with the consistency loss, and their metrics."""
    step, state, mesh = compiled(**options)
    results = []
    for number in range(2):
        state, metrics = step(state, sharding.place_batch(batch(number, repeated), mesh))
        results.append(jax.device_get((state, metrics)))
    return results


def assert_same_step(actual, expected):
    """Losses, gradients (the momentum of the first step), parameters and memory are the same."""
    for (state, metrics), (expected_state, expected_metrics) in zip(actual, expected):
        assert metrics.keys() == expected_metrics.keys()
        assert_close(metrics, expected_metrics, 1e-10)
        for part in ("params", "memory", "opt_state", "step"):
            assert_close(getattr(state, part), getattr(expected_state, part), 1e-10)


# ---- The same numbers ---------------------------------------------------------------------------


@pytest.mark.slow  # quick: test_statistics_move_once_by_the_mean_over_the_parts
@pytest.mark.parametrize(("groups", "parts"), [(2, 2), (1, 4), (2, 4)])
def test_parts_of_equal_statistics_are_the_whole_batch(groups, parts):
    whole = run(parts=1, groups=groups, repeated=True)
    actual = run(parts=parts, groups=groups, repeated=True)
    assert_same_step(actual, whole)
    assert actual[1][1]["loss_memory"] > 0
    assert np.abs(actual[1][0].memory).max() > 0.01
    # Running variances are those of fewer pixels, n / (n - 1) larger; the means are the same.
    for path, value in jax.tree_util.tree_leaves_with_path(actual[1][0].batch_stats):
        expected = functools.reduce(lambda tree, key: tree[key.key], path, whole[1][0].batch_stats)
        if path[-1].key == "mean":
            np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-10)
        else:
            np.testing.assert_allclose(value, expected, rtol=0.3)
            assert np.all(value >= expected * (1 - 1e-10))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"groups": 2, "weights": (0.5, 2.0, 1.5)}, marks=pytest.mark.slow),
        {"groups": 1, "memory": False},
    ],
    ids=str,
)
def test_any_images_where_batch_statistics_play_no_part(options):
    whole, actual = (run(parts=n, frozen=True, **options) for n in (1, 4))
    assert_same_step(actual, whole)
    start = build(1, memory=options.get("memory", True))[1]
    assert largest_difference(actual[0][0].params, start.params) > 1e-3
    # The momentum after the first step is the gradient and the weight decay.
    traces = [optax.tree_utils.tree_get(x[0][0].opt_state, "trace") for x in (actual, whole)]
    assert_close(*traces, 1e-11)
    assert float(optax.tree.norm(traces[0])) > 0.1


@pytest.mark.slow
def test_a_batch_statistic_is_what_differs():
    whole, actual = run(parts=1, groups=2), run(parts=2, groups=2)
    assert largest_difference(actual[0][0].params, whole[0][0].params) > 1e-5
    loss, expected = (float(run[0][1]["loss"]) for run in (actual, whole))
    assert loss == pytest.approx(expected, rel=0.2)


@pytest.mark.slow
def test_statistics_move_once_by_the_mean_over_the_parts():
    """The stem sees nothing but the images, so its statistics follow from theirs."""
    moved = run(parts=4, groups=1)[0][0].batch_stats["backbone"]["ConvNorm_0"]["norm"]
    alone = []
    for part in range(4):
        images = batch(0, False)["image"][part::4]
        _, mutated = ThreeConvolutions(jnp.float64).apply(
            {"params": build(1)[1].params["backbone"],
             "batch_stats": build(1)[1].batch_stats["backbone"]},
            images, train=True, mutable=["batch_stats"],
        )  # fmt: skip
        alone.append(mutated["batch_stats"]["ConvNorm_0"]["norm"])
    assert_close(moved, jax.tree.map(lambda *x: sum(x) / 4, *alone))
    assert largest_difference(alone[0], alone[1]) > 1e-3


def test_no_labels_at_all():
    step, state, mesh = compiled(parts=4, groups=1)
    unlabelled = batch(0, False) | {"label": np.full_like(labels(0), 255)}
    after, metrics = jax.device_get(step(state, sharding.place_batch(unlabelled, mesh)))
    assert [metrics[name] for name in ("loss_stage1", "loss_stage2", "loss_aux")] == [0, 0, 0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after, metrics)))
    assert after.memory.tobytes() == jax.device_get(state.memory).tobytes()


# ---- Devices and memory -------------------------------------------------------------------------


@pytest.mark.slow
def test_eight_devices_give_the_numbers_of_one():
    one, eight = (run(parts=2, groups=2, **on) for on in ({}, {"devices": 8}))
    assert_same_step(eight, one)
    assert_close(eight[1][0].batch_stats, one[1][0].batch_stats)


def test_devices_keep_their_images():
    program = compiled(devices=8, parts=2, groups=2)[0]
    assert {opcode.removesuffix("-start") for opcode, _ in collectives(program)} == {"all-reduce"}


@pytest.mark.slow
def test_memory_falls_with_the_number_of_parts():
    peaks = []
    for parts in (1, 4):
        config = tiny.get_config()
        config.train.accumulate = parts
        model = build_segmentor(config).clone(
            backbone=ThreeConvolutions(jnp.float64), dtype=jnp.float64
        )
        schedule = optimizer.schedule_from_config(config, 4)
        tx = optimizer.from_config(config, schedule)
        arrays = {
            "image": jax.ShapeDtypeStruct((BATCH, 256, 256, 3), jnp.float32),
            "label": jax.ShapeDtypeStruct((BATCH, 256, 256), jnp.uint8),
        }
        step = jax.jit(make_train_step(model, config, tx, schedule, 1))
        program = step.lower(abstract_state(model, tx), arrays).compile(FAST_COMPILE)
        peaks.append(program.memory_analysis().temp_size_in_bytes)
    assert peaks[1] < 0.5 * peaks[0]


# ---- What cannot be split -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "devices", "groups", "accumulate", "answer"),
    [
        (12, 1, 1, 5, "config.train.accumulate = 5 parts.*one device.*10 or 15.*1, 2, 3, 4, 6, 12"),
        (12, 4, 1, 2, "config.train.accumulate = 2 parts.*4 devices.*8 or 16.*1, 3"),
        (16, 4, 8, 4, "config.train.accumulate = 4 parts.*config.replica_groups = 8.*32.*1, 2"),
    ],
)
def test_parts_that_are_not_equal_are_refused(batch_size, devices, groups, accumulate, answer):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    with pytest.raises(UserError, match=answer):
        sharding_rules.check_batch_size(batch_size, mesh, groups, accumulate)


@pytest.mark.parametrize(("devices", "groups", "accumulate"), [(1, 1, 16), (4, 2, 4), (2, 8, 2)])
def test_equal_parts_are_accepted(devices, groups, accumulate):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    sharding_rules.check_batch_size(16, mesh, groups, accumulate)
