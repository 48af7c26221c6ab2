"""ADE20K with HRNetV2-W48, as published: 45.79 mIoU (single scale), 47.34 (ms + flip).

    python -m memseg_jax.main --config configs/ade20k_hrnet.py --config.data.root=DATA

See `ade20k_resnet50.py` for the folder, and for what random weights mean for the score.
"""

import ml_collections

from configs import ade20k_resnet50


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe: that of ResNet-50 with what is different for HRNetV2-W48."""
    config = ade20k_resnet50.get_config()
    config.model.backbone = "hrnetv2w48"
    config.optimizer.lr = 0.004
    config.optimizer.min_lr = 4e-5
    config.model.memory.base_lr = 0.004
    config.train.epochs = 180
    return config
