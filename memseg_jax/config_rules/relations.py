"""How fields of a config depend on each other, where that needs neither data nor devices.

A relation is a function of the config that yields what is wrong; it may rely on every field being
what its own rule says.
"""

import functools
import operator
import re
from collections.abc import Iterator
from typing import Any

from memseg_jax.config_rules.kinds import refusal
from memseg_jax.data.classes import IGNORE, colors_by_class
from memseg_jax.errors import UserError
from memseg_jax.models import backbones
from memseg_jax.runtime.suggest import did_you_mean


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
    for name, section in (
        ("data.palette", config.data),
        ("data.label_colors", config.data),
        ("loss.class_weights", config.loss),
    ):
        values = section[name.split(".")[1]]
        if values and not isinstance(values, str) and len(values) != classes:
            yield refusal(
                f"config.{name}",
                values,
                f"as many as config.data.class_names has, {classes}, or () for the default; "
                f"found {len(values)}",
            )


def _some_weight(config: Any) -> Iterator[UserError]:
    loss = config.loss
    if loss.class_weights != "balanced" and loss.class_weights and not any(loss.class_weights):
        yield refusal("config.loss.class_weights", loss.class_weights, "some weight above 0")
    stage1 = loss.stage1 if config.model.memory.enabled else 0
    context = loss.context if _predicts_from_context(config.model) else 0
    auxiliary = loss.auxiliary if config.model.auxiliary else 0
    if not loss.stage2 + stage1 + context + auxiliary:
        yield refusal(
            "config.loss.stage2",
            loss.stage2,
            "a number above 0, as the weights of the other losses are 0, too: nothing would be "
            "learned",
        )


def _predicts_from_context(model: Any) -> bool:
    """Whether there is a decoder of the context alone."""
    is_plus_plus = model.method == "mcibi_plus_plus"
    return is_plus_plus and model.memory.enabled and model.context != "none"


# Fields that one of the methods alone knows, and their defaults.
_OF_METHOD = {
    "mcibi": {
        "model.downsample": 1,
        "model.memory.slots": 1,
        "model.memory.strategy": "cosine",
        "model.memory.fusion": "published",
        "loss.consistency": 0.0,
    },
    "mcibi_plus_plus": {
        "model.decoder_kernels.pixels": 1,
        "model.decoder_kernels.context": 1,
        "model.decoder_kernels.final": 1,
        "model.memory.downsample": 1,
        "model.memory.read_by": "context",
        "model.memory.fuse_before_fpn": False,
        "loss.context": 1.0,
    },
}


def _only_of_method(config: Any) -> Iterator[UserError]:
    method = config.model.method
    for owner, defaults in _OF_METHOD.items():
        for field, default in defaults.items():
            value = functools.reduce(operator.getitem, field.split("."), config)
            if owner != method and value != default:
                yield refusal(
                    f"config.{field}",
                    value,
                    f"{default!r} beside config.model.method = {method!r}: {owner!r} alone has it",
                )


def _widths_that_add_up(config: Any) -> Iterator[UserError]:
    model = config.model
    adds = model.method == "mcibi" and model.memory.enabled and model.memory.fusion == "residual"
    if adds and model.context != "none" and model.aspp_dim != model.feature_dim:
        yield refusal(
            "config.model.aspp_dim",
            model.aspp_dim,
            f"config.model.feature_dim, {model.feature_dim}, beside config.model.memory.fusion = "
            "'residual': what is read from the memory is added to the context",
        )


def _pyramid_of_maps(config: Any) -> Iterator[UserError]:
    model = config.model
    if model.memory.fuse_before_fpn and not model.fpn:
        yield refusal(
            "config.model.memory.fuse_before_fpn",
            True,
            "False beside config.model.fpn = False: there is no pyramid",
        )
    if not model.fpn:
        return
    if model.context == "none":
        yield refusal(
            "config.model.context",
            "none",
            "'pyramid_pooling' or 'aspp' beside config.model.fpn = True: the top of the pyramid is "
            "the context",
        )
    modules = backbones()
    if modules[model.backbone] in _ONE_SIZE:
        with_pyramid = [name for name, module in modules.items() if module not in _ONE_SIZE]
        yield refusal(
            "config.model.backbone",
            model.backbone,
            f"one of {', '.join(map(repr, with_pyramid))} beside config.model.fpn = True: a "
            "pyramid needs maps of several sizes",
        )


# Modules of backbones whose maps are all of one size.
_ONE_SIZE = ("hrnet", "vit")


def _read_by_a_prediction(config: Any) -> Iterator[UserError]:
    model = config.model
    if model.method != "mcibi_plus_plus" or not model.memory.enabled:
        return
    if model.context == "none" and model.memory.read_by == "context":
        yield refusal(
            "config.model.memory.read_by",
            "context",
            "'pixels' beside config.model.context = 'none': no context predicts anything",
        )


def _paths_to_drop(config: Any) -> Iterator[UserError]:
    model = config.model
    if model.drop_path and backbones()[model.backbone] != "swin":
        yield refusal(
            "config.model.drop_path",
            model.drop_path,
            f"0.0 beside config.model.backbone = {model.backbone!r}: Swin alone has it",
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


def _memory_that_moves(config: Any) -> Iterator[UserError]:
    memory, optimizer = config.model.memory, config.optimizer
    # Adam's learning rates are hundreds of times below SGD's, for which base_lr is made.
    if optimizer.name == "adamw" and memory.enabled and memory.base_lr > 10 * optimizer.lr:
        yield refusal(
            "config.model.memory.base_lr",
            memory.base_lr,
            f"at most {10 * optimizer.lr:g} at config.optimizer.lr = {optimizer.lr:g}, or 0 for a "
            "fixed share: an update replaces momentum / base_lr * lr of a memory row, which would "
            f"never be above {memory.momentum / memory.base_lr * optimizer.lr:g}",
            f"The usual base_lr is lr: {optimizer.lr:g}",
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


def _groups_of_equal_size(config: Any) -> Iterator[UserError]:
    group, parts = config.model.norm_group, config.train.accumulate
    images = config.train.batch_size // parts
    if group and images % group:
        fitting = [str(n) for n in range(2, images + 1) if images % n == 0]
        yield refusal(
            "config.model.norm_group",
            group,
            f"0 or a divisor of the {images} images that are computed together "
            "(config.train.batch_size / config.train.accumulate)",
            f"There are {', '.join(fitting)}" if fitting else "",
        )


def _evaluations_to_stop_by(config: Any) -> Iterator[UserError]:
    train = config.train
    if train.early_stop and not train.eval_every:
        yield refusal(
            "config.train.early_stop",
            train.early_stop,
            "0 beside config.train.eval_every = 0: it counts evaluations, and there is one alone, "
            "at the end",
        )


def _one_axis_is_the_rest(config: Any) -> Iterator[UserError]:
    free = [name for name, size in config.sharding.items() if size == -1]
    for name in ("rows", "fsdp"):
        if name in free and len(free) > 1:
            other = next(one for one in free if one != name)
            yield refusal(
                f"config.sharding.{name}",
                -1,
                f"a number beside config.sharding.{other} = -1: only one can be the rest of the "
                "devices",
                "The default is 1",
            )


def _generated_images(config: Any) -> Iterator[UserError]:
    data = config.data
    for field in ("num_train", "num_val"):
        if data.name == "shapes" and not data[field]:
            yield refusal(
                f"config.data.{field}", 0, "1 or more: config.data.name = 'shapes' generates images"
            )


def _colors_with_one_meaning(config: Any) -> Iterator[UserError]:
    data = config.data
    if not data.label_colors:
        for field, default in (("ignore_colors", ()), ("unknown_color", "error")):
            if tuple(data[field]) != tuple(default):
                yield refusal(
                    f"config.data.{field}",
                    data[field],
                    f"{default!r} as long as config.data.label_colors is empty: label files are "
                    "read as class ids then",
                )
        return
    meanings: dict[tuple[int, ...], set[str]] = {}
    of_class = zip(data.class_names, colors_by_class(data.label_colors))
    for name, colors in [*of_class, ("not labelled", data.ignore_colors)]:
        for color in colors:
            meanings.setdefault(tuple(color), set()).add(name)
    for color, names in meanings.items():
        if len(names) > 1:
            yield refusal(
                "config.data.label_colors",
                data.label_colors,
                f"every colour to mean one class; {color} means {' and '.join(sorted(names))}",
            )


def _map_to_classes(config: Any) -> Iterator[UserError]:
    data = config.data
    if data.outside_polygons not in (IGNORE, *data.class_names):
        yield refusal(
            "config.data.outside_polygons",
            data.outside_polygons,
            f"{IGNORE!r} or one of config.data.class_names",
            did_you_mean(data.outside_polygons, data.class_names).rstrip("."),
        )
    if not data.label_map:
        return
    name = "config.data.label_map"
    if data.label_colors:
        yield refusal(
            name,
            data.label_map,
            "() beside config.data.label_colors: label files hold either ids or colours",
        )
    if IGNORE in data.class_names:
        yield refusal(
            "config.data.class_names",
            data.class_names,
            f"another name for class {IGNORE!r}, which means 'not labelled' in {name}",
        )
    for index, (_, meaning) in enumerate(data.label_map):
        if meaning != IGNORE and meaning not in data.class_names:
            yield refusal(
                f"{name}[{index}][1]",
                meaning,
                f"{IGNORE!r} or one of config.data.class_names",
                did_you_mean(str(meaning), data.class_names).rstrip("."),
            )
    values = [value for value, _ in data.label_map]
    for index, value in enumerate(values):
        if value in values[:index]:
            yield refusal(f"{name}[{index}][0]", value, "every value once")


def _names_of_labels(config: Any) -> Iterator[UserError]:
    name, words = config.data.label_name, ("{stem}", "{name}", "{parent}")
    if not name:
        return
    unknown = [word for word in re.findall(r"\{.*?\}", name) if word not in words]
    if unknown or not ("{stem}" in name or "{name}" in name):
        yield refusal(
            "config.data.label_name",
            name,
            "text with {stem} or {name}, and no other words in braces but {parent}, such as "
            "'{stem}_mask.png'",
        )


def _two_parts(config: Any) -> Iterator[UserError]:
    data = config.data
    if data.val_share and data.train_split == data.eval_split:
        yield refusal(
            "config.data.eval_split",
            data.eval_split,
            "another name than that of config.data.train_split: config.data.val_share = "
            f"{data.val_share:g} makes two splits",
        )


def _only_of_folders(config: Any) -> Iterator[UserError]:
    data = config.data
    if data.name == "folder":
        return
    for field in ("label_map", "label_colors", "label_name", "val_share"):
        if data[field]:
            yield refusal(
                f"config.data.{field}",
                data[field],
                f"{type(data[field])()!r} beside config.data.name = {data.name!r}, which has "
                "labels and splits of its own: set config.data.name='folder' for files of yours",
            )


RELATIONS = (
    _one_start,
    _as_many_as_classes,
    _some_weight,
    _only_of_method,
    _widths_that_add_up,
    _pyramid_of_maps,
    _read_by_a_prediction,
    _paths_to_drop,
    _pairs_of_classes,
    _ordered,
    _windows_without_gaps,
    _share_of_a_row,
    _memory_that_moves,
    _equal_parts,
    _groups_of_equal_size,
    _evaluations_to_stop_by,
    _one_axis_is_the_rest,
    _generated_images,
    _colors_with_one_meaning,
    _map_to_classes,
    _names_of_labels,
    _two_parts,
    _only_of_folders,
)
