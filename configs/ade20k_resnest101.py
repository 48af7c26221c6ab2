r"""ADE20K with ResNeSt-101-D8, as published: 46.63 mIoU (single scale), 47.36 (ms + flip).

    python -m memseg_jax.main --config configs/ade20k_resnest101.py --config.data.root=DATA \
        --config.init.backbone=resnest101_d2-f3b931b2.pth
    python -m memseg_jax.main --config configs/ade20k_resnest101.py --config.data.root=DATA \
        --mode evaluate

Recipe: batch 16, learning rate 0.004, 180 epochs of 1263 steps, crops of 512x512. See
`ade20k_resnet50.py` for the folder DATA. The published model starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/resnest101_d2-f3b931b2.pth

`--config configs/ade20k_resnest101.py:ms_flip` is the test with several scales and mirror images
(ms + flip); for `--mode evaluate` add `--workdir runs/ade20k_resnest101`.
"""

import ml_collections

from configs import ade20k_resnet50


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50 with what is different for ResNeSt-101-D8.

    Args:
        arg: "ms_flip" for the test with several scales and mirror images.
    """
    config = ade20k_resnet50.get_config(arg)
    config.model.backbone = "resnest101"
    config.optimizer.lr = 0.004
    config.optimizer.min_lr = 4e-5
    config.model.memory.base_lr = 0.004
    config.train.epochs = 180
    return config
