"""Weights that people have: files as torchvision, timm and Hugging Face's transformers write them.

With the same random weights, our backbone computes what the library's own network computes.
"""

import functools

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from converters import names
from converters.backbone_files import read_backbone
from memseg_jax.errors import UserError
from memseg_jax.models import vit
from memseg_jax.models.segmentor import build_backbone
from tests.backbone_weights import abstract_of
from tests.libraries import library
from tests.small_models import fast_jit

IMAGE = (1, 3, 64, 48)


def randomised(network: torch.nn.Module) -> torch.nn.Module:
    """Gives every tensor random values of the usual size: nothing is neutral, nothing grows."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if name.endswith(("running_var", "bn1.weight", "bn2.weight", "downsample.1.weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("bn3.weight"):  # the sum of many blocks stays of one size
            tensor.uniform_(0.1, 0.3, generator=generator)
        elif tensor.ndim > 1 and not name.endswith(("cls_token", "pos_embed")):
            scale = (2 / tensor[0].numel()) ** 0.5
            tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
        elif tensor.is_floating_point():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return network.eval()


def save(tensors: dict[str, torch.Tensor], path) -> None:
    """Writes a file in the form that its suffix says."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)


def images_of(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_normal(shape).astype(np.float32))


def our_maps(backbone, name: str, path, images: torch.Tensor) -> list[np.ndarray]:
    """The maps [batch, channels, height, width] of our backbone with the weights of a file."""
    arrays, _ = read_backbone(path, name, abstract_of(backbone))
    variables = {kind: tree["backbone"] for kind, tree in names.unflatten(arrays).items()}
    forward = fast_jit(functools.partial(backbone.apply, train=False))
    maps = forward(variables, images.numpy().transpose(0, 2, 3, 1))
    return [np.transpose(x, (0, 3, 1, 2)) for x in maps]


def assert_equal_maps(ours, theirs) -> None:
    """As close as float32 comes: 1e-5 of a map's standard deviation at the median position."""
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs):
        b = b.detach().numpy()
        assert a.shape == b.shape
        assert np.abs(a - b).max() < 1e-3 * b.std()
        assert np.median(np.abs(a - b)) < 1e-5 * b.std()


# ---- ResNet -------------------------------------------------------------------------------------

DEPTHS = [
    "resnet18",
    pytest.param("resnet50", marks=[pytest.mark.slow, pytest.mark.exhaustive]),
    pytest.param("resnet101", marks=pytest.mark.slow),
]


def stages_of(network, x: torch.Tensor) -> list[torch.Tensor]:
    """The results of the four stages of torchvision's ResNet."""
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    maps = []
    for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
        maps.append(x := layer(x))
    return maps


@torch.no_grad()
@pytest.mark.parametrize("depth", DEPTHS)
def test_resnet_of_torchvision(tmp_path, depth):
    make = getattr(library("torchvision").models, depth)
    network = randomised(make())
    save(network.state_dict(), tmp_path / "a.pth")
    images = images_of(IMAGE)
    name = f"{depth}_v1b"
    ours = our_maps(build_backbone(name, 1.0, np.float32), name, tmp_path / "a.pth", images)
    # The dilated network computes at every position what the one with strides, for which the
    # weights are made, computes at every second and fourth position.
    assert_equal_maps(
        [ours[0], ours[1], ours[2][:, :, ::2, ::2], ours[3][:, :, ::4, ::4]],
        stages_of(network, images),
    )
    if depth != "resnet18":  # which torchvision cannot dilate
        dilated = make(replace_stride_with_dilation=(False, True, True)).eval()
        dilated.load_state_dict(network.state_dict())
        assert_equal_maps(ours, stages_of(dilated, images))


@torch.no_grad()
@pytest.mark.parametrize("depth", DEPTHS)
def test_resnet_of_timm(tmp_path, depth):
    network = randomised(library("timm").create_model(depth, output_stride=8))
    path = tmp_path / "model.safetensors"
    save(network.state_dict(), path)
    images, name = images_of(IMAGE), f"{depth}_v1b"
    theirs = network.forward_intermediates(images, indices=[1, 2, 3, 4], intermediates_only=True)
    backbone = build_backbone(name, 1.0, np.float32)
    assert_equal_maps(our_maps(backbone, name, path, images), theirs)


@pytest.mark.parametrize("depth", ["resnet18", "resnet50", "resnet101"])
@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_names_and_shapes_of_a_resnet(source, depth):
    with torch.device("meta"):
        package = library(source)
        network = getattr(package.models, depth)() if source == "torchvision" else (
            package.create_model(depth)
        )  # fmt: skip
    theirs = {
        name: tuple(tensor.shape)
        for name, tensor in network.state_dict().items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    backbone = abstract_of(build_backbone(f"{depth}_v1b", 1.0, np.float32))
    assert theirs == {
        names.torch_key(path).removeprefix("backbone_net."): names.torch_shape(leaf.shape)
        for path, leaf in names.flatten(backbone).items()
        if "/backbone/" in path
    }


# ---- ViT ----------------------------------------------------------------------------------------


@functools.cache
def small_timm_vit():
    """Four blocks of two heads, made for images of 64x64."""
    return randomised(
        library("timm").create_model(
            "vit_base_patch16_224", img_size=64, embed_dim=128, depth=4, num_heads=2
        )
    )


def small_vit(grid: int = 4):
    return vit.ViT(grid, width=1.0, outputs=(0, 1, 2, 3), channels=128)


def hugging_face_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's tensors as `ViTForImageClassification` of transformers has them in its files."""
    plain = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "head": "classifier",
    }
    of_block = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    renamed = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if not name.startswith("blocks."):
            renamed[f"{plain[module]}.{kind}" if module else plain[name]] = tensor
            continue
        _, index, inner = module.split(".", 2)
        block = f"vit.encoder.layer.{index}."
        if inner == "attn.qkv":
            for part, value in zip(("query", "key", "value"), tensor.chunk(3)):
                renamed[f"{block}attention.attention.{part}.{kind}"] = value
        else:
            renamed[f"{block}{of_block[inner]}.{kind}"] = tensor
    return renamed


def names_in_memory(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same as transformers has them in memory since version 5."""
    renamed = {}
    for name, tensor in hugging_face_names(tensors).items():
        for earlier, later in (
            ("encoder.layer.", "layers."),
            ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"),
            ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("intermediate.dense", "mlp.fc1"),
            (".output.dense", ".mlp.fc2"),
        ):
            name = name.replace(earlier, later)
        renamed[name] = tensor
    return renamed


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "spelt",
    [dict, hugging_face_names, names_in_memory],
    ids=["timm", "hugging_face", "hugging_face_5"],
)
def test_vit_of_timm_and_its_weights_by_hugging_faces_names(tmp_path, spelt, suffix):
    network, images = small_timm_vit(), images_of((2, 3, 64, 64))
    path = (tmp_path / "model").with_suffix(suffix)
    save(spelt(network.state_dict()), path)
    theirs = network.forward_intermediates(images, intermediates_only=True)
    assert_equal_maps(our_maps(small_vit(), "vitbase", path, images), theirs)


def test_hugging_faces_file_is_accounted_for(tmp_path):
    tensors = hugging_face_names(small_timm_vit().state_dict())
    extra = {"vit.pooler.dense.weight": torch.zeros(128, 128)}
    save(tensors | extra, tmp_path / "a.pth")
    _, report = read_backbone(tmp_path / "a.pth", "vitbase", abstract_of(small_vit(6)))
    assert report.dropped.keys() == {
        "classifier.weight", "classifier.bias", "layernorm.weight", "layernorm.bias",
        "pooler.dense.weight",
    }  # fmt: skip
    assert len(report.taken) == 4 + 4 * 12
    assert report.changes == (
        "8 triples of queries, keys and values joined",
        "positions resized from 4x4 to 6x6",
    )


def test_a_missing_part_of_hugging_faces_attention_is_named(tmp_path):
    tensors = hugging_face_names(small_timm_vit().state_dict())
    del tensors["vit.encoder.layer.2.attention.attention.key.weight"]
    save(tensors, tmp_path / "a.pth")
    with pytest.raises(UserError) as raised:
        read_backbone(tmp_path / "a.pth", "vitbase", abstract_of(small_vit()))
    message = str(raised.value)
    block = "encoder.layer.2.attention.attention."
    assert f"1 missing in the file:\n    {block}{{query,key,value}}.weight [384, 128]" in message
    assert f"2 not in the model:\n    {block}query.weight [128, 128]" in message
    assert "jx_vit_base_p16_384" in message


@pytest.mark.parametrize(
    ("model", "name"), [("vit_base_patch16_384", "vitbase"), ("vit_large_patch16_384", "vitlarge")]
)
@pytest.mark.parametrize("spelt", [dict, hugging_face_names], ids=["timm", "hugging_face"])
def test_vits_of_full_size_fit(tmp_path, model, name, spelt, monkeypatch):
    """Names and shapes: the values are zeros that take no room on disk."""
    with torch.device("meta"):
        network = library("timm").create_model(model)
    zero = torch.zeros(())
    tensors = {key: zero.expand(tensor.shape) for key, tensor in network.state_dict().items()}
    save(spelt(tensors), tmp_path / "a.pth")
    monkeypatch.setattr("converters.backbone_files._checked", lambda file, name, tensor: tensor)
    backbone = build_backbone(name, 1.0, np.float32)
    arrays, report = read_backbone(tmp_path / "a.pth", name, abstract_of(backbone))
    assert len(arrays) == len(jax.tree.leaves(abstract_of(backbone))) - 1  # without the head
    assert "positions resized from 24x24 to 32x32" in report.changes
