"""What the recipes of MCIBI++ share: the method, the networks around it, and Swin's training.

Each of them starts from a data set: that of a recipe of MCIBI in `configs/`, or its own.
"""

import ml_collections

from configs import common

LEARNING_RATE_OF_SWIN = 6e-5


def start(
    base: ml_collections.ConfigDict, context: str, fpn: bool = False
) -> ml_collections.ConfigDict:
    """Returns a config with the data, schedule and test of another one, and MCIBI++ as the method.

    Args:
        base: of which `data`, `augment`, `eval`, `optimizer` and `train` are taken, and backbone
            and auxiliary head; the rest is as in `configs/common.py`.
        context: `config.model.context`.
        fpn: whether the network is UPerNet; the memory enters its pyramid at the top.
    """
    config = common.get_config()
    config.replica_groups = 8
    for group in ("data", "augment", "eval", "optimizer", "train"):
        config[group] = base[group]
    model = config.model
    model.backbone, model.auxiliary = base.model.backbone, base.model.auxiliary
    model.method = "mcibi_plus_plus"
    model.context = context
    model.memory.momentum = 0.1
    model.memory.base_lr = 0.0  # the momentum is fixed
    if context == "none":
        model.memory.read_by = "pixels"
    if fpn:
        model.fpn = True
        model.memory.fuse_before_fpn = True
    return config


def set_rate(config: ml_collections.ConfigDict, lr: float) -> None:
    """Sets the learning rate of SGD, which falls to a hundredth."""
    config.optimizer.lr = lr
    config.optimizer.min_lr = lr / 100


def set_windows(config: ml_collections.ConfigDict, window: int, stride: int) -> None:
    """Sets the test by square windows of one size, whose class probabilities are averaged."""
    config.eval.mode = "slide"
    config.eval.window = (window, window)
    config.eval.stride = (stride, stride)
    config.eval.softmax_before_resize = True
    # A window at the border of a smaller image is padded to the same size.
    config.eval.canvases, config.eval.exact_sizes = ((window, window),), 0


def set_swin(config: ml_collections.ConfigDict) -> None:
    """Sets Swin-Large, and the optimiser that all recipes have for it."""
    config.model.backbone = "swinlarge"
    config.model.drop_path = 0.3
    optimizer = config.optimizer
    optimizer.name = "adamw"
    optimizer.lr = LEARNING_RATE_OF_SWIN
    optimizer.min_lr = 0.0
    optimizer.power = 1.0
    optimizer.weight_decay = 0.01
    optimizer.warmup_steps = 1500
    optimizer.warmup_start = 1e-6
    # No decay of the backbone's normalisations and tables of positions; all else has it, biases
    # and the batch normalisations of the head included.
    optimizer.multipliers = ml_collections.ConfigDict(
        {
            "backbone/*norm*": (1.0, 0.0),
            "backbone/*relative_position_bias_table": (1.0, 0.0),
        }
    )
