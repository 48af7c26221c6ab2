"""ADE20K with ResNet-50-D8, as published: 44.39 mIoU (single scale), 45.95 (ms + flip).

    python -m memseg_jax.main --config configs/ade20k_resnet50.py --config.data.root=DATA

where DATA holds `ADEChallengeData2016/`. The published model starts from ImageNet weights
(resnet50_v1c); this config starts from random weights until those can be loaded, so the published
score is not to be expected from it yet. The baseline without memory (published: 43.19) is
`--config.model.memory.enabled=False`.
"""

import ml_collections

from configs import common
from memseg_jax.data import ade20k


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe: batch 16 in 8 groups, 130 epochs of 1263 steps, 512x512 crops."""
    config = common.get_config()
    config.replica_groups = 8
    config.data.name = "ade20k"
    config.data.train_split = "training"
    config.data.eval_split = "validation"
    config.data.class_names = ade20k.CLASS_NAMES
    config.data.palette = ade20k.PALETTE
    config.model.backbone = "resnet50"
    config.loss.consistency = 1.0
    config.train.batch_size = 16
    config.train.epochs = 130
    return config
