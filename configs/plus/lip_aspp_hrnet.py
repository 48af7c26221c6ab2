r"""LIP, DeepLabV3 with HRNetV2-W48 and MCIBI++: 56.72 mIoU, 57.30 (flip), 57.55 (ms + flip).

    python -m memseg_jax.main --config configs/plus/lip_aspp_hrnet.py \
        --config.data.root=DATA --config.init.backbone=hrnetv2_w48-d2186c55.pth
    python -m memseg_jax.main --config configs/plus/lip_aspp_hrnet.py \
        --config.data.root=DATA --mode evaluate

where DATA holds the folders of images and labels. Recipe: batch 40, learning rate 0.007, 150 epochs
of 761 steps, crops of 473x473. The published model is mcibiplusplus_aspp_hrnetv2w48_lip.pth; it
starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/hrnetv2_w48-d2186c55.pth

`--config configs/plus/lip_aspp_hrnet.py:ms_flip` is the test with mirror images (flip); for `--mode
evaluate` add `--workdir runs/lip_aspp_hrnet`.
"""

import ml_collections

from configs.plus import lip_aspp_resnet50, recipe


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50-D8 with what is different for HRNetV2-W48.

    Args:
        arg: "ms_flip" for the test with mirror images.
    """
    config = lip_aspp_resnet50.get_config(arg)
    config.model.backbone = "hrnetv2w48_relu"
    config.model.auxiliary = False
    config.model.decoder_kernels.final = 3
    config.model.memory.within_image_context = False
    config.model.memory.downsample = 2
    recipe.set_rate(config, 0.007)
    config.train.batch_size = 40
    return config
