r"""Cityscapes, DeepLabV3 with ResNet-101-D8 and MCIBI++: 82.20 mIoU on the test split (ms + flip).

    python -m memseg_jax.main --config configs/plus/cityscapes_aspp_resnet101.py \
        --config.data.root=DATA --config.init.backbone=resnet101_v1c-e67eebb6.pth
    python -m memseg_jax.main --config configs/plus/cityscapes_aspp_resnet101.py \
        --config.data.root=DATA --mode evaluate

where DATA holds `leftImg8bit/` and `gtFine/`. Recipe: batch 16, learning rate 0.01, 440 epochs of
217 steps, crops of 512x1024. The published model is mcibiplusplus_aspp_resnet101os8_cityscapes.pth;
it starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/resnet101_v1c-e67eebb6.pth

The published score is that of the benchmark server on the test split, whose labels are not public.
Here `val` is scored, which is part of the training split `trainval`; see
`configs/cityscapes_resnet50.py`.

`--config configs/plus/cityscapes_aspp_resnet101.py:ms_flip` is the test with several scales and
mirror images (ms + flip); for `--mode evaluate` add `--workdir runs/cityscapes_aspp_resnet101`.
"""

import ml_collections

from configs.plus import cityscapes_aspp_resnet50


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50-D8 with what is different for ResNet-101-D8.

    Args:
        arg: "ms_flip" for the test with several scales and mirror images.
    """
    config = cityscapes_aspp_resnet50.get_config(arg)
    config.data.train_split = "trainval"
    config.model.backbone = "resnet101"
    config.model.decoder_kernels.final = 3
    config.train.batch_size = 16
    config.train.epochs = 440
    return config
