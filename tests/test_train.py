"""Training end to end: what a run leaves behind, and how it goes on after it was killed."""

import csv
import functools
import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from PIL import Image

from memseg_jax import checkpoint
from memseg_jax.data import open_split
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import compilation, files
from memseg_jax.scoring import memory_history
from memseg_jax.training import optimizer
from memseg_jax.training.state import abstract_state
from tests import tiny

pytestmark = [
    pytest.mark.usefixtures("quiet_entry"),
]
STEPS = 16  # of the whole run of tiny_config
TERMS = ("loss_stage1", "loss_stage2", "loss_aux")
LOSSES = ("loss", *TERMS, "loss_memory", "lr", "grad_norm")


def rows(workdir, column="loss"):
    """The rows of metrics.csv that have a value in a column."""
    text = (workdir / "metrics.csv").read_text()
    return [row for row in csv.DictReader(text.splitlines()) if row[column]]


@functools.cache
def state_shapes():
    """The training state of the tiny config."""
    config = tiny.get_config()
    tx = optimizer.from_config(config, optimizer.schedule_from_config(config, STEPS))
    return abstract_state(build_segmentor(config), tx)


def load_state(workdir):
    """All arrays of the last checkpoint."""
    with checkpoint.Checkpointer(workdir, 2) as checkpointer:
        return checkpointer.restore(state_shapes())[0]


def assert_same_run(workdir, other):
    """Every array and every loss is the same to the last bit, and no step is there twice."""
    left, right = (jax.tree_util.tree_leaves_with_path(load_state(w)) for w in (workdir, other))
    assert len(left) == len(right) > 100
    for (path, a), (_, b) in zip(left, right):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)
    ours, theirs = rows(workdir), rows(other)
    assert [int(row["step"]) for row in ours] == list(range(1, STEPS + 1))
    for a, b in zip(ours, theirs):
        assert [a[name] for name in LOSSES] == [b[name] for name in LOSSES]
    for name in ("metrics.json", "per_class.csv", "examples.png"):
        assert (workdir / name).read_bytes() == (other / name).read_bytes()
    ours, theirs = memory_history.read(workdir), memory_history.read(other)
    assert [record.step for record in ours] == [record.step for record in theirs] == [STEPS]
    for a, b in zip(ours, theirs):
        for name in ("memory", "ages", "pixels", "steps"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


# ---- One run from start to end ------------------------------------------------------------------


def test_what_is_shown():
    workdir, result = tiny.trained()
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "32 training images, 4 evaluation images, 3 classes; 4 epochs of 4 steps" in (
        result.stderr
    )
    notices = result.stderr.splitlines()
    start = notices.index("compiling the training step ...")
    assert notices[start + 1].startswith("compiled the training step in ")
    lines = [line for line in result.stdout.splitlines() if line.startswith("step ")]
    assert len(lines) == STEPS
    for part in ("step 10/16  ", "epoch 3/4  ", "loss ", "(aux ", "stage1 ", "stage2 ", "memory "):
        assert part in lines[9]
    for part in ("lr 0.0", " img/s  ", "data wait ", "left "):
        assert part in lines[9]
    for name in (*tiny.get_config().data.class_names, "mIoU"):
        assert name in result.stdout
    assert f"--workdir {workdir} --mode predict" in result.stdout


def test_what_is_written():
    workdir, _ = tiny.trained()
    config = tiny.get_config()
    losses = rows(workdir)
    assert [int(row["step"]) for row in losses] == list(range(1, STEPS + 1))
    assert [int(float(row["epoch"])) for row in losses[::4]] == [1, 2, 3, 4]
    totals = [sum(float(row[name]) for name in TERMS) for row in losses]
    assert np.mean(totals[-4:]) < 0.95 * np.mean(totals[:4])
    assert [float(row["loss_memory"]) > 0 for row in losses] == [False] * 4 + [True] * 12
    assert float(losses[0]["lr"]) == pytest.approx(config.optimizer.lr)
    scores = json.loads((workdir / "metrics.json").read_text())
    assert (scores["step"], scores["split"], scores["images"]) == (STEPS, "val", 4)
    assert 0 < scores["mIoU"] < 1
    (evaluated,) = rows(workdir, "eval_mIoU")
    assert int(evaluated["step"]) == STEPS
    assert float(evaluated["eval_mIoU"]) == pytest.approx(scores["mIoU"])
    with open(workdir / "per_class.csv", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == list(config.data.class_names)
    with Image.open(workdir / "examples.png") as picture:
        assert min(picture.size) > 200
    assert checkpoint.all_steps(workdir) == [15, 16]  # checkpoint.keep = 2
    step, meta = checkpoint.read_meta(workdir, "best")
    assert (step, meta["data_position"]) == (STEPS, STEPS)
    assert checkpoint.read_scores(workdir)[STEPS]["mIoU"] == scores["mIoU"]
    assert meta["class_names"] == list(config.data.class_names)
    assert [tuple(colour) for colour in meta["palette"]] == list(config.data.palette)
    (record,) = memory_history.read(workdir)
    assert (record.step, record.since) == (STEPS, 0)
    np.testing.assert_array_equal(record.memory, load_state(workdir).memory)
    assert record.steps.max() == STEPS  # every batch has ground
    assert meta["memory_updates"]["pixels"] == record.pixels.tolist()
    assert 0 < record.pixels.sum() <= STEPS * 8 * tiny.SIDE**2


@pytest.mark.slow
def test_baseline_on_generated_images_with_eight_devices(
    tmp_path, capsys, monkeypatch, three_convolutions
):
    monkeypatch.setattr(compilation, "compile_with_notice", tiny.compile_quickly)
    status = tiny.run(
        "--workdir", tmp_path, "--config.data.name=shapes", "--config.data.image_size=(32,32)",
        "--config.data.num_train=16", "--config.data.num_val=9", "--config.train.epochs=2",
        "--config.data.class_names=('a','b','c','d','e','f')", "--config.data.palette=()",
        "--config.model.memory.enabled=false", "--config.train.log_every=2",
        "--config.train.eval_every=1",
    )  # fmt: skip
    shown = capsys.readouterr()
    assert status == 0, shown.err
    # Every second step, and before every save.
    assert [int(row["step"]) for row in rows(tmp_path)] == [2, 3, 4]
    assert [int(row["step"]) for row in rows(tmp_path, "eval_mIoU")] == [2, 4]
    assert "memory" not in shown.out.split("class")[0]
    assert json.loads((tmp_path / "metrics.json").read_text())["images"] == 9


# ---- Going on -----------------------------------------------------------------------------------


def kill_after_a_checkpoint(workdir, *arguments):
    """Trains until a checkpoint is there and kills the program; returns its last checkpoint."""
    process = tiny.start(f"--config.data.root={tiny.data_root()}", "--workdir", workdir, *arguments)
    try:
        limit = time.monotonic() + 240
        while not checkpoint.all_steps(workdir):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < limit
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL
    return checkpoint.all_steps(workdir)[-1]


def kill_and_go_on(workdir, *arguments):
    step = kill_after_a_checkpoint(workdir, *arguments)
    assert 0 < step < STEPS
    result = tiny.program(
        f"--config.data.root={tiny.data_root()}", "--workdir", workdir, *arguments
    )
    assert result.returncode == 0, result.stderr
    assert f"resuming at step {step} of {STEPS}" in result.stderr
    assert f"step {step + 1}/{STEPS}" in result.stdout
    assert f"step {step}/{STEPS}" not in result.stdout
    assert_same_run(workdir, tiny.trained()[0])


@pytest.mark.slow
@pytest.mark.exhaustive  # in CI, killed twice, in a bucket, and stopped (test_stopping.py)
@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("--config.data.workers=2",),
        ("--config.data.threads=0", "--config.data.prefetch=1"),
    ],
    ids=["", "workers", "no threads"],
)
def test_killed_and_continued_is_the_run_that_never_stopped(tmp_path, changes):
    kill_and_go_on(tmp_path, *changes)


@pytest.mark.slow
def test_killed_in_a_bucket_and_continued_is_the_run_on_a_disk_that_never_stopped(bucket):
    kill_and_go_on(bucket)
    assert files.names(bucket) == sorted(
        ["checkpoints", "evaluation.npz", "examples.png", "log.txt", "memory_history"]
        + ["metrics.csv", "metrics.json", "per_class.csv", "per_image.csv", "report.html"]
        + ["scores.json"]
        + ["tensorboard"] * ("tensorboard" in files.names(bucket))
    )  # fmt: skip

    def run(mode, *arguments):
        root = f"--config.data.root={tiny.data_root()}"
        return tiny.program(root, "--workdir", bucket, "--mode", mode, *arguments)

    verified = run("verify")
    assert "all 2 checkpoints in gs://" in verified.stdout, verified.stderr
    files.write_text(bucket / "metrics.json", "")
    evaluated = run("evaluate", f"--config.eval.save_predictions={bucket}/maps")
    assert evaluated.returncode == 0, evaluated.stderr
    for name in ("per_class.csv", "examples.png"):
        assert (bucket / name).read_bytes() == (tiny.trained()[0] / name).read_bytes()
    assert json.loads(files.read_text(bucket / "metrics.json"))["images"] == 4
    maps = files.files_below(bucket / "maps")
    assert [path.name for path in maps] == [f"{number:02d}.png" for number in range(4)]
    for path in sorted((tiny.data_root() / "images/val").iterdir()):
        (bucket / "photos" / path.name).write_bytes(path.read_bytes())
    predicted = run("predict", "--input", f"{bucket}/photos/0[12].png")
    assert predicted.returncode == 0, predicted.stderr
    assert "2 pictures segmented" in predicted.stdout
    assert [p.name for p in files.files_below(bucket / "predictions")] == [
        *(f"{number}{ending}" for number in ("01", "02") for ending in (".png", "_overlay.jpg")),
        "summary.csv",
    ]


@pytest.mark.slow
def test_killed_twice(tmp_path):
    first = kill_after_a_checkpoint(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / str(first))  # as if killed before it
    (tmp_path / "checkpoints" / f"{first}.orbax-checkpoint-tmp").mkdir()
    kill_and_go_on(tmp_path, "--config.data.workers=1")


@pytest.fixture
def finished(tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(tiny.trained()[0], tmp_path / "run")


def test_a_finished_run_is_left_alone(finished, capsys):
    before = (finished / "metrics.csv").read_bytes()
    root = f"--config.data.root={tiny.data_root()}"
    assert tiny.run(root, "--workdir", finished) == 0
    assert f"This run is complete ({STEPS} steps)" in capsys.readouterr().out
    assert (finished / "metrics.csv").read_bytes() == before


def test_harmless_changes_are_accepted(finished, capsys, tmp_path):
    elsewhere = shutil.copytree(tiny.data_root(), tmp_path / "elsewhere")
    status = tiny.run(
        f"--config.data.root={elsewhere}", "--workdir", finished, "--config.train.log_every=7",
        "--config.data.workers=3", "--config.data.threads=1", "--config.data.prefetch=9",
        "--config.eval.mode=slide", "--config.eval.batch_size=4", "--config.checkpoint.keep=1",
        "--config.checkpoint.every=5", "--config.train.eval_every=1",
    )  # fmt: skip
    assert status == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("optimizer.lr=0.05", "optimizer.lr: 0.1 in the checkpoint, 0.05 now"),
        ("train.batch_size=16", "train.batch_size: 8 in the checkpoint, 16 now"),
        ("augment.crop=(24,32)", "augment.crop: [32, 32] in the checkpoint, [24, 32] now"),
        ("train.epochs=5", "train.epochs: 4 in the checkpoint, 5 now"),
        ("model.memory.slots=2", "model.memory.slots: 1 in the checkpoint, 2 now"),
        ("seed=1", "seed: 0 in the checkpoint, 1 now"),
    ],
)
def test_another_config_is_refused(finished, capsys, change, line):
    root = f"--config.data.root={tiny.data_root()}"
    assert tiny.run(root, "--workdir", finished, f"--config.{change}") == 1
    error = capsys.readouterr().err
    assert f"  {line}\n" in error
    assert error.count(" in the checkpoint, ") == 1
    assert "--workdir" in error
    assert load_state(finished).step == STEPS


def test_another_data_set_is_refused(finished, capsys, tmp_path):
    other = shutil.copytree(tiny.data_root(), tmp_path / "other")
    for kind in ("images", "labels"):
        (other / kind / "train" / "00.png").rename(other / kind / "train" / "new.png")
    assert tiny.run(f"--config.data.root={other}", "--workdir", finished) == 1
    error = capsys.readouterr().err
    config = tiny.get_config()
    for root in (tiny.data_root(), other):
        config.data.root = str(root)
        assert open_split(config.data, "train").fingerprint() in error
    assert "the list of training images: fingerprint" in error


def test_a_warmup_that_the_run_would_not_outlast_leaves_no_folder(capsys, tmp_path):
    flags = (f"--config.data.root={tiny.data_root()}", "--workdir", tmp_path / "run")
    assert tiny.run(*flags, f"--config.optimizer.warmup_steps={STEPS}") == 1
    assert f"expected fewer than the run has steps, {STEPS} (" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- The loop, without a real step --------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ("train.batch_size=12", "config.train.batch_size is 12, which 8 devices cannot share"),
        ("replica_groups=3", "config.train.batch_size is 8; expected a multiple of config.replica"),
        ("model.backbone=resnet9", "config.model.backbone is 'resnet9'; expected one of"),
        ("data.palette=((1,2,3),)", "config.data.palette is ((1, 2, 3),); expected as many"),
        ("checkpoint.keep=0", "config.checkpoint.keep is 0"),
        ("data.eval_split=test", "'test'"),
        ("train.freeze=('backbone/layer9*',)", "config.train.freeze names 'backbone/layer9*'"),
    ],
)
def test_impossible_values_are_refused_at_once(tmp_path, capsys, monkeypatch, change, answer):
    tiny.replace_training_step(monkeypatch, None)
    root = f"--config.data.root={tiny.data_root()}"
    assert tiny.run(root, "--workdir", tmp_path, f"--config.{change}") == 1
    assert answer in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        "train.epochs=0", "train.log_every=0", "checkpoint.every=0", "train.eval_every=-1",
        "eval.mode=slides", "eval.size_multiple=30", "eval.batch_size=0",
    ],
)  # fmt: skip
def test_values_that_would_fail_later_are_refused_at_once(tmp_path, capsys, monkeypatch, change):
    tiny.replace_training_step(monkeypatch, None)
    root = f"--config.data.root={tiny.data_root()}"
    assert tiny.run(root, "--workdir", tmp_path, f"--config.{change}") == 1
    assert f"config.{change.partition('=')[0]}" in capsys.readouterr().err


def test_work_survives_an_evaluation_that_fails(tmp_path, capsys, monkeypatch, three_convolutions):
    root = shutil.copytree(tiny.data_root(), tmp_path / "data")
    (root / "images" / "val" / "03.png").write_bytes(b"")
    tiny.count_steps(monkeypatch)
    run = (f"--config.data.root={root}", "--workdir", tmp_path / "run")
    assert tiny.run(*run, "--config.checkpoint.every=1000", "--config.train.eval_every=1") == 1
    assert "images/val/03.png" in capsys.readouterr().err
    assert checkpoint.all_steps(tmp_path / "run") == [4]


def test_the_last_evaluation_is_made_up_for(
    tmp_path, capsys, monkeypatch, compilations, three_convolutions
):
    root = shutil.copytree(tiny.data_root(), tmp_path / "data")
    bad = root / "images" / "val" / "03.png"
    content = bad.read_bytes()
    bad.write_bytes(b"")
    tiny.count_steps(monkeypatch)
    run = (f"--config.data.root={root}", "--workdir", tmp_path / "run")
    assert tiny.run(*run) == 1
    bad.write_bytes(content)
    assert tiny.run(*run) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["step"] == STEPS
    assert checkpoint.read_scores(tmp_path / "run")[STEPS]["mIoU"] > 0


@pytest.mark.slow
def test_a_run_ends_when_the_scores_no_longer_rise(
    tmp_path, capsys, caplog, monkeypatch, compilations, three_convolutions
):
    tiny.count_steps(monkeypatch)  # nothing is learned: the first score is the highest
    run = (f"--config.data.root={tiny.data_root()}", "--workdir", tmp_path)
    run += ("--config.train.eval_every=1",)
    with caplog.at_level("INFO"):
        assert tiny.run(*run, "--config.train.early_stop=2") == 0, capsys.readouterr().err
    assert "no higher mIoU in the last 2 evaluations: the run ends here" in caplog.text
    assert "Trained 12 steps" in capsys.readouterr().out
    assert list(checkpoint.read_scores(tmp_path)) == [4, 8, 12]
    assert checkpoint.all_steps(tmp_path)[-1] == 12

    before = (tmp_path / "metrics.csv").read_bytes()
    assert tiny.run(*run, "--config.train.early_stop=2") == 0
    assert "This run is complete (12 steps)" in capsys.readouterr().out
    assert (tmp_path / "metrics.csv").read_bytes() == before

    assert tiny.run(*run, "--config.train.early_stop=4") == 0  # of which there are 3 at the end
    assert "Trained 4 steps" in capsys.readouterr().out
    assert list(checkpoint.read_scores(tmp_path)) == [4, 8, 12, 16]


def test_in_a_bucket_a_step_makes_no_request(door, capsys, monkeypatch, three_convolutions):
    # What is written in the background, or looked at, every few seconds is left out.
    monkeypatch.setattr(files, "_SECONDS_BETWEEN_LOOKS", 1000)
    made = {}
    for epochs in (1, 40):
        tiny.count_steps(monkeypatch)
        before = len(door.passed)
        status = tiny.run(
            f"--config.data.root={tiny.data_root()}", "--workdir", door.folder / str(epochs),
            f"--config.train.epochs={epochs}", "--config.checkpoint.every=1000",
        )  # fmt: skip
        assert status == 0, capsys.readouterr().err
        # The library below asks for the parts of a checkpoint now more often and now less.
        made[epochs] = len([x for x in door.passed[before:] if "checkpoints" not in x])
        assert len(rows(door.folder / str(epochs))) == 4 * epochs  # a line for every step
    # Both have saved and evaluated once. A minute more or less makes a few: the lock is renewed.
    assert made[40] < made[1] + 30 < 100, made
