"""A tiny segmentor for tests: every part of the real one, compiled in about a second."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs import common
from converters import names
from memseg_jax.models import hrnet, swin
from memseg_jax.models.backbone import Backbone
from memseg_jax.models.layers import ConvNorm
from memseg_jax.models.segmentor import Segmentor
from memseg_jax.training.state import abstract_variables

# Optimising the machine code takes most of the compile time and gains nothing at these sizes. Of
# what is left, the newer of XLA's two generators of fused loops takes half, and dividing a program
# among threads, which other tests keep busy, a sixth.
FAST_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


def small_config():
    """ResNet-18 with an eighth of its channels, 16 channels in the head, five classes."""
    config = common.get_config()
    config.data.class_names = ("sky", "road", "car", "tree", "person")
    config.model.backbone = "resnet18"
    config.model.backbone_width = 0.125
    config.model.feature_dim = 16
    config.model.aspp_dim = 16
    config.model.aspp_dilations = (1, 2, 3)
    config.model.memory.attention_dim = 8
    return config


def shallow_hrnet(monkeypatch):
    """Lets HRNets have one module a stage and one block a branch; the others repeat them."""
    monkeypatch.setattr(hrnet, "MODULES", dict.fromkeys(hrnet.MODULES, 1))
    monkeypatch.setattr(hrnet, "BLOCKS", 1)


def shallow_swin(monkeypatch):
    """Lets Swins have one block a stage, and a second one, shifted, in the first and the last."""
    for name, (_, heads, window) in swin.VARIANTS.items():
        monkeypatch.setitem(swin.VARIANTS, name, ((2, 1, 1, 2), heads, window))


class ThreeConvolutions(Backbone):
    """Three convolutions in place of a ResNet: what is around it is the same."""

    dtype: Any = jnp.float32
    output_stride = 8
    auxiliary_levels = (-2,)

    @nn.compact
    def __call__(self, x, *, train, valid_size=None):
        maps = []
        for features in (8, 16, 16):
            conv = ConvNorm(features, 3, stride=2, activation="relu", dtype=self.dtype)
            maps.append(x := conv(x, train=train, valid_size=valid_size))
        return maps


def random_tree(abstract: dict, seed: int) -> dict:
    """Fills a tree of shapes so that nothing is neutral: biases, statistics and memory count."""
    rng = np.random.default_rng(seed)
    filled = {}
    for path, leaf in names.flatten(abstract).items():
        kind, shape = path.rsplit("/", 1)[-1], leaf.shape
        if kind == "kernel":
            value = rng.standard_normal(shape) * (2 / np.prod(shape[:-1])) ** 0.5
        elif kind in ("scale", "var"):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = 0.3 * rng.standard_normal(shape)
        filled[path] = value.astype(np.float32)
    return names.unflatten(filled)


def random_variables(model: Segmentor, seed: int) -> dict:
    """Params, batch_stats and memory of `model`, random and of the usual size."""
    return random_tree(abstract_variables(model), seed)


def fast_jit(function, **kw):
    """`jax.jit` that compiles quickly."""
    return jax.jit(function, compiler_options=FAST_COMPILE, **kw)
