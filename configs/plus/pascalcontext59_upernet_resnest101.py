r"""PASCAL-Context, UPerNet with ResNeSt-101-D8 and MCIBI++: 56.83 mIoU, 57.92 (ms + flip).

    python -m memseg_jax.main --config configs/plus/pascalcontext59_upernet_resnest101.py \
        --config.data.root=DATA --config.init.backbone=resnest101_d2-f3b931b2.pth
    python -m memseg_jax.main --config configs/plus/pascalcontext59_upernet_resnest101.py \
        --config.data.root=DATA --mode evaluate

where DATA holds `VOCdevkit/VOC2010/`. Recipe: batch 16, learning rate 0.004, 260 epochs of 312
steps, crops of 480x480. The published model is
mcibiplusplus_upernet_resnest101os8_pascalcontext59.pth; it starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/resnest101_d2-f3b931b2.pth

`--config configs/plus/pascalcontext59_upernet_resnest101.py:ms_flip` is the test with several
scales and mirror images (ms + flip); for `--mode evaluate` add `--workdir
runs/pascalcontext59_upernet_resnest101`.
"""

import ml_collections

from configs.plus import pascalcontext59_upernet_resnet101


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-101-D8 with what is different for ResNeSt-101-D8.

    Args:
        arg: "ms_flip" for the test with several scales and mirror images.
    """
    config = pascalcontext59_upernet_resnet101.get_config(arg)
    config.model.backbone = "resnest101"
    return config
