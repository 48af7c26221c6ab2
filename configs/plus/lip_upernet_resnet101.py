r"""LIP, UPerNet with ResNet-101-D8 and MCIBI++: 55.87 mIoU, 56.26 (flip), 56.32 (ms + flip).

    python -m memseg_jax.main --config configs/plus/lip_upernet_resnet101.py \
        --config.data.root=DATA --config.init.backbone=resnet101_v1c-e67eebb6.pth
    python -m memseg_jax.main --config configs/plus/lip_upernet_resnet101.py \
        --config.data.root=DATA --mode evaluate

where DATA holds the folders of images and labels. Recipe: batch 32, learning rate 0.01, 150 epochs
of 952 steps, crops of 473x473. The published model is mcibiplusplus_upernet_resnet101os8_lip.pth;
it starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/resnet101_v1c-e67eebb6.pth

`--config configs/plus/lip_upernet_resnet101.py:ms_flip` is the test with mirror images (flip); for
`--mode evaluate` add `--workdir runs/lip_upernet_resnet101`.
"""

import ml_collections

from configs.plus import lip_upernet_resnet50


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50-D8 with what is different for ResNet-101-D8.

    Args:
        arg: "ms_flip" for the test with mirror images.
    """
    config = lip_upernet_resnet50.get_config(arg)
    config.model.backbone = "resnet101"
    return config
