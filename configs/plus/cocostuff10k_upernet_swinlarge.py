r"""COCO-Stuff 10k, UPerNet with Swin-Large and MCIBI++: 49.11 mIoU, 50.27 (ms + flip).

    python -m memseg_jax.main --config configs/plus/cocostuff10k_upernet_swinlarge.py \
        --config.data.root=DATA --config.init.backbone=swin_large_patch4_window12_384_22k.pth
    python -m memseg_jax.main --config configs/plus/cocostuff10k_upernet_swinlarge.py \
        --config.data.root=DATA --mode evaluate

where DATA holds `images/`, `annotations/` and `imageLists/`. Recipe: batch 16, learning rate 6e-05,
150 epochs of 562 steps, crops of 512x512. The published model is
mcibiplusplus_upernet_swinlarge_cocostuff10k.pth; it starts from ImageNet weights:
https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_large_patch4_window12_384_22k.pth

`--config configs/plus/cocostuff10k_upernet_swinlarge.py:ms_flip` is the test with several scales
and mirror images (ms + flip); for `--mode evaluate` add `--workdir
runs/cocostuff10k_upernet_swinlarge`.
"""

import ml_collections

from configs.plus import cocostuff10k_upernet_resnet50, recipe


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50-D8 with what is different for Swin-Large.

    Args:
        arg: "ms_flip" for the test with several scales and mirror images.
    """
    config = cocostuff10k_upernet_resnet50.get_config(arg)
    recipe.set_swin(config)
    config.model.context = "aspp"
    config.train.epochs = 150
    recipe.set_windows(config, 512, 341)
    return config
