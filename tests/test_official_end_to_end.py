"""The published data sets, from their official folders to scores, through the real entry.

A generated tree in the layout of the download is trained on for a few steps and evaluated, as
published and with several scales and mirror images; on one device, on eight, and by two processes;
from folders and packed.
"""

import csv
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from memseg_jax import command_line, main
from memseg_jax.data import open_split
from memseg_jax.runtime import compilation, sharding
from tests import session, tiny
from tests.official_trees import SPLITS, write_tree
from tests.small_models import FAST_COMPILE

pytestmark = pytest.mark.slow
DATA_SETS = ("lip", "ade20k", "cityscapes", "cocostuff10k")
# What does not depend on how images are read: in CI, that which is trained on two splits and
# evaluated by windows, too.
ON_ANY = [
    pytest.param(name, marks=() if name == "cityscapes" else pytest.mark.exhaustive)
    for name in DATA_SETS
]
# The other two are read as these are, and each has its reader's tests.
MOST_DIFFERENT = [
    pytest.param(name, marks=() if name in ("lip", "cityscapes") else pytest.mark.exhaustive)
    for name in DATA_SETS
]
# The published recipe at the size of a stamp.
SMALL = {
    "model.backbone": "resnet18",
    "model.backbone_width": 0.125,
    "model.feature_dim": 16,
    "model.aspp_dim": 16,
    "model.aspp_dilations": (1, 2),
    "model.memory.attention_dim": 8,
    "augment.base_size": (64, 48),
    "augment.crop": (32, 32),
    "eval.base_size": (64, 48),
    "eval.size_multiple": 32,
    "train.batch_size": 8,
    "train.epochs": 12,
    "train.log_every": 1,
    "train.eval_every": 0,
    "data.threads": 2,
    "data.prefetch": 2,
}
MS_FLIP = {"eval.scales": (0.5, 1.5), "eval.window": (32, 32), "eval.stride": (24, 24)}
MS_FLIP_LIP = {}  # its published test has one scale and whole images
COUNTS = {"train": 16, "eval": 3}  # of which 3 are divided evenly by nothing
STEPS = 24
EARLY = slice(0, 4)  # steps after which rounding has not grown yet


class Walk:
    """One data set: its tree, its runs, and which devices they use.

    Attributes:
        name: of the data set.
        root: its tree.
        folder: for everything that is written.
        devices: how many devices programs use from now on.
        scores: of the evaluation at the end of the training.
    """

    def __init__(self, name, folder):
        self.name, self.folder, self.devices = name, folder, 1
        self.root = folder / "data"
        self._evaluated = {}
        counts = dict.fromkeys(SPLITS[name], 0)
        counts[SPLITS[name][0]] = COUNTS["train"]
        counts[self.config().data.eval_split] = COUNTS["eval"]
        if name == "cityscapes":  # which trains on both splits
            counts["train"] -= COUNTS["eval"]
        write_tree(name, self.root, counts)

    def arguments(self, workdir, words="", **fields):
        """The command line; the names of fields have two underscores instead of dots."""
        fields = {name.replace("__", "."): value for name, value in fields.items()}
        chosen = SMALL | {"data.root": str(self.root)}
        if words and self.name != "lip":
            chosen |= MS_FLIP
        fields = chosen | fields
        path = tiny.ROOT / "configs" / f"{self.name}_resnet50.py"
        words = f":{words}" if words else ""
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        return ["main", f"--config={path}{words}", f"--workdir={workdir}", *flags]

    def config(self, **fields):
        arguments = self.arguments("", **fields)
        return command_line.parse(arguments, {"workdir": ""}).config

    def run(self, workdir, mode="train", words="", **fields):
        assert main.main([*self.arguments(workdir, words, **fields), f"--mode={mode}"]) == 0
        return workdir

    @property
    def run_folder(self):
        return self.folder / "run"

    def evaluate(self, maps, words="", **fields):
        """Evaluates the run; returns the scores and the saved label maps by name of the sample."""
        maps = self.folder / maps
        self.run(self.run_folder, "evaluate", words, eval__save_predictions=str(maps), **fields)
        return scores_of(self.run_folder), label_maps(maps)

    def evaluated(self, words=""):
        """What `evaluate` gives on one device, computed once."""
        if words not in self._evaluated:
            assert self.devices == 1
            self._evaluated[words] = self.evaluate(f"evaluated_{words}", words)
        return self._evaluated[words]


def scores_of(workdir):
    scores = json.loads((workdir / "metrics.json").read_text())
    scores.pop("seconds", None)
    return scores


def label_maps(folder):
    return {path.stem: np.array(Image.open(path)) for path in folder.glob("*.png")}


def losses_of(workdir):
    with open(workdir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return np.array([float(row["loss"]) for row in rows if row.get("loss")])


def assert_agree(maps, others):
    """Label maps that rounding may have changed in a few pixels."""
    assert maps.keys() == others.keys()
    different = np.mean([np.mean(maps[name] != others[name]) for name in maps])
    assert different < 2e-3


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """Returns the trained `Walk` of a data set; equal programs are compiled once."""
    programs, made = {}, {}
    current = []
    real_mesh = sharding.make_mesh

    def compile_once(function, what, *args):
        lowered = function.lower(*args)
        text = lowered.as_text()
        if text not in programs:
            programs[text] = lowered.compile(compiler_options=FAST_COMPILE)
        return programs[text]

    def make_mesh(devices=None, layout=None):
        return real_mesh(jax.devices()[: current[-1].devices], layout)

    def walk_of(name):
        if name not in made:
            made[name] = Walk(name, tmp_path_factory.mktemp(name))
            current.append(made[name])
            made[name].run(made[name].run_folder)
            made[name].scores = scores_of(made[name].run_folder)
        current.append(made[name])
        made[name].devices = 1
        return made[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "compile_with_notice", compile_once)
        patch.setattr(sharding, "make_mesh", make_mesh)
        patch.setattr(main, "set_up_logging", lambda: None)
        patch.setattr(compilation, "keep_programs", lambda: None)
        yield walk_of


@pytest.mark.parametrize("name", MOST_DIFFERENT)
def test_trained_evaluated_and_scored(name, walks):
    walk = walks(name)
    losses = losses_of(walk.run_folder)
    assert len(losses) == STEPS
    assert np.isfinite(losses).all()
    plain, plain_maps = walk.evaluated()
    flipped, flipped_maps = walk.evaluated("ms_flip")
    assert (plain["images"], plain["flip"], flipped["flip"]) == (COUNTS["eval"], False, True)
    assert plain["mIoU"] == walk.scores["mIoU"]
    # An independent computation from the files.
    source = open_split(walk.config().data, walk.config().data.eval_split)
    for scores, maps in ((plain, plain_maps), (flipped, flipped_maps)):
        assert sorted(maps) == sorted(source.names)
        assert scores["mIoU"] == pytest.approx(mean_iou(source, maps), abs=1e-12)
    # So short a training may have found one class only; then no scale can change anything.
    if len(np.unique(np.concatenate([x.ravel() for x in plain_maps.values()]))) > 1:
        assert any((plain_maps[key] != flipped_maps[key]).any() for key in plain_maps)


@pytest.mark.parametrize("name", ON_ANY)
def test_eight_devices_give_the_same_scores(name, walks):
    walk = walks(name)
    expected = [walk.evaluated(words) for words in ("", "ms_flip")]
    walk.devices = 8
    for words, (scores, maps) in zip(("", "ms_flip"), expected):
        again, again_maps = walk.evaluate(f"on_eight_{words}", words)
        assert_agree(again_maps, maps)
        assert again["pixels"] == scores["pixels"]
        assert again["mIoU"] == pytest.approx(scores["mIoU"], abs=2e-3)


@pytest.mark.parametrize("name", ON_ANY)
def test_eight_devices_train_the_same(name, walks):
    walk = walks(name)
    walk.devices = 8
    walk.run(walk.folder / "on_eight")
    found, expected = losses_of(walk.folder / "on_eight"), losses_of(walk.run_folder)
    np.testing.assert_allclose(found[EARLY], expected[EARLY], rtol=1e-3)


@pytest.mark.parametrize("name", ON_ANY)
def test_packed(name, walks):
    walk = walks(name)
    scores, maps = walk.evaluated()
    packed = str(walk.folder / "packed")
    walk.run(walk.run_folder, "pack", data__packed=packed)
    hidden = walk.root.rename(walk.folder / "hidden")
    try:
        again, again_maps = walk.evaluate("from_packed", data__packed=packed)
        walk.run(walk.folder / "packed_run", data__packed=packed)
        data = walk.config(data__packed=packed).data
        sources = {s: open_split(data, s) for s in (data.train_split, data.eval_split)}
    finally:
        hidden.rename(walk.root)
    assert again == scores
    assert all(np.array_equal(again_maps[key], maps[key]) for key in maps)
    found, expected = losses_of(walk.folder / "packed_run"), losses_of(walk.run_folder)
    np.testing.assert_array_equal(found, expected)
    for split, source in sources.items():
        tiny.assert_same_samples(source, open_split(walk.config().data, split))


@pytest.mark.exhaustive  # in CI, on other data: runtime/test_several_processes.py
@pytest.mark.parametrize("name", ON_ANY)
def test_two_processes_train_and_score_the_same(name, walks):
    walk = walks(name)
    expected, expected_maps = walk.evaluated()
    workdir = walk.folder / "two"
    in_two_processes(walk.arguments(workdir))
    found = losses_of(workdir)
    assert len(found) == STEPS
    np.testing.assert_allclose(found[EARLY], losses_of(walk.run_folder)[EARLY], rtol=1e-3)
    assert scores_of(workdir)["pixels"] == expected["pixels"]
    # The weights of the run by one process, as those of the other have drifted away by rounding.
    maps = walk.folder / "maps_of_two"
    arguments = walk.arguments(walk.run_folder, eval__save_predictions=str(maps))
    in_two_processes([*arguments, "--mode=evaluate"])
    scores = scores_of(walk.run_folder)
    assert (scores["images"], scores["pixels"]) == (expected["images"], expected["pixels"])
    assert scores["mIoU"] == pytest.approx(expected["mIoU"], abs=2e-3)
    assert_agree(label_maps(maps), expected_maps)


def in_two_processes(arguments):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": tiny.FLAGS}
    env |= {"MEMSEG_CACHE": session.cache(), "MEMSEG_HEARTBEAT_SECONDS": "120"}
    flags = [f"--coordinator_address=localhost:{port}", "--num_processes=2"]
    command = [sys.executable, "-m", "memseg_jax.main", *arguments[1:], *flags]
    both = [
        subprocess.Popen(
            [*command, f"--process_id={index}"], cwd=tiny.ROOT, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=900)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], printed


def mean_iou(source, maps):
    """The mean over the classes of truth or prediction, from sets of pixels."""
    truth = np.concatenate([source[k]["label"].ravel() for k in range(len(source))])
    found = np.concatenate([maps[source.names[k]].ravel() for k in range(len(source))])
    valid = truth != 255
    truth, found = truth[valid], found[valid]
    return np.mean(
        [
            np.sum((truth == k) & (found == k)) / np.sum((truth == k) | (found == k))
            for k in np.union1d(truth, found)
        ]
    )
