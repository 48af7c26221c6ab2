"""The recipes of MCIBI++ are the published ones, field by field."""

import functools
import importlib
import json
import re
from pathlib import Path

import pytest

from memseg_jax import config_rules
from memseg_jax.command_line import load_config
from memseg_jax.data import transforms
from memseg_jax.data.pipeline import steps_per_epoch

CONFIGS = Path(__file__).parents[1] / "configs" / "plus"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "recipe")
# What config files call the networks and the backbones of the published rows.
NETWORKS = {"": "fcn", "aspp": "aspp", "ppm": "ppm", "upernet": "upernet"}
BACKBONES = {
    "resnet50os8": "resnet50",
    "resnet101os8": "resnet101",
    "resnest101os8": "resnest101",
    "hrnetv2w48": "hrnet",
    "swinlarge": "swinlarge",
}
IMAGES = {"ade20k": 20210, "cocostuff10k": 9000, "lip": 30462, "voc": 10582}
IMAGES |= {"pascalcontext59": 4998, "vspw": 2806}  # of VSPW: videos
# The benchmark's settings for several scales are those of the rows of its test split.
ON_TEST = ("cityscapes_aspp_hrnet", "cityscapes_aspp_resnest101", "cityscapes_aspp_resnet101")


@functools.cache
def published():
    """Config -> fact -> value; what several rows share is stored once."""
    path = Path(__file__).parent / "facts" / "published_recipes_plus.json"
    facts = json.loads(path.read_text())
    found = {}
    for row, of_row in facts["rows"].items():
        *network, backbone, data_set = row.split("_")
        shared = facts["all"] | facts["data_sets"][data_set] | facts["backbones"][backbone]
        name = f"{data_set}_{NETWORKS[''.join(network)]}_{BACKBONES[backbone]}"
        found[name] = shared | of_row
    return found


def load(name, argument=""):
    get_config = importlib.import_module(f"configs.plus.{name}").get_config
    return get_config(argument) if argument else get_config()


def images_of(config):
    if config.data.name == "cityscapes":
        return {"train": 2975, "trainval": 3475}[config.data.train_split]
    return IMAGES[config.data.name]


# ---- What our configs say about each fact --------------------------------------------------------

# The reference's arguments of a backbone that we know by its name.
_RESNET = {"outstride": 8, "selected_indices": [0, 1, 2, 3]}
_CONV_STEM = {"type": "ResNet", "use_conv3x3_stem": True} | _RESNET
_HRNET = {
    "type": "HRNet", "structure_type": "hrnetv2_w48", "arch": "hrnetv2_w48",
    "selected_indices": [0, 0, 0, 0],
}  # fmt: skip
OF_BACKBONE = {
    "resnet50": {"depth": 50, "structure_type": "resnet50conv3x3stem"} | _CONV_STEM,
    "resnet101": {"depth": 101, "structure_type": "resnet101conv3x3stem"} | _CONV_STEM,
    "resnest101": {"type": "ResNeSt", "depth": 101, "structure_type": "resnest101"} | _RESNET,
    "hrnetv2w48": _HRNET | {"mcibi_version": True},  # its stem has one ReLU less
    "hrnetv2w48_relu": _HRNET,
    "swinlarge": {
        "type": "SwinTransformer", "structure_type": "swin_large_patch4_window12_384_22k",
        "selected_indices": [0, 1, 2, 3], "norm_cfg/type": "LayerNorm", "pretrain_img_size": 384,
        "in_channels": 3, "embed_dims": 192, "patch_size": 4, "window_size": 12, "mlp_ratio": 4,
        "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "qkv_bias": True, "qk_scale": None,
        "patch_norm": True, "drop_rate": 0.0, "attn_drop_rate": 0.0, "use_abs_pos_embed": False,
    },
}  # fmt: skip
WIDTHS = {"HRNet": [720] * 4, "SwinTransformer": [192, 384, 768, 1536]}
WIDTHS |= {kind: [256, 512, 1024, 2048] for kind in ("ResNet", "ResNeSt")}
DATA_SETS = {
    "ade20k": "ADE20kDataset", "cityscapes": "CityScapesDataset", "lip": "LIPDataset",
    "cocostuff10k": "COCOStuff10kDataset", "pascalcontext59": "PascalContext59Dataset",
    "voc": "VOCDataset", "vspw": "VSPWDataset",
}  # fmt: skip
SPLITS = {"training": "train", "validation": "val"}  # of ADE20K, in the reference's words
CONTEXTS = {"aspp": "aspp", "pyramid_pooling": "ppm"}
OPTIMISERS = {"sgd": "SGD", "adamw": "AdamW"}
WITHOUT_DECAY = {"backbone/*norm*": (1.0, 0.0)}
WITHOUT_DECAY |= {"backbone/*relative_position_bias_table": (1.0, 0.0)}


def backbone_facts(config):
    facts = dict(OF_BACKBONE[config.model.backbone])
    if facts["type"] == "SwinTransformer":
        facts["drop_path_rate"] = config.model.drop_path
    return {f"backbone/{name}": value for name, value in facts.items()}


def head_facts(config):
    model, memory = config.model, config.model.memory
    widths = WIDTHS[OF_BACKBONE[model.backbone]["type"]]
    has_context = model.context != "none"
    channels = model.feature_dim * (1 + has_context)  # of what was read and of the context
    facts = {
        "context_within_image/cfg/pool_scales": list(model.pool_scales),
        "context_within_image/cfg/dilations": list(model.aspp_dilations),
        "context_within_image/is_on": has_context,
        "warmup_epoch": 0,
        "use_hard_aggregate": memory.hard,
        "downsample_before_sa": memory.downsample == 2,
        "in_channels": widths[-1],
        "feats_channels": model.feature_dim,
        "transform_channels": memory.attention_dim,
        "out_channels": model.feature_dim,
        "update_cfg/ignore_index": -100,
        "update_cfg/momentum_cfg/base_momentum": memory.momentum,
        "update_cfg/momentum_cfg/base_lr": memory.base_lr or None,
        "update_cfg/momentum_cfg/adjust_by_learning_rate": memory.base_lr > 0,
    }
    if has_context:
        facts["context_within_image/type"] = CONTEXTS[model.context]
        facts["context_within_image/use_self_attention"] = memory.within_image_context
        facts["force_use_preds_pr"] = memory.read_by == "pixels"
        assert model.aspp_dim == model.feature_dim
    else:
        assert memory.read_by == "pixels"
    if model.fpn:
        assert memory.fuse_before_fpn
        facts["fuse_memory_cwi_before_fpn"] = True
        facts["fpn/feats_channels"] = channels
        facts["fpn/out_channels"] = model.fpn_dim
        facts["fpn/in_channels_list"] = [*widths[:3], channels]
        channels += 3 * model.fpn_dim
    for decoder, kernel, inputs in (
        ("pr", model.decoder_kernels.pixels, model.feature_dim),
        ("cwi", model.decoder_kernels.context, model.feature_dim),
        ("cls", model.decoder_kernels.final, channels),
    ):
        facts[f"decoder/{decoder}/in_channels"] = inputs
        facts[f"decoder/{decoder}/out_channels"] = model.feature_dim
        facts[f"decoder/{decoder}/dropout"] = model.dropout
        facts[f"decoder/{decoder}/kernel_size"] = kernel
        facts[f"decoder/{decoder}/padding"] = kernel // 2
    facts = {f"head/{name}": value for name, value in facts.items()}
    if model.auxiliary:
        facts |= {
            "auxiliary/in_channels": widths[-2],
            "auxiliary/out_channels": model.feature_dim,
            "auxiliary/dropout": model.dropout,
            "losses/loss_aux": config.loss.auxiliary,
        }
    else:
        facts["auxiliary"] = None
    if has_context:
        facts["losses/loss_cwi"] = config.loss.context
    return facts | {
        "losses/loss_pr": config.loss.stage1,
        "losses/loss_cls": config.loss.stage2,
        "num_classes": len(config.data.class_names),
        "act/type": {"relu": "ReLU"}[model.activation],
        "align_corners": False,
    }


def schedule_facts(config):
    o = config.optimizer
    facts = {
        "type": "PolyScheduler",
        "max_epochs": config.train.epochs,
        "power": o.power,
        "min_lr": o.min_lr,
        "optimizer/type": OPTIMISERS[o.name],
        "optimizer/lr": o.lr,
        "optimizer/weight_decay": o.weight_decay,
    }
    multipliers = dict(o.multipliers.items())
    if o.name == "adamw":
        facts["optimizer/betas"] = [o.momentum, 0.999]
        assert multipliers == WITHOUT_DECAY
        # There are no absolute positions; the others select what these words do (see
        # tests/training/test_optimizer.py).
        for word in ("absolute_pos_embed", "relative_position_bias_table", "norm"):
            facts[f"optimizer/params_rules/{word}/wd_multiplier"] = 0.0
        facts["warmup_cfg/type"] = "linear"
        facts["warmup_cfg/iters"] = o.warmup_steps
        facts["warmup_cfg/ratio"] = o.warmup_start
    else:
        facts["optimizer/momentum"] = o.momentum
        assert not o.warmup_steps
        if multipliers:
            lr_factor, decay_factor = multipliers.pop("backbone")
            facts["optimizer/params_rules/backbone_net/lr_multiplier"] = lr_factor
            facts["optimizer/params_rules/backbone_net/wd_multiplier"] = decay_factor
        else:
            facts["optimizer/params_rules"] = {}
        assert not multipliers
    facts = {f"scheduler/{name}": value for name, value in facts.items()}
    batch = config.train.batch_size
    return facts | {
        "batch_size/auto_adapt_to_expected_train_bs": True,
        "batch_size/expected_total_train_bs_for_assert": batch,
        "batch_size/train/batch_size_per_gpu": batch // config.replica_groups,
        "batch_size/train/drop_last": True,
    }


def data_facts(config):
    augment, evaluate, data = config.augment, config.eval, config.data
    norm = {"Normalize/mean": list(transforms.MEAN), "Normalize/std": list(transforms.STD)}
    train = norm | {
        "Resize/output_size": list(augment.base_size),
        "Resize/keep_ratio": augment.keep_ratio,
        "Resize/scale_range": list(augment.scale_range),
        "RandomCrop/crop_size": list(augment.crop),
        "RandomCrop/one_category_max_ratio": augment.max_category_share,
        "RandomFlip/prob": augment.flip,
        "ToTensor": {},
        "Padding/output_size": list(augment.crop),
        "Padding/data_type": "tensor",
    }
    if augment.photometric:
        train["PhotoMetricDistortion"] = {}
    if augment.flip_pairs:
        pairs = sorted(sorted(pair) for pair in augment.flip_pairs)
        train["RandomFlip/fixed_seg_target_pairs"] = pairs
    if augment.rotation:
        train["RandomRotation/prob"] = augment.rotation
        train["RandomRotation/angle_upper"] = augment.rotation_degrees
    test = norm | {
        "Resize/output_size": list(evaluate.base_size),
        "Resize/keep_ratio": evaluate.keep_ratio,
        "Resize/scale_range": None,
        "ToTensor": {},
    }
    slides = evaluate.mode == "slide"
    facts = {
        "type": DATA_SETS[data.name],
        "train_set": SPLITS.get(data.train_split, data.train_split),
        "test_set": SPLITS.get(data.eval_split, data.eval_split),
    }
    facts |= {f"train_pipeline/{name}": value for name, value in train.items()}
    facts |= {f"test_pipeline/{name}": value for name, value in test.items()}
    return {f"dataset/{name}": value for name, value in facts.items()} | {
        "inference/forward/mode": evaluate.mode,
        "inference/forward/cropsize": list(evaluate.window) if slides else None,
        "inference/forward/stride": list(evaluate.stride) if slides else None,
        "inference/tta/multiscale": list(evaluate.scales),
        "inference/tta/flip": evaluate.flip,
        "inference/tta/use_probs_before_resize": evaluate.softmax_before_resize,
    }


def comparable(name, facts):
    """The published facts with what the reference fills in, and without what has no meaning."""
    facts = {fact: value for fact, value in facts.items() if not fact.startswith("published/")}
    facts.pop("dataset/train_pipeline/EdgeExtractor", None)  # no loss uses the edges it adds
    has_context = facts["head/context_within_image/is_on"]
    if has_context:
        facts.setdefault("head/context_within_image/use_self_attention", True)
    else:
        # The probabilities of the pixels are used whatever this says.
        assert not facts.pop("head/force_use_preds_pr")
        facts.pop("head/context_within_image/type")
    if "head/fpn/in_channels_list" in facts:
        # The last one has no layer; one recipe has the width of the backbone's map there.
        facts["head/fpn/in_channels_list"] = [*facts["head/fpn/in_channels_list"][:3], 1024]
    else:
        facts.pop("head/fuse_memory_cwi_before_fpn")
    for decoder in ("pr", "cwi", "cls"):
        facts.setdefault(f"head/decoder/{decoder}/kernel_size", 1)
        facts.setdefault(f"head/decoder/{decoder}/padding", 0)
    facts.setdefault("scheduler/min_lr", facts["scheduler/optimizer/lr"] / 100)
    flip_pairs = "dataset/train_pipeline/RandomFlip/fixed_seg_target_pairs"
    if flip_pairs in facts:
        facts[flip_pairs] = sorted(sorted(pair) for pair in facts[flip_pairs])
    if name in ON_TEST:  # whose labels are not public
        assert facts["dataset/test_set"] == "test"
        facts["dataset/test_set"] = "val"
    return facts


def same(ours, theirs):
    if isinstance(theirs, float) and isinstance(ours, float):
        return ours == pytest.approx(theirs, rel=1e-12)
    return ours == theirs


# ---- The published rows -------------------------------------------------------------------------


def test_every_published_row_has_a_config():
    assert sorted(published()) == NAMES
    assert len(NAMES) == 37


@pytest.mark.parametrize("name", NAMES)
def test_published_recipe(name):
    # The scores of the test split of Cityscapes are with several scales.
    config = load(name, "ms_flip" if name in ON_TEST else "")
    assert config.replica_groups == 8
    assert config.model.method == "mcibi_plus_plus"
    assert config.model.memory.enabled
    ours = backbone_facts(config) | head_facts(config) | schedule_facts(config) | data_facts(config)
    theirs = comparable(name, published()[name])
    assert ours.keys() == theirs.keys()
    different = {f: (ours[f], theirs[f]) for f in ours if not same(ours[f], theirs[f])}
    assert not different


@pytest.mark.parametrize("name", NAMES)
def test_the_rules_allow_it(name):
    for argument in ("", ":ms_flip"):
        config_rules.check(load_config(f"{CONFIGS / name}.py{argument}"))


@pytest.mark.parametrize("name", NAMES)
def test_several_scales_change_the_test_alone(name):
    plain, several = load(name), load(name, "ms_flip")
    assert several.eval.flip
    # The second score of LIP is that of one scale and mirror images.
    assert (len(several.eval.scales) == 1) == name.startswith("lip_")
    if plain.eval.mode == "slide":
        window = tuple(plain.eval.window)
        assert (tuple(several.eval.window), several.eval.stride) == (window, plain.eval.stride)
        assert several.eval.canvases == plain.eval.canvases == (window,)
    plain.eval = several.eval
    assert plain == several


@pytest.mark.parametrize("name", NAMES)
def test_docstring_has_scores_commands_and_weights(name):
    text = importlib.import_module(f"configs.plus.{name}").__doc__
    facts, config = published()[name], load(name)
    first, words = text.split("\n\n")[0], " ".join(text.split())
    scores = [f"{float(score.strip('%')):.2f}" for score in scores_of(facts)]
    assert re.findall(r"\d\d\.\d\d", first) == scores
    assert ("no score was published" in first) == (not scores)
    assert ("test split" in first) == (name in ON_TEST)
    assert facts.get("published/released", "No model was published") in words
    command = f"python -m memseg_jax.main --config configs/plus/{name}.py \\ --config.data.root="
    assert words.count(command) == 2
    file = re.search(r"--config\.init\.backbone=(\S+\.pth)", text)[1]
    assert text.count(file) == 2
    batch, lr = config.train.batch_size, config.optimizer.lr
    steps = steps_per_epoch(images_of(config), batch, config.replica_groups)
    height, width = config.augment.crop
    assert f"batch {batch}, learning rate {lr:g}, {config.train.epochs} epochs of {steps} steps, " \
        f"crops of {height}x{width}." in words  # fmt: skip
    assert f"`--config configs/plus/{name}.py:ms_flip`" in words


def scores_of(facts):
    text = facts.get("published/miou")
    return text.split("/") if text else []


def test_published_schedules_agree_with_the_table_of_scores():
    for name, facts in published().items():
        if "published/schedule" not in facts:
            continue
        config = load(name)
        lr, _, batch, epochs = facts["published/schedule"].split(": ")[1].split("/")
        assert float(lr) == config.optimizer.lr, name
        assert (int(batch), int(epochs)) == (config.train.batch_size, config.train.epochs), name
