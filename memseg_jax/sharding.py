"""Where arrays live: one mesh, the state replicated, the batch split over its `data` axis."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memseg_jax.errors import UserError


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices (or the given ones) with the single axis `data`."""
    return Mesh(np.array(jax.devices() if devices is None else devices), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """Every device holds an equal part of the first axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch_size(batch_size: int, mesh: Mesh, groups: int, accumulate: int = 1) -> None:
    """Refuses a batch that cannot be split evenly.

    Args:
        batch_size: images in the global batch.
        mesh: the devices.
        groups: replica groups.
        accumulate: parts of the batch that are computed one after the other; every part has
            equally many images of every device and of every replica group.

    Raises:
        UserError: batch_size is not a multiple of the devices or of the replica groups, times
            `accumulate`; or one of the numbers is not positive.
    """
    if accumulate < 1:
        raise UserError(f"config.train.accumulate is {accumulate}; expected 1 or more")
    for count, what in ((mesh.size, "devices"), (groups, "config.replica_groups")):
        if count < 1 or batch_size % count:
            raise UserError(
                f"config.train.batch_size is {batch_size}, which {count} {what} cannot share "
                f"evenly; use {_multiples(batch_size, count)}"
            )
    least = math.lcm(mesh.size, groups)
    if batch_size % (least * accumulate) == 0:
        return
    devices = "one device" if mesh.size == 1 else f"{mesh.size} devices"
    fitting = [n for n in range(1, batch_size + 1) if batch_size % (least * n) == 0]
    advice = f"use a batch of {_multiples(batch_size, least * accumulate)}"
    if fitting:
        advice += f", or config.train.accumulate = {', '.join(map(str, fitting))}"
    raise UserError(
        f"config.train.batch_size is {batch_size}: its config.train.accumulate = {accumulate} "
        f"parts cannot be equal, with {devices} and config.replica_groups = {groups} sharing every "
        f"part evenly; {advice}"
    )


def _multiples(number: int, count: int) -> str:
    """The multiples of `count` on both sides of `number`, for a message."""
    below = max(number // max(count, 1), 1) * count
    return " or ".join(map(str, sorted({below, (number // max(count, 1) + 1) * count})))


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes the global batch from this process's part of it, split over the devices."""
    sharding = split_batch(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }


def place(tree: Any, mesh: Mesh) -> Any:
    """Puts a tree of host arrays onto all devices of the mesh, replicated.

    The copies are XLA's own: an array that still shares memory with NumPy must not be donated.
    """
    sharding = replicated(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(
            np.shape(x), sharding, lambda index, x=x: np.array(np.asarray(x)[index])
        ),
        tree,
    )


def with_sharding(abstract: Any, mesh: Mesh) -> Any:
    """Adds the sharding that `place` gives to a tree of `jax.ShapeDtypeStruct`."""
    sharding = replicated(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract
    )
