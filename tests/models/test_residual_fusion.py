"""`config.model.memory.fusion = "residual"`: it starts as the plain baseline, and can leave it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import names
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.training.state import abstract_variables, init_variables
from tests.models.test_segmentor import largest, rest_of
from tests.small_models import ThreeConvolutions, fast_jit, small_config

CASES = {
    "aspp": {},
    "no second attention": {"memory.within_image_context": False, "memory.slots": 2},
    "fcn": {"context": "none", "memory.hard": True},
}


@functools.cache
def models(case):
    """The residual model and the plain one."""
    config = small_config()
    config.model.update_from_flattened_dict(CASES[case] | {"memory.fusion": "residual"})
    residual = build_segmentor(config)
    config.model.memory.enabled = False
    return [
        model.clone(backbone=ThreeConvolutions()) for model in (residual, build_segmentor(config))
    ]


def start_of(case):
    """The variables of both before the first step, but with a memory; those of plain are taken."""
    residual, plain = models(case)
    variables = init_variables(residual, 0)
    memory = np.random.default_rng(1).standard_normal(variables["memory"].shape)
    flat = names.flatten(variables | {"memory": memory.astype(np.float32)})
    shared = names.flatten({k: abstract_variables(plain)[k] for k in ("params", "batch_stats")})
    assert all(flat[path].shape == leaf.shape for path, leaf in shared.items())
    taken = {path: flat[path] for path in shared} | {"memory": np.zeros((0, 1, 16), np.float32)}
    return names.unflatten(flat), names.unflatten(taken)


def images(seed=0):
    return np.random.default_rng(seed).standard_normal((2, 32, 40, 3)).astype(np.float32)


@pytest.mark.parametrize(("case", "train"), [("aspp", False), *((case, True) for case in CASES)])
def test_it_starts_as_the_plain_model(case, train):
    found = []
    for model, variables in zip(models(case), start_of(case)):
        run = fast_jit(
            functools.partial(model.apply, train=train, mutable=["batch_stats"], rngs=dropout())
        )
        out, _ = run(rest_of(variables), images(), variables["memory"])
        found.append(out["logits"])
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-6 * np.std(found[1]))


def dropout():
    return {"dropout": jax.random.key(0)}  # a layer's draw depends on its name, too


@pytest.mark.parametrize("case", ["aspp", "fcn"])
def test_the_first_gradient_is_of_the_last_normalisation_alone(case):
    model, (variables, _) = models(case)[0], start_of(case)

    def loss(branch, memory):
        params = variables["params"] | {"memory_module": branch}
        rest = {"params": params, "batch_stats": variables["batch_stats"]}
        return jnp.sum(jnp.sin(model.apply(rest, images(), memory)["logits"]))

    branch = variables["params"]["memory_module"]
    gradient = names.flatten(fast_jit(jax.grad(loss))(branch, variables["memory"]))
    last = "bottleneck" if case != "aspp" else "bottleneck_ms"
    moving = {path for path, value in gradient.items() if largest(value)}
    assert moving == {f"{last}/norm/scale", f"{last}/norm/bias"}
    # Every channel can begin to use the memory, not only those that a ReLU lets through.
    assert (np.abs(gradient[f"{last}/norm/scale"]) > 1e-6).all()


def test_what_it_reads_counts_once_the_scale_has_moved():
    model, (variables, _) = models("aspp")[0], start_of("aspp")
    run = fast_jit(lambda rest, memory: model.apply(rest, images(), memory)["logits"])
    path = model.zeros_at_start()[0].split("/")[1:]
    found = []
    for scale in (0.0, 0.5):
        flat = names.flatten(rest_of(variables))
        flat["/".join(["params", *path])] = np.full(16, scale, np.float32)
        rest = names.unflatten(flat)
        with_rows, with_zeros = (run(rest, variables["memory"] * share) for share in (1, 0))
        found.append(float(np.abs(with_rows - with_zeros).max()))
    assert found[0] == 0
    assert found[1] > 1e-3


def test_rows_go_through_the_classifier():
    model, (variables, _) = models("aspp")[0], start_of("aspp")
    rows = np.asarray(variables["memory"]).reshape(-1, 16)
    logits = model.apply(rest_of(variables), rows, train=False, method="classify_rows")
    layer = variables["params"]["classifier"]["conv"]
    np.testing.assert_allclose(logits, rows @ layer["kernel"][0, 0] + layer["bias"], atol=1e-5)
