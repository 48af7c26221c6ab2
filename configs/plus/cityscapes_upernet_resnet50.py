r"""Cityscapes, UPerNet with ResNet-50-D8 and MCIBI++: 80.05 mIoU (single scale).

    python -m memseg_jax.main --config configs/plus/cityscapes_upernet_resnet50.py \
        --config.data.root=DATA --config.init.backbone=resnet50_v1c-2cccc1ad.pth
    python -m memseg_jax.main --config configs/plus/cityscapes_upernet_resnet50.py \
        --config.data.root=DATA --mode evaluate

where DATA holds `leftImg8bit/` and `gtFine/`. Recipe: batch 8, learning rate 0.01, 220 epochs of
372 steps, crops of 512x1024. The published model is
mcibiplusplus_upernet_resnet50os8_cityscapes.pth; it starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/resnet50_v1c-2cccc1ad.pth

`--config configs/plus/cityscapes_upernet_resnet50.py:ms_flip` is the test with several scales and
mirror images (ms + flip); for `--mode evaluate` add `--workdir runs/cityscapes_upernet_resnet50`.
"""

import ml_collections

from configs import cityscapes_resnet50
from configs.plus import recipe


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe, in the 8 groups of the published models.

    Args:
        arg: "ms_flip" for the test with several scales and mirror images.
    """
    config = recipe.start(cityscapes_resnet50.get_config(arg), "pyramid_pooling", fpn=True)
    config.data.train_split = "train"
    config.model.fpn_dim = 1024
    config.model.memory.within_image_context = False
    config.train.batch_size = 8
    config.train.epochs = 220
    return config
