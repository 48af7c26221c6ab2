r"""PASCAL-Context, UPerNet with Swin-Large and MCIBI++: 62.37 mIoU, 64.01 (ms + flip).

    python -m memseg_jax.main --config configs/plus/pascalcontext59_upernet_swinlarge.py \
        --config.data.root=DATA --config.init.backbone=swin_large_patch4_window12_384_22k.pth
    python -m memseg_jax.main --config configs/plus/pascalcontext59_upernet_swinlarge.py \
        --config.data.root=DATA --mode evaluate

where DATA holds `VOCdevkit/VOC2010/`. Recipe: batch 16, learning rate 6e-05, 260 epochs of 312
steps, crops of 480x480. The published model is mcibiplusplus_upernet_swinlarge_pascalcontext59.pth;
it starts from ImageNet weights:
https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_large_patch4_window12_384_22k.pth

`--config configs/plus/pascalcontext59_upernet_swinlarge.py:ms_flip` is the test with several scales
and mirror images (ms + flip); for `--mode evaluate` add `--workdir
runs/pascalcontext59_upernet_swinlarge`.
"""

import ml_collections

from configs.plus import pascalcontext59_upernet_resnet101, recipe


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-101-D8 with what is different for Swin-Large.

    Args:
        arg: "ms_flip" for the test with several scales and mirror images.
    """
    config = pascalcontext59_upernet_resnet101.get_config(arg)
    recipe.set_swin(config)
    return config
