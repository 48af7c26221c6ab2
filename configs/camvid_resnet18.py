"""CamVid (SegNet split, 11 classes, 360x480) with ResNet-18 from random weights: for a CPU.

    python -m memseg_jax.main --config configs/camvid_resnet18.py --config.data.root=CAMVID

where CAMVID holds `train/`, `trainannot/`, `val/`, `valannot/`, `test/`, `testannot/` and the list
files `train.txt`, `val.txt`, `test.txt` with one file stem per line. Score on the test split with
`--mode evaluate --config.data.eval_split=test`.
"""

import ml_collections

from configs import camvid_resnet50


def get_config() -> ml_collections.ConfigDict:
    """Returns the config: small crops, half the width, about half an hour on two CPU cores."""
    config = camvid_resnet50.get_config()
    config.model.backbone = "resnet18"
    config.model.backbone_width = 0.5
    config.model.feature_dim = 128
    config.model.aspp_dim = 128
    config.model.aspp_dilations = (1, 4, 8, 12)
    config.model.memory.attention_dim = 64
    config.augment.scale_range = (0.4, 1.0)
    config.augment.crop = (144, 192)
    config.optimizer.lr = 0.05
    config.optimizer.min_lr = 5e-4
    config.model.memory.base_lr = 0.05
    config.train.batch_size = 8
    config.train.epochs = 30
    config.train.eval_every = 5
    config.train.log_every = 45
    config.checkpoint.every = 450
    return config
