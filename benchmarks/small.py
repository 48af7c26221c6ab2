"""The quickstart with the feature memory: the whole method, small enough to compile in seconds."""

import ml_collections

from configs import quickstart


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = quickstart.get_config()
    config.model.memory.enabled = True
    return config
