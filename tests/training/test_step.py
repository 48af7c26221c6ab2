"""The training step, in double precision: in single precision a rounding error turns a ReLU over
now and then, which hides what is compared here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memseg_jax.models.memory_update import memory_momentum, update_memory
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import sharding
from memseg_jax.scoring.memory_health import PIXELS
from memseg_jax.training import optimizer
from memseg_jax.training.losses import consistency_loss, cross_entropy
from memseg_jax.training.state import init_state, init_variables
from memseg_jax.training.step import make_train_step
from tests import tiny
from tests.small_models import FAST_COMPILE, ThreeConvolutions, fast_jit

pytestmark = pytest.mark.usefixtures("double_precision")
STEPS = 3
BATCH = 8
CE_TERMS = ("loss_stage1", "loss_stage2", "loss_aux")


def double(tree):
    return jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, tree)


@functools.cache
def batch(number):
    images, labels = zip(*(tiny.picture(100 * number + k) for k in range(BATCH)))
    labels = np.stack(labels)
    labels[:3, :16] = 255  # groups differ in their number of labelled pixels
    stop = np.zeros(BATCH, np.int32)  # one flag per device at most
    stop[5] = number == 2
    return {"image": (np.stack(images) - 120.0) / 60, "label": labels, "stop": stop}


@functools.cache
def build(groups=1, dropout=0.0, memory=True, name="sgd", start_epoch=1):
    """Returns config, model, schedule and optimiser. An epoch has one step."""
    config = tiny.get_config()
    config.replica_groups = groups
    config.model.dropout = dropout
    config.model.memory.enabled = memory
    config.model.memory.start_epoch = start_epoch
    config.optimizer.name = name
    model = build_segmentor(config).clone(
        backbone=ThreeConvolutions(jnp.float64), dtype=jnp.float64
    )
    schedule = optimizer.schedule_from_config(config, STEPS + 1)
    return config, model, schedule, optimizer.from_config(config, schedule)


@functools.cache
def initial(memory=True, name="sgd"):
    _, model, _, tx = build(memory=memory, name=name)
    return double(init_state(init_variables(model, 0), tx))


@functools.cache
def compiled(devices, **options):
    """Returns the mesh and the compiled step."""
    config, model, schedule, tx = build(**options)
    mesh = sharding.make_mesh(jax.devices()[:devices])
    step = jax.jit(make_train_step(model, config, tx, schedule, 1), compiler_options=FAST_COMPILE)
    return mesh, step


def take_step(state, batch, devices=1, **options):
    mesh, step = compiled(devices, **options)
    return jax.device_get(step(sharding.place(state, mesh), sharding.place_batch(batch, mesh)))


@functools.cache
def run(devices=1, **options):
    """Returns the states (before the first step too) and the metrics of a few steps."""
    state = initial(options.get("memory", True))
    states, metrics = [state], []
    for number in range(STEPS):
        state, values = take_step(state, batch(number), devices, **options)
        states.append(state)
        metrics.append(values)
    return states, metrics


@functools.cache
def forward():
    """The plain forward pass of a training step."""
    model = build()[1]

    def apply(state, memory, images):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        rngs = {"dropout": jax.random.key(0)}
        return model.apply(
            variables, images, memory, train=True, mutable=["batch_stats"], rngs=rngs
        )

    return fast_jit(apply)


@functools.cache
def updated():
    return fast_jit(update_memory)


def assert_close(actual, expected, tolerance=1e-9):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


def largest_difference(a, b):
    return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


# ---- Devices and replica groups -----------------------------------------------------------------


@pytest.mark.slow  # quick: the same with accumulation (test_accumulation.py)
@pytest.mark.parametrize("groups", [2, 1, 8])
def test_eight_devices_give_the_numbers_of_one(groups):
    one, eight = run(devices=1, groups=groups), run(devices=8, groups=groups)
    assert_close(eight[1], one[1])
    assert_close(eight[0][-1], one[0][-1])
    assert np.abs(one[0][-1].memory).max() > 0.01
    assert largest_difference(one[0][-1].params, one[0][0].params) > 0.01


@pytest.mark.slow
def test_a_request_to_stop_of_any_process_comes_back_to_all():
    _, metrics = run(devices=8)
    assert [int(step["stop"]) for step in metrics] == [0, 0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("groups", [(1, 2), (2, 8)])
def test_the_number_of_groups_matters(groups):
    a, b = (run(groups=number)[0][-1] for number in groups)
    assert largest_difference(a.params, b.params) > 1e-4
    assert largest_difference(a.memory, b.memory) > 1e-4


def test_groups_are_means_of_parts_of_the_batch():
    states, metrics = run(groups=2)
    out, _ = forward()(states[1], states[1].memory, batch(1)["image"])
    labels, config = batch(1)["label"], build()[0]
    halves = (slice(0, BATCH // 2), slice(BATCH // 2, BATCH))
    losses = [cross_entropy(out["logits"][half], labels[half]) for half in halves]
    assert abs(losses[0] - losses[1]) > 1e-3
    assert metrics[1]["loss_stage2"] == pytest.approx(float(sum(losses) / 2), rel=1e-9)
    momentum = memory_momentum(
        metrics[1]["lr"], config.model.memory.momentum, config.model.memory.base_lr
    )
    memories = [
        updated()(states[1].memory, out["memory_input"][half], labels[half], momentum)
        for half in halves
    ]
    assert_close(states[2].memory, sum(memories) / 2)


# ---- The order inside the step ------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1])
def test_forward_uses_the_memory_of_the_step_before(number):
    states, metrics = run()
    before, after = states[number], states[number + 1]
    images, labels = batch(number)["image"], batch(number)["label"]
    out, _ = forward()(before, before.memory, images)
    assert metrics[number]["loss_stage2"] == pytest.approx(
        float(cross_entropy(out["logits"], labels)), rel=1e-9
    )
    other, _ = forward()(before, after.memory, images)
    assert abs(cross_entropy(other["logits"], labels) - metrics[number]["loss_stage2"]) > 1e-5


def test_memory_is_updated_from_the_features_of_this_step():
    config = build()[0]
    states, metrics = run()
    for number in range(2):
        out, _ = forward()(states[number], states[number].memory, batch(number)["image"])
        momentum = memory_momentum(
            metrics[number]["lr"], config.model.memory.momentum, config.model.memory.base_lr
        )
        expected = updated()(
            states[number].memory, out["memory_input"], batch(number)["label"], momentum
        )
        assert_close(states[number + 1].memory, expected)
        labels = batch(number)["label"].astype(np.int64).ravel()
        counts = np.bincount(labels, minlength=256)[: len(config.data.class_names)]
        assert metrics[number][PIXELS].tolist() == counts.tolist()


def test_the_losses_add_up_with_their_weights():
    config = build()[0]
    states, metrics = run()
    out, _ = forward()(states[1], states[1].memory, batch(1)["image"])
    for name, logits in (("stage1", out["stage1"]), ("auxiliary", out["auxiliary"][0])):
        expected = config.loss[name] * cross_entropy(logits, batch(1)["label"])
        shown = metrics[1]["loss_aux" if name == "auxiliary" else f"loss_{name}"]
        assert shown == pytest.approx(float(expected), rel=1e-9)
    for values in metrics:
        terms = [value for name, value in values.items() if name.startswith("loss_")]
        assert len(terms) == 4
        assert values["loss"] == pytest.approx(sum(terms), rel=1e-12)


def test_the_optimiser_is_sgd_on_the_gradient_of_the_sum():
    # Two runs from one state: momentum is what links the steps.
    states, metrics = run()
    config = build()[0].optimizer
    velocity = [optax.tree_utils.tree_get(state.opt_state, "trace") for state in states]
    for number in range(STEPS):
        lr = metrics[number]["lr"]
        moved = jax.tree.map(
            lambda p, v, lr=lr: p - lr * v, states[number].params, velocity[number + 1]
        )
        assert_close(states[number + 1].params, moved)
        gradient = jax.tree.map(
            lambda new, old, p: new - config.momentum * old - config.weight_decay * p,
            velocity[number + 1],
            velocity[number],
            states[number].params,
        )
        assert float(optax.tree.norm(gradient)) == pytest.approx(
            float(metrics[number]["grad_norm"]), rel=1e-9
        )


def test_a_memory_that_starts_later_is_empty_until_then():
    (first, second, third, fourth), metrics = run(start_epoch=3)
    assert not any(state.memory.any() for state in (first, second, third))
    assert [bool(values[PIXELS].any()) for values in metrics] == [False, False, True]
    assert [bool(values["loss_memory"]) for values in metrics] == [False, False, True]
    # The step that begins it is one that finds an empty memory, as the first of other runs does.
    assert_close(take_step(third, batch(2))[0].memory, fourth.memory)
    assert fourth.memory.any(axis=-1).all()


# ---- Consistency loss ---------------------------------------------------------------------------


def test_consistency_starts_with_the_second_epoch():
    _, metrics = run()
    assert metrics[0]["loss_memory"] == 0
    assert all(values["loss_memory"] > 0 for values in metrics[1:])


def test_consistency_moves_the_statistics_of_the_second_decoder_again():
    config, model, _, _ = build()
    states, metrics = run()
    for number in range(2):
        before, after = states[number], states[number + 1]
        _, mutated = forward()(before, before.memory, batch(number)["image"])
        once = mutated["batch_stats"]
        if number:
            logits, mutated = model.apply(
                {"params": before.params, "batch_stats": once},
                after.memory.reshape(-1, after.memory.shape[-1]),
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
                method="classify_rows",
            )
            twice = mutated["batch_stats"]
            moved = {name for name in once if largest_difference(once[name], twice[name]) > 1e-6}
            assert moved == {"decoder_stage2"}
            loss = consistency_loss(logits.reshape(1, *after.memory.shape[:2], -1))
            expected = config.loss.consistency * float(loss)
            assert metrics[number]["loss_memory"] == pytest.approx(expected, rel=1e-9)
            once = twice
        assert_close(after.batch_stats, once)


# ---- Special cases ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1])
def test_a_batch_without_labels(number):
    state = run()[0][number]
    unlabelled = batch(0) | {"label": np.full_like(batch(0)["label"], 255)}
    after, metrics = take_step(state, unlabelled)
    assert [metrics[name] for name in CE_TERMS] == [0, 0, 0]
    assert all(np.isfinite(value).all() for value in metrics.values())
    assert metrics[PIXELS].tolist() == [0] * len(build()[0].data.class_names)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    assert after.memory.tobytes() == state.memory.tobytes()


def test_the_baseline_has_no_memory_and_learns():
    states, metrics = run(memory=False)
    assert set(metrics[0]) == {
        "loss",
        "loss_stage2",
        "loss_aux",
        "lr",
        "grad_norm",
        "nonfinite",
        "stop",
    }
    assert states[-1].memory.size == 0
    assert not {"memory_module", "decoder_stage1", "bottleneck"} & set(states[-1].params)
    state, first = take_step(states[-1], batch(0), memory=False)
    for _ in range(30):
        state = state.replace(step=np.int32(0))  # for the highest learning rate
        state, last = take_step(state, batch(0), memory=False)
    assert last["loss"] < 0.9 * first["loss"]


def test_dropout_depends_on_the_step_and_on_nothing_else():
    state = initial()
    results = [
        take_step(state.replace(step=np.int32(step)), batch(0), dropout=0.5)[1]["loss_stage2"]
        for step in (0, 0, 1)
    ]
    assert results[0] == results[1]
    assert abs(results[2] - results[0]) > 1e-3
