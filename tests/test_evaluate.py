"""Evaluating: what is written, and numbers that do not depend on how images are batched."""

import csv
import gc
import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memseg_jax.data import open_split
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import sharding
from memseg_jax.scoring.evaluator import Evaluator
from memseg_jax.scoring.metrics import confusion_matrix
from tests import tiny
from tests.small_models import ThreeConvolutions, random_variables

pytestmark = [
    pytest.mark.usefixtures("quiet_entry"),
]
# Most of these are padded to 64x64; some sides are no multiples of the stride 8.
SIZES = [(64, 64), (40, 56), (33, 47), (64, 41), (57, 64), (35, 60), (1, 50), (50, 36)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes")
    return tiny.write_folder(folder, {"train": [(32, 32)], "val": SIZES})


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tiny.save_random_model(tmp_path_factory.mktemp("random_model"))


@pytest.fixture
def matrix(root, compilations, monkeypatch):
    """Returns the confusion matrix of the split of many sizes with fields of config.eval."""
    config = tiny.get_config()
    config.data.root = str(root)
    model = build_segmentor(config).clone(backbone=ThreeConvolutions())
    variables = random_variables(model, 3)
    source = open_split(config.data, "val")

    def compute(mesh=None, **fields):
        config.eval.update(fields)
        mesh = mesh or sharding.make_mesh()
        monkeypatch.setattr(sharding, "make_mesh", lambda *args, **kw: mesh)
        return Evaluator(config, model, source).evaluate(variables).matrix

    return compute


def moved(a, b):
    """The share of pixels that two confusion matrices count differently."""
    assert a.sum() == b.sum()
    return np.abs(a - b).sum() / a.sum()


# ---- The mode -----------------------------------------------------------------------------------


def test_evaluate_writes_scores_by_name(root, workdir, compilations, capsys):
    status = tiny.run(f"--config.data.root={root}", "--workdir", workdir, "--mode=evaluate")
    shown = capsys.readouterr()
    assert status == 0, shown.err
    scores = json.loads((workdir / "metrics.json").read_text())
    assert (scores["step"], scores["split"], scores["images"], scores["mode"]) == (
        7, "val", len(SIZES), "auto",
    )  # fmt: skip
    labels = [sample["label"] for sample in _samples(root)]
    truth = np.sum([np.bincount(x.ravel(), minlength=256)[:3] for x in labels], axis=0)
    assert scores["pixels"] == truth.sum()
    with open(workdir / "per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["ground", "box", "disc"]
    assert [int(row["true_pixels"]) for row in rows] == truth.tolist()
    assert sum(int(row["predicted_pixels"]) > 0 for row in rows) > 1
    assert np.mean([float(row["iou"]) for row in rows]) == pytest.approx(scores["mIoU"])
    for name in ("mIoU", "mAcc", "aAcc", "mDice"):
        assert f"{name} {scores[name]:.4f}" in shown.out
    assert (workdir / "examples.png").is_file()


def _samples(root):
    config = tiny.get_config()
    config.data.root = str(root)
    source = open_split(config.data, "val")
    return [source[index] for index in range(len(source))]


def test_a_class_in_neither_truth_nor_prediction_is_absent(tmp_path, compilations, capsys):
    config = tiny.get_config()
    config.data.class_names = ("ground", "box", "disc", "unicorn")
    config.data.palette = ()
    root = tiny.write_folder(tmp_path / "data")
    workdir = tiny.save_random_model(tmp_path / "run", config, never=3)
    flags = ["--config.data.class_names=('ground','box','disc','unicorn')"]
    status = tiny.run(
        f"--config.data.root={root}", "--workdir", workdir, "--mode=evaluate", *flags,
        "--config.data.palette=()",
    )  # fmt: skip
    shown = capsys.readouterr()
    assert status == 0, shown.err
    (line,) = (line for line in shown.out.splitlines() if line.startswith("unicorn"))
    assert line.split() == ["unicorn", "absent"]
    scores = json.loads((workdir / "metrics.json").read_text())
    assert scores["per_class"][3]["iou"] is None
    assert scores["mIoU"] == pytest.approx(np.mean([c["iou"] for c in scores["per_class"][:3]]))


def test_no_checkpoint(tmp_path, capsys):
    root = f"--config.data.root={tiny.data_root()}"
    assert tiny.run(root, "--workdir", tmp_path / "typo", "--mode=evaluate") == 1
    assert "there is no checkpoint in" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


def test_classes_of_the_checkpoint_in_another_order_are_refused(workdir, capsys, compilations):
    flags = [f"--config.data.root={tiny.data_root()}", "--workdir", workdir, "--mode=evaluate"]
    status = tiny.run(*flags, "--config.data.class_names=('box','ground','disc')")
    assert status == 1
    assert "class_names" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (
            "mode=slides",
            "config.eval.mode is 'slides'; expected one of 'auto', 'whole', 'slide'. Did you",
        ),
        ("batch_size=0", "config.eval.batch_size is 0; expected a whole number from 1 to"),
        ("scales=()", "config.eval.scales is (); expected 1 to 100 factors"),
        ("scales=(1.0,-2)", "config.eval.scales[1] is -2; expected a number above 0"),
        ("canvases=((64,64),(64,60))", "config.eval.canvases[1] is (64, 60); expected (height"),
        ("size_multiple=30", "config.eval.size_multiple is 30; expected a multiple of"),
    ],
)
def test_impossible_values(workdir, capsys, change, answer):
    flags = [f"--config.data.root={tiny.data_root()}", "--workdir", workdir, "--mode=evaluate"]
    assert tiny.run(*flags, f"--config.eval.{change}") == 1
    assert answer in capsys.readouterr().err


# ---- The numbers --------------------------------------------------------------------------------


def test_padded_sizes_give_the_numbers_of_exact_sizes(matrix, compilations):
    exact = matrix(exact_sizes=len(SIZES))
    assert (exact.sum(axis=0)[:3] > 0).sum() > 1  # several classes are predicted
    networks = [what for what in compilations if "network" in what]
    assert len(networks) == len(SIZES)
    compilations.clear()
    padded = matrix(exact_sizes=1, size_multiple=32)
    assert moved(exact, padded) < 1e-3  # ties
    networks = [what for what in compilations if "network" in what]
    assert len(networks) <= 3  # one exact size, 32x64 and 64x64
    assert len(compilations) <= 2 * len(networks) + 1


def test_batches_and_devices_change_nothing(matrix, compilations):
    one = matrix(exact_sizes=0, size_multiple=64, batch_size=1)
    assert len(compilations) == 2
    assert moved(one, matrix(batch_size=3)) < 1e-3
    eight = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    assert moved(one, matrix(mesh=eight, batch_size=1)) < 1e-3


def test_every_image_is_counted_once(matrix, root, compilations):
    total = matrix(exact_sizes=0, size_multiple=64, batch_size=3)
    truth = sum(confusion_matrix(s["label"], s["label"], 3).sum(axis=1) for s in _samples(root))
    np.testing.assert_array_equal(total.sum(axis=1), truth)
    assert total[:, 3].sum() == 0


def test_sliding_windows(matrix, compilations):
    slide = {"mode": "slide", "window": (32, 40), "stride": (20, 24)}
    windows = matrix(**slide, exact_sizes=0, size_multiple=64, batch_size=1)
    # One for full windows; one for all that are smaller, because the images are.
    assert sum("network" in what for what in compilations) == 2
    assert len(compilations) <= 8
    assert moved(windows, matrix(batch_size=5)) < 1e-3


@pytest.mark.slow
def test_sliding_windows_of_exact_sizes(matrix):
    slide = {"mode": "slide", "window": (32, 40), "stride": (20, 24)}
    windows = matrix(**slide, exact_sizes=0, size_multiple=64, batch_size=1)
    assert moved(windows, matrix(exact_sizes=9)) < 1e-3
    # A window as large as every image is the whole image.
    assert moved(matrix(window=(64, 64)), matrix(mode="whole")) < 1e-3


@pytest.mark.slow
def test_copies_of_split_weights_are_gone_after_the_evaluation(root, compilations):
    config = tiny.get_config()
    config.data.root = str(root)
    model = build_segmentor(config).clone(backbone=ThreeConvolutions())
    mesh = Mesh(np.array(jax.devices()).reshape(1, 8), ("data", "fsdp"))
    variables = jax.tree.map(
        lambda x: jax.device_put(x, split(x, mesh)), random_variables(model, 3)
    )
    evaluator = Evaluator(config, model, open_split(config.data, "val"))
    before = held()
    assert evaluator.evaluate(variables).matrix.sum() > 0
    assert held() == before


def split(x, mesh):
    """The sharding of an array over all devices by its last axis, if that can be."""
    splits = x.shape[-1] % mesh.size == 0
    return NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "fsdp" if splits else None))


def held():
    """Bytes of all arrays on devices; several arrays may be views of one buffer."""
    gc.collect()
    shards = [shard.data for x in jax.live_arrays() for shard in x.addressable_shards]
    return sum({x.unsafe_buffer_pointer(): x.nbytes for x in shards}.values())
