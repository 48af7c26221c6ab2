"""Schedules against stored numbers, optimisers against PyTorch's and against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from memseg_jax.errors import UserError
from memseg_jax.training.optimizer import (
    from_config,
    multiplier,
    poly_schedule,
    schedule_from_config,
)


@pytest.mark.parametrize(
    ("step", "total", "lr", "expected"),
    [
        (0, 164190, 0.01, 0.01),
        (1, 164190, 0.01, 0.00999994573358479),
        (82095, 164190, 0.01, 0.005405278639554652),
        (164189, 164190, 0.01, 0.00010020036560035863),
        (0, 42150, 0.001, 0.001),
        (42149, 42150, 0.001, 0.00010006193336662305),
    ],
)
def test_poly_schedule(step, total, lr, expected):
    schedule = poly_schedule(lr, 1e-4, 0.9, total)
    # Float32 loses digits in 1 - step / total towards the end.
    assert float(schedule(step)) == pytest.approx(expected, rel=5e-7)
    assert float(jax.jit(schedule)(jnp.int32(step))) == pytest.approx(expected, rel=5e-7)


def test_schedule_falls_to_its_floor_and_stays():
    schedule = poly_schedule(0.01, 1e-4, 0.9, 50)
    values = np.array([float(schedule(step)) for step in range(60)])
    assert (np.diff(values[:51]) < 0).all()
    np.testing.assert_allclose(values[50:], 1e-4, rtol=1e-6)


def test_schedule_of_a_config():
    config = common.get_config()
    config.optimizer.update({"lr": 0.02, "min_lr": 0.001, "power": 2.0})
    schedule = schedule_from_config(config, 10)
    for step in range(11):
        expected = (0.02 - 0.001) * (1 - step / 10) ** 2 + 0.001
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-6)


def test_a_warmup_rises_to_the_curve_from_the_share_of_it():
    """The recipe of MCIBI++'s Swin models: 1500 steps from 1e-6, then poly to 0 with power 1."""
    config = common.get_config()
    config.optimizer.update({"lr": 6e-5, "min_lr": 0.0, "power": 1.0, "warmup_steps": 1500})
    schedule = schedule_from_config(config, 150_000)
    by_hand = {
        0: 6e-11,
        1: 6e-5 * (1 - 1 / 150_000) * (1e-6 + (1 - 1e-6) / 1500),
        750: 6e-5 * 0.995 * 0.5000005,
        1500: 6e-5 * 0.99,
        1501: 6e-5 * (1 - 1501 / 150_000),
        75_000: 3e-5,
        150_000: 0,
    }
    for step, expected in by_hand.items():
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-6, abs=1e-12), step
    config.optimizer.warmup_steps = 0
    without = schedule_from_config(config, 150_000)
    assert all(float(schedule(step)) == float(without(step)) for step in (1500, 1501, 149_999))


def test_rates_are_scaled_with_the_batch():
    config = common.get_config()
    config.optimizer.update({"lr": 0.02, "min_lr": 0.001, "base_batch": 16, "warmup_steps": 2})
    config.optimizer.warmup_start = 0.25  # as in Goyal et al.: from the rate before the scaling
    config.train.batch_size = 64
    schedule = schedule_from_config(config, 10)
    assert float(schedule(0)) == pytest.approx(0.02, rel=1e-6)
    for step in range(2, 11):
        expected = 4 * ((0.02 - 0.001) * (1 - step / 10) ** 0.9 + 0.001)
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-6)


def test_a_warmup_as_long_as_the_run_is_refused():
    config = common.get_config()
    config.optimizer.warmup_steps = 10
    schedule_from_config(config, 11)
    with pytest.raises(UserError, match=r"warmup_steps is 10; expected fewer than .* steps, 10 "):
        schedule_from_config(config, 10)


# ---- SGD -------------------------------------------------------------------------------------


def draw_tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {"backbone": {"conv": {"kernel": (3, 4), "bias": (4,)}}, "context": {"scale": (5,)}}
    return jax.tree.map(
        lambda shape: rng.standard_normal(shape).astype(np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def run(config, schedule, steps=6, gradient_scale=1, dtype=np.float32):
    """Our parameters after every step, with gradients that depend on the step alone."""
    tx = from_config(config, schedule)
    params = jax.tree.map(lambda x: x.astype(dtype), draw_tree(0))
    state = tx.init(params)
    history = []
    for step in range(steps):
        gradients = jax.tree.map(
            lambda g: (gradient_scale * g).astype(dtype), draw_tree(100 + step)
        )
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history


def plain_sgd(config, schedule, factors, steps=6):
    """g += decay * p; v = momentum * v + g, v = g in the first step; p -= lr * v. In float64."""
    o = config.optimizer
    params = jax.tree.map(lambda x: x.astype(np.float64), draw_tree(0))
    velocity, history = None, []
    for step in range(steps):
        gradients = draw_tree(100 + step)
        decayed = {
            name: jax.tree.map(
                lambda g, p, name=name: g + o.weight_decay * factors.get(name, (1, 1))[1] * p,
                gradients[name],
                params[name],
            )
            for name in params
        }
        if velocity is None:
            velocity = decayed
        else:
            velocity = jax.tree.map(lambda v, g: o.momentum * v + g, velocity, decayed)
        params = {
            name: jax.tree.map(
                lambda p, v, name=name, step=step: (
                    p - float(schedule(step)) * factors.get(name, (1, 1))[0] * v
                ),
                params[name],
                velocity[name],
            )
            for name in params
        }
        history.append(params)
    return history


def assert_histories_equal(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
                     ours, theirs)  # fmt: skip


def config_with(multipliers=None, **optimizer):
    config = common.get_config()
    config.optimizer.update({"lr": 0.5, "min_lr": 0.005, "weight_decay": 0.1} | optimizer)
    config.optimizer.multipliers.update(multipliers or {})
    return config


@pytest.mark.parametrize(
    "multipliers",
    [{}, {"backbone": (0.1, 0.1)}, {"backbone": (0.1, 0.0)}, {"context": (2.0, 3.0)}],
)
def test_sgd_equals_pytorchs_rule(multipliers):
    config = config_with(multipliers)
    schedule = schedule_from_config(config, 6)
    expected = plain_sgd(config, schedule, multipliers)
    assert_histories_equal(run(config, schedule), expected)


def test_learning_rate_stays_outside_the_momentum():
    # The rate drops to 0 after the first step and returns: the velocity has gone on growing.
    config = config_with(weight_decay=0.0)

    def schedule(step):
        return jnp.where(step == 1, 0.0, 1.0)

    history = run(config, schedule, steps=3)
    g = [draw_tree(100 + step)["context"]["scale"] for step in range(3)]
    np.testing.assert_array_equal(history[1]["context"]["scale"], history[0]["context"]["scale"])
    moved = history[2]["context"]["scale"] - history[1]["context"]["scale"]
    np.testing.assert_allclose(moved, -(0.81 * g[0] + 0.9 * g[1] + g[2]), rtol=1e-5, atol=1e-6)


def test_decay_applies_to_scales_and_biases_too():
    config = config_with(momentum=0.0)
    after = run(config, lambda step: 0.5, steps=1, gradient_scale=0)[0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, (1 - 0.5 * 0.1) * b, rtol=1e-6),
        after,
        draw_tree(0),
    )


def test_learning_rate_factor_zero_freezes_a_module():
    config = config_with({"backbone": (0.0, 0.0)})
    after = run(config, schedule_from_config(config, 6))[-1]
    before = draw_tree(0)
    jax.tree.map(np.testing.assert_array_equal, after["backbone"], before["backbone"])
    assert (after["context"]["scale"] != before["context"]["scale"]).all()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("context/scale", (1.0, 1.0)),
        ("backbone/conv1/kernel", (0.5, 1.0)),
        ("backbone/layer1_0/conv1/conv/kernel", (0.1, 0.2)),
        ("backbone/layer2_0/conv1/conv/kernel", (0.5, 1.0)),
        ("backbone/layer1_0/conv1/norm/scale", (3.0, 0.0)),
    ],
)
def test_the_longest_pattern_counts(path, expected):
    table = {
        "backbone": (0.5, 1.0),
        "backbone/layer1_*": (0.1, 0.2),
        "backbone/*/norm/scale": (3, 0),
    }
    for multipliers in (table, dict(reversed(table.items()))):
        keys = tuple(jax.tree_util.DictKey(key) for key in path.split("/"))
        assert multiplier(keys, multipliers) == expected


def test_sgd_with_factors_for_a_part_of_a_module():
    config = config_with({"backbone/*/kernel": (0.1, 0.0)})
    schedule = schedule_from_config(config, 6)
    parts = [plain_sgd(config, schedule, factors)[-1] for factors in ({}, {"backbone": (0.1, 0)})]
    expected = {"context": parts[0]["context"], "backbone": {"conv": {
        "kernel": parts[1]["backbone"]["conv"]["kernel"],
        "bias": parts[0]["backbone"]["conv"]["bias"],
    }}}  # fmt: skip
    assert_histories_equal(run(config, schedule)[-1:], [expected])


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_what_is_frozen_stays_and_the_rest_moves_as_before(name):
    config = config_with(name=name)
    schedule = schedule_from_config(config, 6)
    expected = run(config, schedule)[-1]
    config.train.freeze = ("backbone/conv/kernel",)
    after = run(config, schedule)[-1]
    expected["backbone"]["conv"]["kernel"] = draw_tree(0)["backbone"]["conv"]["kernel"]
    jax.tree.map(np.testing.assert_array_equal, after, expected)


def test_unknown_module_is_named():
    config = config_with({"backbon": (0.1, 0.1)})
    with pytest.raises(UserError, match=r"multipliers names 'backbon', .*Did you mean backbone\?"):
        run(config, lambda step: 0.1, steps=1)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_updates_keep_shapes_and_types(name):
    config = config_with(name=name)
    for leaf, before in zip(
        jax.tree.leaves(run(config, schedule_from_config(config, 6), steps=2)[-1]),
        jax.tree.leaves(draw_tree(0)),
    ):
        assert leaf.dtype == jnp.float32
        assert leaf.shape == before.shape


# ---- Others ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_same_as_pytorchs(double_precision, name):
    """In double precision, with warm-up, factors by module and decay by name."""
    torch = pytest.importorskip("torch")
    factors = {"backbone": (0.1, 2.0), "backbone/*/bias": (1.0, 0.0), "context": (1.0, 0.0)}
    config = config_with(factors, name=name, lr=0.02, warmup_steps=3, min_lr=0.0)
    schedule = schedule_from_config(config, 6)

    def tensors(seed):
        leaves = jax.tree.leaves(draw_tree(seed))
        return [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in leaves]

    params, decay = tensors(0), config.optimizer.weight_decay
    pairs = [(1.0, 0.0), (0.1, 2.0), (1.0, 0.0)]  # bias, kernel, scale
    groups = [
        {"params": [p], "factor": factor, "weight_decay": decay * of_decay}
        for p, (factor, of_decay) in zip(params, pairs, strict=True)
    ]
    if name == "adamw":
        theirs = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    else:
        theirs = torch.optim.SGD(groups, momentum=0.9)
    ours = run(config, schedule, dtype=np.float64)
    for step in range(6):
        for group, gradient in zip(theirs.param_groups, tensors(100 + step), strict=True):
            group["lr"] = group["factor"] * float(schedule(step))
            group["params"][0].grad = gradient.detach()
        theirs.step()
        for a, b in zip(jax.tree.leaves(ours[step]), params, strict=True):
            np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-12, atol=1e-14)


def test_lars_is_its_formula(double_precision):
    """Steps in proportion to the norm of the kernel; a bias and a scale move as with SGD."""
    config = config_with({"backbone": (0.5, 2.0)}, name="lars", lr=20.0)
    schedule = schedule_from_config(config, 6)
    ours = run(config, schedule, dtype=np.float64)
    params = [x.astype(np.float64) for x in jax.tree.leaves(draw_tree(0))]
    velocity = [np.zeros_like(x) for x in params]
    for step in range(6):
        gradients = jax.tree.leaves(draw_tree(100 + step))
        for k, (g, factor) in enumerate(zip(gradients, (0.5, 0.5, 1.0), strict=True)):
            p, g, trust = params[k], g.astype(np.float64), 1.0
            if p.ndim > 1:
                g = g + 2.0 * 0.1 * p
                trust = 0.001 * np.sqrt((p**2).sum()) / np.sqrt((g**2).sum())
            velocity[k] = 0.9 * velocity[k] + float(schedule(step)) * factor * trust * g
            params[k] = p - velocity[k]
        for a, b in zip(jax.tree.leaves(ours[step]), params, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)


def test_lars_without_decay_does_not_depend_on_the_size_of_gradients():
    config = config_with(name="lars", weight_decay=0.0)
    one, other = (
        run(config, lambda step: 2.0, steps=2, gradient_scale=scale)[-1] for scale in (1, 1e-3)
    )
    one, other = (tree["backbone"]["conv"]["kernel"] for tree in (one, other))
    np.testing.assert_allclose(one, other, rtol=1e-5)
    assert np.abs(one - draw_tree(0)["backbone"]["conv"]["kernel"]).max() > 1e-3
