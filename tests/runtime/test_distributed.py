"""Several processes as one run: real processes that train, are killed, and go on.

They run in double precision (see `small_program`), so that sums in another order, which is all that
several processes change, do not show in the nine digits of metrics.csv.
"""

import contextlib
import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest
from PIL import Image

from memseg_jax import checkpoint, main
from memseg_jax.errors import UserError
from memseg_jax.runtime import distributed
from memseg_jax.scoring import evaluator
from memseg_jax.scoring.findings import Findings
from tests import gcs, session, tiny

PROGRAM = (sys.executable, "-m", "tests.small_program")
WITH_RESNET = (sys.executable, "-m", "memseg_jax.main", "--config", tiny.CONFIG)
STEPS = 16
LIMIT = 600  # seconds; the machine may be busy
LOSSES = ("loss", "loss_stage1", "loss_stage2", "loss_aux", "loss_memory", "lr")


# ---- Flags, without a second process ------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (("perhaps",), "--distributed=perhaps: expected one of auto, on, off"),
        (("on",), "--distributed=on: JAX knows no cluster here"),
        (("off", "host:1", "2", "0"), "--coordinator_address does not go with --distributed=off"),
        (("auto", "host:1", "2", None), "--coordinator_address without --process_id"),
        (("auto", None, "2", "0"), "--num_processes without --coordinator_address"),
        (("auto", "host", "2", "0"), "--coordinator_address=host: expected HOST:PORT"),
        (("auto", "host:1", "two", "0"), "--num_processes=two: expected a whole number"),
        (("auto", "host:1", "2", "-1"), "--process_id=-1: expected a whole number"),
        (("auto", "host:1", "2", "2"), "--process_id=2: expected 0 to 1"),
    ],
)
def test_flags_that_do_not_fit(flags, answer, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UserError, match=answer):
        distributed.start(*flags)


def test_alone_is_the_default(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_")):
            monkeypatch.delenv(name)
    distributed.start()
    distributed.start("off")
    assert (distributed.process_index(), distributed.process_count()) == (0, 1)
    assert distributed.is_primary()


def test_one_task_of_slurm_is_alone(monkeypatch):
    values = {"JOB_ID": "7", "STEP_NODELIST": "a", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    distributed.start("auto")
    assert distributed.process_count() == 1


def test_alone_everything_is_its_own():
    assert (
        distributed.reduce_on_primary("any", b"mine", lambda payloads: b"+".join(payloads))
        == b"mine"
    )
    assert distributed.on_primary("any", lambda: {"a": [1, None]}) == {"a": [1, None]}
    distributed.check_same("any", {"a": 1})
    distributed.failed(ValueError("not told to anybody"))
    distributed.finish(1)


class Unreliable:
    """In the place of the runtime's key-value store: answers after some failures only."""

    def __init__(self, failures, answers):
        self.failures, self.answers = failures, answers

    def key_value_dir_get(self, folder):
        self.failures -= 1
        if self.failures >= 0:
            raise RuntimeError("UNAVAILABLE: failed to connect to all addresses")
        return self.answers.get(folder, [])


def test_notes_are_looked_for_after_failures_too(monkeypatch):
    run = distributed._Run()
    run.client = Unreliable(5, {distributed._STOP: [("memseg_jax/stop/1", "15")]})
    monkeypatch.setattr(distributed, "_run", run)
    monkeypatch.setattr(distributed, "_LOOK_EVERY", 0.001)
    monkeypatch.setattr(distributed, "_LOOK_AT_LEAST_EVERY", 0.01)
    looking = threading.Thread(target=distributed._look_for_notes, daemon=True)
    looking.start()
    assert distributed.stop_requested().wait(60)
    run.finished.set()
    looking.join(60)
    assert not looking.is_alive()
    assert run.client.failures < 0


class Store:
    """In the place of the runtime's key-value store, for one process of two."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    key_value_set_bytes = key_value_set

    def blocking_key_value_get_bytes(self, key, milliseconds):
        if key not in self.values:
            raise RuntimeError("DEADLINE_EXCEEDED: not there")
        return self.values[key]

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]

    def key_value_delete(self, prefix):
        self.values = {k: v for k, v in self.values.items() if not k.startswith(prefix)}


def test_a_meeting_is_over_when_all_have_come_or_one_has_called_it_off(monkeypatch):
    store = Store()
    monkeypatch.setattr(distributed, "_run", distributed._Run())
    distributed._run.client, distributed._run.count = store, 2
    for name in ("a", "b", "c"):
        store.values[f"{distributed._MEETINGS}{name}/1"] = "here"
        distributed.meet(name, 60, "x")
    # What is left is that of the last one, which the others may be at.
    assert set(store.values) == {f"{distributed._MEETINGS}c/{index}" for index in range(2)}
    with pytest.raises(TimeoutError, match="process 1 did not come within 0 s"):
        distributed.meet("d", 0, "x")
    distributed._run.index = 1
    distributed.call_off("x")
    distributed._run.index = 0
    with pytest.raises(RuntimeError, match="another process could not do its part"):
        distributed.meet("e", 60, "x")
    store.values[f"{distributed._MEETINGS}f/1"] = "here"
    distributed.meet("f", 60, "y")


def test_flags_are_only_for_some_modes(capsys):
    arguments = ["main", "--config", str(tiny.CONFIG), "--mode", "predict", "--input", "x"]
    assert main.main([*arguments, "--distributed=off"]) == 1
    assert (
        "--distributed is only for --mode train and evaluate and report and benchmark"
        in capsys.readouterr().err
    )


def test_parts_of_an_evaluation_add_up():
    rng = np.random.default_rng(0)

    def part(index):
        matrix = rng.integers(0, 2**60, (3, 4))  # more than float64 holds exactly
        triple = tuple(rng.integers(0, 9, (2, 3)).astype(np.uint8) for _ in range(3))
        findings = Findings(3)
        findings.per_image.add(index, f"ä/{index}", (2, 3), matrix)
        return evaluator._Part(
            matrix, findings=findings, examples={index: triple}, sizes={f"ä/{index}": (2, 3)}
        )

    parts = [part(index) for index in range(3)]
    total = evaluator._Part(np.zeros((3, 4), np.int64), findings=Findings(3))
    for each in parts:
        total._add(each._packed(with_examples=True))
    np.testing.assert_array_equal(total.matrix, sum(each.matrix for each in parts))
    np.testing.assert_array_equal(total.findings.per_image.total(), total.matrix)
    assert total.sizes == {"ä/0": (2, 3), "ä/1": (2, 3), "ä/2": (2, 3)}
    for index, each in enumerate(parts):
        for ours, theirs in zip(total.examples[index], each.examples[index], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert total.complete
    parts[1].complete = False
    total._add(parts[1]._packed(with_examples=False))
    assert not total.complete


# ---- Real processes -----------------------------------------------------------------------------


def start(
    count, workdir, *arguments, root=None, devices=1, program=PROGRAM, heartbeat=300, last=(),
    homes=None, of_last=(),
):  # fmt: skip
    """Starts the processes of one run; their output goes to files beside the workdir.

    `last` are further arguments of the last process, `of_last` its own environment. With a folder
    `homes`, each process has a disk of its own there, as far as a process can tell, and the output
    goes there.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"{tiny.FLAGS} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "MEMSEG_CACHE": session.cache(),
        "MEMSEG_HEARTBEAT_SECONDS": str(heartbeat),
        "PYTHONFAULTHANDLER": "1",  # for `where_they_are`
    }
    processes = []
    for index in range(count):
        command = [*program, "--workdir", workdir, *arguments]
        command.append(f"--config.data.root={root or tiny.data_root()}")
        if count > 1:
            command.append(f"--coordinator_address=127.0.0.1:{port}")
            command += [f"--num_processes={count}", f"--process_id={index}"]
        if index == count - 1:
            command += last
        beside, own, place = workdir, env, tiny.ROOT
        if homes:
            beside = homes / "run"
            place = tempfile.mkdtemp(dir=homes)
            own = env | {"HOME": place, "TMPDIR": place, "PYTHONPATH": str(tiny.ROOT)}
        if index == count - 1:
            own = own | dict(of_last)
        path = beside.with_name(f"{beside.name}.{time.monotonic_ns()}.{index}.log")
        with open(path, "w") as file:
            process = subprocess.Popen(
                list(map(str, command)), cwd=place, env=own, stdout=file, stderr=file
            )
        process.log = path
        processes.append(process)
    return processes


def finish(processes, limit=LIMIT):
    """Waits for all; returns their exit statuses and what they printed."""
    try:
        for process in processes:
            process.wait(limit)
    except subprocess.TimeoutExpired:
        pytest.fail(where_they_are(processes))
    finally:
        for process in processes:
            process.kill()
    return [p.returncode for p in processes], [p.log.read_text() for p in processes]


def run(count, workdir, *arguments, **options):
    codes, logs = finish(start(count, workdir, *arguments, **options))
    assert codes == [0] * count, "\n".join(logs)
    return logs


def wait_for(condition, processes):
    limit = time.monotonic() + LIMIT
    while not condition():
        assert all(p.poll() is None for p in processes), [p.log.read_text() for p in processes]
        assert time.monotonic() < limit, where_they_are(processes)
        time.sleep(0.01)


def where_they_are(processes):
    """Ends processes that do not go on; returns what they printed, and all stacks."""
    for process in processes:
        process.send_signal(signal.SIGABRT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        for process in processes:
            process.wait(60)
    return "\n".join(process.log.read_text() for process in processes)


def rows(workdir, column="loss"):
    text = (workdir / "metrics.csv").read_text()
    return [row for row in csv.DictReader(text.splitlines()) if row[column]]


def assert_same_run(workdir, other, losses=LOSSES):
    """Losses of every step to the last of nine digits or nearly so; the scores exactly."""
    ours, theirs = rows(workdir), rows(other)
    assert [row["step"] for row in ours] == [str(step) for step in range(1, STEPS + 1)]
    for a, b in zip(ours, theirs, strict=True):
        for name in losses:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-7, abs=1e-12)
    for name in ("metrics.json", "per_class.csv", "examples.png"):
        assert (workdir / name).read_bytes() == (other / name).read_bytes()


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
