"""The optimiser of MCIBI++'s Swin recipes: what has no decay, the rate, and PyTorch's AdamW."""

import importlib

import jax
import numpy as np
import optax
import pytest

from memseg_jax.training import optimizer

RECIPES = [
    f"{data_set}_upernet_swinlarge"
    for data_set in ("ade20k", "cocostuff10k", "lip", "pascalcontext59", "vspw")
]
WORDS = ("absolute_pos_embed", "relative_position_bias_table", "norm")  # of the reference
BLOCK, OUR_BLOCK = "backbone_net.stages.2.blocks.17.", "backbone/stages_2_blocks_17/"
# Our parameter -> the reference's name of it: one of every kind, and of every normalisation.
NAMES = {
    "backbone/patch_embed/projection/kernel": "backbone_net.patch_embed.projection.weight",
    "backbone/patch_embed/projection/bias": "backbone_net.patch_embed.projection.bias",
    "backbone/patch_embed/norm/scale": "backbone_net.patch_embed.norm.weight",
    "backbone/patch_embed/norm/bias": "backbone_net.patch_embed.norm.bias",
    f"{OUR_BLOCK}norm1/scale": f"{BLOCK}norm1.weight",
    f"{OUR_BLOCK}norm1/bias": f"{BLOCK}norm1.bias",
    f"{OUR_BLOCK}attn/relative_position_bias_table": (
        f"{BLOCK}attn.w_msa.relative_position_bias_table"
    ),
    f"{OUR_BLOCK}attn/qkv/kernel": f"{BLOCK}attn.w_msa.qkv.weight",
    f"{OUR_BLOCK}attn/qkv/bias": f"{BLOCK}attn.w_msa.qkv.bias",
    f"{OUR_BLOCK}attn/proj/kernel": f"{BLOCK}attn.w_msa.proj.weight",
    f"{OUR_BLOCK}norm2/scale": f"{BLOCK}norm2.weight",
    f"{OUR_BLOCK}ffn/fc1/kernel": f"{BLOCK}ffn.layers.0.0.weight",
    f"{OUR_BLOCK}ffn/fc2/bias": f"{BLOCK}ffn.layers.1.bias",
    "backbone/stages_0_downsample/norm/scale": "backbone_net.stages.0.downsample.norm.weight",
    "backbone/stages_0_downsample/reduction/kernel": (
        "backbone_net.stages.0.downsample.reduction.weight"
    ),
    "backbone/norm0/scale": "backbone_net.norm0.weight",
    "backbone/norm3/bias": "backbone_net.norm3.bias",
    # Batch normalisations of the head have no such word in the reference's names.
    "context/branch_0/norm/scale": "context_within_image_module.parallel_branches.0.1.weight",
    "bottleneck/conv/kernel": "bottleneck.0.weight",
    "bottleneck/norm/scale": "bottleneck.1.weight",
    "bottleneck/norm/bias": "bottleneck.1.bias",
    "decoder_stage1/project/norm/scale": "decoder_pr.bn1.weight",
    "decoder_stage2/classifier/bias": "decoder_cls.conv2.bias",
    "memory_module/self_attention/query_project_0/norm/scale": (
        "memory_module.self_attention.query_project.0.1.weight"
    ),
    "fpn/lateral_0/norm/scale": "lateral_convs.0.1.weight",
    "auxiliary_decoders_0/project/norm/bias": "auxiliary_decoder.1.bias",
}


def load(name):
    return importlib.import_module(f"configs.plus.{name}").get_config()


def keys_of(path):
    return tuple(jax.tree_util.DictKey(key) for key in path.split("/"))


@pytest.mark.parametrize("name", RECIPES)
def test_what_has_no_decay(name):
    multipliers = dict(load(name).optimizer.multipliers.items())
    without = [path for path, theirs in NAMES.items() if any(word in theirs for word in WORDS)]
    assert len(without) == 9
    for path in NAMES:
        expected = (1.0, 0.0 if path in without else 1.0)
        assert optimizer.multiplier(keys_of(path), multipliers) == expected, path


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
    return {path: rng.standard_normal(3) for path in NAMES}


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
    config = load("ade20k_upernet_swinlarge")
    config.optimizer.warmup_steps, total = 3, 6
    # Larger than in the recipe, so that the decay is seen in six steps.
    config.optimizer.lr = 0.1
    theirs = {path: torch.tensor(value, requires_grad=True) for path, value in tree_of(0).items()}
    groups = [
        {"params": [p], "weight_decay": 0.0 if any(w in NAMES[path] for w in WORDS) else 0.01}
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
