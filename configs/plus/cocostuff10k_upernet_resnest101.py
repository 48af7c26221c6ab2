r"""COCO-Stuff 10k, UPerNet with ResNeSt-101-D8 and MCIBI++: 41.81 mIoU, 42.71 (ms + flip).

    python -m memseg_jax.main --config configs/plus/cocostuff10k_upernet_resnest101.py \
        --config.data.root=DATA --config.init.backbone=resnest101_d2-f3b931b2.pth
    python -m memseg_jax.main --config configs/plus/cocostuff10k_upernet_resnest101.py \
        --config.data.root=DATA --mode evaluate

where DATA holds `images/`, `annotations/` and `imageLists/`. Recipe: batch 32, learning rate 0.001,
150 epochs of 281 steps, crops of 512x512. The published model is
mcibiplusplus_upernet_resnest101os8_cocostuff10k.pth; it starts from ImageNet weights:
https://download.openmmlab.com/pretrain/third_party/resnest101_d2-f3b931b2.pth

`--config configs/plus/cocostuff10k_upernet_resnest101.py:ms_flip` is the test with several scales
and mirror images (ms + flip); for `--mode evaluate` add `--workdir
runs/cocostuff10k_upernet_resnest101`.
"""

import ml_collections

from configs.plus import cocostuff10k_upernet_resnet50


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50-D8 with what is different for ResNeSt-101-D8.

    Args:
        arg: "ms_flip" for the test with several scales and mirror images.
    """
    config = cocostuff10k_upernet_resnet50.get_config(arg)
    config.model.backbone = "resnest101"
    config.model.decoder_kernels.context = 3
    config.optimizer.min_lr = 1e-4
    config.optimizer.weight_decay = 5e-4
    config.train.batch_size = 32
    config.train.epochs = 150
    return config
