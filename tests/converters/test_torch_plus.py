"""The PyTorch model of MCIBI++: its state dict, its numbers, its training steps."""

import functools
import pathlib
import re

import numpy as np
import pytest
import torch

from converters import names
from converters.torch_model import taps_of
from converters.torch_model.statistics_memory import draw_rows, update_statistics
from converters.torch_model.training import build_optimizer, train_step
from memseg_jax.data import IGNORE_LABEL
from tests.goldens import assert_slices, pixels, stored_taps, take_slice
from tests.goldens_plus import (
    assert_forward,
    golden_files,
    load,
    manifest,
    manifest_models,
    rule_image,
    rule_train_image,
    rule_train_label,
)
from tests.reference_models_plus import reference_config
from tests.torch_models_plus import rule_model, torch_model

UPDATES = [name for name in golden_files("memory") if "features_0" in load(name)]
SHAPES = {"upernet_swinreduced_ade20k": (2, 3, 96, 128), "ppm_resnet50os8_lip": (4, 3, 64, 96)}
OUR_NAMES = {
    "loss_cls": "loss_stage2",
    "loss_cwi": "loss_context",
    "loss_pr": "loss_stage1",
    "loss_aux": "loss_aux",
    "loss_total": "loss",
    "returned": "loss",
}


@pytest.mark.golden
@pytest.mark.parametrize("tag", manifest_models())
def test_the_state_dict_is_that_of_the_reference(tag):
    listed = [
        (key, tuple(value.shape), str(value.dtype).removeprefix("torch."))
        for key, value in torch_model(tag).state_dict().items()
    ]
    assert listed == manifest(tag)


@functools.lru_cache(maxsize=1)
def cached_model(tag):
    return rule_model(tag)


def forward_cases():
    """Quick is that with the smallest images of the smallest model.

    In CI, all at their odd size.
    """
    cases = sorted(golden_files("forward"), key=lambda name: (pixels(name[5:]), len(name)))
    smallest = next(name for name in cases if "/resnet50" in name)
    largest = {name.split("__")[0]: name for name in cases}.values()
    for name in golden_files("forward"):
        marks = [] if name == smallest else [pytest.mark.slow]
        marks += [pytest.mark.exhaustive] * (name != smallest and name not in largest)
        yield pytest.param(name, marks=marks, id=name)


@pytest.mark.golden
@pytest.mark.parametrize("name", list(forward_cases()))
def test_forward_equals_the_reference(name):
    case = pathlib.Path(name).stem
    tag, size = case.split("__")
    golden = load(name)
    images = rule_image(f"image:{case}", tuple(int(n) for n in size.split("x")))
    np.testing.assert_array_equal(images.reshape(-1)[:8], golden["image_check"])
    taps = taps_of(cached_model(tag), torch.from_numpy(images))
    wanted = stored_taps(golden)
    assert wanted <= taps.keys()
    # Backbones have further taps, which are compared in the first set.
    assert all(re.match("stem|maxpool|layer|stage", tap) for tap in taps.keys() - wanted)
    assert_forward(golden, {name: taps[name].numpy() for name in wanted})


@pytest.mark.golden
@pytest.mark.parametrize("name", [n for n in golden_files("memory") if "/rows" in n])
def test_rows_are_those_of_the_reference(name):
    golden = load(name)
    rows = draw_rows(torch.from_numpy(golden["memory"]), golden["rows"].shape[1])
    np.testing.assert_array_equal(rows.numpy(), golden["rows"])


@pytest.mark.golden
@pytest.mark.parametrize("name", UPDATES)
def test_updates_equal_the_reference(name):
    golden = load(name)
    memory = torch.from_numpy(golden["memory_0"].copy())
    momentum = 0.1
    if golden.get("adjust_by_learning_rate", False):
        momentum *= float(golden["learning_rate"]) / float(golden["base_lr"])
    steps = sum(key.startswith("features_") for key in golden)
    for index in range(steps):
        features = torch.from_numpy(golden[f"features_{index}"])
        labels = torch.from_numpy(golden[f"labels_{index}"].astype(np.int64))
        update_statistics(memory, features, labels, momentum)
        np.testing.assert_allclose(memory.numpy(), golden[f"memory_{index + 1}"], atol=1e-6)


@pytest.mark.golden
def test_two_processes_update_copies():
    golden = load("plus/memory/two_ranks.npz")
    local = []
    for rank in range(2):
        memory = torch.from_numpy(golden["memory_0"].copy())
        features = torch.from_numpy(golden[f"features_rank{rank}"])
        labels = torch.from_numpy(golden[f"labels_rank{rank}"].astype(np.int64))
        update_statistics(memory, features, labels, 0.1)
        np.testing.assert_allclose(memory.numpy(), golden[f"memory_rank{rank}_local"], atol=1e-6)
        local.append(memory)
    np.testing.assert_allclose((sum(local) / 2).numpy(), golden["memory_1"], atol=1e-6)


def assert_norms(golden, name, key_names, arrays, limit):
    for key, expected in zip(golden[key_names], golden[name]):
        found = np.linalg.norm(arrays[str(key)])
        assert abs(found - expected) <= limit * max(expected, 1e-8), f"{name} {key}"


# In CI, of the others the forward pass: gradients are PyTorch's own. A Swin has an optimiser and
# multipliers of its own.
STEPS = [
    pytest.param(
        name,
        marks=[] if "swin" in name or "/resnet50" in name else pytest.mark.exhaustive,
        id=name,
    )
    for name in golden_files("train")
]


@pytest.mark.golden
@pytest.mark.slow
@pytest.mark.large  # a whole network in double precision
@pytest.mark.parametrize("name", STEPS)
def test_two_steps_equal_the_reference(name):
    tag = pathlib.Path(name).stem
    golden = load(name)
    config = reference_config(tag)
    config.model.dropout = config.model.drop_path = 0.0
    model = rule_model(tag, config).double()
    optimizer = build_optimizer(model, config)
    shape = SHAPES.get(tag, (2, 3, 64, 96))
    classes = len(config.data.class_names)
    np.testing.assert_allclose(model.memory_module.memory, golden["memory_before"], atol=1e-9)
    for index in range(2):
        images = torch.from_numpy(rule_train_image(tag, index, shape)).double()
        size = (shape[0], *shape[2:])
        labels = torch.from_numpy(rule_train_label(tag, index, size, classes, IGNORE_LABEL))
        losses = train_step(model, optimizer, images, labels, index, config, 10)
        number, first = index + 1, index == 0
        rate = optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx(golden["learning_rate"][index], rel=1e-12)
        for loss_name, expected in zip(golden["loss_names"], golden["losses"][index]):
            found = float(losses[OUR_NAMES[str(loss_name)]])
            assert found == pytest.approx(expected, rel=1e-9 if first else 1e-7), loss_name
        state = {key: value.numpy() for key, value in model.state_dict().items()}
        if first:
            named = model.named_parameters()
            gradients = {key: p.grad.numpy() for key, p in named if p.grad is not None}
            assert_norms(golden, "grad_norm_step1", "param_names", gradients, 1e-7)
            assert_slices(golden, "grad_slice", gradients, 1e-6)
        limit = 1e-8 if first else 1e-5
        assert_norms(golden, f"param_norm_step{number}", "param_names", state, limit)
        assert_slices(golden, f"param_slice_step{number}", state, 10 * limit)
        assert_norms(golden, f"buffer_norm_step{number}", "buffer_names", state, limit)
        assert_slices(golden, f"buffer_slice_step{number}", state, limit)
        memory = state[names.MEMORY_KEY]
        np.testing.assert_allclose(memory, golden[f"memory_after_step{number}"], atol=limit)
    images = torch.from_numpy(rule_train_image(tag, 0, shape)).double()
    with torch.no_grad():
        logits = model.eval()(images).numpy()
    limit = 1e-4 * golden["eval_logits__stats"][1]
    np.testing.assert_allclose(
        take_slice(logits, 512), golden["eval_logits__slice"], rtol=0, atol=limit
    )
