r"""LIP, UPerNet with ResNet-50-D8 and MCIBI++: 53.92 mIoU (single scale).

    python -m memseg_jax.main --config configs/plus/lip_upernet_resnet50.py \
        --config.data.root=DATA --config.init.backbone=resnet50_v1c-2cccc1ad.pth
    python -m memseg_jax.main --config configs/plus/lip_upernet_resnet50.py \
        --config.data.root=DATA --mode evaluate

where DATA holds the folders of images and labels. Recipe: batch 32, learning rate 0.01, 150 epochs
of 952 steps, crops of 473x473. The published model is mcibiplusplus_upernet_resnet50os8_lip.pth; it
starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/resnet50_v1c-2cccc1ad.pth

`--config configs/plus/lip_upernet_resnet50.py:ms_flip` is the test with mirror images (flip); for
`--mode evaluate` add `--workdir runs/lip_upernet_resnet50`.
"""

import ml_collections

from configs import lip_resnet50
from configs.plus import recipe


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe, in the 8 groups of the published models.

    Args:
        arg: "ms_flip" for the test with mirror images.
    """
    config = recipe.start(lip_resnet50.get_config(arg), "pyramid_pooling", fpn=True)
    config.model.decoder_kernels.final = 3
    config.model.memory.within_image_context = False
    return config
