"""Whether a batch can be split over a mesh as a config asks for."""

import math

import ml_collections
from jax.sharding import Mesh

from memseg_jax.errors import UserError
from memseg_jax.runtime import sharding


def check(config: ml_collections.ConfigDict, mesh: Mesh, coarsest_stride: int) -> None:
    """Refuses a config whose batches the devices cannot share.

    Args:
        config: the whole config.
        mesh: the devices, see `sharding.make_mesh`.
        coarsest_stride: of the network, see `Segmentor.coarsest_stride`.

    Raises:
        UserError: names the fields, and values that would do.
    """
    train = config.train
    groups = config.replica_groups, train.accumulate, config.model.norm_group
    check_batch_size(train.batch_size, mesh, *groups)
    check_rows(config.augment.crop[0], coarsest_stride, mesh)


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
        UserError: batch_size is not a multiple of the pieces that the mesh splits it into, or of
            the replica groups, times `accumulate`; or some device would have parts of groups beside
            whole ones.
    """
    pieces, height = sharding.batch_pieces(mesh), sharding.row_parts(mesh)
    devices = "one device" if mesh.size == 1 else f"{mesh.size} devices"
    if height > 1:
        devices += f" (config.sharding.rows = {height}: {pieces} images at a time)"
    for count, what in ((pieces, devices), (groups, f"{groups} config.replica_groups")):
        if batch_size % count:
            raise UserError(
                f"config.train.batch_size is {batch_size}, which {what} cannot share "
                f"evenly; use {_multiples(batch_size, count)}"
            )
    least = math.lcm(pieces, groups)
    if batch_size % (least * accumulate) == 0:
        _check_norm_group(norm_group, batch_size // accumulate, pieces)
        return
    fitting = [n for n in range(1, batch_size + 1) if batch_size % (least * n) == 0]
    advice = f"use a batch of {_multiples(batch_size, least * accumulate)}"
    if fitting:
        advice += f", or config.train.accumulate = {', '.join(map(str, fitting))}"
    raise UserError(
        f"config.train.batch_size is {batch_size}: its config.train.accumulate = {accumulate} "
        f"parts cannot be equal, with {devices} and config.replica_groups = {groups} sharing every "
        f"part evenly; {advice}"
    )


def check_rows(height: int, stride: int, mesh: Mesh) -> None:
    """Refuses to split images into more parts than their coarsest map has rows.

    Args:
        height: of the images, in pixels.
        stride: of the network's coarsest map.
        mesh: the devices.

    Raises:
        UserError: some devices would have nothing of that map.
    """
    count, most = sharding.row_parts(mesh), -(-height // stride)
    if count > most:
        raise UserError(
            f"config.sharding.rows is {count}, but images of {height} rows have {most} rows on the "
            f"coarsest map of this network (one for every {stride}); use at most {most}"
        )


def _check_norm_group(group: int, images: int, devices: int) -> None:
    """Refuses groups of images that would have to be moved between devices.

    Args:
        group: images in a group.
        images: that are computed at a time.
        devices: number of those that have images of their own.
    """

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
