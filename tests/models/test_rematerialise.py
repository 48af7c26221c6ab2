"""`config.model.remat`: same parameters, same numbers, less memory."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseg_jax.hlo import gpu
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.training import optimizer
from memseg_jax.training.state import abstract_state, abstract_variables
from memseg_jax.training.step import make_train_step
from tests import tiny
from tests.compiled_program import equations
from tests.small_models import FAST_COMPILE, random_variables

# Residual and transformer blocks, and of the head: ASPP, bottleneck, two attentions and the
# convolution after each of them, two decoders, an auxiliary head of every map that has one.
HEAD = 9
BLOCKS = {
    "resnet18": 8 + HEAD,
    "resnest101": 33 + HEAD,
    "hrnetv2w48": 4 + 4 * (2 + 4 * 3 + 3 * 4) + HEAD - 1,
    "vitlarge": 24 + HEAD + 2,
}


def small(backbone, remat):
    config = tiny.get_config()
    config.model.backbone = backbone
    config.model.backbone_width = 1 / 16
    config.model.remat = remat
    config.loss.consistency_from_epoch = 1
    return config


@pytest.mark.parametrize(
    "backbone",
    [
        "resnet18",
        "vitlarge",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("resnest101", "hrnetv2w48")),
    ],
)
def test_every_block_is_computed_again_and_no_name_changes(backbone):
    counts, variables = [], []
    for remat in ("none", "blocks"):
        model = build_segmentor(small(backbone, remat))
        abstract = abstract_variables(model)
        weights = {name: abstract[name] for name in ("params", "batch_stats")}

        def forward(weights, images, memory, model=model):
            key = {"dropout": jax.random.key(0)}
            return model.apply(
                weights, images, memory, train=True, mutable=["batch_stats"], rngs=key
            )

        images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
        jaxpr, out = jax.make_jaxpr(forward, return_shape=True)(weights, images, abstract["memory"])
        counts.append(sum("remat" in e.primitive.name for e in equations(jaxpr)))
        variables.append((abstract, out))
    assert counts == [0, BLOCKS[backbone]]
    assert variables[0] == variables[1]


@pytest.mark.slow
def test_a_step_has_the_same_numbers_():
    jax.config.update("jax_enable_x64", True)
    try:
        results = []
        for remat in ("none", "blocks"):
            config = small("resnet18", remat)
            model = build_segmentor(config)
            backbone = model.backbone.clone(dtype=jnp.float64)
            model = model.clone(dtype=jnp.float64, backbone=backbone)
            schedule = optimizer.schedule_from_config(config, 4)
            tx = optimizer.from_config(config, schedule)
            shapes = abstract_state(model, tx)
            filled = random_variables(model, 0) | {"step": np.int32(0)}
            state = shapes.replace(
                opt_state=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes.opt_state),
                **filled,
            )
            state = jax.tree.map(
                lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, state
            )
            images, labels = zip(*(tiny.picture(k, 96, 96) for k in range(4)))
            batch = {"image": np.stack(images) / 60 - 2, "label": np.stack(labels)}
            step = jax.jit(make_train_step(model, config, tx, schedule, 1))
            step = step.lower(state, batch).compile(FAST_COMPILE)
            results.append(jax.device_get(step(state, batch)))
    finally:
        jax.config.update("jax_enable_x64", False)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
        results[1],
        results[0],
    )
    assert config.model.dropout > 0  # the masks are the same
    assert results[0][1]["loss_memory"] > 0


# On CPU, XLA finds out that it computes things twice, and keeps them after all.
COMPILE_FOR_H200 = """
from memseg_jax.hlo import gpu
from tests import h200
mesh = gpu.make_mesh()
for remat in ("none", "blocks"):
    config = h200.small_config("resnet50", 0.25, 1)
    config.model.remat = remat
    print(gpu.compile_step(config, mesh).memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
def test_a_gpu_needs_less_memory():
    if reason := gpu.missing():
        pytest.skip(reason)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", COMPILE_FOR_H200]
    result = subprocess.run(command, cwd=tiny.ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    none, blocks = map(int, result.stdout.split())
    assert blocks < 0.7 * none
