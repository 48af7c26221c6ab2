r"""VSPW, UPerNet with Swin-Large and MCIBI++: 56.04 mIoU (single scale).

    python -m memseg_jax.main --config configs/plus/vspw_upernet_swinlarge.py \
        --config.data.root=DATA --config.init.backbone=swin_large_patch4_window12_384_22k.pth
    python -m memseg_jax.main --config configs/plus/vspw_upernet_swinlarge.py \
        --config.data.root=DATA --mode evaluate

where DATA holds `data/`, `train.txt` and `val.txt`. Recipe: batch 16, learning rate 6e-05, 240
epochs of 175 steps, crops of 512x512. The published model is
mcibiplusplus_upernet_swinlarge_vspw.pth; it starts from ImageNet weights:
https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_large_patch4_window12_384_22k.pth

An epoch has one frame of every video, drawn anew in each; all frames are evaluated.

`--config configs/plus/vspw_upernet_swinlarge.py:ms_flip` is the test with several scales and mirror
images (ms + flip); for `--mode evaluate` add `--workdir runs/vspw_upernet_swinlarge`.
"""

import ml_collections

from configs.plus import recipe, vspw_upernet_resnet50


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50-D8 with what is different for Swin-Large.

    Args:
        arg: "ms_flip" for the test with several scales and mirror images.
    """
    config = vspw_upernet_resnet50.get_config(arg)
    recipe.set_swin(config)
    config.model.context = "pyramid_pooling"
    config.model.decoder_kernels.context = 3
    config.model.memory.within_image_context = True
    return config
