"""Files of ImageNet weights: what is taken, and that it computes what PyTorch computes."""

import functools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from converters import names, recognise
from converters.backbone_files import SOURCES, read_backbone
from memseg_jax.models import hrnet, resnest, resnet, swin, vit
from memseg_jax.models.segmentor import build_backbone
from tests import tiny
from tests.backbone_weights import (
    CNNS,
    NARROW,
    abstract_of,
    assert_holds,
    narrow,
    save_bare,
    save_old_format,
    save_segmentor,
    save_under_model,
    save_wrapped,
    small_vit,
    timm_dict,
    torch_dict,
    with_extras,
)
from tests.small_models import fast_jit

# ---- What is taken --------------------------------------------------------------------------


def test_every_backbone_has_a_source():
    variants = [
        *resnet.VARIANTS, *resnest.VARIANTS, *hrnet.VARIANTS, *vit.VARIANTS, *swin.VARIANTS
    ]  # fmt: skip
    assert {recognise.file_kind(name) for name in variants} == set(SOURCES)


@pytest.mark.parametrize("name", CNNS)
def test_all_tensors_are_taken_and_the_others_named(tmp_path, name):
    tensors = torch_dict(narrow(name))
    path = tmp_path / "imagenet.pth"
    torch.save({"state_dict": with_extras(tensors), "meta": {"epoch": 100}}, path)
    arrays, report = read_backbone(path, name, narrow(name))
    assert_holds(arrays, tensors, narrow(name))
    assert report.taken.keys() == tensors.keys()
    counters = [key for key, reason in report.dropped.items() if "counters" in reason]
    assert len(counters) == sum(key.endswith("running_mean") for key in tensors)
    assert set(report.dropped) - set(counters) == {"fc.weight", "fc.bias"}
    assert report.left == ("params/head/kernel",)
    assert f"imagenet.pth (SHA-256 {report.sha256[:12]}): {len(tensors)} tensors taken, " in (
        report.summary()
    )


@pytest.mark.parametrize("name", ["hrnetv2w48", "hrnetv2w48_relu"])
def test_hrnet_is_one_file_for_both_forms(tmp_path, name):
    path = tmp_path / "hrnet.pth"
    tensors = torch_dict(narrow("hrnetv2w48"))
    head = ["incre_modules.0.0.conv1.weight", "downsamp_modules.0.0.weight", "final_layer.0.bias"]
    torch.save(tensors | dict.fromkeys([*head, "classifier.weight"], torch.ones(3)), path)
    arrays, report = read_backbone(path, name, narrow("hrnetv2w48"))
    assert_holds(arrays, tensors, narrow("hrnetv2w48"))
    assert list(report.dropped) == [*head, "classifier.weight"]


@pytest.mark.parametrize(
    "save",
    [
        save_bare, save_old_format, save_under_model, save_wrapped, save_segmentor,
        functools.partial(save_segmentor, prefix="backbone."),
    ],
)  # fmt: skip
def test_layouts_make_no_difference(tmp_path, save):
    tensors = torch_dict(narrow("resnet18"))
    save(with_extras(tensors), tmp_path / "weights.pth")
    arrays, _ = read_backbone(tmp_path / "weights.pth", "resnet18", narrow("resnet18"))
    assert_holds(arrays, tensors, narrow("resnet18"))


def test_the_rest_of_a_segmentor_is_accounted_for(tmp_path):
    save_segmentor(torch_dict(narrow("resnet18")), tmp_path / "a.pth")
    _, report = read_backbone(tmp_path / "a.pth", "resnet18", narrow("resnet18"))
    reason = "outside of the backbone"
    assert report.dropped == {"bottleneck.0.weight": reason, "fc.weight": reason}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_float_types_become_float32_and_are_mentioned(tmp_path, dtype):
    tensors = {key: value.to(dtype) for key, value in torch_dict(narrow("resnet18")).items()}
    torch.save(tensors, tmp_path / "a.pth")
    arrays, report = read_backbone(tmp_path / "a.pth", "resnet18", narrow("resnet18"))
    assert_holds(arrays, {key: x.float() for key, x in tensors.items()}, narrow("resnet18"))
    assert report.changes == (f"{len(tensors)} converted from {str(dtype).split('.')[1]}",)


def test_the_arrays_outlive_the_file(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(torch_dict(narrow("resnet18")), path)
    arrays, _ = read_backbone(path, "resnet18", narrow("resnet18"))
    path.write_bytes(bytes(path.stat().st_size))
    assert_holds(arrays, torch_dict(narrow("resnet18")), narrow("resnet18"))
    assert all(array.flags.owndata and array.flags.writeable for array in arrays.values())


# ---- What is taken computes what the file's network computes ---------------------------------


def variables_of(arrays: dict) -> dict:
    """The backbone's own variables."""
    return {kind: tree["backbone"] for kind, tree in names.unflatten(arrays).items()}


def test_resnet_computes_what_pytorch_computes(tmp_path):
    tensors = torch_dict(narrow("resnet18"))
    torch.save({"state_dict": tensors}, tmp_path / "a.pth")
    arrays, _ = read_backbone(tmp_path / "a.pth", "resnet18", narrow("resnet18"))

    def unit(x, conv, norm, stride=1, dilation=1):
        kernel = tensors[f"{conv}.weight"]
        padding = dilation * (kernel.shape[-1] // 2)
        x = F.conv2d(x, kernel, None, stride, padding, dilation)
        parts = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(tensors[f"{norm}.{part}"] for part in parts), eps=1e-5)

    images = np.random.default_rng(0).standard_normal((1, 3, 48, 64)).astype(np.float32)
    x = torch.from_numpy(images)
    for index, stride in enumerate((2, 1, 1)):
        x = F.relu(unit(x, f"stem.{3 * index}", f"stem.{3 * index + 1}", stride))
    x = F.max_pool2d(x, 3, 2, 1)
    expected = []
    for layer, (stride, dilation) in enumerate(((1, 1), (2, 1), (1, 2), (1, 4)), 1):
        for block in (0, 1):
            name = f"layer{layer}.{block}"
            first = block == 0
            dilated = max(dilation // 2, 1) if first else dilation
            y = F.relu(unit(x, f"{name}.conv1", f"{name}.bn1", stride if first else 1, dilated))
            y = unit(y, f"{name}.conv2", f"{name}.bn2")
            if f"{name}.downsample.0.weight" in tensors:
                x = unit(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
            x = F.relu(x + y)
        expected.append(x)

    model = build_backbone("resnet18", NARROW["resnet18"], np.float32)
    forward = fast_jit(functools.partial(model.apply, train=False))
    maps = forward(variables_of(arrays), images.transpose(0, 2, 3, 1))
    for ours, theirs in zip(maps, expected, strict=True):
        np.testing.assert_allclose(
            np.transpose(ours, (0, 3, 1, 2)), theirs.numpy(), atol=2e-4, rtol=1e-4
        )


def test_vit_computes_what_pytorch_computes(tmp_path):
    tensors = timm_dict(64, 2, 4)
    torch.save(tensors, tmp_path / "a.pth")
    arrays, _ = read_backbone(tmp_path / "a.pth", "vitlarge", abstract_of(small_vit()))

    images = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
    patches = F.conv2d(
        torch.from_numpy(images),
        tensors["patch_embed.proj.weight"],
        tensors["patch_embed.proj.bias"],
        16,
    )
    tokens = patches.flatten(2).transpose(1, 2)
    x = torch.cat([tensors["cls_token"].expand(2, 1, 64), tokens], 1) + tensors["pos_embed"]
    expected = []
    for index in range(2):

        def linear(value, name, index=index):
            return F.linear(
                value, *(tensors[f"blocks.{index}.{name}.{part}"] for part in ("weight", "bias"))
            )

        def norm(value, name, index=index):
            parts = (tensors[f"blocks.{index}.{name}.{part}"] for part in ("weight", "bias"))
            return F.layer_norm(value, (64,), *parts, 1e-6)

        # One head of 64, as this small model has.
        query, key, value = linear(norm(x, "norm1"), "attn.qkv").split(64, -1)
        weights = (query @ key.transpose(1, 2) / 8).softmax(-1)
        x = x + linear(weights @ value, "attn.proj")
        x = x + linear(F.gelu(linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2")
        expected.append(x[:, 1:].reshape(2, 4, 4, 64).numpy())

    forward = fast_jit(functools.partial(small_vit().apply, train=False))
    maps = forward(variables_of(arrays), images.transpose(0, 2, 3, 1))
    for ours, theirs in zip(maps, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=1e-4)


# ---- ViT: names and positions ----------------------------------------------------------------


def test_vit_names_of_timm(tmp_path):
    tensors = timm_dict(64, 2, 4)
    torch.save(tensors, tmp_path / "a.pth")
    arrays, report = read_backbone(tmp_path / "a.pth", "vitlarge", abstract_of(small_vit()))
    head = {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert report.taken.keys() == tensors.keys() - head
    assert report.dropped.keys() == head
    assert report.changes == ()
    block = "params/backbone/layers_1/"
    for path, key in {
        block + "in_proj/kernel": "blocks.1.attn.qkv.weight",
        block + "in_proj/bias": "blocks.1.attn.qkv.bias",
        block + "out_proj/kernel": "blocks.1.attn.proj.weight",
        block + "ln1/scale": "blocks.1.norm1.weight",
        block + "ln2/bias": "blocks.1.norm2.bias",
        block + "ffn_0/kernel": "blocks.1.mlp.fc1.weight",
        block + "ffn_1/bias": "blocks.1.mlp.fc2.bias",
        "params/backbone/pos_embed": "pos_embed",
        "params/backbone/cls_token": "cls_token",
    }.items():
        source = tensors[key].numpy()
        expected = source.T if source.ndim == 2 else source
        np.testing.assert_array_equal(arrays[path], expected, path)


@pytest.mark.parametrize(("side", "grid"), [(24, 32), (24, 29), (24, 24), (32, 29), (5, 3)])
def test_positions_are_resized_as_pytorch_does_it(tmp_path, side, grid):
    tensors = timm_dict(64, 2, side)
    torch.save(tensors, tmp_path / "a.pth")
    arrays, report = read_backbone(tmp_path / "a.pth", "vitlarge", abstract_of(small_vit(grid)))
    table = arrays["params/backbone/pos_embed"]
    assert table.shape == (1, 1 + grid * grid, 64)
    source = tensors["pos_embed"]
    np.testing.assert_array_equal(table[:, 0], source[:, 0])
    square = source[:, 1:].reshape(1, side, side, 64).permute(0, 3, 1, 2)
    resized = F.interpolate(square.double(), (grid, grid), mode="bilinear", align_corners=False)
    expected = resized.permute(0, 2, 3, 1).reshape(1, grid * grid, 64)
    np.testing.assert_allclose(table[:, 1:], expected, atol=1e-6)
    assert report.changes == (
        () if side == grid else (f"positions resized from {side}x{side} to {grid}x{grid}",)
    )


def test_a_segmentor_with_another_grid_is_a_source_too(tmp_path):
    save_segmentor(torch_dict(abstract_of(small_vit(6))), tmp_path / "a.pth")
    arrays, report = read_backbone(tmp_path / "a.pth", "vitlarge_473", abstract_of(small_vit(5)))
    assert arrays["params/backbone/pos_embed"].shape == (1, 26, 64)
    assert "positions resized from 6x6 to 5x5" in report.summary()


# ---- Full size -------------------------------------------------------------------------------

MEASURE = r"""
import re, sys
from converters import torch_files
from converters.backbone_files import read_backbone
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.training.state import abstract_variables
from tests.small_models import small_config
torch_files.import_torch()
config = small_config()
config.model.backbone_width = 1.0
config.model.backbone = sys.argv[2]
abstract = abstract_variables(build_segmentor(config))
peak = lambda: int(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1])
before = peak()
arrays, report = read_backbone(sys.argv[1], sys.argv[2], abstract)
print(peak() - before)
print(report.summary(), file=sys.stderr)
"""
# Tensors taken. A convolution and its normalisation have five.
COUNTS = {
    "resnet50": 5 * (3 + 16 * 3 + 4),  # stem, blocks, shortcuts
    "resnet101": 5 * (3 + 33 * 3 + 4),
    "resnest101": 5 * (3 + 4) + 33 * (3 * 5 + 6 + 2),  # the two layers of the attention have biases
    "hrnetv2w48": 1525,
    "vitlarge": 4 + 24 * 12,
    "vitlarge_473": 4 + 24 * 12,
}


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from /proc")
@pytest.mark.parametrize(
    "name",
    # In CI, the file of most tensors.
    [pytest.param(x, marks=() if x == "hrnetv2w48" else pytest.mark.exhaustive) for x in COUNTS],
)
def test_the_published_sizes_and_their_memory(tmp_path, name):
    path = tmp_path / "full.pth"
    if name.startswith("vit"):
        torch.save(timm_dict(1024, 24, 24), path)
    else:
        tensors = torch_dict(abstract_of(build_backbone(name, 1.0, np.float32)))
        torch.save({"state_dict": with_extras(tensors)}, path)
        del tensors
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, path, name],
        cwd=tiny.ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"{COUNTS[name]} tensors taken" in result.stderr
    assert 1024 * int(result.stdout) < 2.1 * path.stat().st_size + 64e6
