r"""COCO-Stuff-10k with ResNet-101-D8, as published: 39.84 mIoU (single scale), 41.49 (ms + flip).

    python -m memseg_jax.main --config configs/cocostuff10k_resnet101.py --config.data.root=DATA \
        --config.init.backbone=resnet101_v1c-e67eebb6.pth
    python -m memseg_jax.main --config configs/cocostuff10k_resnet101.py --config.data.root=DATA \
        --mode evaluate

Recipe: batch 16, learning rate 0.001, 110 epochs of 562 steps, crops of 512x512. See
`cocostuff10k_resnet50.py` for the folder DATA. The published model starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/resnet101_v1c-e67eebb6.pth

`--config configs/cocostuff10k_resnet101.py:ms_flip` is the test with several scales and mirror
images (ms + flip); for `--mode evaluate` add `--workdir runs/cocostuff10k_resnet101`.
"""

import ml_collections

from configs import cocostuff10k_resnet50, common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50 with what is different for ResNet-101-D8.

    Args:
        arg: "ms_flip" for the test with several scales and mirror images.
    """
    words = common.words_of(arg)
    config = cocostuff10k_resnet50.get_config()
    config.model.backbone = "resnet101"
    if "ms_flip" in words:
        common.set_ms_flip(config)
    return config
