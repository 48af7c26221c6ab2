"""Balanced class weights: the rule, and that a run computes, keeps, records and uses them."""

import json

import jax
import numpy as np
import pytest

from memseg_jax import checkpoint
from memseg_jax.data import open_split
from memseg_jax.errors import UserError
from memseg_jax.modes import train
from memseg_jax.training import class_weights
from memseg_jax.training.class_weights import balanced, class_weights_of, with_class_weights
from tests import tiny
from tests.tiny_config import get_config


def config_of(root, weights="balanced"):
    config = get_config()
    config.data.root = str(root)
    config.loss.class_weights = weights
    return config


def test_median_frequency():
    # Class 0: 60 of 100 pixels; class 1: 5 of the 50 of one image; class 2: never.
    weights = balanced(np.array([60, 5, 0, 35]), np.array([100, 50, 0, 100]))
    np.testing.assert_allclose(weights, [0.35 / 0.6, 0.35 / 0.1, 1, 1])


def test_pixels_are_counted_without_the_images(tmp_path):
    tiny.write_folder(tmp_path, {"train": [(8, 8)] * 3, "val": [(8, 8)]})
    labels = np.full((3, 8, 8), 255, np.uint8)
    labels[0, :4], labels[0, 4] = 0, 1
    labels[1, :2] = 2
    for index, label in enumerate(labels):
        tiny.write(tmp_path / f"labels/train/{index:02d}.png", label)
        (tmp_path / f"images/train/{index:02d}.png").write_bytes(b"not read")
    source = open_split(config_of(tmp_path).data, "train")
    pixels, around = class_weights.count_pixels(source, 3, 2)
    assert pixels.tolist() == [32, 8, 16]
    assert around.tolist() == [40, 40, 16]
    alone = [{"label": label} for label in labels]  # a source without `label`
    np.testing.assert_array_equal(class_weights.count_pixels(alone, 3, 0), [pixels, around])


def test_weights_are_kept_and_damage_is_named(tmp_path):
    root = tiny.write_folder(tmp_path / "data", {"train": [(16, 16)] * 2, "val": [(8, 8)]})
    config = config_of(root)
    source = open_split(config.data, "train")
    weights = class_weights_of(config, source, tmp_path)
    assert len(weights) == 3
    assert len(set(weights)) > 1
    assert class_weights_of(config, None, tmp_path) == weights  # nothing is counted again
    assert with_class_weights(config, weights).loss.class_weights == weights
    assert with_class_weights(config, None).loss.class_weights == (1.0, 1.0, 1.0)
    assert config.loss.class_weights == "balanced"
    for text in ("{", '{"class_weights": [1, 2]}', "[]"):
        (tmp_path / class_weights.FILE).write_text(text)
        with pytest.raises(UserError, match=r"class_weights\.json: .* Remove the file"):
            class_weights_of(config, None, tmp_path)


def test_numbers_stay_as_they_are(tmp_path):
    for weights in ((), (1.0, 2.0, 0.5)):
        config = config_of(tmp_path, weights)
        assert class_weights_of(config, None, tmp_path) == weights
        assert with_class_weights(config, weights) is config


def run_flags(tmp_path, workdir):
    root = tmp_path / "data"
    if not root.exists():
        tiny.write_folder(root, {"train": [(32, 32)] * 8, "val": [(32, 32)]})
    return [f"--config.data.root={root}", "--config.train.epochs=1", "--workdir", workdir]


@pytest.mark.usefixtures("quiet_entry", "compilations", "three_convolutions")
def test_a_run_records_them(tmp_path, capsys, monkeypatch):
    programs = []

    def count_steps(function, what, *args):
        def step(state, batch):
            with jax.transfer_guard("allow"):
                state = state.replace(step=state.step + 1)
            return state, {"loss": np.float32(1), "lr": np.float32(0.1), "nonfinite": np.int32(0)}

        return step

    tiny.replace_training_step(monkeypatch, count_steps)
    made = train.training_program
    monkeypatch.setattr(
        train, "training_program", lambda *args: programs.append(args) or made(*args)
    )
    run = [*run_flags(tmp_path, tmp_path / "run"), "--config.loss.class_weights=balanced"]
    assert tiny.run(*run) == 0
    kept = json.loads((tmp_path / "run" / class_weights.FILE).read_text())["class_weights"]
    meta = checkpoint.read_meta(tmp_path / "run")[1]
    assert meta["class_weights"] == kept
    assert meta["config"]["loss"]["class_weights"] == "balanced"
    assert programs[0][-1] == tuple(kept)
    # Labels that changed since would go unnoticed.
    (tmp_path / "run" / class_weights.FILE).write_text('{"class_weights": [1.0, 1.0, 2.0]}')
    capsys.readouterr()
    assert tiny.run(*run) == 1
    message = f"the class weights: {kept} in the checkpoint, [1.0, 1.0, 2.0] now"
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("quiet_entry", "compilations", "three_convolutions")
def test_a_run_has_the_losses_of_the_same_weights_as_numbers(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert tiny.run(*run_flags(tmp_path, first), "--config.loss.class_weights=balanced") == 0
    weights = checkpoint.read_meta(first)[1]["class_weights"]
    numbers = f"--config.loss.class_weights={tuple(weights)}"
    assert tiny.run(*run_flags(tmp_path, second), numbers) == 0
    lines = [(run / "metrics.csv").read_text().splitlines()[:2] for run in (first, second)]
    columns = [dict(zip(*(line.split(",") for line in of_run))) for of_run in lines]
    losses = [{k: v for k, v in values.items() if "loss" in k} for values in columns]
    assert losses[0] == losses[1]
    assert len(losses[0]) > 3
