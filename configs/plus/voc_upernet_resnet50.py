r"""PASCAL VOC, UPerNet with ResNet-50-D8 and MCIBI++: 79.48 mIoU (single scale).

    python -m memseg_jax.main --config configs/plus/voc_upernet_resnet50.py \
        --config.data.root=DATA --config.init.backbone=resnet50_v1c-2cccc1ad.pth
    python -m memseg_jax.main --config configs/plus/voc_upernet_resnet50.py \
        --config.data.root=DATA --mode evaluate

where DATA holds `VOCdevkit/VOC2012/`. Recipe: batch 16, learning rate 0.01, 60 epochs of 661 steps,
crops of 512x512. The published model is mcibiplusplus_upernet_resnet50os8_voc.pth; it starts from
ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/resnet50_v1c-2cccc1ad.pth

`--config configs/plus/voc_upernet_resnet50.py:ms_flip` is the test with several scales and mirror
images (ms + flip); for `--mode evaluate` add `--workdir runs/voc_upernet_resnet50`.
"""

import ml_collections

from configs import common
from configs.plus import recipe
from memseg_jax.data import voc


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe, in the 8 groups of the published models.

    Args:
        arg: "ms_flip" for the test with several scales and mirror images.
    """
    words = common.words_of(arg)
    base = common.get_config()
    base.data.name = "voc"
    base.data.train_split = "trainaug"
    base.data.class_names = voc.CLASS_NAMES
    base.data.palette = voc.PALETTE
    base.eval.mode = "whole"
    base.eval.canvases, base.eval.exact_sizes = common.CANVASES[1.0], 0
    config = recipe.start(base, "aspp", fpn=True)
    config.model.decoder_kernels.final = 3
    config.model.memory.within_image_context = False
    config.train.epochs = 60
    if "ms_flip" in words:
        common.set_ms_flip(config)
    return config
