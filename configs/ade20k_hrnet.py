r"""ADE20K with HRNetV2-W48, as published: 45.79 mIoU (single scale), 47.34 (ms + flip).

    python -m memseg_jax.main --config configs/ade20k_hrnet.py --config.data.root=DATA \
        --config.init.backbone=hrnetv2_w48-d2186c55.pth
    python -m memseg_jax.main --config configs/ade20k_hrnet.py --config.data.root=DATA \
        --mode evaluate

Recipe: batch 16, learning rate 0.004, 180 epochs of 1263 steps, crops of 512x512. See
`ade20k_resnet50.py` for the folder DATA. The published model starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/hrnetv2_w48-d2186c55.pth

`--config configs/ade20k_hrnet.py:2025` is the reference's present form, whose stem has one ReLU
more.

`--config configs/ade20k_hrnet.py:ms_flip` is the test with several scales and mirror images (ms +
flip), `:2025,ms_flip` both; for `--mode evaluate` add `--workdir runs/ade20k_hrnet`.
"""

import ml_collections

from configs import ade20k_resnet50, common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50 with what is different for HRNetV2-W48.

    Args:
        arg: "2025" for the form of the reference since 2025, "ms_flip" for the test with several
            scales and mirror images, "2025,ms_flip" for both.
    """
    words = common.words_of(arg, forms=True)
    config = ade20k_resnet50.get_config()
    config.model.backbone = "hrnetv2w48_relu" if "2025" in words else "hrnetv2w48"
    config.model.auxiliary = False
    config.optimizer.lr = 0.004
    config.optimizer.min_lr = 4e-5
    config.model.memory.base_lr = 0.004
    config.train.epochs = 180
    if "ms_flip" in words:
        common.set_ms_flip(config, window=(512, 512))
    return config
