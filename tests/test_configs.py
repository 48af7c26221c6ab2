"""Every config file can be loaded and describes a model that can be built."""

import importlib
from pathlib import Path

import jax
import pytest

from memseg_jax import optimizer
from memseg_jax.inference import check_evaluation
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.state import abstract_state

CONFIGS = Path(__file__).parents[1] / "configs"
BASES = ("__init__", "common", "own_folder")  # not configs by themselves
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem not in BASES)

# Published rows: learning rate, its floor, weight decay, memory base_lr, epochs, trainable scalars.
PUBLISHED = {
    "ade20k_resnet50": (0.01, 1e-4, 5e-4, 0.01, 130, 91_410_722),
    "ade20k_resnet101": (0.01, 1e-4, 5e-4, 0.01, 130, 110_402_850),
    "ade20k_resnest101": (0.004, 4e-5, 5e-4, 0.004, 180, 114_109_474),
    "ade20k_hrnet": (0.004, 4e-5, 5e-4, 0.004, 180, 102_574_444),
    "ade20k_vit": (0.01, 1e-4, 0.0, 0.01, 130, 368_790_254),
}


def load(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("name", NAMES)
def test_config_describes_a_model(name):
    config = load(name)
    model = build_segmentor(config)
    check_evaluation(config.eval, model)
    optimizer.sgd(config, optimizer.schedule_from_config(config, 10))
    assert config.train.batch_size % config.replica_groups == 0
    assert len(config.data.palette) in (0, len(config.data.class_names))
    assert len(config.augment.crop) == 2
    # The memory's momentum starts at 0.9 in all rows on ADE20K, and in our own configs.
    assert config.model.memory.base_lr == config.optimizer.lr


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_recipe(name):
    config = load(name)
    o = config.optimizer
    recipe = (o.lr, o.min_lr, o.weight_decay, config.model.memory.base_lr, config.train.epochs)
    model = build_segmentor(config)
    state = abstract_state(model, optimizer.sgd(config, lambda step: 0.0))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert (*recipe, parameters) == PUBLISHED[name]
    assert (config.train.batch_size, config.replica_groups) == (16, 8)
    assert config.loss.consistency == 1.0
    assert (o.momentum, o.power) == (0.9, 0.9)
    assert tuple(config.augment.crop) == (512, 512)
