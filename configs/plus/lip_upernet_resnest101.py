r"""LIP, UPerNet with ResNeSt-101-D8 and MCIBI++: 56.57 mIoU, 56.77 (flip), 57.08 (ms + flip).

    python -m memseg_jax.main --config configs/plus/lip_upernet_resnest101.py \
        --config.data.root=DATA --config.init.backbone=resnest101_d2-f3b931b2.pth
    python -m memseg_jax.main --config configs/plus/lip_upernet_resnest101.py \
        --config.data.root=DATA --mode evaluate

where DATA holds the folders of images and labels. Recipe: batch 32, learning rate 0.01, 150 epochs
of 952 steps, crops of 473x473. The published model is mcibiplusplus_upernet_resnest101os8_lip.pth;
it starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/resnest101_d2-f3b931b2.pth

`--config configs/plus/lip_upernet_resnest101.py:ms_flip` is the test with mirror images (flip); for
`--mode evaluate` add `--workdir runs/lip_upernet_resnest101`.
"""

import ml_collections

from configs.plus import lip_upernet_resnet50


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50-D8 with what is different for ResNeSt-101-D8.

    Args:
        arg: "ms_flip" for the test with mirror images.
    """
    config = lip_upernet_resnet50.get_config(arg)
    config.model.backbone = "resnest101"
    return config
