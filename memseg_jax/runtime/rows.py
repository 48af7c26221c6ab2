"""Images whose rows are split over devices: the mesh axis `rows`, seen from inside the models.

XLA splits convolutions and everything elementwise by itself. What goes through a map block by block
(attention, losses, the memory's update) has to be told that every device goes through its own rows:
such code says `by_rows(...)` and is written for the rows of one part. Without the axis, or where it
is 1, there is one part, and nothing here changes the program.

A height that the parts do not divide is padded at the bottom (`pad`), so that all parts are equal.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

Array = jax.Array

AXIS = "rows"
# The axes over which the images of a batch are split.
IMAGES = ("data", "fsdp")
# How arrays lie: [batch, height, ...] by images and rows; [parts, ...]; the same everywhere.
MAPS, BY_PART, SAME = PartitionSpec(IMAGES, AXIS), PartitionSpec(AXIS), PartitionSpec()
_FREE = PartitionSpec.UNCONSTRAINED


def parts() -> int:
    """Over how many devices the program that is being traced splits the rows of every map."""
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)


def by_rows(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """A function of what one device has, as a function of the whole arrays.

    Args:
        function: takes and returns arrays of some images and of one part of their rows; inside,
            `with_border` and the collectives of `jax.lax` over `AXIS` work.
        in_specs: for each argument, `MAPS`, `BY_PART` or `SAME`.
        out_specs: the same for the results.

    Returns:
        The function, to be called where `parts()` is more than 1.
    """
    # Custom gradients do not say what varies over which axis, so that it cannot be checked.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def pad(x: Array, fill: float = 0, stride: int = 1) -> Array:
    """Adds rows of `fill` at the bottom of `x` [batch, rows, ...].

    Args:
        x: the maps.
        fill: value of the rows.
        stride: every part gets a multiple of this.
    """
    margin = -x.shape[1] % (parts() * stride) if parts() > 1 else 0
    margins = [(0, 0), (0, margin), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, margins, constant_values=fill) if margin else x


def in_equal_parts(
    function: Callable[[Array], Array], x: Array, fill: float = 0, stride: int = 1
) -> Array:
    """`function(x)` of a function that sees a window of rows around each row of its result.

    Where the parts do not divide the rows, XLA's partitioner (jaxlib 0.10.2) makes wrong filter
    gradients of some convolutions with a stride. So the parts are made equal before, with rows that
    are what the function has around the map anyway.

    Args:
        function: [batch, rows, ...] -> [batch, ceil(rows / stride), ...].
        x: its argument.
        fill: what it takes for rows outside of the map.
        stride: rows of `x` per row of the result.
    """
    return function(pad(x, fill, stride))[:, : -(-x.shape[1] // stride)]


def with_border(x: Array, above: int, below: int) -> Array:
    """The rows of a part between the last rows of the parts above and the first of those below.

    Inside of `by_rows` only. One message for every part that the border reaches.

    Args:
        x: [batch, rows, ...] of one part.
        above: number of rows before the part's own.
        below: number of rows after them.

    Returns:
        [batch, above + rows + below, ...]; zeros beyond the first and the last row of all.
    """
    pieces, size, count = [x], x.shape[1], parts()
    for hop in range(1, -(-above // size) + 1):
        taken = x[:, size - min(above - (hop - 1) * size, size) :]
        pieces.insert(0, lax.ppermute(taken, AXIS, [(r, r + hop) for r in range(count - hop)]))
    for hop in range(1, -(-below // size) + 1):
        taken = x[:, : min(below - (hop - 1) * size, size)]
        pieces.append(lax.ppermute(taken, AXIS, [(r + hop, r) for r in range(count - hop)]))
    return jnp.concatenate(pieces, axis=1)


def add_border(x: Array, above: int, below: int) -> Array:
    """The transpose of `with_border`: what lies on the border is added to the rows it is of.

    Args:
        x: [batch, above + rows + below, ...].
        above: as for `with_border`.
        below: as for `with_border`.

    Returns:
        [batch, rows, ...].
    """
    if above == below == 0:
        return x
    own = jax.ShapeDtypeStruct((x.shape[0], x.shape[1] - above - below, *x.shape[2:]), x.dtype)
    return jax.linear_transpose(lambda rows: with_border(rows, above, below), own)(x)[0]


def split(x: Array) -> Array:
    """Tells XLA to keep `x` [batch, rows, ...] split by rows; its other axes are as it likes."""
    return _constrain(x, AXIS)


def whole(x: Array) -> Array:
    """Tells XLA to give every device all rows of `x` [batch, rows, ...], in one message."""
    return _constrain(x, None)


def _constrain(x: Array, rows: str | None) -> Array:
    if parts() == 1:
        return x
    spec = PartitionSpec(_FREE, rows, *[_FREE] * (x.ndim - 2))
    return lax.with_sharding_constraint(x, spec)


def border(first: np.ndarray, stop: np.ndarray, size: int) -> tuple[int, int]:
    """How many rows of its neighbours every part needs.

    Args:
        first: int [parts, ...], the first rows that each part needs.
        stop: int [parts, ...], the rows after the last ones.
        size: rows of a part.

    Returns:
        Rows above and below, enough for all parts.
    """
    own = np.arange(len(first)).reshape(-1, *[1] * (first.ndim - 1)) * size
    return max(int(np.max(own - first)), 0), max(int(np.max(stop - own)) - size, 0)
