"""Small backbones, and PyTorch files of weights for them, for tests."""

import functools

import flax.linen as nn
import jax
import numpy as np
import torch

from converters import names
from memseg_jax.models import vit
from memseg_jax.models.segmentor import build_backbone
from tests.goldens import rule_array

NARROW = {
    "resnet18": 1 / 16,
    "resnet50": 1 / 16,
    "resnet50_v1b": 1 / 16,
    "resnest101": 1 / 16,
    "hrnetv2w48": 1 / 24,
}
CNNS = tuple(NARROW)


@functools.cache
def abstract_of(backbone: nn.Module) -> dict:
    """Shapes of a backbone's variables, and of one other layer."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    tree = jax.eval_shape(lambda x: backbone.init(jax.random.key(0), x, train=False), images)
    other = {"head": {"kernel": jax.ShapeDtypeStruct((1, 1, 4, 5), np.float32)}}
    variables = {kind: {"backbone": leaves} for kind, leaves in tree.items() if kind != "taps"}
    variables["params"] |= other
    return variables


def narrow(name: str) -> dict:
    """Shapes of a backbone with few channels."""
    return abstract_of(build_backbone(name, NARROW[name], np.float32))


def small_vit(grid: int = 4) -> vit.ViT:
    """Two blocks of 64 channels."""
    return vit.ViT(grid, width=1 / 16, outputs=(0, 1))


def torch_dict(abstract: dict) -> dict[str, torch.Tensor]:
    """The backbone's tensors by the rule, under the reference's names."""
    made = {}
    for path, leaf in names.flatten(abstract).items():
        if "/backbone/" in path:
            key = names.torch_key(path)
            value = torch.from_numpy(rule_array(key, names.torch_shape(leaf.shape)))
            made[key.removeprefix("backbone_net.")] = value
    return made


def timm_dict(channels: int, blocks: int, side: int) -> dict[str, torch.Tensor]:
    """A ViT's tensors under the names of timm."""
    shapes = {
        "cls_token": (1, 1, channels),
        "pos_embed": (1, 1 + side * side, channels),
        "patch_embed.proj.weight": (channels, 3, 16, 16),
        "patch_embed.proj.bias": (channels,),
    }
    for index in range(blocks):
        linear = {
            "attn.qkv": (3 * channels, channels),
            "attn.proj": (channels, channels),
            "mlp.fc1": (4 * channels, channels),
            "mlp.fc2": (channels, 4 * channels),
        }
        for name in ("norm1", "norm2"):
            shapes[f"blocks.{index}.{name}.weight"] = (channels,)
            shapes[f"blocks.{index}.{name}.bias"] = (channels,)
        for name, shape in linear.items():
            shapes[f"blocks.{index}.{name}.weight"] = shape
            shapes[f"blocks.{index}.{name}.bias"] = shape[:1]
    shapes |= {"norm.weight": (channels,), "norm.bias": (channels,)}
    shapes |= {"head.weight": (1000, channels), "head.bias": (1000,)}
    return {key: torch.from_numpy(rule_array(key, shape)) for key, shape in shapes.items()}


def with_extras(tensors: dict) -> dict:
    """Adds what a classification network of PyTorch has besides."""
    means = [key for key in tensors if key.endswith("running_mean")]
    counters = {
        key.replace("running_mean", "num_batches_tracked"): torch.tensor(7) for key in means
    }
    head = {"fc.weight": torch.zeros(1000, 8), "fc.bias": torch.zeros(1000)}
    return tensors | counters | head


def assert_holds(arrays: dict, tensors: dict, abstract: dict) -> None:
    """Every array is the file's tensor in our layout; nothing of the backbone is missing."""
    ours = {p: leaf for p, leaf in names.flatten(abstract).items() if "/backbone/" in p}
    assert arrays.keys() == ours.keys()
    for path, array in arrays.items():
        source = tensors[names.torch_key(path).removeprefix("backbone_net.")].numpy()
        if source.ndim == 4:
            source = np.moveaxis(source, (0, 1), (3, 2))
        if source.ndim == 2:
            source = source.T
        assert array.shape == ours[path].shape
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, source, path)


def save_bare(tensors, path):
    torch.save(tensors, path)


def save_old_format(tensors, path):
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def save_under_model(tensors, path):
    torch.save({"model": tensors, "epoch": 3}, path)


def save_wrapped(tensors, path):
    torch.save({"state_dict": {f"module.{key}": value for key, value in tensors.items()}}, path)


def save_segmentor(tensors, path, prefix="backbone_net."):
    other = {"bottleneck.0.weight": torch.zeros(2, 2, 3, 3), "fc.weight": torch.zeros(3)}
    torch.save({"model": other | {prefix + key: value for key, value in tensors.items()}}, path)
