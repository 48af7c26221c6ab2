r"""ADE20K, UPerNet with Swin-Large and MCIBI++: 53.48 mIoU, 54.50 (ms + flip).

    python -m memseg_jax.main --config configs/plus/ade20k_upernet_swinlarge.py \
        --config.data.root=DATA --config.init.backbone=swin_large_patch4_window12_384_22k.pth
    python -m memseg_jax.main --config configs/plus/ade20k_upernet_swinlarge.py \
        --config.data.root=DATA --mode evaluate

where DATA holds `ADEChallengeData2016/`. Recipe: batch 16, learning rate 6e-05, 130 epochs of 1263
steps, crops of 640x640. The published model is mcibiplusplus_upernet_swinlarge_ade20k.pth; it
starts from ImageNet weights:
https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_large_patch4_window12_384_22k.pth

`--config configs/plus/ade20k_upernet_swinlarge.py:ms_flip` is the test with several scales and
mirror images (ms + flip); for `--mode evaluate` add `--workdir runs/ade20k_upernet_swinlarge`.
"""

import ml_collections

from configs.plus import ade20k_upernet_resnet50, recipe


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50-D8 with what is different for Swin-Large.

    Args:
        arg: "ms_flip" for the test with several scales and mirror images.
    """
    config = ade20k_upernet_resnet50.get_config(arg)
    recipe.set_swin(config)
    config.model.context = "aspp"
    config.model.memory.within_image_context = True
    config.augment.base_size = (2560, 640)
    config.augment.crop = (640, 640)
    config.eval.base_size = (2560, 640)
    recipe.set_windows(config, 640, 426)
    return config
