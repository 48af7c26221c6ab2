"""Every config file describes a model; those of published models have the published recipe."""

import functools
import importlib
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from memseg_jax import command_line
from memseg_jax.data import transforms
from memseg_jax.data.pipeline import steps_per_epoch
from memseg_jax.errors import UserError
from memseg_jax.inference import check_evaluation
from memseg_jax.models import vit
from memseg_jax.models.layers import activation
from memseg_jax.models.memory_update import memory_momentum
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.training import optimizer
from memseg_jax.training.state import abstract_variables

CONFIGS = Path(__file__).parents[1] / "configs"
BASES = ("__init__", "common", "own_folder")  # not configs by themselves
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem not in BASES)
# What config files call the backbones of the published rows.
BACKBONES = {
    "resnet50os8": "resnet50",
    "resnet101os8": "resnet101",
    "resnest101os8": "resnest101",
    "hrnetv2w48": "hrnet",
    "vitlarge": "vit",
}
# Trainable scalars of the PyTorch reference's models.
PARAMETERS = {
    "ade20k_resnet50": 91_410_722,
    "ade20k_resnet101": 110_402_850,
    "ade20k_resnest101": 114_109_474,
    "ade20k_hrnet": 102_574_444,
    "ade20k_vit": 368_790_254,
    "cityscapes_resnet50": 91_209_113,
    "cityscapes_resnet101": 110_201_241,
    "cityscapes_resnest101": 113_907_865,
    "cityscapes_hrnet": 107_107_078,
    "cocostuff10k_resnet50": 91_459_970,
    "cocostuff10k_resnet101": 110_452_098,
    "cocostuff10k_resnest101": 114_158_722,
    "cocostuff10k_hrnet": 102_607_276,
    "cocostuff10k_vit": 368_684_942,
    "cocostuff10k_vit:2025": 368_872_334,
    "lip_resnet50": 91_210_652,
    "lip_resnet101": 110_202_780,
    "lip_resnest101": 113_909_404,
    "lip_hrnet": 107_108_104,
}
WITH_FORMS = ("ade20k_hrnet", "cocostuff10k_hrnet", "cocostuff10k_vit", "lip_hrnet")


def load(name):
    """The config of "ade20k_hrnet" or "ade20k_hrnet:2025"."""
    module, _, argument = name.partition(":")
    get_config = importlib.import_module(f"configs.{module}").get_config
    return get_config(argument) if argument else get_config()


@functools.cache
def published():
    """Row -> fact -> value; what all rows or all rows of a data set share is stored once."""
    path = Path(__file__).parent / "facts" / "published_recipes.json"
    facts = json.loads(path.read_text())
    return {
        row: facts["all"] | facts["data_sets"][row.split("_")[0]] | of_row
        for row, of_row in facts["rows"].items()
    }


def config_name(row):
    data_set, backbone = row.split("_")
    return f"{data_set}_{BACKBONES[backbone]}"


@pytest.mark.parametrize("name", NAMES)
def test_config_describes_a_model(name):
    config = load(name)
    model = build_segmentor(config)
    check_evaluation(config.eval, model)
    optimizer.from_config(config, optimizer.schedule_from_config(config, 10))
    assert config.train.batch_size % config.replica_groups == 0
    assert len(config.data.palette) in (0, len(config.data.class_names))
    assert len(config.augment.crop) == 2
    # A larger share than 1 of a memory row cannot be replaced.
    lr, memory = config.optimizer.lr, config.model.memory
    assert 0.9 <= np.float32(memory_momentum(lr, memory.momentum, memory.base_lr)) <= 1


# ---- The published rows -------------------------------------------------------------------------

# The reference's names of splits in ours. The labels of the test split of Cityscapes are not
# public: its config scores the validation split instead.
SPLITS = {
    ("ade20k", "train"): "training",
    ("ade20k", "val"): "validation",
    ("cityscapes", "test"): "val",
}
TYPES = {
    "resnet50": ("resnet50",),
    "resnet101": ("resnet101",),
    "resnest101": ("resnest101",),
    "hrnetv2_w48": ("hrnetv2w48",),
    "jx_vit_large_p16_384": ("vitlarge", "vitlarge_473"),
}


def data_module(config):
    return importlib.import_module(f"memseg_jax.data.{config.data.name}")


def our_split(config, split):
    return SPLITS.get((config.data.name, split), split)


def type_of(config):
    return next(kind for kind, names in TYPES.items() if config.model.backbone in names)


def patches_a_side(config):
    """Rows of the grid that the position table is for; None without a table."""
    return vit.VARIANTS.get(config.model.backbone)


def multiplier_of(config, module):
    """One number: the published rows use the same for the rate and for the decay."""
    if not config.optimizer.multipliers:
        return None
    path = (jax.tree_util.DictKey(module), jax.tree_util.DictKey("kernel"))
    rate, decay = optimizer.multiplier(path, dict(config.optimizer.multipliers))
    assert rate == decay
    return rate


def steps(config, groups):
    size = data_module(config).SPLIT_SIZES[config.data.train_split]
    return steps_per_epoch(size, config.train.batch_size, groups)


def momentum_at(config, lr):
    memory = config.model.memory
    return float(memory_momentum(lr, memory.momentum, memory.base_lr))


def auxiliary_heads(config):
    backbone = build_segmentor(config).backbone
    head = {"out_channels": config.model.feature_dim, "dropout": config.model.dropout}
    return [head] * (len(backbone.auxiliary_levels) if config.model.auxiliary else 0)


def scores_in_docstring(config_module):
    """The published scores: (single scale or None, with several scales or flip)."""
    head = config_module.__doc__.split("\n\n")[0]
    numbers = [float(number) for number in re.findall(r"\d\d\.\d\d", head)]
    return (None, *numbers) if len(numbers) == 1 else tuple(numbers)


def window(config, field):
    return list(config.eval[field]) if config.eval.mode == "slide" else None


def flip_pairs(config):
    return [list(pair) for pair in config.augment.flip_pairs] or None


# Fact -> what our config says about it.
COMPARED = {
    "backbone/type": type_of,
    "backbone/img_size": patches_a_side,
    "num_classes": lambda c: len(c.data.class_names),
    "crop_hw": lambda c: list(c.augment.crop),
    "batch_size_total": lambda c: c.train.batch_size,
    "epochs": lambda c: c.train.epochs,
    "optimizer/base_lr": lambda c: c.optimizer.lr,
    "optimizer/momentum": lambda c: c.optimizer.momentum,
    "optimizer/weight_decay": lambda c: c.optimizer.weight_decay,
    "optimizer/params_rules/backbone_net": lambda c: multiplier_of(c, "backbone"),
    "optimizer/params_rules/others": lambda c: multiplier_of(c, "decoder_stage2"),
    "schedule/power": lambda c: c.optimizer.power,
    "schedule/min_lr": lambda c: c.optimizer.min_lr,
    "iterations/train_images": lambda c: data_module(c).SPLIT_SIZES[c.data.train_split],
    "iterations/per_epoch_by_world_size/1": lambda c: steps(c, 1),
    "iterations/per_epoch_by_world_size/2": lambda c: steps(c, 2),
    "iterations/per_epoch_by_world_size/4": lambda c: steps(c, 4),
    "iterations/per_epoch_by_world_size/8": lambda c: steps(c, c.replica_groups),
    "iterations/total_by_world_size/1": lambda c: steps(c, 1) * c.train.epochs,
    "iterations/total_by_world_size/2": lambda c: steps(c, 2) * c.train.epochs,
    "iterations/total_by_world_size/4": lambda c: steps(c, 4) * c.train.epochs,
    "iterations/total_by_world_size/8": lambda c: steps(c, c.replica_groups) * c.train.epochs,
    "loss_weights/loss_cls_stage2": lambda c: c.loss.stage2,
    "loss_weights/loss_cls_stage1": lambda c: c.loss.stage1,
    "loss_weights/loss_aux": lambda c: [c.loss.auxiliary for _ in auxiliary_heads(c)],
    "memory_loss/weight": lambda c: c.loss.consistency,
    "memory_loss/starts_at_epoch": lambda c: (
        c.loss.consistency_from_epoch if c.loss.consistency else None
    ),
    "memory/slots_per_class": lambda c: c.model.memory.slots,
    "memory/feature_dim": lambda c: c.model.feature_dim,
    "memory/attention_dim": lambda c: c.model.memory.attention_dim,
    "memory/out_dim": lambda c: c.model.aspp_dim,
    "memory/hard_aggregation": lambda c: c.model.memory.hard,
    "memory/update_strategy": lambda c: c.model.memory.strategy + "_similarity",
    "memory/momentum_base": lambda c: c.model.memory.momentum,
    "memory/momentum_base_lr": lambda c: c.model.memory.base_lr,
    "memory/momentum_tied_to_lr": lambda c: c.model.memory.base_lr > 0,
    "memory/momentum_first_iter": lambda c: momentum_at(c, c.optimizer.lr),
    "memory/momentum_floor": lambda c: momentum_at(c, c.optimizer.min_lr),
    "head/aspp_dilations": lambda c: list(c.model.aspp_dilations),
    "head/downsample_backbone_stride": lambda c: c.model.downsample,
    "head/dropout2d": lambda c: c.model.dropout,
    "head/activation": lambda c: c.model.activation.replace("_", ""),
    "head/negative_slope": lambda c: -float(activation(c.model.activation)(-np.ones(1))[0]) or None,
    "head/per_level_layernorm": lambda c: build_segmentor(c).backbone.normalise_maps,
    "aux_heads": auxiliary_heads,
    "train_split": lambda c: c.data.train_split,
    "eval_split": lambda c: c.data.eval_split,
    "train_pipeline/Resize/output_size": lambda c: list(c.augment.base_size),
    "train_pipeline/Resize/keep_ratio": lambda c: c.augment.keep_ratio,
    "train_pipeline/Resize/scale_range": lambda c: list(c.augment.scale_range),
    "train_pipeline/RandomCrop/crop_size": lambda c: list(c.augment.crop),
    "train_pipeline/RandomCrop/one_category_max_ratio": lambda c: c.augment.max_category_share,
    "train_pipeline/RandomFlip/flip_prob": lambda c: c.augment.flip,
    "train_pipeline/RandomFlip/fix_ann_pairs": flip_pairs,
    "train_pipeline/RandomRotation/rotation_prob": lambda c: c.augment.rotation or None,
    "train_pipeline/RandomRotation/angle_upper": lambda c: (
        c.augment.rotation_degrees if c.augment.rotation else None
    ),
    "train_pipeline/PhotoMetricDistortion": lambda c: {} if c.augment.photometric else None,
    "train_pipeline/Normalize/mean": lambda c: list(transforms.MEAN),
    "train_pipeline/Normalize/std": lambda c: list(transforms.STD),
    "train_pipeline/Padding/output_size": lambda c: list(c.augment.crop),
    "test_pipeline/Resize/output_size": lambda c: list(c.eval.base_size),
    "test_pipeline/Resize/keep_ratio": lambda c: c.eval.keep_ratio,
    "test_pipeline/Normalize/mean": lambda c: list(transforms.MEAN),
    "test_pipeline/Normalize/std": lambda c: list(transforms.STD),
    "test_single_scale/mode": lambda c: c.eval.mode,
    "test_single_scale/crop_hw": lambda c: window(c, "window"),
    "test_single_scale/stride_hw": lambda c: window(c, "stride"),
    "test_single_scale/softmax_before_resize": lambda c: c.eval.softmax_before_resize,
}


def comparable(config, fact, value):
    """A published value in the terms of our config, where the two differ."""
    if fact in ("train_split", "eval_split"):
        return our_split(config, value)
    if fact == "backbone/img_size" and value:
        return value[0] // vit.PATCH
    if fact == "train_pipeline/RandomFlip/fix_ann_pairs" and value:
        return sorted(sorted(pair) for pair in value)
    return value


def same(ours, published):
    if isinstance(published, float) and isinstance(ours, (int, float)):
        return ours == pytest.approx(published, rel=1e-6)
    return type(ours) is type(published) and ours == published


def test_every_published_row_has_a_config():
    assert sorted(map(config_name, published())) == sorted(n for n in PARAMETERS if ":" not in n)
    assert len(published()) == 18


@pytest.mark.parametrize("row", sorted(published()))
def test_published_recipe(row):
    name = config_name(row)
    config = load(name)
    facts = {f: v for f, v in published()[row].items() if not f.startswith("test_ms_flip/")}
    assert config.replica_groups == 8
    assert not config.loss.class_weights
    scores = (facts.pop("published_miou/single"), facts.pop("published_miou/ms_flip"))
    assert scores_in_docstring(importlib.import_module(f"configs.{name}")) == scores
    # Where the test split has no public labels, its size is that of another split than ours.
    sizes = data_module(config).SPLIT_SIZES
    scored = facts["eval_split"] if facts["eval_split"] in sizes else config.data.eval_split
    assert sizes[scored] == facts.pop("eval_images")
    assert set(facts) == set(COMPARED)
    ours = {fact: read(config) for fact, read in COMPARED.items()}
    theirs = {fact: comparable(config, fact, value) for fact, value in facts.items()}
    different = {f: (ours[f], theirs[f]) for f in facts if not same(ours[f], theirs[f])}
    assert not different


@pytest.mark.parametrize("row", sorted(published()))
def test_published_settings_with_several_scales_and_flip(row):
    name = config_name(row)
    config = load(f"{name}:ms_flip")
    ours = {
        "mode": config.eval.mode,
        "crop_hw": window(config, "window"),
        "stride_hw": window(config, "stride"),
        "scales": list(config.eval.scales),
        "flip": config.eval.flip,
        "softmax_before_resize": config.eval.softmax_before_resize,
    }
    assert ours == {fact: published()[row][f"test_ms_flip/{fact}"] for fact in ours}
    check_evaluation(config.eval, build_segmentor(config))
    # The argument changes nothing else.
    plain = load(name)
    plain.eval = config.eval
    assert plain == config


def tracing_takes_long(name):
    """Marks the recipes whose backbone a recipe of an earlier line has, too: not in CI."""
    first = next(other for other in PARAMETERS if other.partition("_")[2] == name.partition("_")[2])
    slow = name != first
    return pytest.param(name, marks=[pytest.mark.slow, pytest.mark.exhaustive] if slow else [])


@pytest.mark.parametrize("name", [tracing_takes_long(name) for name in sorted(PARAMETERS)])
def test_number_of_parameters(name):
    variables = abstract_variables(build_segmentor(load(name)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(n for n in PARAMETERS if ":" not in n))
def test_docstring_has_the_commands_and_the_weights(name):
    text = importlib.import_module(f"configs.{name}").__doc__
    command = f"python -m memseg_jax.main --config configs/{name}.py --config.data.root=DATA "
    assert " ".join(text.split()).count(command) == 2
    assert "--mode evaluate" in text
    file = re.search(r"--config\.init\.backbone=(\S+\.pth)", text)[1]
    assert text.count(file) == 2 or "pytorch-image-models" in text
    # What the text says about the schedule, too.
    config = load(name)
    assert f"batch {config.train.batch_size}, learning rate {config.optimizer.lr:g}," in text
    schedule = f"{config.train.epochs} epochs of {steps(config, config.replica_groups)} steps"
    height, width = config.augment.crop
    assert f"{schedule}, crops of {height}x{width}." in " ".join(text.split())
    assert f"`--config configs/{name}.py:ms_flip`" in text


# ---- Forms of 2021 and 2025 ---------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_FORMS)
def test_the_form_of_2021_is_the_default(name):
    assert load(name) == load(f"{name}:2021")
    old, new = (command_line.field_values(load(f"{name}:{form}")) for form in ("2021", "2025"))
    groups = {field for field, value in old.items() if hasattr(value, "items")}
    different = {f for f in old if f not in groups and old[f] != new[f]}
    if name == "cocostuff10k_vit":
        assert different == {"model.backbone", "model.aspp_dilations"}
        assert (new["model.backbone"], new["model.aspp_dilations"]) == ("vitlarge", (1, 12, 24, 36))
    else:
        assert different == {"model.backbone"}
        assert new["model.backbone"] == "hrnetv2w48_relu"


@pytest.mark.parametrize("name", WITH_FORMS)
def test_form_and_test_settings_combine(name):
    config = load(f"{name}:2025,ms_flip")
    assert config.model == load(f"{name}:2025").model
    assert config.eval == load(f"{name}:ms_flip").eval
    assert config == load(f"{name}:ms_flip,2025")


def test_unknown_arguments_are_refused_on_the_command_line(capsys):
    with pytest.raises(UserError, match=r"'2023'. It has: ms_flip \(.*\), 2021 \(.*\), 2025 \("):
        command_line.load_config(str(CONFIGS / "lip_hrnet.py") + ":2023")
    with pytest.raises(UserError, match=r":2025: this config has no '2025'. It has: ms_flip"):
        command_line.load_config(str(CONFIGS / "cityscapes_hrnet.py") + ":2025")
    with pytest.raises(UserError, match=r"has no 'flip'. It has: ms_flip"):
        command_line.load_config(str(CONFIGS / "ade20k_resnet101.py") + ":ms_flip,flip")
    with pytest.raises(UserError, match=r"choose one of 2021 and 2025"):
        command_line.load_config(str(CONFIGS / "ade20k_hrnet.py") + ":2021,2025,ms_flip")
    assert capsys.readouterr().err == ""
