r"""ADE20K with ViT-Large, as published: 49.73 mIoU (single scale), 50.99 (ms + flip).

    python -m memseg_jax.main --config configs/ade20k_vit.py --config.data.root=DATA \
        --config.init.backbone=jx_vit_large_p16_384-b3be5167.pth
    python -m memseg_jax.main --config configs/ade20k_vit.py --config.data.root=DATA \
        --mode evaluate

Recipe: batch 16, learning rate 0.01, 130 epochs of 1263 steps, crops of 512x512. See
`ade20k_resnet50.py` for the folder DATA. The published model starts from ImageNet weights: that
file of release v0.1-vitjx of https://github.com/rwightman/pytorch-image-models

`--config configs/ade20k_vit.py:ms_flip` is the test with several scales and mirror images (ms +
flip); for `--mode evaluate` add `--workdir runs/ade20k_vit`.
"""

import ml_collections

from configs import ade20k_resnet50, common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50 with what is different for ViT-Large.

    Args:
        arg: "ms_flip" for the test with several scales and mirror images.
    """
    words = common.words_of(arg)
    config = ade20k_resnet50.get_config()
    config.model.backbone = "vitlarge"
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
