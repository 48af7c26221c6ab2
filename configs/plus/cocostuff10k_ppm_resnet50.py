r"""COCO-Stuff 10k, PSPNet with ResNet-50-D8 and MCIBI++: 38.47 mIoU (single scale).

    python -m memseg_jax.main --config configs/plus/cocostuff10k_ppm_resnet50.py \
        --config.data.root=DATA --config.init.backbone=resnet50_v1c-2cccc1ad.pth
    python -m memseg_jax.main --config configs/plus/cocostuff10k_ppm_resnet50.py \
        --config.data.root=DATA --mode evaluate

where DATA holds `images/`, `annotations/` and `imageLists/`. Recipe: batch 16, learning rate 0.001,
110 epochs of 562 steps, crops of 512x512. The published model is
mcibiplusplus_ppm_resnet50os8_cocostuff10k.pth; it starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/resnet50_v1c-2cccc1ad.pth

`--config configs/plus/cocostuff10k_ppm_resnet50.py:ms_flip` is the test with several scales and
mirror images (ms + flip); for `--mode evaluate` add `--workdir runs/cocostuff10k_ppm_resnet50`.
"""

import ml_collections

from configs import cocostuff10k_resnet50
from configs.plus import recipe


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe, in the 8 groups of the published models.

    Args:
        arg: "ms_flip" for the test with several scales and mirror images.
    """
    config = recipe.start(cocostuff10k_resnet50.get_config(arg), "pyramid_pooling")
    config.model.decoder_kernels.final = 3
    config.optimizer.min_lr = 1e-4
    return config
