"""The quickstart with 26 classes instead of 6: a config for `benchmarks.ablation`.

    python -m benchmarks.ablation --config benchmarks/many_classes.py ...

Every outline comes with every surface, and each of these pairs is a class. From random weights, the
quickstart's 500 steps are far too few for them; from a trained quickstart they are not.
"""

import ml_collections

from configs import quickstart
from memseg_jax.data import shapes


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = quickstart.get_config()
    config.data.class_names = shapes.PAIR_NAMES
    config.data.palette = ()
    return config
