"""`config.model.norm_group`: a step of a batch in groups is the mean of steps of the groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseg_jax.errors import UserError
from memseg_jax.hlo import hlo_text
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import sharding, sharding_rules
from memseg_jax.training import optimizer
from memseg_jax.training.state import abstract_state, init_state
from memseg_jax.training.step import make_train_step
from tests import tiny
from tests.compiled_program import equations
from tests.small_models import FAST_COMPILE, ThreeConvolutions, random_variables

BATCH = 8


@functools.cache
def build(norm_group, groups, parts=1, consistency=0.0, dtype=jnp.float64):
    """The step and the state before it. Nothing is dropped; rows of all groups never mix."""
    config = tiny.get_config()
    config.replica_groups = groups
    config.train.accumulate = parts
    config.loss.consistency = consistency
    config.loss.consistency_from_epoch = 1
    config.model.norm_group = norm_group
    config.model.dropout = 0.0
    model = build_segmentor(config).clone(backbone=ThreeConvolutions(dtype), dtype=dtype)
    schedule = optimizer.schedule_from_config(config, 4)
    tx = optimizer.from_config(config, schedule)
    return make_train_step(model, config, tx, schedule, 1), model, tx


def initial():
    _, model, tx = build(0, 1)
    state = init_state(random_variables(model, 0), tx)
    return jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, state)


@functools.cache
def batch():
    images, labels = zip(*(tiny.picture(index) for index in range(BATCH)))
    return {"image": (np.stack(images) - 120.0) / 60, "label": np.stack(labels)}


def take_step(images, devices, **options):
    """The state after one step of some images of the batch."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    step = jax.jit(build(**options)[0], compiler_options=FAST_COMPILE)
    part = {name: value[images] for name, value in batch().items()}
    state, _ = step(sharding.place(initial(), mesh), sharding.place_batch(part, mesh))
    return jax.device_get(state)


def mean_of_steps(parts, **options):
    """The mean of the states after one step each of several parts of the batch."""
    states = [take_step(part, 1, **options) for part in parts]
    return jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *states)


def assert_close(state, expected):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), state, expected
    )


def test_all_images_of_a_step_are_in_groups_and_rows_of_the_memory_in_none(double_precision):
    step, *_ = build(norm_group=4, groups=2, consistency=1.0)
    variances = (
        equation.invars[0].aval.shape
        for equation in equations(jax.make_jaxpr(step)(initial(), batch()))
        if equation.primitive.name == "rsqrt"
    )
    # One group has no axis of groups.
    sizes = [shape[0] if len(shape) == 5 else 1 for shape in variances if len(shape) in (4, 5)]
    norms = len(jax.tree.leaves(initial().batch_stats)) // 2
    assert sizes.count(2) == norms
    assert sizes.count(1) == len(sizes) - norms == 1


@pytest.mark.slow
def test_a_step_in_groups_is_the_mean_of_steps_of_the_groups(double_precision):
    """As if two processes that share no statistics had trained; here 4 devices share a group."""
    state = take_step(slice(None), 8, norm_group=4, groups=2)
    assert_close(state, mean_of_steps([slice(0, 4), slice(4, 8)], norm_group=0, groups=1))
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: abs(a - b).max(), state, initial()))
    assert max(moved) > 0.01


@pytest.mark.slow
def test_groups_of_parts_of_a_batch(double_precision):
    """Part i has the images i, i + 2, ...; its groups are of these."""
    state = take_step(slice(None), 2, norm_group=2, groups=2, parts=2)
    parts = [[0, 2], [4, 6], [1, 3], [5, 7]]
    means = mean_of_steps(parts, norm_group=0, groups=1)
    for running, expected in zip(*map(jax.tree.leaves, (state.batch_stats, means.batch_stats))):
        np.testing.assert_allclose(running, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_small_messages_of_a_step_in_bfloat16():
    """Two for every normalisation, and few others; groups on one device need none of them."""

    def count(norm_group):
        step, model, tx = build(norm_group, 1, dtype=jnp.bfloat16)
        mesh = sharding.make_mesh()
        state = sharding.with_sharding(abstract_state(model, tx), mesh)
        arrays = {
            name: jax.ShapeDtypeStruct(
                (2 * BATCH, *value.shape[1:]),
                np.float32 if name == "image" else value.dtype,
                sharding=sharding.split_batch(mesh),
            )
            for name, value in batch().items()
        }
        lowered = sharding.jit_step(step, state, mesh).lower(state, arrays)
        text = lowered.compile(compiler_options=FAST_COMPILE).as_text()
        statistics = jax.tree.leaves(state.batch_stats)
        return sum(c.count for c in hlo_text.collectives(text, mesh.size)), len(statistics) // 2

    (whole, norms), (own, _) = count(0), count(2)
    assert 2 * norms - 8 <= whole - own <= 2 * norms
    assert own < 12


# ---- What cannot be split -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "accumulate", "norm_group"),
    [(8, 1, 0), (8, 1, 3), (8, 1, 6), (8, 1, 24), (4, 1, 2), (4, 2, 6), (1, 1, 12)],
)
def test_groups_of_whole_devices_or_on_one_device(devices, accumulate, norm_group):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    sharding_rules.check_batch_size(24, mesh, 1, accumulate, norm_group)


@pytest.mark.parametrize(
    ("devices", "accumulate", "norm_group", "answer"),
    [
        (8, 1, 4, "norm_group is 4, but each of 8 devices computes 3 images.*: 0, 3, 6, 12, 24"),
        (4, 2, 4, "norm_group is 4, but each of 4 devices computes 3 images.*: 0, 3, 6, 12"),
    ],
)
def test_groups_across_devices_are_refused(devices, accumulate, norm_group, answer):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    with pytest.raises(UserError, match=answer):
        sharding_rules.check_batch_size(24, mesh, 1, accumulate, norm_group)
