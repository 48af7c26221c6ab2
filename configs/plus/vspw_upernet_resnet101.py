r"""VSPW, UPerNet with ResNet-101-D8 and MCIBI++: 43.21 mIoU (single scale).

    python -m memseg_jax.main --config configs/plus/vspw_upernet_resnet101.py \
        --config.data.root=DATA --config.init.backbone=resnet101_v1c-e67eebb6.pth
    python -m memseg_jax.main --config configs/plus/vspw_upernet_resnet101.py \
        --config.data.root=DATA --mode evaluate

where DATA holds `data/`, `train.txt` and `val.txt`. Recipe: batch 16, learning rate 0.01, 240
epochs of 175 steps, crops of 512x512. The published model is
mcibiplusplus_upernet_resnet101os8_vspw.pth; it starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/resnet101_v1c-e67eebb6.pth

An epoch has one frame of every video, drawn anew in each; all frames are evaluated.

`--config configs/plus/vspw_upernet_resnet101.py:ms_flip` is the test with several scales and mirror
images (ms + flip); for `--mode evaluate` add `--workdir runs/vspw_upernet_resnet101`.
"""

import ml_collections

from configs.plus import vspw_upernet_resnet50


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50-D8 with what is different for ResNet-101-D8.

    Args:
        arg: "ms_flip" for the test with several scales and mirror images.
    """
    config = vspw_upernet_resnet50.get_config(arg)
    config.model.backbone = "resnet101"
    return config
