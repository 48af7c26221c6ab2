r"""COCO-Stuff-10k with HRNetV2-W48, as published: 39.77 mIoU (single scale), 41.35 (ms + flip).

    python -m memseg_jax.main --config configs/cocostuff10k_hrnet.py --config.data.root=DATA \
        --config.init.backbone=hrnetv2_w48-d2186c55.pth
    python -m memseg_jax.main --config configs/cocostuff10k_hrnet.py --config.data.root=DATA \
        --mode evaluate

Recipe: batch 16, learning rate 0.001, 110 epochs of 562 steps, crops of 512x512. See
`cocostuff10k_resnet50.py` for the folder DATA. The published model starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/hrnetv2_w48-d2186c55.pth

`--config configs/cocostuff10k_hrnet.py:2025` is the reference's present form, whose stem has one
ReLU more.

`--config configs/cocostuff10k_hrnet.py:ms_flip` is the test with several scales and mirror images
(ms + flip), `:2025,ms_flip` both; for `--mode evaluate` add `--workdir runs/cocostuff10k_hrnet`.
"""

import ml_collections

from configs import cocostuff10k_resnet50, common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50 with what is different for HRNetV2-W48.

    Args:
        arg: "2025" for the form of the reference since 2025, "ms_flip" for the test with several
            scales and mirror images, "2025,ms_flip" for both.
    """
    words = common.words_of(arg, forms=True)
    config = cocostuff10k_resnet50.get_config()
    config.model.backbone = "hrnetv2w48_relu" if "2025" in words else "hrnetv2w48"
    config.model.auxiliary = False
    if "ms_flip" in words:
        common.set_ms_flip(config, common.SCALES[:-1], window=(512, 512))
    return config
