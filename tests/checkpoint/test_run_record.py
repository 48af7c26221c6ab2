"""Whether two records are of the same run, and what is recorded."""

import json

import ml_collections
import numpy as np
import pytest

from configs import common
from memseg_jax import run_record
from memseg_jax.errors import UserError
from tests.checkpoints import make_meta


def test_scores_become_plain_json():
    scores = {"mIoU": np.float64(0.5), "per_class": {"iou": np.array([0.5, np.nan])}}
    meta = run_record.make_meta(common.get_config(), 1, ("a", "b"), (), "f", scores)
    assert meta["scores"] == {"mIoU": 0.5, "per_class": {"iou": [0.5, None]}}
    assert json.loads(json.dumps(meta, allow_nan=False)) == meta


def test_same_config_is_accepted_after_json():
    config = common.get_config()
    meta = json.loads(json.dumps(make_meta(5, config)))
    assert run_record.config_differences(meta["config"], config) == []
    config.data.root = "/elsewhere"
    config.data.workers = 3
    config.eval.mode = "slide"
    config.checkpoint.every = 7
    config.train.log_every = 1
    config.model.remat = "blocks"
    run_record.check_same_run(meta, config, "f00d")


def test_other_config_is_refused_by_field():
    meta = json.loads(json.dumps(make_meta(5)))
    config = common.get_config()
    config.train.batch_size = 8
    config.augment.crop = (64, 64)
    config.optimizer.multipliers = ml_collections.ConfigDict({"backbone": (0.1, 0.1)})
    with pytest.raises(UserError) as caught:
        run_record.check_same_run(meta, config, "beef")
    message = str(caught.value)
    assert "at step 5" in message
    assert "train.batch_size: 16 in the checkpoint, 8 now" in message
    assert "augment.crop: [512, 512] in the checkpoint, [64, 64] now" in message
    assert "optimizer.multipliers.backbone: not set in the checkpoint, [0.1, 0.1] now" in message
    assert "fingerprint f00d in the checkpoint, beef now" in message
    assert "--workdir" in message


def test_harmless_fields_exist():
    config = common.get_config()
    for field in run_record.HARMLESS_FIELDS:
        section, name = field.split(".")
        assert name == "*" or name in config[section]
        assert section in config


def test_a_field_that_is_newer_than_the_checkpoint_may_be_empty():
    meta = json.loads(json.dumps(make_meta(5)))
    del meta["config"]["init"]
    config = common.get_config()
    assert run_record.config_differences(meta["config"], config) == []
    config.init.backbone = "resnet50.pth"
    assert run_record.config_differences(meta["config"], config) == [
        'init.backbone: not set in the checkpoint, "resnet50.pth" now'
    ]


def test_a_run_from_before_there_were_parts_continues_with_one():
    config = common.get_config()
    meta = json.loads(json.dumps(make_meta(5)))
    del meta["config"]["train"]["accumulate"], meta["config"]["model"]["remat"]
    config.model.remat = "blocks"
    assert run_record.config_differences(meta["config"], config) == []
    config.train.accumulate = 2
    assert run_record.config_differences(meta["config"], config) == [
        "train.accumulate: not set in the checkpoint, 2 now"
    ]
