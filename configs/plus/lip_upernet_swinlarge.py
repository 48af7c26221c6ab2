r"""LIP, UPerNet with Swin-Large and MCIBI++: 59.58 mIoU, 59.89 (flip), 59.91 (ms + flip).

    python -m memseg_jax.main --config configs/plus/lip_upernet_swinlarge.py \
        --config.data.root=DATA --config.init.backbone=swin_large_patch4_window12_384_22k.pth
    python -m memseg_jax.main --config configs/plus/lip_upernet_swinlarge.py \
        --config.data.root=DATA --mode evaluate

where DATA holds the folders of images and labels. Recipe: batch 16, learning rate 6e-05, 110 epochs
of 1904 steps, crops of 473x473. The published model is mcibiplusplus_upernet_swinlarge_lip.pth; it
starts from ImageNet weights:
https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_large_patch4_window12_384_22k.pth

`--config configs/plus/lip_upernet_swinlarge.py:ms_flip` is the test with mirror images (flip); for
`--mode evaluate` add `--workdir runs/lip_upernet_swinlarge`.
"""

import ml_collections

from configs.plus import lip_upernet_resnet50, recipe


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50-D8 with what is different for Swin-Large.

    Args:
        arg: "ms_flip" for the test with mirror images.
    """
    config = lip_upernet_resnet50.get_config(arg)
    recipe.set_swin(config)
    config.model.decoder_kernels.final = 1
    config.train.batch_size = 16
    config.train.epochs = 110
    return config
