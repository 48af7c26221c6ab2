"""bfloat16 computes, float32 keeps: parameters, statistics, memory, losses, long sums."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.training import optimizer
from memseg_jax.training.state import abstract_state, init_state, init_variables
from memseg_jax.training.step import make_train_step
from tests import tiny
from tests.compiled_program import equations
from tests.small_models import fast_jit, shallow_hrnet

BATCH = 12  # more than SUMMED, so that a sum over the batch counts as long
SUMMED = 9  # a 3x3 window: so many values may be summed in bfloat16


@functools.cache
def batch():
    images, labels = zip(*(tiny.picture(k, 64, 64) for k in range(BATCH)))
    return {"image": (np.stack(images) - 120.0).astype(np.float32) / 60, "label": np.stack(labels)}


def build(dtype, accumulate=1, backbone="resnet18", width=0.125):
    config = tiny.get_config()
    config.model.compute_dtype = dtype
    config.model.dropout = 0.0
    config.model.backbone = backbone
    config.model.backbone_width = width
    config.train.accumulate = accumulate
    config.replica_groups = 2
    config.loss.consistency_from_epoch = 1
    model = build_segmentor(config)
    schedule = optimizer.schedule_from_config(config, 100)
    tx = optimizer.from_config(config, schedule)
    return model, tx, make_train_step(model, config, tx, schedule, 1)


@functools.cache
def compiled(dtype):
    return fast_jit(build(dtype)[2])


@functools.cache
def run(dtype, steps):
    """The state after some steps on one batch, and the metrics of every step."""
    model, tx, _ = build(dtype)
    state, metrics = init_state(init_variables(model, 0), tx), []
    for _ in range(steps):
        state, values = compiled(dtype)(state, batch())
        metrics.append(jax.device_get(values))
    return jax.device_get(state), metrics


@pytest.mark.parametrize("accumulate", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_everything_that_is_kept_is_float32(accumulate):
    model, tx, step = build("bfloat16", accumulate)
    state = abstract_state(model, tx)
    after, metrics = jax.eval_shape(step, state, batch())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert {x.dtype for x in jax.tree.leaves((after.params, after.batch_stats, after.memory))} == {
        np.dtype(np.float32)
    }
    assert metrics.pop("nonfinite").dtype == np.int32
    assert {x.dtype for x in metrics.values()} == {np.dtype(np.float32)}


def test_logits_are_float32_and_features_are_not():
    model = build("bfloat16")[0]
    variables = init_variables(model, 0)
    memory = variables.pop("memory")
    out = jax.eval_shape(lambda: model.apply(variables, batch()["image"], memory))
    for name in ("logits", "stage1"):
        assert out[name].dtype == np.float32
    assert all(logits.dtype == np.float32 for logits in out["auxiliary"])
    assert out["memory_input"].dtype == jnp.bfloat16
    assert out["context"].dtype == jnp.bfloat16


@pytest.mark.slow
def test_a_step_is_close_to_that_of_float32():
    # Not from the start: the gradient of random weights is so sensitive that rounding nothing but
    # the weights turns it by 30 degrees.
    start = run("float32", 20)[0]
    fresh = start.replace(opt_state=jax.tree.map(np.zeros_like, start.opt_state))
    (exact, expected), (state, metrics) = (
        jax.device_get(compiled(dtype)(fresh, batch())) for dtype in ("float32", "bfloat16")
    )
    for name in ("loss", "loss_stage1", "loss_stage2", "loss_aux", "loss_memory"):
        # By now the few rows of the memory are classified surely. The relative error of a loss near
        # 0 is the absolute error of its logits, here of 4 and more with 8 bits.
        limit = 0.02 if name == "loss_memory" else 0.01
        assert metrics[name] == pytest.approx(expected[name], rel=limit)
    assert metrics["loss"] != expected["loss"]
    traces = [optax.tree_utils.tree_get(s.opt_state, "trace") for s in (exact, state)]
    for module in ("backbone", "memory_module", "decoder_stage1", "decoder_stage2"):
        a, b = (
            np.concatenate([x.ravel() for x in jax.tree.leaves(trace[module])]) for trace in traces
        )
        lengths = np.linalg.norm(a), np.linalg.norm(b)
        assert a @ b / math.prod(lengths) > 0.99, module
        assert lengths[1] == pytest.approx(lengths[0], rel=0.05)
    np.testing.assert_allclose(
        state.memory, exact.memory, rtol=0, atol=0.02 * np.abs(exact.memory).max()
    )


@pytest.mark.slow
def test_a_short_training_learns():
    metrics = run("bfloat16", 30)[1]
    assert all(np.isfinite(value).all() for values in metrics for value in values.values())
    assert metrics[-1]["loss_stage2"] < 0.6 * metrics[0]["loss_stage2"]


@pytest.mark.parametrize(
    ("backbone", "width"),
    [
        ("resnet18", 0.125),
        pytest.param("resnest101", 0.0625, marks=pytest.mark.slow),
        pytest.param("hrnetv2w48", 0.0625, marks=pytest.mark.slow),
        pytest.param("vitlarge", 0.0625, marks=pytest.mark.slow),
    ],
)
def test_no_long_sum_is_in_bfloat16(backbone, width, monkeypatch):
    """Sums over positions, such as a bias's gradient: adding to 256, bfloat16 loses a 1."""
    shallow_hrnet(monkeypatch)
    model, tx, step = build("bfloat16", backbone=backbone, width=width)
    found = []
    for equation in equations(jax.make_jaxpr(step)(abstract_state(model, tx), batch())):
        name, result = equation.primitive.name, equation.outvars[0].aval
        if result.dtype != jnp.bfloat16:
            continue
        if name in ("reduce_sum", "cumsum", "scatter-add"):
            count = math.prod(equation.invars[0].aval.shape) / max(math.prod(result.shape), 1)
        elif name == "reduce_window_sum":
            count = math.prod(equation.params["window_dimensions"])
        else:
            continue
        if count > SUMMED:
            found.append((name, equation.invars[0].aval.shape, result.shape))
    assert not found, sorted(set(found))
