"""VSPW: an epoch of training has one frame of every video, all else has all frames."""

import collections
import json

import numpy as np
import pytest

from configs.plus import vspw_upernet_resnet50
from memseg_jax.data import open_split, packed, pipeline
from memseg_jax.errors import UserError
from memseg_jax.modes import check_data, pack, plan
from tests.official_trees import write_tree
from tests.tiny import assert_same_samples

VIDEOS, FRAMES = 4, 2  # of the training split; FRAMES is that of the tree


@pytest.fixture
def config(tmp_path):
    write_tree("vspw", tmp_path / "data", {"train": VIDEOS * FRAMES, "val": 3}, size=(12, 16))
    config = vspw_upernet_resnet50.get_config()
    config.data.root = str(tmp_path / "data")
    config.augment.base_size = ()
    config.augment.crop = (8, 8)
    config.train.batch_size, config.replica_groups = 2, 1
    config.data.threads = 2
    return config


def train_source(config):
    return open_split(config.data, "train")


def drawn(config, source, epochs):
    """The frames of each epoch, as indices."""
    steps = pipeline.steps_per_epoch(VIDEOS, config.train.batch_size)
    found = []
    for epoch in range(epochs):
        with pipeline.train_batches(source, config, epoch * steps, steps) as batches:
            found.append([int(k) for batch in batches for k in batch["index"]])
    return found


def test_all_frames_are_samples_and_those_of_a_video_are_together(config, tmp_path):
    source, evaluated = train_source(config), open_split(config.data, "val")
    assert (len(source), source.groups) == (VIDEOS * FRAMES, (FRAMES,) * VIDEOS)
    assert (len(evaluated), evaluated.groups) == (3, (2, 1))
    assert [name.split("/")[1] for name in source.names] == ["00000000", "00000001"] * VIDEOS
    write_tree("vspw", tmp_path / "deep", {"train": VIDEOS * FRAMES, "val": 1}, nested=True)
    config.data.root = str(tmp_path / "deep")
    assert train_source(config).names == source.names


def test_an_epoch_draws_one_frame_of_every_video(config):
    source = train_source(config)
    epochs = drawn(config, source, 12)
    for frames in epochs:
        assert sorted(frame // FRAMES for frame in frames) == list(range(VIDEOS))
    assert len({tuple(frames) for frames in epochs}) > 6
    assert {frame for frames in epochs for frame in frames} == set(range(len(source)))


def test_frames_are_drawn_evenly(config):
    samples = pipeline.TrainSamples(train_source(config), config)
    indices = [samples.locate(item)[2] for item in range(2000 * VIDEOS)]
    counts = np.array(list(collections.Counter(indices).values()))
    assert len(counts) == VIDEOS * FRAMES
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(2000 * 0.25)


def test_the_stream_is_the_same_however_it_is_read(config):
    source = train_source(config)
    whole = drawn(config, source, 3)
    config.data.threads = 0
    assert drawn(config, source, 3) == whole
    with pipeline.train_batches(source, config, 3, 1) as batches:  # resumed in an epoch
        (batch,) = batches
    assert batch["index"].tolist() == whole[1][2:]
    parts = []
    for index in range(2):
        with pipeline.train_batches(source, config, 0, 2, index, 2) as batches:
            parts.append([int(k) for batch in batches for k in batch["index"]])
    assert [parts[k % 2][k // 2] for k in range(4)] == whole[0]
    config.seed += 1
    assert drawn(config, source, 3) != whole


def test_packed_frames_keep_their_videos(config, tmp_path):
    source = train_source(config)
    expected = drawn(config, source, 3)
    config.data.packed = str(tmp_path / "packed")
    pack.run(config)
    again = train_source(config)
    assert isinstance(again, packed.PackedSource)
    assert tuple(again.groups) == source.groups
    assert_same_samples(again, source)
    assert drawn(config, again, 3) == expected
    manifest = json.loads((tmp_path / "packed/train.packed.json").read_text())
    assert manifest["groups"] == [FRAMES] * VIDEOS


def test_all_frames_are_checked_and_counted(config, capsys):
    assert check_data.run(config) == 0
    printed = capsys.readouterr().out
    assert "train: 8 images" in printed
    assert "the published split has 198244 images, this one 8" in printed
    assert "All 11 samples can be read" in printed
    assert plan.epoch_images(config.data) == VIDEOS
    config.data.root = ""
    assert plan.epoch_images(config.data) == 2806


def test_videos_that_are_missing_or_listed_twice(config, tmp_path):
    path = tmp_path / "data/train.txt"
    lines = path.read_text()
    path.write_text(lines + "elsewhere\n")
    with pytest.raises(UserError, match=r"train\.txt: .* there is no folder .*elsewhere/origin "):
        train_source(config)
    path.write_text(lines + lines.splitlines()[0])
    with pytest.raises(UserError, match=r"train\.txt: videos that are named twice: 0___"):
        train_source(config)
