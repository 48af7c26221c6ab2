"""Where arrays live: one mesh of devices, the batch split over it, the state whole or split.

The mesh has three axes. The images of a batch are split over `data` and `fsdp`, the rows of every
image and map over `rows`. Parameters and the optimiser's state are split over `fsdp`, or over all
devices (`config.sharding.weight_update`): a device then keeps and updates only its share of them,
and gathers the parameters while it computes a step. What is not split is replicated.
`config.sharding` sets the sizes of all axes; the numbers do not depend on it, rounding aside.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memseg_jax.errors import UserError
from memseg_jax.runtime import rows
from memseg_jax.runtime.compilation import program_bytes
from memseg_jax.runtime.text import format_bytes

# The innermost axis is the one whose devices wait for each other most often: neighbours.
AXES = (*rows.IMAGES, rows.AXIS)
# Arrays of fewer elements are replicated: splitting them saves nothing and costs a message each.
_SMALL = 2**14
# What of a state is split over `fsdp`. Statistics and memory are small, and every device changes
# and reads all of them in each step.
_SPLIT = ("params", "opt_state")


def make_mesh(
    devices: list[jax.Device] | None = None, layout: Mapping[str, Any] | None = None
) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `rows`.

    Args:
        devices: which ones; None: all of all processes.
        layout: `config.sharding`, the sizes of the axes, one of which may be -1: as many as there
            are devices for; None: all devices along `data`.

    Returns:
        The mesh. Devices of one process lie side by side, so that every process has one piece of
        the batch, in the order of the processes. Where an image is split over the devices of
        several processes, these have the same piece.

    Raises:
        UserError: the sizes do not fit the number of devices.
    """
    devices = sorted(
        jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id)
    )
    count = len(devices)
    sizes = {"data": -1, "rows": 1, "fsdp": 1}
    sizes |= {name: size for name, size in (layout or {}).items() if name in sizes}
    shown = f"config.sharding is {sizes}"
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
    own = count // len({d.process_index for d in devices})
    if own % sizes["rows"] and sizes["rows"] % own:
        fitting = [n for n in range(1, count + 1) if count % n == own % n * (n % own) == 0]
        raise UserError(
            f"{shown}: processes have {own} devices each, which cannot share images in "
            f"{sizes['rows']} parts; use rows = {', '.join(map(str, fitting))}"
        )
    return Mesh(np.array(devices).reshape([sizes[name] for name in AXES]), AXES)


def local_mesh(height: int = 1) -> Mesh:
    """The devices of this process, on which it segments images that the others do not see.

    Args:
        height: `config.eval.rows`, over how many of them each image is split.

    Raises:
        UserError: they cannot be arranged so.
    """
    count = len(jax.local_devices())
    if count % height:
        fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise UserError(
            f"config.eval.rows is {height}, which the {count} device(s) of a process cannot be "
            f"arranged for; use {fitting}"
        )
    return make_mesh(jax.local_devices(), {"data": -1, "rows": height})


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """Every device holds an equal part of the images, or of the rows of some of them.

    For arrays [batch, height, ...] whose height is a multiple of the mesh's `rows`; of any height
    where that is 1.
    """
    return split_images(mesh) if row_parts(mesh) == 1 else NamedSharding(mesh, rows.MAPS)


def split_images(mesh: Mesh) -> NamedSharding:
    """Every device holds an equal part of the first axis, all rows of its images."""
    return NamedSharding(mesh, PartitionSpec(tuple(x for x in rows.IMAGES if x in mesh.shape)))


def split_devices(mesh: Mesh) -> NamedSharding:
    """Every device holds its own entry of an array [devices]."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def row_parts(mesh: Mesh) -> int:
    """Over how many devices the rows of every image are split."""
    return mesh.shape.get(rows.AXIS, 1)


def batch_pieces(mesh: Mesh) -> int:
    """Into how many pieces the images of a batch are split."""
    return mesh.size // row_parts(mesh)


def piece_of_process(mesh: Mesh) -> tuple[int, int]:
    """Which piece of the batch this process reads, and into how many the processes divide it.

    Processes whose devices have rows of the same images read the same piece.
    """
    processes = jax.process_count()
    sharing = max(row_parts(mesh) * processes // mesh.size, 1)
    return jax.process_index() // sharing, processes // sharing


def split_array(
    shape: tuple[int, ...], mesh: Mesh, over: tuple[str, ...] = ("fsdp",)
) -> NamedSharding:
    """How one array of parameters lies.

    Args:
        shape: of the array.
        mesh: the devices.
        over: axes of the mesh that share it.

    Returns:
        The largest axis that they divide is split over them, or, where they divide none, over the
        first of them that do. Small arrays are replicated.
    """
    over = tuple(name for name in over if mesh.shape.get(name, 1) > 1)
    while over and math.prod(shape) >= _SMALL:
        parts = math.prod(mesh.shape[name] for name in over)
        fitting = [axis for axis, size in enumerate(shape) if size % parts == 0]
        if fitting:
            axis = max(fitting, key=lambda axis: (shape[axis], axis))
            split = over if len(over) > 1 else over[0]
            return NamedSharding(mesh, PartitionSpec(*[None] * axis, split))
        over = over[:-1]
    return replicated(mesh)


def shardings_of(state: Any, mesh: Mesh, update: str = "each") -> Any:
    """The tree of shardings of a `TrainState`, or of a dict of variables.

    Args:
        state: the tree.
        mesh: the devices.
        update: `config.sharding.weight_update`. "each": parameters and the optimiser's state are
            split over `fsdp`; "shared": over all devices.
    """
    over = mesh.axis_names if update == "shared" else ("fsdp",)

    def of_leaf(path: tuple, leaf: Any) -> NamedSharding:
        name = getattr(path[0], "name", getattr(path[0], "key", None)) if path else None
        return split_array(np.shape(leaf), mesh, over) if name in _SPLIT else replicated(mesh)

    return jax.tree_util.tree_map_with_path(of_leaf, state)


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes the global batch from this process's piece of it, split over the devices.

    Args:
        batch: "image" [batch, height, width, 3] and "label" [batch, height, width] of this
            process's piece, whole images; "stop" [devices of this process] in a run.
        mesh: the devices.

    Returns:
        The same of the whole batch; heights are padded to a multiple of the mesh's `rows`.
    """
    placed = {}
    for name, value in batch.items():
        sharding, shape = split_devices(mesh), (len(value) * jax.process_count(),)
        if name != "stop":
            sharding = split_batch(mesh)
            value = _pad_rows(value, mesh)
            shape = (len(value) * piece_of_process(mesh)[1], *value.shape[1:])
        placed[name] = jax.make_array_from_process_local_data(sharding, value, shape)
    return placed


def padded_height(height: int, mesh: Mesh) -> int:
    """The next height that can be split over the mesh's `rows`."""
    return height + -height % row_parts(mesh)


def _pad_rows(x: np.ndarray, mesh: Mesh) -> np.ndarray:
    margin = padded_height(x.shape[1], mesh) - x.shape[1]
    return np.pad(x, ((0, 0), (0, margin), *[(0, 0)] * (x.ndim - 2))) if margin else x


def place(tree: Any, abstract: Any) -> Any:
    """Puts a state of host arrays, or a dict of variables, onto devices.

    The copies are XLA's own: an array that still shares memory with NumPy must not be donated.

    Args:
        tree: of arrays.
        abstract: the same tree of shapes with shardings, or a mesh, for those of `shardings_of`.
    """
    if isinstance(abstract, Mesh):
        abstract = with_sharding(tree, abstract)
    return jax.tree.map(
        lambda x, like: jax.make_array_from_callback(
            np.shape(x), like.sharding, lambda index: np.array(np.asarray(x)[index])
        ),
        tree,
        abstract,
    )


def with_sharding(tree: Any, mesh: Mesh, update: str = "each") -> Any:
    """Shapes, types and the shardings of `shardings_of` for a tree of arrays or of shapes."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(
            np.shape(x), jnp.result_type(x), sharding=sharding
        ),
        tree,
        shardings_of(tree, mesh, update),
    )


class Shares(NamedTuple):
    """How a step gets from a device's share of the parameters to the whole of them, and back.

    Attributes:
        gather: whole parameters, from those of a state.
        scatter: every device's share of the gradients, from the sums over its images.
    """

    gather: Callable[[Any], Any]
    scatter: Callable[[Any], Any]


# Every device has all of the parameters.
ALL = Shares(lambda params: params, lambda gradients: gradients)


def shares_of(params: Any, compute_dtype: Any = None) -> Shares:
    """What a step has to do whose parameters are split.

    The parameters are made whole once, kernels in the type that is computed in: rounded before or
    after they are sent, the numbers are the same. Otherwise the compiler may compute layers in
    parts of their channels, with a message of the size of the activations for each.

    Args:
        params: shapes with shardings.
        compute_dtype: of the model; None: that of the parameters.
    """

    def gather(params: Any) -> Any:
        def whole(path: tuple, x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
            if like.sharding.is_fully_replicated:
                return x
            if path[-1].key == "kernel" and compute_dtype is not None:
                # Still in parts: otherwise the compiler rounds what has been sent.
                x = jax.lax.with_sharding_constraint(x.astype(compute_dtype), like.sharding)
            return jax.lax.with_sharding_constraint(x, replicated(like.sharding.mesh))

        return jax.tree_util.tree_map_with_path(whole, params, abstract)

    def scatter(gradients: Any) -> Any:
        def share(g: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
            # Of the whole sum: the compiler would make the parts in a loop around the devices.
            g = jax.lax.with_sharding_constraint(g, replicated(like.sharding.mesh))
            return jax.lax.with_sharding_constraint(g, like.sharding).astype(like.dtype)

        return jax.tree.map(share, gradients, abstract)

    abstract = params
    if all(x.sharding.is_fully_replicated for x in jax.tree.leaves(params)):
        return ALL
    return Shares(gather, scatter)


def jit_step(step: Callable, state: Any, mesh: Mesh, height: int | None = None) -> Callable:
    """`jax.jit` of a training step whose state stays where it is.

    Args:
        step: (state, batch) -> (state, metrics), see `training.step.make_train_step`.
        state: a `TrainState` of shapes with shardings, or of arrays.
        mesh: the devices.
        height: of the images, where `place_batch` may have padded them; None: it has not.

    Returns:
        The jitted step; the state is donated.
    """

    def cut(state: Any, batch: Any) -> Any:
        images = {name: rows.split(x[:, :height]) for name, x in batch.items() if x.ndim > 1}
        return step(state, batch | images)

    out = (jax.tree.map(lambda x: x.sharding, state), replicated(mesh))
    function = step if row_parts(mesh) == 1 else traced_by_rows(cut, mesh)
    return jax.jit(function, donate_argnums=0, out_shardings=out)


def traced_by_rows(function: Callable, mesh: Mesh) -> Callable:
    """`function`, to be jitted, whose models know while they are traced how rows are split."""
    if row_parts(mesh) == 1:
        return function

    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


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
