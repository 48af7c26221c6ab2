"""States and checkpoints of them without a model, and damage to checkpoints, for tests."""

import json
import shutil
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import common
from memseg_jax import checkpoint
from memseg_jax.checkpoint import Checkpointer
from memseg_jax.runtime import files


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
    return checkpoint.make_meta(config or common.get_config(), step, names, palette, "f00d")


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_one(workdir, step=3, miou=None, state=None):
    with Checkpointer(workdir, keep=5) as checkpointer:
        checkpointer.save(state or make_state(step), make_meta(step))
        if miou is not None:
            checkpointer.record_scores(step, {"mIoU": miou})


def tamper(workdir, step, pattern, change):
    found = files.matching(workdir / checkpoint.FOLDER / str(step) / pattern)
    assert found, f"nothing matches {pattern}"
    change(max(found, key=size))


def size(path):
    return len(path.read_bytes())


def halve(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


# ---- Damage ------------------------------------------------------------------------------------


def files_of(workdir, step):
    return files.files_below(workdir / checkpoint.FOLDER / str(step))


def flip(path, position, bit=4):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def largest(workdir, step):
    """The file that holds most of the arrays' values."""
    return max(files_of(workdir, step), key=size)


def unlink(path):
    path.unlink()


def remove(path):
    """Removes a file or a folder."""
    if not path.is_dir():
        path.unlink()
    elif files.in_bucket(path):
        path.rmtree()
    else:
        shutil.rmtree(path)


def empty(folder):
    """Leaves a folder with nothing in it, which in a bucket is one with its marker alone."""
    for path in files.files_below(folder):
        if not files.in_bucket(folder) or path != folder / "commit_success.txt":
            path.unlink()
    if not files.in_bucket(folder):
        remove(folder)
        folder.mkdir()


def forget_array(path):
    """The list of arrays lacks one."""
    listed = json.loads(path.read_text())
    name = next(name for name in listed["tree_metadata"] if "'memory'" in name)
    del listed["tree_metadata"][name]
    path.write_text(json.dumps(listed))


DAMAGES = {
    "flipped byte": (None, lambda path: flip(path, size(path) // 2), "kernel"),
    "truncated file": (None, halve, "cannot be read"),
    "missing file": (None, unlink, "cannot be read"),
    "missing array": ("state/_METADATA", forget_array, "memory: found none, expected float32"),
    "missing list": ("state/_METADATA", unlink, "the list of arrays"),
    "missing item": ("state", remove, "the list of arrays"),
    "missing description": ("meta", remove, "meta/metadata cannot be read"),
    "half a description": ("meta/metadata", halve, "meta/metadata cannot be read"),
    "empty description": ("meta/metadata", lambda path: path.write_text(""), "metadata is empty"),
    "changed description": (
        "meta/metadata",
        lambda path: path.write_text(path.read_text().replace('"step": 3', '"step": 4')),
        "it was changed after it had been written",
    ),
    "empty folder": ("", empty, "meta/metadata cannot be read"),
}


def damage_step(workdir: files.Place, step: int, damage: str) -> str:
    """Brings about one of `DAMAGES`; returns a part of what is said about it."""
    place, change, named = DAMAGES[damage]
    folder = workdir / checkpoint.FOLDER / str(step)
    change(largest(workdir, step) if place is None else folder / place)
    return named
