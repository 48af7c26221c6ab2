r"""ADE20K, UPerNet with ResNeSt-101-D8 and MCIBI++: 47.59 mIoU, 48.56 (ms + flip).

    python -m memseg_jax.main --config configs/plus/ade20k_upernet_resnest101.py \
        --config.data.root=DATA --config.init.backbone=resnest101_d2-f3b931b2.pth
    python -m memseg_jax.main --config configs/plus/ade20k_upernet_resnest101.py \
        --config.data.root=DATA --mode evaluate

where DATA holds `ADEChallengeData2016/`. Recipe: batch 16, learning rate 0.004, 180 epochs of 1263
steps, crops of 512x512. The published model is mcibiplusplus_upernet_resnest101os8_ade20k.pth; it
starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/resnest101_d2-f3b931b2.pth

`--config configs/plus/ade20k_upernet_resnest101.py:ms_flip` is the test with several scales and
mirror images (ms + flip); for `--mode evaluate` add `--workdir runs/ade20k_upernet_resnest101`.
"""

import ml_collections

from configs.plus import ade20k_upernet_resnet50, recipe


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50-D8 with what is different for ResNeSt-101-D8.

    Args:
        arg: "ms_flip" for the test with several scales and mirror images.
    """
    config = ade20k_upernet_resnet50.get_config(arg)
    config.model.backbone = "resnest101"
    config.model.context = "aspp"
    recipe.set_rate(config, 0.004)
    config.train.epochs = 180
    return config
