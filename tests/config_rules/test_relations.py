"""Fields that have to fit each other."""

import pytest

from memseg_jax import config_rules
from memseg_jax.errors import UserError
from tests.tiny_config import get_config

RGB = ((1, 2, 3), (4, 5, 6), (7, 8, 9))
PLUS_PLUS = {"model__method": "mcibi_plus_plus", "loss__consistency": 0.0}


def config_with(**fields):
    config = get_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"init__backbone": "a.pth", "init__checkpoint": "run"},
            r"config.init.backbone is 'a.pth'; expected '' beside config.init.checkpoint = 'run'",
        ),
        (
            {"data__palette": ((1, 2, 3),)},
            r"config.data.palette is \(\(1, 2, 3\),\); expected as many as .*class_names has, 3,",
        ),
        (
            {"loss__class_weights": (1.0, 2.0)},
            r"config.loss.class_weights is \(1.0, 2.0\); expected as many .* 3, or .* found 2",
        ),
        (
            {"loss__class_weights": (0, 0, 0)},
            r"config.loss.class_weights is \(0, 0, 0\); expected some weight above 0",
        ),
        (
            {"loss__stage2": 0.0, "loss__stage1": 0.0, "loss__auxiliary": 0.0},
            "config.loss.stage2 is 0.0; .*nothing would be learned",
        ),
        (
            {**PLUS_PLUS, "model__memory__slots": 2},
            r".*slots is 2; expected 1 beside .*method = 'mcibi_plus_plus': 'mcibi' alone has it",
        ),
        (
            {**PLUS_PLUS, "model__memory__strategy": "mean"},
            ".*strategy is 'mean'; expected 'cosine' beside config.model.method",
        ),
        (
            {**PLUS_PLUS, "loss__consistency": 1.0},
            "config.loss.consistency is 1.0; expected 0.0 beside config.model.method",
        ),
        (
            {**PLUS_PLUS, "model__downsample": 2},
            "config.model.downsample is 2; expected 1 beside config.model.method",
        ),
        (
            {**PLUS_PLUS, "model__memory__fusion": "residual"},
            ".*fusion is 'residual'; expected 'published' beside config.model.method",
        ),
        (
            {"model__memory__fusion": "residual", "model__aspp_dim": 24},
            "config.model.aspp_dim is 24; expected config.model.feature_dim, 16, beside",
        ),
        (
            {"model__memory__downsample": 2},
            ".*memory.downsample is 2; expected 1 .* 'mcibi': 'mcibi_plus_plus' alone has it",
        ),
        (
            {"model__memory__read_by": "pixels"},
            ".*read_by is 'pixels'; expected 'context' beside config.model.method = 'mcibi'",
        ),
        (
            {"model__decoder_kernels__final": 3},
            ".*decoder_kernels.final is 3; expected 1 beside config.model.method = 'mcibi'",
        ),
        (
            {"loss__context": 0.4},
            "config.loss.context is 0.4; expected 1.0 beside config.model.method",
        ),
        (
            {**PLUS_PLUS, "model__memory__fuse_before_fpn": True},
            ".*fuse_before_fpn is True; expected False beside config.model.fpn = False",
        ),
        (
            {"model__fpn": True, "model__context": "none"},
            "config.model.context is 'none'; expected 'pyramid_pooling' or 'aspp' beside",
        ),
        (
            {"model__fpn": True, "model__backbone": "hrnetv2w48"},
            "config.model.backbone is 'hrnetv2w48'; expected one of .*'resnet50', .*several sizes",
        ),
        (
            {**PLUS_PLUS, "model__context": "none"},
            ".*read_by is 'context'; expected 'pixels' beside config.model.context = 'none'",
        ),
        (
            {"model__drop_path": 0.3},
            r".*drop_path is 0.3; expected 0.0 beside .*backbone = 'resnet18': Swin alone has it",
        ),
        (
            {"loss__stage2": 0.0, "model__auxiliary": False, "model__memory__enabled": False},
            "config.loss.stage2 is 0.0; .*nothing would be learned",
        ),
        (
            {"augment__flip_pairs": ((0, 1), (1, 2))},
            r"config.augment.flip_pairs is \(\(0, 1\), \(1, 2\)\); .* no class twice",
        ),
        ({"augment__flip_pairs": ((1, 1),)}, "config.augment.flip_pairs is .* no class twice"),
        (
            {"augment__flip_pairs": ((0, 3),)},
            r"config.augment.flip_pairs is \(\(0, 3\),\); expected .* which are 0 to 2",
        ),
        (
            {"augment__scale_range": (2, 1)},
            r"config.augment.scale_range is \(2, 1\); .* Did you mean \(1, 2\)\?",
        ),
        (
            {"eval__mode": "slide", "eval__window": (32, 64), "eval__stride": (33, 20)},
            r"config.eval.stride is \(33, 20\); .*window, \(32, 64\).* nearest is \(32, 20\)",
        ),
        (
            {"optimizer__min_lr": 0.2},
            "config.optimizer.min_lr is 0.2; expected at most config.optimizer.lr, 0.1",
        ),
        (
            {"optimizer__lr": 0.25},
            r"config.model.memory.base_lr is 0.1; expected at least 0.225 at config.optimizer.lr = "
            r"0.25, .* would be 2.25. The usual base_lr is lr: 0.25",
        ),
        (
            {"optimizer__name": "adamw", "optimizer__lr": 6e-5, "optimizer__min_lr": 0.0},
            r"config.model.memory.base_lr is 0.1; expected at most 0.0006 at config.optimizer.lr = "
            r"6e-05, .* never be above 0.00054. The usual base_lr is lr: 6e-05",
        ),
        (
            {"replica_groups": 3},
            r"config.train.batch_size is 8; expected a multiple of config.replica_groups \* "
            r"config.train.accumulate = 3 \* 1. The nearest is 6 or 9",
        ),
        (
            {"train__early_stop": 3, "train__eval_every": 0},
            "config.train.early_stop is 3; expected 0 beside config.train.eval_every = 0: it",
        ),
        (
            {"replica_groups": 4, "train__accumulate": 4},
            r"config.train.batch_size is 8; .* 4 \* 4. The nearest is 16$",
        ),
        (
            {"model__norm_group": 3, "train__accumulate": 2},
            r"config.model.norm_group is 3; expected 0 or a divisor of the 4 images .* 2, 4$",
        ),
        (
            {"sharding__rows": -1},
            "config.sharding.rows is -1; .* beside config.sharding.data = -1: only one can be",
        ),
        (
            {"sharding__fsdp": -1},
            "config.sharding.fsdp is -1; .* only one can be the rest of the devices",
        ),
        (
            {"data__name": "shapes", "data__num_val": 4},
            "config.data.num_train is 0; expected 1 or more: config.data.name = 'shapes'",
        ),
        (
            {"data__name": "shapes", "data__num_train": 4},
            "config.data.num_val is 0; expected 1 or more: config.data.name = 'shapes'",
        ),
        (
            {"data__label_colors": ((1, 2, 3), ((4, 5, 6), (7, 8, 9)))},
            r"config.data.label_colors is .*; expected as many as .* has, 3, .* found 2",
        ),
        (
            {"data__label_colors": ((1, 2, 3), ((4, 5, 6), (1, 2, 3)), (7, 8, 9))},
            r"config.data.label_colors is .* mean one class; \(1, 2, 3\) means box and ground",
        ),
        (
            {"data__label_colors": RGB, "data__ignore_colors": ((4, 5, 6),)},
            r"config.data.label_colors is .*; \(4, 5, 6\) means box and not labelled",
        ),
        (
            {"data__ignore_colors": ((4, 5, 6),)},
            r"config.data.ignore_colors is .*; expected \(\) as long as config.data.label_colors",
        ),
        (
            {"data__unknown_color": "nearest"},
            "config.data.unknown_color is 'nearest'; expected 'error' as long as config.data.label",
        ),
        (
            {"data__label_map": ((7, "box"),), "data__label_colors": RGB},
            r"config.data.label_map is .*; expected \(\) beside config.data.label_colors",
        ),
        (
            {"data__label_map": ((7, "box"), (8, "bx"))},
            r"config.data.label_map\[1\]\[1\] is 'bx'; expected 'ignore' or .*Did you mean box\?",
        ),
        (
            {"data__label_map": ((7, "box"), (7, "disc"))},
            r"config.data.label_map\[1\]\[0\] is 7; expected every value once",
        ),
        (
            {"data__label_map": ((7, "a"),), "data__class_names": ("a", "ignore", "b")},
            r"config.data.class_names is .*; expected another name for class 'ignore'",
        ),
        (
            {"data__outside_polygons": "grund"},
            "config.data.outside_polygons is 'grund'; .* Did you mean ground",
        ),
        (
            {"data__name": "lip", "data__val_share": 0.1},
            "config.data.val_share is 0.1; expected 0.0 beside config.data.name = 'lip', which has",
        ),
        (
            {"data__label_name": "mask.png"},
            "config.data.label_name is 'mask.png'; expected text with {stem} or {name}, and no",
        ),
        (
            {"data__label_name": "{stem}_{id}.png"},
            "config.data.label_name is '{stem}_{id}.png'; .* no other words in braces but",
        ),
        (
            {"data__val_share": 0.2, "data__eval_split": "train"},
            "config.data.eval_split is 'train'; expected another name than .*train_split",
        ),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(UserError, match=f"^{message}"):
        config_rules.check(config_with(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"init__backbone": "a.pth"},
        {
            **PLUS_PLUS,
            "model__context": "pyramid_pooling",
            "model__fpn": True,
            "model__memory__fuse_before_fpn": True,
            "loss__context": 0.4,
        },
        {
            **PLUS_PLUS,
            "model__context": "none",
            "model__memory__read_by": "pixels",
            "model__memory__downsample": 2,
        },
        # The prediction from the context is something to learn.
        {
            **PLUS_PLUS,
            "loss__stage2": 0.0,
            "loss__stage1": 0.0,
            "loss__auxiliary": 0.0,
        },
        # Without a memory, nothing is read.
        {
            **PLUS_PLUS,
            "model__context": "none",
            "model__memory__enabled": False,
        },
        {"model__fpn": True},
        {"init__checkpoint": "run"},
        {"data__palette": ()},
        {"loss__class_weights": (0.0, 1, 2.5)},
        {"loss__stage2": 0.0},
        {"augment__flip_pairs": ((2, 0),)},
        {"augment__scale_range": (1.0, 1.0)},
        {"eval__mode": "slide", "eval__window": (32, 32), "eval__stride": (32, 32)},
        {"eval__mode": "whole", "eval__window": (32, 32), "eval__stride": (64, 64)},
        {"optimizer__min_lr": 0.1},
        {"optimizer__lr": 0.1 / 0.9},  # the whole of a row is replaced
        {"optimizer__lr": 0.25, "model__memory__base_lr": 0.0},
        {"optimizer__lr": 0.25, "model__memory__enabled": False},
        {"optimizer__name": "adamw", "optimizer__lr": 0.01},
        {"optimizer__name": "adamw", "optimizer__lr": 1e-3, "model__memory__base_lr": 0.0},
        {"optimizer__name": "adamw", "optimizer__lr": 1e-3, "model__memory__enabled": False},
        # Learning rate and base_lr grow by the same factor: the share of a row stays.
        {"optimizer__base_batch": 1, "optimizer__warmup_steps": 5, "optimizer__name": "lars"},
        {"replica_groups": 4, "train__accumulate": 2},
        {"model__norm_group": 4, "train__accumulate": 2},
        {"sharding__fsdp": -1, "sharding__data": 2},
        {"sharding__rows": -1, "sharding__data": 2},
        {"data__name": "shapes", "data__num_train": 1, "data__num_val": 1},
        {"data__label_colors": RGB, "data__ignore_colors": ((0, 0, 0),)},
        {"data__label_colors": ((1, 2, 3), RGB[1:], (0, 0, 0)), "data__unknown_color": "nearest"},
        {"data__label_map": ((7, "box"), (8, "box"), ("lorry", "disc"), (0, "ignore"))},
        {"data__outside_polygons": "ground"},
        {"data__label_name": "{parent}/{stem}.png"},
        {"data__val_share": 0.2},
        {"loss__class_weights": "balanced"},
    ],
)
def test_what_fits_is_accepted(fields):
    config_rules.check(config_with(**fields))
