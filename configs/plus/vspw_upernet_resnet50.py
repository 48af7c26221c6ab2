r"""VSPW, UPerNet with ResNet-50-D8 and MCIBI++: no score was published.

    python -m memseg_jax.main --config configs/plus/vspw_upernet_resnet50.py \
        --config.data.root=DATA --config.init.backbone=resnet50_v1c-2cccc1ad.pth
    python -m memseg_jax.main --config configs/plus/vspw_upernet_resnet50.py \
        --config.data.root=DATA --mode evaluate

where DATA holds `data/`, `train.txt` and `val.txt`. Recipe: batch 16, learning rate 0.01, 240
epochs of 175 steps, crops of 512x512. No model was published; the recipe starts from ImageNet
weights:
https://download.openmmlab.com/pretrain/third_party/resnet50_v1c-2cccc1ad.pth

An epoch has one frame of every video, drawn anew in each; all frames are evaluated.

`--config configs/plus/vspw_upernet_resnet50.py:ms_flip` is the test with several scales and mirror
images (ms + flip); for `--mode evaluate` add `--workdir runs/vspw_upernet_resnet50`.
"""

import ml_collections

from configs import common
from configs.plus import recipe
from memseg_jax.data import vspw


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the recipe, in the 8 groups of the published models.

    Args:
        arg: "ms_flip" for the test with several scales and mirror images.
    """
    words = common.words_of(arg)
    base = common.get_config()
    base.data.name = "vspw"
    base.data.class_names = vspw.CLASS_NAMES
    base.data.palette = vspw.PALETTE
    config = recipe.start(base, "aspp", fpn=True)
    config.model.decoder_kernels.final = 3
    config.model.memory.within_image_context = False
    config.optimizer.multipliers.backbone = (0.1, 1.0)
    config.train.epochs = 240
    if "ms_flip" in words:
        common.set_ms_flip(config)
    recipe.set_windows(config, 512, 341)
    return config
