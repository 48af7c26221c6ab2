r"""LIP with HRNetV2-W48, as published: 56.40 mIoU (single scale), 56.99 (flip).

    python -m memseg_jax.main --config configs/lip_hrnet.py --config.data.root=DATA \
        --config.init.backbone=hrnetv2_w48-d2186c55.pth
    python -m memseg_jax.main --config configs/lip_hrnet.py --config.data.root=DATA \
        --mode evaluate

Recipe: batch 40, learning rate 0.007, 150 epochs of 761 steps, crops of 473x473. See
`lip_resnet50.py` for the folder DATA. The published model starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/hrnetv2_w48-d2186c55.pth

`--config configs/lip_hrnet.py:2025` is the reference's present form, whose stem has one ReLU more.

`--config configs/lip_hrnet.py:ms_flip` is the test with mirror images (flip), `:2025,ms_flip` both;
for `--mode evaluate` add `--workdir runs/lip_hrnet`.
"""

import ml_collections

from configs import common, lip_resnet50


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50 with what is different for HRNetV2-W48.

    Args:
        arg: "2025" for the form of the reference since 2025, "ms_flip" for the test with mirror
            images, "2025,ms_flip" for both.
    """
    words = common.words_of(arg, forms=True)
    config = lip_resnet50.get_config()
    config.model.backbone = "hrnetv2w48_relu" if "2025" in words else "hrnetv2w48"
    config.model.downsample = 2
    config.model.auxiliary = False
    config.model.activation = "relu"
    config.model.memory.base_lr = 0.007
    config.optimizer.lr = 0.007
    config.optimizer.min_lr = 7e-5
    config.train.batch_size = 40
    config.eval.flip = "ms_flip" in words
    return config
