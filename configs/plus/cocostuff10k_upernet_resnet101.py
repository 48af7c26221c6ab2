r"""COCO-Stuff 10k, UPerNet with ResNet-101-D8 and MCIBI++: 40.41 mIoU, 41.84 (ms + flip).

    python -m memseg_jax.main --config configs/plus/cocostuff10k_upernet_resnet101.py \
        --config.data.root=DATA --config.init.backbone=resnet101_v1c-e67eebb6.pth
    python -m memseg_jax.main --config configs/plus/cocostuff10k_upernet_resnet101.py \
        --config.data.root=DATA --mode evaluate

where DATA holds `images/`, `annotations/` and `imageLists/`. Recipe: batch 16, learning rate 0.001,
110 epochs of 562 steps, crops of 512x512. The published model is
mcibiplusplus_upernet_resnet101os8_cocostuff10k.pth; it starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/resnet101_v1c-e67eebb6.pth

`--config configs/plus/cocostuff10k_upernet_resnet101.py:ms_flip` is the test with several scales
and mirror images (ms + flip); for `--mode evaluate` add `--workdir
runs/cocostuff10k_upernet_resnet101`.
"""

import ml_collections

from configs.plus import cocostuff10k_upernet_resnet50


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50-D8 with what is different for ResNet-101-D8.

    Args:
        arg: "ms_flip" for the test with several scales and mirror images.
    """
    config = cocostuff10k_upernet_resnet50.get_config(arg)
    config.model.backbone = "resnet101"
    config.model.context = "aspp"
    return config
