"""Whether two records are of the same run, and what is recorded."""

import json

import ml_collections
import numpy as np
import pytest

from configs import common
from memseg_jax import checkpoint
from memseg_jax.checkpoint import meta as records
from memseg_jax.errors import UserError
from tests.checkpoints import make_meta


def test_records_are_plain_json():
    config = common.get_config()
    config.data.palette = (np.array([1, 2, 3], np.uint8), (np.int64(4), 5, 6))
    config.train.watchdog_minutes = float("nan")
    meta = make_meta(5, config)
    assert meta["config"]["data"]["palette"] == [[1, 2, 3], [4, 5, 6]]
    assert meta["config"]["train"]["watchdog_minutes"] is None
    assert json.loads(json.dumps(meta, allow_nan=False)) == meta


def test_same_config_is_accepted_after_json():
    config = common.get_config()
    meta = json.loads(json.dumps(make_meta(5, config)))
    assert records.config_differences(meta["config"], config) == []
    config.data.root = "/elsewhere"
    config.data.workers = 3
    config.eval.mode = "slide"
    config.checkpoint.every = 7
    config.train.log_every = 1
    config.model.remat = "blocks"
    checkpoint.check_same_run(meta, config, "f00d")


def test_other_config_is_refused_by_field():
    meta = json.loads(json.dumps(make_meta(5)))
    config = common.get_config()
    config.seed = 1
    config.train.batch_size = 8
    config.augment.crop = (64, 64)
    config.optimizer.multipliers = ml_collections.ConfigDict({"backbone": (0.1, 0.1)})
    with pytest.raises(UserError) as caught:
        checkpoint.check_same_run(meta, config, "beef")
    message = str(caught.value)
    assert "at step 5" in message
    assert "seed: 0 in the checkpoint, 1 now" in message
    assert "train.batch_size: 16 in the checkpoint, 8 now" in message
    assert "augment.crop: [512, 512] in the checkpoint, [64, 64] now" in message
    assert "optimizer.multipliers.backbone: not set in the checkpoint, [0.1, 0.1] now" in message
    assert "fingerprint f00d in the checkpoint, beef now" in message
    assert "--workdir" in message


@pytest.mark.parametrize("names", [("road", "sky"), ("sky", "road")])
def test_classes_in_another_order_are_refused(names):
    meta = {"class_names": list(names)}
    records.check_class_names(meta, names)
    records.check_class_names(meta, (*names, "tree"))  # the shapes of the arrays say more
    with pytest.raises(UserError, match="scores would be given to the wrong classes"):
        records.check_class_names(meta, names[::-1])


def test_a_seal_knows_values_and_no_order():
    meta = {"step": 3, "config": {"a": 1, "b": 2}}
    other_order = {"config": {"b": 2, "a": 1}, "step": 3}
    assert records.sealed(meta) == records.sealed(other_order)
    assert records.sealed(records.sealed(meta)) == records.sealed(meta)
    assert records.sealed(meta) != records.sealed(meta | {"step": 4})


def test_checkpoints_from_before_there_was_a_precision():
    config = common.get_config()
    meta = make_meta(5, config)
    del meta["config"]["model"]["precision"]
    (line,) = records.config_differences(meta["config"], config)
    assert line == 'model.precision: "default" in the checkpoint, "highest" now'
    config.model.precision = "default"
    assert records.config_differences(meta["config"], config) == []


def test_checkpoints_from_before_there_was_a_choice_of_optimisers():
    config = common.get_config()
    meta = make_meta(5, config)
    for name in ("name", "warmup_steps", "warmup_start", "base_batch"):
        del meta["config"]["optimizer"][name]
    assert records.config_differences(meta["config"], config) == []
    config.optimizer.name = "adamw"
    (line,) = records.config_differences(meta["config"], config)
    assert line == 'optimizer.name: "sgd" in the checkpoint, "adamw" now'


def test_checkpoints_from_before_there_was_a_choice_of_methods():
    config = common.get_config()
    meta = make_meta(5, config)
    model = meta["config"]["model"]
    for name in ("method", "context", "pool_scales", "fpn", "fpn_dim", "drop_path"):
        del model[name]
    for name in ("downsample", "read_by", "fuse_before_fpn"):
        del model["memory"][name]
    del model["decoder_kernels"], meta["config"]["loss"]["context"]
    assert records.config_differences(meta["config"], config) == []
    config.model.method = "mcibi_plus_plus"
    (line,) = records.config_differences(meta["config"], config)
    assert line == 'model.method: "mcibi" in the checkpoint, "mcibi_plus_plus" now'


def test_harmless_fields_exist():
    config = common.get_config()
    for field in records.HARMLESS_FIELDS:
        section, name = field.split(".")
        assert name == "*" or name in config[section]
        assert section in config
