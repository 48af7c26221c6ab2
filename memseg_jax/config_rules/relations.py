"""How fields of a config depend on each other, where that needs neither data nor devices.

A relation is a function of the config that yields what is wrong; it may rely on every field being
what its own rule says.
"""

from collections.abc import Iterator
from typing import Any

from memseg_jax.config_rules.kinds import refusal
from memseg_jax.errors import UserError


def _one_start(config: Any) -> Iterator[UserError]:
    init = config.init
    if init.backbone and init.checkpoint:
        yield refusal(
            "config.init.backbone",
            init.backbone,
            f"'' beside config.init.checkpoint = {init.checkpoint!r}: a run has one start",
        )


def _as_many_as_classes(config: Any) -> Iterator[UserError]:
    classes = len(config.data.class_names)
    for name, section in (("data.palette", config.data), ("loss.class_weights", config.loss)):
        values = section[name.split(".")[1]]
        if values and len(values) != classes:
            yield refusal(
                f"config.{name}",
                values,
                f"as many as config.data.class_names has, {classes}, or () for the default; "
                f"found {len(values)}",
            )


def _some_weight(config: Any) -> Iterator[UserError]:
    loss = config.loss
    if loss.class_weights and not any(loss.class_weights):
        yield refusal("config.loss.class_weights", loss.class_weights, "some weight above 0")
    stage1 = loss.stage1 if config.model.memory.enabled else 0
    auxiliary = loss.auxiliary if config.model.auxiliary else 0
    if not loss.stage2 + stage1 + auxiliary:
        yield refusal(
            "config.loss.stage2",
            loss.stage2,
            "a number above 0, as the weights of the other losses are 0, too: nothing would be "
            "learned",
        )


def _pairs_of_classes(config: Any) -> Iterator[UserError]:
    pairs, classes = config.augment.flip_pairs, len(config.data.class_names)
    members = [member for pair in pairs for member in pair]
    if len(set(members)) < len(members):
        yield refusal("config.augment.flip_pairs", pairs, "pairs with no class twice")
    if members and max(members) >= classes:
        yield refusal(
            "config.augment.flip_pairs",
            pairs,
            f"pairs of classes, which are 0 to {classes - 1} (config.data.class_names)",
        )


def _ordered(config: Any) -> Iterator[UserError]:
    least, most = config.augment.scale_range
    if least > most:
        yield refusal(
            "config.augment.scale_range",
            config.augment.scale_range,
            "(least, most) in this order",
            f"Did you mean {(most, least)}?",
        )
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        yield refusal(
            "config.optimizer.min_lr",
            optimizer.min_lr,
            f"at most config.optimizer.lr, {optimizer.lr}, from which the learning rate falls to "
            "min_lr",
        )


def _windows_without_gaps(config: Any) -> Iterator[UserError]:
    stride, window = config.eval.stride, config.eval.window
    if config.eval.mode == "slide" and any(s > w for s, w in zip(stride, window)):
        yield refusal(
            "config.eval.stride",
            stride,
            f"at most config.eval.window, {tuple(window)}: pixels between windows would get no "
            "prediction",
            f"The nearest is {tuple(map(min, stride, window))}",
        )


def _share_of_a_row(config: Any) -> Iterator[UserError]:
    memory, lr = config.model.memory, config.optimizer.lr
    if not (memory.enabled and memory.base_lr):
        return
    share = memory.momentum / memory.base_lr * lr
    if share > 1 + 1e-6:  # rounding
        yield refusal(
            "config.model.memory.base_lr",
            memory.base_lr,
            f"at least {memory.momentum * lr:g} at config.optimizer.lr = {lr:g}, or 0 for a fixed "
            "share: an update replaces momentum / base_lr * lr of a memory row, which would be "
            f"{share:g}",
            f"The usual base_lr is lr: {lr:g}",
        )


def _equal_parts(config: Any) -> Iterator[UserError]:
    batch_size, groups, parts = (
        config.train.batch_size,
        config.replica_groups,
        config.train.accumulate,
    )
    if batch_size % (groups * parts):
        below = batch_size // (groups * parts) * groups * parts
        around = [str(n) for n in (below, below + groups * parts) if n]
        yield refusal(
            "config.train.batch_size",
            batch_size,
            f"a multiple of config.replica_groups * config.train.accumulate = {groups} * {parts}",
            f"The nearest is {' or '.join(around)}",
        )


def _one_axis_is_the_rest(config: Any) -> Iterator[UserError]:
    if config.sharding.data == config.sharding.fsdp == -1:
        yield refusal(
            "config.sharding.fsdp",
            -1,
            "a number beside config.sharding.data = -1: only one can be the rest of the devices",
            "The default is 1",
        )


def _generated_images(config: Any) -> Iterator[UserError]:
    data = config.data
    for field in ("num_train", "num_val"):
        if data.name == "shapes" and not data[field]:
            yield refusal(
                f"config.data.{field}", 0, "1 or more: config.data.name = 'shapes' generates images"
            )


RELATIONS = (
    _one_start,
    _as_many_as_classes,
    _some_weight,
    _pairs_of_classes,
    _ordered,
    _windows_without_gaps,
    _share_of_a_row,
    _equal_parts,
    _one_axis_is_the_rest,
    _generated_images,
)
