"""What every field of a config may hold; `configs/common.py` says what each of them means.

A new field there needs a line here. Ranges are wide: what they leave out is meaningless (a negative
learning rate, no channels) or is more than any machine holds.
"""

from memseg_jax.config_rules.kinds import (
    Choice,
    Either,
    Number,
    Several,
    Switch,
    Table,
    Text,
    Whole,
)
from memseg_jax.data import data_sets
from memseg_jax.models import PARTS, backbones

_COUNT = Whole(1, 2**31 - 1)
_COUNT_OR_NONE = Whole(0, 2**31 - 1)
_SIDE = Whole(1, 2**16)  # pixels
_CHANNELS = Whole(1, 2**14)
_BATCH = Whole(1, 2**16)
_WORKERS = Whole(0, 1024)
_SHARE = Number(0, 1)
_WEIGHT = Number(0, 1e6)
_FACTOR = Number(0, 100, above=True)
_SIZE = Several(_SIDE, 2, 2, "(height, width)", (512, 512))
_COLOR = Several(Whole(0, 255), 3, 3, "(red, green, blue)", (128, 64, 128))
_LIMITS = Several(_SIDE, 2, 2, "(long side, short side)", (2048, 512), or_none=True)

RULES = {
    "seed": Whole(0, 2**32 - 1),
    "replica_groups": _BATCH,
    "sharding.data": Whole(1, 2**20, also=(-1,)),
    "sharding.rows": Whole(1, 2**20, also=(-1,)),
    "sharding.weight_update": Choice(("each", "shared")),
    "sharding.fsdp": Whole(1, 2**20, also=(-1,)),
    "init.backbone": Text(),
    "init.checkpoint": Text(),
    "data.name": Choice(data_sets),
    "data.root": Text(),
    "data.packed": Text(),
    "data.stage": Text(empty=False),
    "data.stage_gb": Number(0, 1e6, above=True, such_as=100.0),
    "data.train_split": Text(empty=False),
    "data.eval_split": Text(empty=False),
    # 255 means "not labelled" in memory, and 254 a value that no label file may hold.
    "data.class_names": Several(
        Text(empty=False), 2, 254, "names, one per class", ("background", "road", "car")
    ),
    "data.palette": Several(
        _COLOR, 0, 254, "colours, one per class", ((0, 0, 255), (128, 64, 128))
    ),
    "data.ignore_label": Whole(-1, 255),
    "data.label_map": Several(
        Several(
            Either((Whole(0, 2**31 - 1), Text(empty=False))),
            2,
            2,
            "(what is in the files, class name or 'ignore')",
            (7, "road"),
        ),
        0,
        2**16,
        "pairs",
        ((0, "ignore"), (7, "road")),
    ),
    "data.outside_polygons": Text(empty=False),
    "data.label_colors": Several(
        Either((_COLOR, Several(_COLOR, 1, 1000, "colours", ((128, 64, 128), (0, 0, 255))))),
        0,
        254,
        "entries, one per class",
        ((0, 0, 255), ((128, 64, 128), (244, 35, 232))),
    ),
    "data.ignore_colors": Several(_COLOR, 0, 1000, "colours", ((0, 0, 0), (255, 255, 255))),
    "data.unknown_color": Choice(("error", "ignore", "nearest")),
    "data.image_dir": Text(empty=False),
    "data.label_dir": Text(empty=False),
    "data.label_name": Text(),
    "data.list_file": Text(),
    "data.val_share": Number(0, 1, below=True, such_as=0.15),
    "data.image_size": Several(Whole(16, 2**16), 2, 2, "(height, width)", (96, 96)),
    "data.num_train": _COUNT_OR_NONE,
    "data.num_val": _COUNT_OR_NONE,
    "data.workers": _WORKERS,
    "data.threads": _WORKERS,
    "data.prefetch": Whole(1, 1024),
    "augment.base_size": _LIMITS,
    "augment.keep_ratio": Switch(),
    "augment.scale_range": Several(_FACTOR, 2, 2, "(least, most)", (0.5, 2.0)),
    "augment.crop": _SIZE,
    "augment.max_category_share": Number(0, 1, above=True, such_as=0.75),
    "augment.flip": _SHARE,
    "augment.flip_pairs": Several(
        Several(Whole(0, 253), 2, 2, "(class, class)", (14, 15)), 0, 127, "pairs", ((14, 15),)
    ),
    "augment.rotation": _SHARE,
    "augment.rotation_degrees": Whole(1, 180),
    "augment.photometric": Switch(),
    "eval.base_size": _LIMITS,
    "eval.keep_ratio": Switch(),
    "eval.scales": Several(_FACTOR, 1, 100, "factors", (0.75, 1.0, 1.25)),
    "eval.flip": Switch(),
    "eval.mode": Choice(("auto", "whole", "slide")),
    "eval.overlap": Number(0.25, 0.9),
    "eval.window": _SIZE,
    "eval.stride": _SIZE,
    "eval.softmax_before_resize": Switch(),
    "eval.batch_size": _BATCH,
    "eval.rows": Whole(1, 2**16),
    "eval.exact_sizes": _COUNT_OR_NONE,
    "eval.canvases": Several(_SIZE, 0, 1000, "sizes", ((512, 512), (512, 704))),
    "eval.size_multiple": _SIDE,
    "eval.save_predictions": Text(),
    "eval.max_megapixels": Number(0, 1e6, above=True, such_as=179.0),
    # Powers of two: a forward pass takes 1, 2, 4, ... pictures, and no blank ones.
    "serve.batch_size": Choice((1, 2, 4, 8, 16, 32, 64)),
    "serve.queue": Whole(1, 2**12),
    "serve.seconds": Number(0, 86400, above=True, such_as=60.0),
    "serve.max_megabytes": Number(0, 1e4, above=True, such_as=20.0),
    "serve.max_megapixels": Number(0, 1e4, above=True, such_as=16.0),
    "serve.origin": Text(),
    "model.method": Choice(("mcibi", "mcibi_plus_plus")),
    "model.context": Choice(("aspp", "pyramid_pooling", "none")),
    "model.backbone": Choice(backbones),
    "model.backbone_width": Number(0, 16, above=True, such_as=1.0),
    "model.downsample": Choice((1, 2)),
    "model.feature_dim": _CHANNELS,
    "model.aspp_dim": _CHANNELS,
    "model.aspp_dilations": Several(Whole(1, 2**12), 1, 100, "dilations", (1, 12, 24, 36)),
    "model.pool_scales": Several(Whole(1, 2**10), 1, 100, "cells per side", (1, 2, 3, 6)),
    "model.fpn": Switch(),
    "model.fpn_dim": _CHANNELS,
    "model.drop_path": Number(0, 1, below=True),
    "model.decoder_kernels.pixels": Choice((1, 3)),
    "model.decoder_kernels.context": Choice((1, 3)),
    "model.decoder_kernels.final": Choice((1, 3)),
    "model.dropout": Number(0, 1, below=True),
    "model.activation": Choice(("relu", "leaky_relu")),
    # Of one image, the branch of global means would always be normalised to its bias.
    "model.norm_group": Whole(2, 2**16, also=(0,)),
    "model.auxiliary": Switch(),
    "model.compute_dtype": Choice(("float32", "bfloat16")),
    "model.precision": Choice(("default", "high", "highest")),
    "model.remat": Choice(("none", "blocks")),
    "model.memory.enabled": Switch(),
    "model.memory.attention_dim": _CHANNELS,
    "model.memory.slots": Whole(1, 2**10),
    "model.memory.hard": Switch(),
    "model.memory.within_image_context": Switch(),
    "model.memory.strategy": Choice(("cosine", "mean")),
    "model.memory.fusion": Choice(("published", "residual")),
    "model.memory.start_epoch": _COUNT,
    "model.memory.momentum": _SHARE,
    "model.memory.base_lr": Number(0, 1000),
    "model.memory.downsample": Choice((1, 2)),
    "model.memory.read_by": Choice(("context", "pixels")),
    "model.memory.fuse_before_fpn": Switch(),
    "loss.stage2": _WEIGHT,
    "loss.stage1": _WEIGHT,
    "loss.context": _WEIGHT,
    "loss.auxiliary": _WEIGHT,
    "loss.consistency": _WEIGHT,
    "loss.consistency_from_epoch": _COUNT,
    "loss.class_weights": Either(
        (
            Several(_WEIGHT, 0, 254, "weights, one per class", (1.0, 0.5, 2.0)),
            Choice(("balanced",)),
        )
    ),
    "optimizer.name": Choice(("sgd", "adamw", "lars")),
    "optimizer.lr": Number(0, 1000, above=True, such_as=0.01),
    "optimizer.min_lr": Number(0, 1000),
    "optimizer.power": Number(0, 100),
    "optimizer.warmup_steps": _COUNT_OR_NONE,
    "optimizer.warmup_start": _SHARE,
    "optimizer.base_batch": Whole(0, 2**16),
    "optimizer.momentum": Number(0, 1, below=True, such_as=0.9),
    "optimizer.weight_decay": _SHARE,
    "optimizer.multipliers": Table(
        PARTS,
        Several(Number(0, 1000), 2, 2, "(learning-rate factor, decay factor)", (0.1, 0.1)),
    ),
    "train.batch_size": _BATCH,
    "train.accumulate": _BATCH,
    "train.epochs": _COUNT,
    "train.log_every": _COUNT,
    "train.eval_every": _COUNT_OR_NONE,
    "train.early_stop": _COUNT_OR_NONE,
    "train.freeze": Several(
        Text(empty=False),
        0,
        1000,
        "patterns of parameter paths",
        ("backbone/stem*", "backbone/layer1*"),
    ),
    "train.on_nonfinite": Choice(("raise", "skip", "rollback")),
    "train.max_nonfinite": _COUNT,
    "train.watchdog_minutes": Number(0, 1e6),
    "train.profile_steps": _COUNT_OR_NONE,
    "checkpoint.every": _COUNT,
    "checkpoint.keep": _COUNT,
    "checkpoint.lock_minutes": Number(0, 1e6, above=True, such_as=10.0),
}
