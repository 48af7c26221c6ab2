r"""PASCAL-Context, UPerNet with ResNet-101-D8 and MCIBI++: 55.63 mIoU, 56.82 (ms + flip).

    python -m memseg_jax.main --config configs/plus/pascalcontext59_upernet_resnet101.py \
        --config.data.root=DATA --config.init.backbone=resnet101_v1c-e67eebb6.pth
    python -m memseg_jax.main --config configs/plus/pascalcontext59_upernet_resnet101.py \
        --config.data.root=DATA --mode evaluate

where DATA holds `VOCdevkit/VOC2010/`. Recipe: batch 16, learning rate 0.004, 260 epochs of 312
steps, crops of 480x480. The published model is
mcibiplusplus_upernet_resnet101os8_pascalcontext59.pth; it starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/resnet101_v1c-e67eebb6.pth

`--config configs/plus/pascalcontext59_upernet_resnet101.py:ms_flip` is the test with several scales
and mirror images (ms + flip); for `--mode evaluate` add `--workdir
runs/pascalcontext59_upernet_resnet101`.
"""

import ml_collections

from configs import common
from configs.plus import recipe
from memseg_jax.data import pascalcontext59


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe, in the 8 groups of the published models.

    Args:
        arg: "ms_flip" for the test with several scales and mirror images.
    """
    words = common.words_of(arg)
    base = common.get_config()
    base.data.name = "pascalcontext59"
    base.data.class_names = pascalcontext59.CLASS_NAMES
    base.data.palette = pascalcontext59.PALETTE
    base.augment.base_size = (520, 520)
    base.augment.crop = (480, 480)
    base.eval.base_size = (520, 520)
    config = recipe.start(base, "aspp", fpn=True)
    config.model.backbone = "resnet101"
    config.model.decoder_kernels.final = 3
    config.model.memory.within_image_context = False
    recipe.set_rate(config, 0.004)
    config.optimizer.weight_decay = 1e-4
    config.optimizer.multipliers.backbone = (0.1, 1.0)
    config.train.epochs = 260
    if "ms_flip" in words:
        common.set_ms_flip(config)
    recipe.set_windows(config, 480, 320)
    return config
