r"""ADE20K with ResNet-50-D8, as published: 44.39 mIoU (single scale), 45.95 (ms + flip).

    python -m memseg_jax.main --config configs/ade20k_resnet50.py --config.data.root=DATA \
        --config.init.backbone=resnet50_v1c-2cccc1ad.pth
    python -m memseg_jax.main --config configs/ade20k_resnet50.py --config.data.root=DATA \
        --mode evaluate

where DATA holds `ADEChallengeData2016/`. Recipe: batch 16, learning rate 0.01, 130 epochs of 1263
steps, crops of 512x512. The published model starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/resnet50_v1c-2cccc1ad.pth

The baseline without memory (published: 43.19) is `--config.model.memory.enabled=False`.

`--config configs/ade20k_resnet50.py:ms_flip` is the test with several scales and mirror images (ms
+ flip); for `--mode evaluate` add `--workdir runs/ade20k_resnet50`.
"""

import ml_collections

from configs import common
from memseg_jax.data import ade20k


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe, in the 8 groups of the published models.

    Args:
        arg: "ms_flip" for the test with several scales and mirror images.
    """
    words = common.words_of(arg)
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
    config.eval.mode = "whole"
    config.eval.canvases, config.eval.exact_sizes = common.CANVASES[1.0], 0
    if "ms_flip" in words:
        common.set_ms_flip(config)
    return config
