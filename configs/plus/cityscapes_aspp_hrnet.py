r"""Cityscapes, DeepLabV3 with HRNetV2-W48 and MCIBI++: 82.74 mIoU on the test split (ms + flip).

    python -m memseg_jax.main --config configs/plus/cityscapes_aspp_hrnet.py \
        --config.data.root=DATA --config.init.backbone=hrnetv2_w48-d2186c55.pth
    python -m memseg_jax.main --config configs/plus/cityscapes_aspp_hrnet.py \
        --config.data.root=DATA --mode evaluate

where DATA holds `leftImg8bit/` and `gtFine/`. Recipe: batch 16, learning rate 0.01, 440 epochs of
217 steps, crops of 512x1024. The published model is mcibiplusplus_aspp_hrnetv2w48_cityscapes.pth;
it starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/hrnetv2_w48-d2186c55.pth

The published score is that of the benchmark server on the test split, whose labels are not public.
Here `val` is scored, which is part of the training split `trainval`; see
`configs/cityscapes_resnet50.py`.

`--config configs/plus/cityscapes_aspp_hrnet.py:ms_flip` is the test with several scales and mirror
images (ms + flip); for `--mode evaluate` add `--workdir runs/cityscapes_aspp_hrnet`.
"""

import ml_collections

from configs.plus import cityscapes_aspp_resnet50


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50-D8 with what is different for HRNetV2-W48.

    Args:
        arg: "ms_flip" for the test with several scales and mirror images.
    """
    config = cityscapes_aspp_resnet50.get_config(arg)
    config.data.train_split = "trainval"
    config.model.backbone = "hrnetv2w48"
    config.model.auxiliary = False
    config.model.decoder_kernels.context = 3
    config.model.decoder_kernels.final = 3
    config.model.memory.within_image_context = False
    config.model.memory.downsample = 2
    config.train.batch_size = 16
    config.train.epochs = 440
    return config
