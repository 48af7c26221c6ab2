r"""LIP with ResNeSt-101-D8, as published: 56.21 mIoU (single scale), 56.34 (flip).

    python -m memseg_jax.main --config configs/lip_resnest101.py --config.data.root=DATA \
        --config.init.backbone=resnest101_d2-f3b931b2.pth
    python -m memseg_jax.main --config configs/lip_resnest101.py --config.data.root=DATA \
        --mode evaluate

Recipe: batch 40, learning rate 0.007, 150 epochs of 761 steps, crops of 473x473. See
`lip_resnet50.py` for the folder DATA. The published model starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/resnest101_d2-f3b931b2.pth

`--config configs/lip_resnest101.py:ms_flip` is the test with mirror images (flip); for `--mode
evaluate` add `--workdir runs/lip_resnest101`.
"""

import ml_collections

from configs import lip_resnet50


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50 with what is different for ResNeSt-101-D8.

    Args:
        arg: "ms_flip" for the test with mirror images.
    """
    config = lip_resnet50.get_config(arg)
    config.model.backbone = "resnest101"
    config.model.activation = "relu"
    config.model.memory.base_lr = 0.007
    config.optimizer.lr = 0.007
    config.optimizer.min_lr = 7e-5
    config.train.batch_size = 40
    return config
