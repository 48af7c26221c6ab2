"""States and checkpoints of them without a model, and damage to checkpoints, for tests."""

import os
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import common
from memseg_jax import checkpoint, run_record
from memseg_jax.checkpoint import Checkpointer


@flax.struct.dataclass
class State:
    step: Any
    params: Any
    batch_stats: Any
    memory: Any
    opt_state: Any


OPTIMIZER = optax.chain(
    optax.add_decayed_weights(1e-3), optax.sgd(optax.constant_schedule(0.1), momentum=0.9)
)


def make_state(step, width=8, classes=5, seed=0, conv="conv1") -> State:
    rng = np.random.default_rng([seed, step])

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {
        "backbone": {conv: {"kernel": draw(3, 3, 4, width)}},
        "head": {"kernel": draw(width, classes), "scale": draw(classes).astype(jnp.bfloat16)},
    }
    stats = {"backbone": {"bn": {"mean": draw(width), "var": draw(width) ** 2}}}
    memory = draw(classes, 1, width)
    opt_state = jax.tree.map(lambda leaf: leaf + 1, OPTIMIZER.init(params))
    return State(jnp.asarray(step, jnp.int32), params, stats, memory, opt_state)


def abstract(state):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state
    )


def make_meta(step, config=None, classes=5):
    names = tuple(f"class{index}" for index in range(classes))
    palette = np.zeros((classes, 3), np.uint8)
    return run_record.make_meta(config or common.get_config(), step, names, palette, "f00d")


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_one(workdir, step=3, miou=None, state=None):
    with Checkpointer(workdir, keep=5) as checkpointer:
        checkpointer.save(state or make_state(step), make_meta(step), miou)


def tamper(workdir, step, pattern, change):
    folder = Path(workdir) / checkpoint.FOLDER / str(step)
    files = [path for path in folder.glob(pattern) if path.is_file()]
    assert files, f"nothing matches {pattern}"
    change(max(files, key=lambda path: path.stat().st_size))


def halve(path):
    os.truncate(path, path.stat().st_size // 2)
