r"""COCO-Stuff-10k with ViT-Large, as published: 44.01 mIoU (single scale), 45.23 (ms + flip).

    python -m memseg_jax.main --config configs/cocostuff10k_vit.py --config.data.root=DATA \
        --config.init.backbone=jx_vit_large_p16_384-b3be5167.pth
    python -m memseg_jax.main --config configs/cocostuff10k_vit.py --config.data.root=DATA \
        --mode evaluate

Recipe: batch 16, learning rate 0.001, 110 epochs of 562 steps, crops of 512x512. See
`cocostuff10k_resnet50.py` for the folder DATA. The published model starts from ImageNet weights:
that file of release v0.1-vitjx of https://github.com/rwightman/pytorch-image-models

`--config configs/cocostuff10k_vit.py:2025` is the reference's present form (44.27 and 45.50): a
position table for 512x512 images instead of 473x473, and ASPP dilations 1, 12, 24, 36.

`--config configs/cocostuff10k_vit.py:ms_flip` is the test with several scales and mirror images (ms
+ flip), `:2025,ms_flip` both; for `--mode evaluate` add `--workdir runs/cocostuff10k_vit`.
"""

import ml_collections

from configs import cocostuff10k_resnet50, common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50 with what is different for ViT-Large.

    Args:
        arg: "2025" for the form of the reference since 2025, "ms_flip" for the test with several
            scales and mirror images, "2025,ms_flip" for both.
    """
    words = common.words_of(arg, forms=True)
    config = cocostuff10k_resnet50.get_config()
    if "2025" in words:
        config.model.backbone = "vitlarge"
        config.model.aspp_dilations = (1, 12, 24, 36)
    else:
        config.model.backbone = "vitlarge_473"
        config.model.aspp_dilations = (1, 6, 12, 18)
    config.optimizer.weight_decay = 0.0
    config.optimizer.multipliers.backbone = (0.1, 0.1)
    config.eval.mode = "slide"
    config.eval.window = (512, 512)
    config.eval.stride = (341, 341)
    config.eval.softmax_before_resize = True
    if "ms_flip" in words:
        common.set_ms_flip(config, window=(512, 512))
    return config
