"""Several processes as one run: real processes that train, are killed, and go on."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image

from memseg_jax import checkpoint
from tests import gcs, tiny
from tests.processes import (
    LOSSES,
    STEPS,
    WITH_RESNET,
    assert_same_run,
    finish,
    run,
    start,
    wait_for,
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process with one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    run(1, workdir)
    return workdir


def kill_two_and_go_on(alone, workdir, *arguments, homes=None, model=(), losses=LOSSES, **options):
    """Kills two processes twice, once as they go on; the rest is done by one.

    `arguments` are of the two alone, `model` of the one, too.
    """
    done = 0
    for _ in range(2):
        processes = start(2, workdir, *model, *arguments, homes=homes, **options)
        wait_for(lambda last=done: max(checkpoint.all_steps(workdir), default=0) > last, processes)
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        codes, logs = finish(processes)
        assert codes == [-signal.SIGKILL] * 2
        assert f"resuming at step {done} of {STEPS}" in logs[0] or not done
        done = checkpoint.all_steps(workdir)[-1]
    assert done < STEPS
    (log,) = run(1, workdir, *model, homes=homes)
    assert f"resuming at step {done} of {STEPS}" in log
    assert_same_run(workdir, alone, losses)


ROWS = {"rows": 2, "weight_update": "shared"}


def layout_flags(layout):
    return [f"--config.sharding.{name}={value}" for name, value in layout.items()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "layout"),
    [
        # In CI, parameters that are whole in each process: `test_one_of_two_is_killed`.
        pytest.param(1, {}, id="images", marks=pytest.mark.exhaustive),
        # Two devices of each process: parameters lie on both, and on both processes.
        pytest.param(2, {"fsdp": 4}, id="parameters"),
        # Each process has one half of every image. In CI, in a bucket.
        pytest.param(1, ROWS, id="rows", marks=pytest.mark.exhaustive),
    ],
)
def test_two_processes_are_killed_and_go_on_as_two_and_as_one(alone, tmp_path, devices, layout):
    kill_two_and_go_on(alone, tmp_path / "run", *layout_flags(layout), devices=devices)


@pytest.mark.slow
@pytest.mark.exhaustive  # in CI, with that of MCIBI; what the step does: training/test_methods.py
def test_so_do_two_processes_with_the_memory_of_mcibi_plus_plus(tmp_path):
    model = {"model.method": "mcibi_plus_plus", "loss.consistency": 0.0}
    model |= {"model.memory.momentum": 0.1, "model.memory.base_lr": 0.0}
    model = [f"--config.{name}={value}" for name, value in model.items()]
    run(1, tmp_path / "alone", *model)
    losses = ("loss", "loss_context", "loss_stage1", "loss_stage2", "loss_aux", "lr")
    rows = layout_flags(ROWS)
    kill_two_and_go_on(tmp_path / "alone", tmp_path / "run", *rows, model=model, losses=losses)


@pytest.mark.slow
def test_two_processes_in_a_bucket_are_killed_and_go_on_as_two_and_as_one(alone, bucket, tmp_path):
    kill_two_and_go_on(alone, bucket / "run", *layout_flags(ROWS), homes=tmp_path)
    assert checkpoint.all_steps(bucket / "run") == checkpoint.all_steps(alone)


@pytest.mark.slow
def test_two_processes_in_a_bucket_that_fails_for_a_while(alone, door, tmp_path):
    workdir, refused = door.folder / "run", []
    processes = start(2, workdir, homes=tmp_path)
    wait_for(lambda: checkpoint.all_steps(workdir), processes)
    for kind in (503, gcs.Door.DROP, 429):
        until = time.monotonic() + 3

        def answer(method, path, kind=kind, until=until):
            if time.monotonic() < until:
                refused.append(kind)
                return kind
            return None

        door.answer = answer
        time.sleep(4)
    codes, logs = finish(processes)
    assert codes == [0, 0], "\n".join(logs)
    assert refused
    assert all(log.count("Requests are made again") <= 1 for log in logs)
    assert_same_run(workdir, alone)
    assert checkpoint.all_steps(workdir) == checkpoint.all_steps(alone)


@pytest.mark.slow
def test_one_of_two_processes_may_not_write_for_a_while(alone, door, tmp_path):
    workdir, other, refused = door.folder / "run", gcs.Door(door.behind), []

    def refuse_first_arrays(method, path):
        if method == "POST" and "checkpoints%2F3%2F" in path and "%2Fd%2F" in path:
            refused.append(path)
            return 403
        return None

    other.answer = refuse_first_arrays
    try:
        # Split arrays: small ones that both have are written by the first process alone.
        environment = gcs.environment(other.address)
        processes = start(
            2, workdir, "--config.sharding.fsdp=2", homes=tmp_path, of_last=environment
        )
        codes, logs = finish(processes)
    finally:
        other.shutdown()
        other.server_close()
    assert codes == [0, 0], "\n".join(logs)
    assert refused
    assert "saving the checkpoint of step 3 in gs://" in logs[0]
    assert "Trying again now, at step 6" in logs[0]
    assert_same_run(workdir, alone)
    assert checkpoint.all_steps(workdir) == checkpoint.all_steps(alone)


@pytest.mark.slow
def test_two_processes_from_start_to_end(alone, tmp_path):
    workdir = tmp_path / "run"
    first, second = run(2, workdir)
    assert "parameters on 2 cpu device(s) of 2 process(es)" in first
    assert "step 16/16" in first
    for words in ("step 1", "mIoU", "compiled", "Trained"):
        assert words not in second
    assert_same_run(workdir, alone)
    files = {path.name for path in workdir.iterdir()} - {"tensorboard"}
    assert files == {path.name for path in alone.iterdir()} - {"tensorboard"}


@pytest.mark.slow
def test_one_of_two_is_killed(tmp_path):
    workdir = tmp_path / "run"
    processes = start(2, workdir, heartbeat=30)
    wait_for(lambda: checkpoint.all_steps(workdir), processes)
    os.kill(processes[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    codes, logs = finish(processes, 180)  # a minute on a machine that does nothing else
    assert time.monotonic() - killed < 180
    assert codes[0] not in (0, -signal.SIGKILL)
    assert "lost the connection to another process" in logs[0] or "another task died" in logs[0]
    step = checkpoint.all_steps(workdir)[-1]
    (log,) = run(1, workdir)
    assert f"resuming at step {step} of {STEPS}" in log
    assert f"step {STEPS}/{STEPS}" in log


def broken(tmp_path, split, name):
    root = shutil.copytree(tiny.data_root(), tmp_path / "data")
    (root / "images" / split / name).write_bytes(b"")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_that_one_process_cannot_read_ends_all(tmp_path, split):
    root = broken(tmp_path, split, "03.png")
    codes, logs = finish(start(2, tmp_path / "run", root=root))
    assert codes == [1, 1], logs
    name = f"images/{split}/03.png"
    reader = [log for log in logs if f"error: {name}" in log or "has ended" not in log]
    told = [log for log in logs if "has ended: " in log]
    assert (len(reader), len(told)) == (1, 1), logs
    assert all(name in log for log in logs)
    assert all("Traceback" not in log for log in logs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "last", "words"),
    [
        ("train", "--config.seed=1", "config.seed: 1 there, 0 here"),
        ("benchmark", "--config.data.root=nowhere", "the list of training images: none there, "),
    ],
)
def test_processes_that_do_not_agree_are_refused(tmp_path, mode, last, words):
    codes, logs = finish(start(2, tmp_path / "run", f"--mode={mode}", last=[last]))
    assert codes == [1, 1], logs
    assert all(f"process 1 differs from process 0 in {words}" in log for log in logs)


@pytest.mark.slow
@pytest.mark.parametrize("images", [5, 1])
def test_evaluation_counts_every_image_once(tmp_path, images):
    sizes = {"train": [(32, 32)], "val": [(32, 32)] * images}
    root = tiny.write_folder(tmp_path / "data", sizes)
    model = tiny.save_random_model(tmp_path / "model")
    results = []
    for count in (1, 2):
        workdir = shutil.copytree(model, tmp_path / f"by_{count}")
        maps = tmp_path / f"maps_{count}"
        logs = run(
            count, workdir, "--mode=evaluate", f"--config.eval.save_predictions={maps}",
            root=root, program=WITH_RESNET,
        )  # fmt: skip
        assert f"{images} label maps in {maps}" in logs[0]
        scores = json.loads((workdir / "metrics.json").read_text())
        assert scores.pop("seconds") > 0
        pictures = {path.name: np.array(Image.open(path)) for path in maps.rglob("*.png")}
        results.append((scores, pictures, (workdir / "examples.png").read_bytes()))
    (one, maps_of_one, sheet), (two, maps_of_two, other_sheet) = results
    assert one == two
    assert one["images"] == images
    assert sheet == other_sheet
    assert maps_of_one.keys() == maps_of_two.keys()
    for name, array in maps_of_one.items():
        np.testing.assert_array_equal(array, maps_of_two[name])


@pytest.mark.slow
def test_two_processes_measure_the_batch_of_both(tmp_path):
    workdir = tmp_path / "run"
    first, second = run(2, workdir, "--mode=benchmark", "--distributed=on")
    header, _, row = (line for line in first.splitlines() if line.startswith("| "))
    assert "train img/s" in header
    assert "| 2 x cpu | 8 x 32x32, float32 |" in row
    assert "| " not in second
    assert "compiled" not in second
    result = json.loads((workdir / "benchmark.json").read_text())
    assert (result["devices"], result["batch_size"]) == (2, 8)
    assert result["images_per_second"] == pytest.approx(8 / result["step_seconds"])
    assert f"| {result['images_per_second']:.4g} |" in row
    assert result["data_images_per_second"] > 0
