"""A model and a training so small that tests can run them: a config like those of `configs/`."""

import ml_collections

from configs import common

CLASSES = ("ground", "box", "disc")
COLOURS = ((90, 90, 90), (220, 40, 40), (40, 200, 60))
SIDE = 32


def get_config() -> ml_collections.ConfigDict:
    """A narrow ResNet-18 on small crops of a folder; four epochs of four steps."""
    config = common.get_config()
    config.data.class_names = CLASSES
    config.data.palette = COLOURS
    config.data.threads = 2
    config.data.prefetch = 2
    config.augment.base_size = ()
    config.augment.scale_range = (0.8, 1.25)
    config.augment.crop = (SIDE, SIDE)
    config.eval.base_size = ()
    config.eval.exact_sizes = 1
    config.eval.size_multiple = 32
    config.model.backbone = "resnet18"
    config.model.backbone_width = 0.125
    config.model.feature_dim = 16
    config.model.aspp_dim = 16
    config.model.aspp_dilations = (1, 2)
    config.model.memory.attention_dim = 8
    config.model.memory.base_lr = 0.1
    config.loss.consistency = 0.5
    config.optimizer.lr = 0.1
    config.optimizer.min_lr = 1e-3
    config.train.batch_size = 8  # each of the forced devices gets one image
    config.train.epochs = 4
    config.train.log_every = 1
    config.train.eval_every = 0
    config.checkpoint.every = 3
    return config
