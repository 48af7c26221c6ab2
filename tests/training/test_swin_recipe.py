"""The optimiser of MCIBI++'s Swin recipes: what has no decay, the rate, and PyTorch's AdamW."""

import functools
import importlib

import jax
import numpy as np
import optax
import pytest

from converters import names
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.training import optimizer
from memseg_jax.training.state import abstract_variables

RECIPES = [
    f"{data_set}_upernet_swinlarge"
    for data_set in ("ade20k", "cocostuff10k", "lip", "pascalcontext59", "vspw")
]
NAME = RECIPES[0]
WORDS = ("absolute_pos_embed", "relative_position_bias_table", "norm")  # of the reference


def load(name):
    return importlib.import_module(f"configs.plus.{name}").get_config()


@functools.cache
def reference_names(name):
    """{our parameter: the reference's name of it}, all of them."""
    params = abstract_variables(build_segmentor(load(name)))["params"]
    return {
        path: names.torch_key(f"params/{path}", "mcibi_plus_plus") for path in names.flatten(params)
    }


def has_decay(theirs):
    return not any(word in theirs for word in WORDS)


def keys_of(path):
    return tuple(jax.tree_util.DictKey(key) for key in path.split("/"))


@pytest.mark.parametrize("name", RECIPES)
def test_what_has_no_decay(name):
    multipliers = dict(load(name).optimizer.multipliers.items())
    decayed = {path: has_decay(theirs) for path, theirs in reference_names(name).items()}
    # Four normalisations of maps, three of patch merging, one of the patches, two of each of 24
    # blocks, each with scale and bias; the blocks' tables. None is a batch normalisation.
    assert list(decayed.values()).count(False) == 2 * (4 + 3 + 1 + 48) + 24
    assert decayed["bottleneck/norm/scale"]
    for path, expected in decayed.items():
        found = optimizer.multiplier(keys_of(path), multipliers)
        assert found == (1.0, float(expected)), path


@pytest.mark.parametrize("name", RECIPES)
def test_the_rate_is_that_of_the_formula(double_precision, name):
    total = 20_000
    schedule = jax.jit(optimizer.schedule_from_config(load(name), total))
    for i in (0, 1, 2, 749, 1498, 1499, 1500, 1501, 7000, total - 1, total):
        poly = 6e-5 * (1 - i / total)
        expected = (1 - (1 - i / 1500) * (1 - 1e-6)) * poly if i <= 1500 else poly
        # The formula itself rounds: at the start, it takes numbers near 1 from 1.
        assert abs(float(schedule(i)) - expected) < 1e-12 * (expected + 6e-5), i


def tree_of(seed):
    rng = np.random.default_rng(seed)
    return {path: rng.standard_normal(3) for path in reference_names(NAME)}


def nested(flat):
    tree = {}
    for path, value in flat.items():
        *modules, leaf = path.split("/")
        group = tree
        for module in modules:
            group = group.setdefault(module, {})
        group[leaf] = value
    return tree


def test_six_steps_are_those_of_pytorch(double_precision):
    """With the reference's own groups: a decay of 0 where the name has one of its words."""
    torch = pytest.importorskip("torch")
    config = load(NAME)
    config.optimizer.warmup_steps, total = 3, 6
    # Larger than in the recipe, so that the decay is seen in six steps.
    config.optimizer.lr = 0.1
    theirs = {path: torch.tensor(value, requires_grad=True) for path, value in tree_of(0).items()}
    groups = [
        {"params": [p], "weight_decay": 0.01 * has_decay(reference_names(NAME)[path])}
        for path, p in theirs.items()
    ]
    reference = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.999), eps=1e-8)
    tx = optimizer.from_config(config, optimizer.schedule_from_config(config, total))
    params = nested(tree_of(0))
    state = tx.init(params)

    @jax.jit
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(total):
        gradients = tree_of(100 + i)
        poly = 0.1 * (1 - i / total)
        for group, (path, p) in zip(reference.param_groups, theirs.items(), strict=True):
            group["lr"] = (1 - (1 - i / 3) * (1 - 1e-6)) * poly if i <= 3 else poly
            p.grad = torch.tensor(gradients[path])
        reference.step()
        params, state = step(params, state, nested(gradients))
        expected = nested({path: p.detach().numpy() for path, p in theirs.items()})
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), params, expected
        )
