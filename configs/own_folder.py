"""Your own folder of photographs and labels: a starting point for a config of a few lines.

See "Train on your own images" in the README.
"""

from collections.abc import Sequence

import ml_collections

from configs import common


def get_config(
    root: str,
    class_names: Sequence[str],
    crop: tuple[int, int] = (256, 256),
    backbone: str = "resnet18",
    epochs: int = 100,
) -> ml_collections.ConfigDict:
    """Returns a config for training on one CPU or GPU; without `config.init`, from random weights.

    Args:
        root: the folder that holds `images/` and `labels/`.
        class_names: one per class, in the order of the ids in the label files.
        crop: height and width of the training crops; images are not shrunk before cropping
            except by the random scale.
        backbone: config.model.backbone, such as resnet18, or resnet50_v1b for torchvision's file.
        epochs: passes over the training images.
    """
    config = common.get_config()
    config.data.root = root
    config.data.class_names = tuple(class_names)
    config.augment.base_size = ()
    config.augment.crop = tuple(crop)
    config.eval.base_size = ()
    config.model.backbone = backbone
    config.model.feature_dim = 256
    config.model.aspp_dim = 256
    # At small scale plain DeepLabV3 is as good as the published memory or better, and a quarter
    # faster; when to turn it on: docs/memory.md.
    config.model.memory.enabled = False
    config.model.memory.attention_dim = 128
    config.train.batch_size = 8
    config.train.epochs = epochs
    config.train.eval_every = max(epochs // 10, 1)
    config.train.log_every = 10
    return config
