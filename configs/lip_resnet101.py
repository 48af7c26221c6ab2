r"""LIP with ResNet-101-D8, as published: 55.02 mIoU (single scale), 55.42 (flip).

    python -m memseg_jax.main --config configs/lip_resnet101.py --config.data.root=DATA \
        --config.init.backbone=resnet101_v1c-e67eebb6.pth
    python -m memseg_jax.main --config configs/lip_resnet101.py --config.data.root=DATA \
        --mode evaluate

Recipe: batch 32, learning rate 0.01, 150 epochs of 952 steps, crops of 473x473. See
`lip_resnet50.py` for the folder DATA. The published model starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/resnet101_v1c-e67eebb6.pth

`--config configs/lip_resnet101.py:ms_flip` is the test with mirror images (flip); for `--mode
evaluate` add `--workdir runs/lip_resnet101`.
"""

import ml_collections

from configs import lip_resnet50


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50 with what is different for ResNet-101-D8.

    Args:
        arg: "ms_flip" for the test with mirror images.
    """
    config = lip_resnet50.get_config(arg)
    config.model.backbone = "resnet101"
    return config
