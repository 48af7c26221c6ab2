"""Where arrays live: one mesh, the state replicated, the batch split over its `data` axis."""

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


def check_batch_size(batch_size: int, mesh: Mesh, groups: int) -> None:
    """Refuses a batch that cannot be split evenly.

    Raises:
        UserError: batch_size is not a multiple of the devices and of the replica groups.
    """
    for count, what in ((mesh.size, "devices"), (groups, "config.replica_groups")):
        if count < 1 or batch_size % count:
            near = sorted({max(batch_size // count, 1) * count, (batch_size // count + 1) * count})
            raise UserError(
                f"config.train.batch_size is {batch_size}, which {count} {what} cannot share "
                f"evenly; use {' or '.join(map(str, near))}"
            )


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
