"""Where arrays live: one mesh of devices, the batch split over it, the state whole or split.

The mesh has two axes. The batch is split over both. Over `data` the state is replicated; over
`fsdp` parameters and the optimiser's state are split, so that a device keeps only its share of them
between steps, and gathers the parameters while it computes a step. `config.sharding` sets the sizes
of both; the numbers do not depend on it, rounding aside.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memseg_jax.errors import UserError
from memseg_jax.runtime.compilation import program_bytes
from memseg_jax.runtime.text import format_bytes

AXES = ("data", "fsdp")
# Arrays of fewer elements are replicated: splitting them saves nothing and costs a message each.
_SMALL = 2**14
# What of a state is split over `fsdp`. Statistics and memory are small, and every device changes
# and reads all of them in each step.
_SPLIT = ("params", "opt_state")


def make_mesh(
    devices: list[jax.Device] | None = None, layout: Mapping[str, int] | None = None
) -> Mesh:
    """A mesh with the axes `data` and `fsdp`.

    Args:
        devices: which ones; None: all of all processes.
        layout: `config.sharding`, the sizes of both axes, one of which may be -1: as many as there
            are devices for; None: all devices along `data`.

    Returns:
        The mesh. Devices of one process lie side by side, so that every process has one piece of
        the batch, in the order of the processes.

    Raises:
        UserError: the sizes do not fit the number of devices.
    """
    devices = sorted(
        jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id)
    )
    count = len(devices)
    sizes = {"data": -1, "fsdp": 1} | dict(layout or {})
    shown = f"config.sharding is {{'data': {sizes['data']}, 'fsdp': {sizes['fsdp']}}}"
    free = [name for name in AXES if sizes[name] == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"{shown}; expected positive numbers, and -1 at most once")
    fixed = math.prod(sizes[name] for name in AXES if name not in free)
    if free and count % fixed == 0:
        sizes[free[0]] = count // fixed
    elif free or fixed != count:
        raise UserError(
            f"{shown}, which {count} device(s) cannot be arranged as: the product of the sizes "
            f"must be {count}; -1 stands for the rest of the devices"
        )
    return Mesh(np.array(devices).reshape(sizes["data"], sizes["fsdp"]), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """Every device holds an equal part of the first axis."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def split_array(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The largest axis that `fsdp` divides is split over it; small arrays are replicated."""
    parts = mesh.shape.get("fsdp", 1)
    fitting = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or math.prod(shape) < _SMALL or not fitting:
        return replicated(mesh)
    axis = max(fitting, key=lambda axis: (shape[axis], axis))
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))


def shardings_of(state: Any, mesh: Mesh) -> Any:
    """The tree of shardings of a `TrainState`, or of a dict of variables."""

    def of_leaf(path: tuple, leaf: Any) -> NamedSharding:
        name = getattr(path[0], "name", getattr(path[0], "key", None)) if path else None
        return split_array(np.shape(leaf), mesh) if name in _SPLIT else replicated(mesh)

    return jax.tree_util.tree_map_with_path(of_leaf, state)


def check_batch_size(
    batch_size: int, mesh: Mesh, groups: int, accumulate: int = 1, norm_group: int = 0
) -> None:
    """Refuses a batch that cannot be split evenly.

    Args:
        batch_size: images in the global batch.
        mesh: the devices.
        groups: replica groups.
        accumulate: parts of the batch that are computed one after the other; every part has
            equally many images of every device and of every replica group.
        norm_group: images in a group of `config.model.norm_group`, a divisor of those of a part;
            0: all of them.

    Raises:
        UserError: batch_size is not a multiple of the devices or of the replica groups, times
            `accumulate`; or some device would have parts of groups beside whole ones.
    """
    for count, what in ((mesh.size, "devices"), (groups, "config.replica_groups")):
        if batch_size % count:
            raise UserError(
                f"config.train.batch_size is {batch_size}, which {count} {what} cannot share "
                f"evenly; use {_multiples(batch_size, count)}"
            )
    least = math.lcm(mesh.size, groups)
    if batch_size % (least * accumulate) == 0:
        _check_norm_group(norm_group, batch_size // accumulate, mesh.size)
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


def _check_norm_group(group: int, images: int, devices: int) -> None:
    """Refuses groups of images that would have to be moved between devices."""

    def fits(group: int) -> bool:
        return group % own == 0 or own % group == 0

    own = images // devices
    if group and not fits(group):
        fitting = [str(n) for n in range(2, images + 1) if images % n == 0 and fits(n)]
        raise UserError(
            f"config.model.norm_group is {group}, but each of {devices} devices computes {own} "
            "images at a time; expected whole devices in a group, or whole groups on a device: 0, "
            f"{', '.join(fitting)}"
        )


def _multiples(number: int, count: int) -> str:
    """The multiples of `count` on both sides of `number`, for a message."""
    below = max(number // count, 1) * count
    return " or ".join(map(str, sorted({below, (number // count + 1) * count})))


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes the global batch from this process's part of it, split over the devices."""
    sharding = split_batch(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }


def place(tree: Any, mesh: Mesh) -> Any:
    """Puts a state of host arrays, or a dict of variables, onto the devices of the mesh.

    The copies are XLA's own: an array that still shares memory with NumPy must not be donated.
    """
    return jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(
            np.shape(x), sharding, lambda index: np.array(np.asarray(x)[index])
        ),
        tree,
        shardings_of(tree, mesh),
    )


def with_sharding(abstract: Any, mesh: Mesh) -> Any:
    """Adds the shardings that `place` gives to a tree of `jax.ShapeDtypeStruct`."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings_of(abstract, mesh),
    )


def jit_step(step: Callable, state: Any, mesh: Mesh) -> Callable:
    """`jax.jit` of a training step whose state stays where it is.

    Args:
        step: (state, batch) -> (state, metrics), see `training.step.make_train_step`.
        state: a `TrainState` of arrays or of shapes.
        mesh: the devices.

    Returns:
        The jitted step; the state is donated.
    """

    def gathered(state: Any, batch: Any) -> Any:
        # The parameters are made whole once. Otherwise the compiler may compute layers in parts of
        # their channels, with a message of the size of the activations for each.
        params = jax.lax.with_sharding_constraint(state.params, replicated(mesh))
        return step(state.replace(params=params), batch)

    out = (shardings_of(state, mesh), replicated(mesh))
    function = step if mesh.shape.get("fsdp", 1) == 1 else gathered
    return jax.jit(function, donate_argnums=0, out_shardings=out)


def on_own_devices(variables: Any, mesh: Mesh) -> Any:
    """The whole of every array on every device of a mesh of this process's own devices.

    All processes have to call it: parts of an array may lie on devices of others.

    Args:
        variables: a tree of arrays on any mesh.
        mesh: of devices of this process that hold a part or a copy of every array.

    Returns:
        The tree on `mesh`, without a copy where an array is there as a whole already.
    """

    def local(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return jax.device_put(x, replicated(mesh))
        pieces = {shard.device: shard.data for shard in x.addressable_shards}
        if not devices <= pieces.keys():
            return jax.device_put(x.addressable_data(0), replicated(mesh))
        return jax.make_array_from_single_device_arrays(
            x.shape, replicated(mesh), [pieces[device] for device in mesh.devices.flat]
        )

    devices = set(mesh.devices.flat)
    for x in jax.tree.leaves(variables):
        if isinstance(x, jax.Array) and not x.is_fully_replicated:
            variables = _whole(x.sharding.mesh)(variables)
            break
    return jax.tree.map(local, variables)


@functools.cache
def _whole(mesh: Mesh) -> Callable:
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def memory_report(compiled: Any, state: Any) -> str | None:
    """What a compiled step needs on every device, in words; None if the compiler does not say.

    Args:
        compiled: the result of `jit_step(...).lower(...).compile()`.
        state: shapes with shardings.
    """
    total = program_bytes(compiled)
    if total is None:
        return None
    held = bytes_per_device(state)
    arguments = compiled.memory_analysis().argument_size_in_bytes
    return (
        f"memory of a step on each device: {format_bytes(total)} "
        f"(state {format_bytes(held)}, batch {format_bytes(max(arguments - held, 0))}, "
        f"intermediate {format_bytes(total - arguments)})"
    )


def bytes_per_device(tree: Any) -> int:
    """Bytes that every device holds of a tree of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
