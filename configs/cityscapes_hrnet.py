r"""Cityscapes with HRNetV2-W48, as published: 82.55 mIoU on the test split (ms + flip).

    python -m memseg_jax.main --config configs/cityscapes_hrnet.py --config.data.root=DATA \
        --config.init.backbone=hrnetv2_w48-d2186c55.pth
    python -m memseg_jax.main --config configs/cityscapes_hrnet.py --config.data.root=DATA \
        --mode evaluate

Recipe: batch 16, learning rate 0.01, 500 epochs of 217 steps, crops of 512x1024. See
`cityscapes_resnet50.py` for the folder DATA and the splits. The published model starts from
ImageNet weights: https://download.openmmlab.com/pretrain/third_party/hrnetv2_w48-d2186c55.pth

`--config configs/cityscapes_hrnet.py:ms_flip` is the test with several scales and mirror images (ms
+ flip); for `--mode evaluate` add `--workdir runs/cityscapes_hrnet`.
"""

import ml_collections

from configs import cityscapes_resnet50


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50 with what is different for HRNetV2-W48.

    Args:
        arg: "ms_flip" for the test with several scales and mirror images.
    """
    config = cityscapes_resnet50.get_config(arg)
    config.model.backbone = "hrnetv2w48"
    config.model.downsample = 2
    config.model.auxiliary = False
    config.train.epochs = 500
    return config
