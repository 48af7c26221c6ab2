r"""LIP with ResNet-50-D8, as published: 53.73 mIoU (single scale), 54.08 (flip).

    python -m memseg_jax.main --config configs/lip_resnet50.py --config.data.root=DATA \
        --config.init.backbone=resnet50_v1c-2cccc1ad.pth
    python -m memseg_jax.main --config configs/lip_resnet50.py --config.data.root=DATA \
        --mode evaluate

where DATA holds `train_images/`, `train_segmentations/`, `val_images/` and `val_segmentations/` (or
deeper, as in the archives). Recipe: batch 32, learning rate 0.01, 150 epochs of 952 steps, crops of
473x473. The published model starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/resnet50_v1c-2cccc1ad.pth

The second score is with flip alone: images are squashed to 473x473, at one scale.

`--config configs/lip_resnet50.py:ms_flip` is the test with mirror images (flip); for `--mode
evaluate` add `--workdir runs/lip_resnet50`.
"""

import ml_collections

from configs import common
from memseg_jax.data import lip


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe, in the 8 groups of the published models.

    Args:
        arg: "ms_flip" for the test with mirror images.
    """
    words = common.words_of(arg)
    config = common.get_config()
    config.replica_groups = 8
    config.data.name = "lip"
    config.data.class_names = lip.CLASS_NAMES
    config.data.palette = lip.PALETTE
    config.augment.base_size = (520, 520)
    config.augment.keep_ratio = False
    config.augment.scale_range = (0.75, 1.25)
    config.augment.crop = (473, 473)
    config.augment.flip_pairs = lip.FLIP_PAIRS
    config.augment.rotation = 0.6
    config.eval.mode = "whole"
    config.eval.base_size = (473, 473)
    config.eval.keep_ratio = False
    config.model.backbone = "resnet50"
    config.model.activation = "leaky_relu"
    config.train.batch_size = 32
    config.train.epochs = 150
    config.eval.flip = "ms_flip" in words  # and one scale, for this data set
    return config
