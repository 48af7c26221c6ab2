"""ImageNet weights of Swin: the official files, timm's, and what is resized or refused."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from converters import names, recognise
from converters.backbone_files import read_backbone
from converters.swin_files import resize_table
from memseg_jax.errors import UserError
from memseg_jax.models.swin import Swin
from tests.backbone_weights import abstract_of, torch_dict
from tests.converters.test_library_backbones import images_of, randomised
from tests.libraries import library
from tests.small_models import fast_jit

NORMS = {f"params/backbone/norm{i}/{leaf}" for i in range(4) for leaf in ("scale", "bias")}


def backbone(window=4):
    """Two heads of 8 channels; the last map is as large as the window, and not shifted."""
    return Swin(16, (2, 2, 2, 1), (2, 4, 8, 16), window)


@functools.cache
def network():
    """The same network by timm, with random weights, and without a classifier."""
    timm = library("timm")
    return randomised(
        timm.models.swin_transformer.SwinTransformer(
            img_size=128,
            patch_size=4,
            window_size=4,
            embed_dim=16,
            depths=(2, 2, 2, 1),
            num_heads=(2, 4, 8, 16),
            num_classes=3,
        )
    )


def by_timm():
    return dict(network().state_dict())


def official():
    """Patch merging ends a stage, the classifier has another name, and buffers are there."""
    tensors = {"layers.0.blocks.1.attn_mask": torch.zeros(64, 16, 16)}
    for name, tensor in by_timm().items():
        if ".downsample." in name:
            stage = int(name.split(".")[1])
            name = name.replace(f"layers.{stage}", f"layers.{stage - 1}")
        tensors[name.replace("head.fc", "head")] = tensor
    tensors["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16).long()
    return tensors


@pytest.mark.parametrize("tensors", [official, by_timm])
def test_the_maps_are_those_of_the_library(tmp_path, tensors):
    torch.save({"model": tensors()}, tmp_path / "swin.pth")
    arrays, report = read_backbone(tmp_path / "swin.pth", "swintiny", abstract_of(backbone()))
    assert set(report.left) == NORMS | {"params/head/kernel"}
    assert "channels of patch merging in another order" in report.changes
    head = {name for name in tensors() if name.startswith("head.")}
    buffers = {name for name in tensors() if name.endswith(("_index", "_mask"))}
    assert set(report.dropped) == head | buffers | {"norm.weight", "norm.bias"}

    params = names.unflatten(arrays)["params"]["backbone"]
    for index in range(4):
        ones = np.ones(16 * 2**index, np.float32)
        params[f"norm{index}"] = {"scale": ones, "bias": 0 * ones}
    images = images_of((2, 3, 128, 128))
    maps = fast_jit(functools.partial(backbone().apply, train=False))(
        {"params": params}, images.numpy().transpose(0, 2, 3, 1)
    )
    with torch.no_grad():
        x, expected = network().patch_embed(images), []
        for layer in network().layers:
            x = layer(x)
            expected.append(F.layer_norm(x, x.shape[-1:], eps=1e-5).numpy())
    for x, y in zip(maps, expected):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, atol=2e-4)


def reference_tensors(window=4):
    return torch_dict(abstract_of(backbone(window)))


def test_a_file_in_the_order_of_the_reference_stays_as_it_is(tmp_path):
    """That of a segmentor, which has the normalisations of the maps, too."""
    tensors = reference_tensors()
    segmentor = {f"backbone_net.{name}": tensor for name, tensor in tensors.items()}
    segmentor["backbone_net.stages.0.blocks.0.attn.w_msa.relative_position_index"] = torch.ones(2)
    torch.save(segmentor, tmp_path / "swin.pth")
    arrays, report = read_backbone(tmp_path / "swin.pth", "swintiny", abstract_of(backbone()))
    assert report.left == ("params/head/kernel",)
    assert not report.changes
    for path, array in arrays.items():
        key = names.torch_key(path).removeprefix("backbone_net.")
        np.testing.assert_array_equal(names.to_torch_layout(array), tensors[key].numpy())


def test_tables_of_other_windows_are_resized(tmp_path):
    torch.save(reference_tensors(window=4), tmp_path / "swin.pth")
    arrays, report = read_backbone(tmp_path / "swin.pth", "swintiny", abstract_of(backbone(6)))
    assert report.changes == ("7 tables of windows resized from 4x4 to 6x6",)
    key = "stages.0.blocks.1.attn.w_msa.relative_position_bias_table"
    table = arrays["params/backbone/stages_0_blocks_1/attn/relative_position_bias_table"]
    np.testing.assert_array_equal(table, resize_table(reference_tensors()[key].numpy(), 121).T)


def test_a_resized_table_keeps_its_middle_and_its_sides():
    y, _ = np.mgrid[-6:7, -6:7]
    table = np.stack([np.full(y.shape, 3.0), y, np.random.default_rng(0).random(y.shape)])
    resized = resize_table(table.reshape(3, -1).T, 23 * 23).T.reshape(3, 23, 23)
    np.testing.assert_allclose(resized[0], 3, atol=1e-5)
    np.testing.assert_allclose(resized[:, 11, 11], table[:, 6, 6], atol=1e-5)
    np.testing.assert_allclose(resized[1], -resized[1, ::-1], atol=1e-5)
    assert (np.diff(resized[1], axis=0) > 0).all()  # down stays down
    assert np.ptp(resized[1], axis=1).max() < 1e-5


def test_another_network_is_named(tmp_path):
    torch.save(official(), tmp_path / "swin.pth")
    abstract = abstract_of(Swin(32, (2, 2, 2, 1), (2, 4, 8, 16), 4))
    with pytest.raises(UserError, match=r"of another shape:") as caught:
        read_backbone(tmp_path / "swin.pth", "swinlarge", abstract)
    assert "swin_large_patch4_window12_384_22k.pth" in str(caught.value)


@pytest.mark.parametrize("form", ["stages.", "layers."])
@pytest.mark.parametrize(
    ("channels", "blocks", "expected"),
    [
        (96, 6, "swintiny"),
        (96, 18, "swinsmall"),
        (128, 18, "swinbase"),
        (192, 18, "swinlarge"),
        (64, 6, None),
    ],
)
def test_networks_are_told_apart_by_depth_and_width(form, channels, blocks, expected):
    tensors = {f"{form}2.blocks.{index}.norm1.bias": np.zeros(1) for index in range(blocks)}
    tensors[f"{form}0.blocks.0.norm1.bias"] = np.zeros(channels)
    assert recognise.backbone_of(tensors) == expected


def test_a_cut_file_is_refused(tmp_path):
    tensors = official()
    del tensors["layers.1.downsample.norm.weight"]
    torch.save(tensors, tmp_path / "swin.pth")
    with pytest.raises(
        UserError, match=r"1 missing in the file:\n    layers\.1\.downsample\.norm\.weight"
    ):
        read_backbone(tmp_path / "swin.pth", "swintiny", abstract_of(backbone()))
