r"""COCO-Stuff-10k with ResNet-50-D8, as published: 38.84 mIoU (single scale), 39.68 (ms + flip).

    python -m memseg_jax.main --config configs/cocostuff10k_resnet50.py --config.data.root=DATA \
        --config.init.backbone=resnet50_v1c-2cccc1ad.pth
    python -m memseg_jax.main --config configs/cocostuff10k_resnet50.py --config.data.root=DATA \
        --mode evaluate

where DATA holds `images/`, `annotations/` and `imageLists/`. Recipe: batch 16, learning rate 0.001,
110 epochs of 562 steps, crops of 512x512. The published model starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/resnet50_v1c-2cccc1ad.pth

There is no validation split: the test split is scored during training, too.

`--config configs/cocostuff10k_resnet50.py:ms_flip` is the test with several scales and mirror
images (ms + flip); for `--mode evaluate` add `--workdir runs/cocostuff10k_resnet50`.
"""

import ml_collections

from configs import common
from memseg_jax.data import cocostuff10k


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe, in the 8 groups of the published models.

    Args:
        arg: "ms_flip" for the test with several scales and mirror images.
    """
    words = common.words_of(arg)
    config = common.get_config()
    config.replica_groups = 8
    config.data.name = "cocostuff10k"
    config.data.eval_split = "test"
    config.data.class_names = cocostuff10k.CLASS_NAMES
    config.data.palette = cocostuff10k.PALETTE
    config.model.backbone = "resnet50"
    config.model.memory.base_lr = 0.0009  # below the learning rate: the momentum starts at 1
    config.optimizer.lr = 0.001
    config.optimizer.min_lr = 1e-5
    config.optimizer.weight_decay = 1e-4
    config.train.batch_size = 16
    config.train.epochs = 110
    config.eval.mode = "whole"
    config.eval.canvases, config.eval.exact_sizes = common.CANVASES[1.0], 0
    if "ms_flip" in words:
        common.set_ms_flip(config, scales=common.SCALES[:-1])
    return config
