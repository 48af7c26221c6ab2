"""The PyTorch models: their state dicts, their numbers, and that they are the models of ours."""

import functools
import importlib
import pathlib

import jax
import numpy as np
import pytest
import torch

from converters import names
from converters.orbax_to_torch import state_dict
from converters.taps import taps_of as our_taps_of
from converters.torch_model import build_torch_model, taps_of
from converters.torch_model.body import DOWNSAMPLE_CALLS
from memseg_jax.errors import UserError
from memseg_jax.models import hrnet, resnest, resnet, vit
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.training.state import abstract_variables
from tests.goldens import (
    assert_forward,
    golden_files,
    load,
    manifest,
    manifest_entry,
    manifest_models,
    pixels,
    rule_array,
    rule_image,
)
from tests.reference_models import reference_config
from tests.small_models import random_variables, small_config

BACKBONES = [*resnet.VARIANTS, *resnest.VARIANTS, *hrnet.VARIANTS, *vit.VARIANTS]


def changed(**fields):
    """The small config with some of its model's fields changed; "memory_x" is memory.x."""
    config = small_config()
    for name, value in fields.items():
        node = config.model.memory if name.startswith("memory_") else config.model
        node[name.removeprefix("memory_")] = value
    return config


SMALL = {
    "plain": changed(),
    "slots, hard": changed(memory_slots=2, memory_hard=True),
    "no context": changed(memory_within_image_context=False, activation="leaky_relu"),
    "widths": changed(feature_dim=24, aspp_dim=8, aspp_dilations=(1, 3), auxiliary=False),
    "downsample": changed(downsample=2, auxiliary=False),
    "pyramid pooling": changed(context="pyramid_pooling"),
    "nothing but the memory": changed(context="none"),
    "swintiny": changed(backbone="swintiny"),
    **{name: changed(backbone=name) for name in BACKBONES},
    "hrnet, downsample": changed(backbone="hrnetv2w48", downsample=2),
}


def listed(model):
    """[(key, shape, dtype)] of a state dict, as in the manifests."""
    return [
        (key, tuple(value.shape), str(value.dtype).removeprefix("torch."))
        for key, value in model.state_dict().items()
    ]


def built_without_memory(config):
    with torch.device("meta"):
        return build_torch_model(config)


@pytest.mark.golden
@pytest.mark.parametrize("name", manifest_models())
def test_the_state_dict_is_that_of_the_reference(name):
    model = built_without_memory(reference_config(name))
    assert listed(model) == manifest(name)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == manifest_entry(name)["trainable"]


@pytest.mark.golden
@pytest.mark.parametrize("name", [name for name in manifest_models() if "_2021" not in name])
def test_the_config_of_a_published_row_has_the_tensors_of_2021(name):
    backbone, dataset = name.split("_")
    short = {"hrnetv2w48": "hrnet", "vitlarge": "vit"}.get(backbone, backbone.removesuffix("os8"))
    config = importlib.import_module(f"configs.{dataset}_{short}").get_config()
    rows = manifest(f"{name}_2021")
    assert sorted(listed(built_without_memory(config))) == sorted(rows)


@pytest.mark.golden
def test_in_2021_the_shortcut_was_the_last_part_of_a_block():
    keys = [key for key, *_ in manifest("resnet50os8_lip_2021") if ".layer2." in key]
    first = [key.split(".")[3] for key in keys if ".layer2.0." in key]
    order = ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "downsample"]
    assert list(dict.fromkeys(first)) == order
    assert keys.index("backbone_net.layer2.1.conv1.weight") == len(first)


@pytest.mark.parametrize("name", SMALL)
def test_every_tensor_of_ours_has_its_counterpart(name):
    config = SMALL[name]
    ours = names.flatten(abstract_variables(build_segmentor(config)))
    shapes = {names.torch_key(path): names.torch_shape(leaf.shape) for path, leaf in ours.items()}
    shapes |= {key: index.shape for key, index in names.index_buffers(shapes).items()}
    theirs = {key: shape for key, shape, _ in listed(built_without_memory(config))}
    counters = {key for key in theirs if key.endswith("num_batches_tracked")}
    assert counters == set(names.counter_keys(shapes))
    assert {key: theirs[key] for key in theirs.keys() - counters} == shapes


def ours_in_double(config):
    """Our model of a config in double precision, its variables, and images for it."""
    ours = build_segmentor(config)
    variables = jax.tree.map(np.float64, random_variables(ours, 0))
    ours = ours.clone(dtype=np.float64, backbone=ours.backbone.clone(dtype=np.float64))
    return ours, variables, np.random.default_rng(1).standard_normal((2, 3, 41, 57))


@pytest.mark.parametrize(
    "name",
    [
        "slots, hard",
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ("plain", "no context", "widths", "downsample", "resnet18_v1b")
        ),
    ],
)
def test_outputs_equal_those_of_our_model(name, double_precision):
    config = SMALL[name]
    ours, variables, images = ours_in_double(config)
    expected = our_taps_of(ours, variables, images)

    model = build_torch_model(config).double()
    model.load_state_dict(state_dict(variables, config))
    taps = taps_of(model, torch.from_numpy(images))
    assert set(taps) == set(expected)
    for tap, value in taps.items():
        limit = 1e-6 * expected[tap].std()  # `our_taps_of` rounds what it returns to float32
        np.testing.assert_allclose(value, expected[tap], rtol=0, atol=limit, err_msg=tap)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(images))
    assert torch.equal(logits, taps["stage2_logits"])


def test_recording_leaves_no_trace():
    model = build_torch_model(SMALL["plain"]).train()
    images = torch.randn(1, 3, 32, 32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, second = taps_of(model, images), taps_of(model, images)
    assert model.training
    assert model.decoder_stage1.training
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_downsampling_moves_its_statistics_four_times_in_a_step():
    model = build_torch_model(SMALL["hrnet, downsample"]).train()
    images = torch.randn(2, 3, 64, 64)
    outputs = model.forward_train(images)
    norm = model.downsample_backbone[1]
    assert int(norm.num_batches_tracked) == DOWNSAMPLE_CALLS
    assert int(model.bottleneck[1].num_batches_tracked) == 1
    assert outputs["auxiliary"] == []
    # What is left of the initial variance 1 after four updates is 0.9 to the fourth.
    with torch.no_grad():
        (features,) = model.backbone_net(images)
        batch = model.downsample_backbone[0](features).var(dim=(0, 2, 3))
    torch.testing.assert_close(norm.running_var, 0.9**4 + (1 - 0.9**4) * batch)


def test_the_memory_is_a_parameter_without_gradient():
    model = build_torch_model(SMALL["plain"])
    memory = dict(model.named_parameters())["memory_module.memory"]
    assert memory.shape == (5, 1, 16)
    assert not memory.requires_grad
    assert not memory.any()


PLAIN = {
    "deeplabv3": changed(memory_enabled=False),
    "pspnet": changed(memory_enabled=False, context="pyramid_pooling", auxiliary=False),
    "fcn": changed(memory_enabled=False, context="none", downsample=2, auxiliary=False),
    "upernet": changed(
        memory_enabled=False, context="pyramid_pooling", fpn=True, fpn_dim=8, backbone="swintiny"
    ),
    "vit": changed(memory_enabled=False, backbone="vitbase"),
}


@pytest.mark.parametrize(
    "name",
    ["deeplabv3", *(pytest.param(x, marks=pytest.mark.slow) for x in PLAIN if x != "deeplabv3")],
)
def test_the_baselines_compute_the_same(name, double_precision):
    config = PLAIN[name]
    ours, variables, images = ours_in_double(config)
    expected = our_taps_of(ours, variables, images)["stage2_logits"]
    model = build_torch_model(config).double().eval()
    model.load_state_dict(state_dict(variables, config))
    with torch.no_grad():
        found = model(torch.from_numpy(images))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * expected.std())


def test_the_reference_has_no_residual_memory():
    with pytest.raises(UserError, match=r"model\.memory\.fusion is 'residual'"):
        build_torch_model(changed(memory_fusion="residual"))


def test_an_unknown_backbone_is_refused():
    with pytest.raises(UserError, match="resnet51"):
        build_torch_model(changed(backbone="resnet51"))


@functools.lru_cache(maxsize=1)
def reference_model(name):
    model = built_without_memory(reference_config(name))
    weights = {
        key: torch.from_numpy(rule_array(key, value.shape))
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(weights, assign=True)
    return model


def forward_cases():
    """Quick is that with the smallest images of every ResNet; the others have more weights.

    In CI, every backbone at an odd size; a ViT at its smallest.
    """
    seen = {"vitlarge", "hrnetv2w48", "resnest101os8"}
    names = sorted(golden_files("forward"), key=pixels)
    odd = {"vitlarge": next(name for name in names if "/vitlarge" in name)}
    odd |= {pathlib.Path(x).stem.split("_")[0]: x for x in names if "97x129" in x}
    for name in names:
        backbone = pathlib.Path(name).stem.split("_")[0]
        marks = [pytest.mark.slow] if backbone in seen else []
        marks += [pytest.mark.exhaustive] * (backbone in seen and name != odd.get(backbone))
        yield pytest.param(name, marks=marks, id=name)
        seen.add(backbone)


@pytest.mark.golden
@pytest.mark.parametrize("name", sorted(forward_cases(), key=lambda case: case.id))
def test_forward_equals_the_reference(name):
    case = pathlib.Path(name).stem
    model_name, size = case.split("__")
    golden = load(name)
    images = rule_image(f"image:{case}", tuple(int(n) for n in size.split("x")))
    np.testing.assert_array_equal(images.reshape(-1)[:8], golden["image_check"])
    taps = taps_of(reference_model(model_name), torch.from_numpy(images))
    assert_forward(golden, {tap: value.numpy() for tap, value in taps.items()})
