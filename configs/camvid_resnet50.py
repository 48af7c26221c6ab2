"""CamVid (SegNet split, 11 classes, 360x480) with ResNet-50 from random weights: for a GPU.

    python -m memseg_jax.main --config configs/camvid_resnet50.py --config.data.root=CAMVID

See `camvid_resnet18.py` for the folder. With the memory: `--config.model.memory.enabled=True`.
"""

import ml_collections

from configs import common

CLASSES = {
    "Sky": (128, 128, 128),
    "Building": (128, 0, 0),
    "Pole": (192, 192, 128),
    "Road": (128, 64, 128),
    "Pavement": (60, 40, 222),
    "Tree": (128, 128, 0),
    "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128),
    "Car": (64, 0, 128),
    "Pedestrian": (64, 64, 0),
    "Bicyclist": (0, 128, 192),
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = common.get_config()
    config.data.class_names = tuple(CLASSES)
    config.data.palette = tuple(CLASSES.values())
    config.data.ignore_label = 11
    config.data.image_dir = "{split}"
    config.data.label_dir = "{split}annot"
    config.data.list_file = "{split}.txt"
    config.augment.base_size = (480, 360)
    config.augment.crop = (360, 480)
    # From random weights the memory has not been worth its time: docs/memory.md.
    config.model.memory.enabled = False
    config.eval.mode = "whole"
    config.eval.base_size = (480, 360)
    config.train.batch_size = 16
    config.train.epochs = 300
    config.train.eval_every = 20
    return config
