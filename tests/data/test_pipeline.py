"""The training stream: position is the step number, whatever prepares the batches."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import common
from memseg_jax.data import IGNORE_LABEL, pipeline
from memseg_jax.data.shapes import Shapes
from memseg_jax.errors import UserError

ROOT = Path(__file__).parents[2]


def make_config(batch_size=4, **data_fields):
    config = common.get_config()
    config.train.batch_size = batch_size
    config.augment.base_size = ()
    config.augment.crop = (24, 24)
    config.data.update(data_fields)
    return config.lock()


class Source:
    """In memory: image i is filled with grey level i, its label with class i % 3."""

    def __init__(self, length=10, broken=None):
        self.length = length
        self.broken = broken

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index == self.broken:
            raise UserError(f"{self.describe(index)}: cannot be decoded")
        return {
            "image": np.full((32, 32, 3), index, np.uint8),
            "label": np.full((32, 32), index % 3, np.uint8),
            "name": str(index),
        }

    def describe(self, index):
        return f"images/{index}.jpg"


class CrashingSource(Source):
    def __getitem__(self, index):
        raise ZeroDivisionError("a bug")


def read(source, config, start=0, steps=3, **processes):
    with pipeline.train_batches(source, config, start, steps, **processes) as batches:
        return list(batches)


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        assert batch.keys() == other.keys() == {"image", "label", "index"}
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def test_shapes_and_types():
    batches = read(Shapes("train", 10, (40, 48)), make_config())
    assert len(batches) == 3
    for batch in batches:
        assert batch["image"].shape == (4, 24, 24, 3)
        assert batch["image"].dtype == np.float32
        assert batch["label"].shape == (4, 24, 24)
        assert batch["label"].dtype == np.uint8
        assert batch["index"].shape == (4,)
        assert batch["index"].dtype == np.int64


def test_batch_of_one():
    (batch,) = read(Shapes("train", 3, (40, 48)), make_config(batch_size=1), steps=1)
    assert batch["image"].shape == (1, 24, 24, 3)
    assert batch["index"].shape == (1,)


@pytest.mark.parametrize(("threads", "prefetch"), [(0, 4), (1, 1), (3, 8), (8, 2)])
def test_threads_do_not_change_the_samples(threads, prefetch):
    source = Shapes("train", 10, (40, 48))
    expected = read(source, make_config(threads=1, prefetch=1), steps=5)
    assert_same(read(source, make_config(threads=threads, prefetch=prefetch), steps=5), expected)


@pytest.mark.parametrize("start", [1, 2, 3, 7])
def test_resumed_stream_equals_the_uninterrupted_one(start):
    source = Shapes("train", 10, (40, 48))  # 2 steps per epoch: crosses epochs
    assert_same(
        read(source, make_config(), start, 8 - start), read(source, make_config(), 0, 8)[start:]
    )


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_global_batch(process_count):
    source = Shapes("train", 10, (40, 48))
    parts = [
        read(source, make_config(), 1, 3, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts)
    ]
    assert_same(joined, read(source, make_config(), 1, 3))


def test_seed_changes_everything():
    source = Shapes("train", 50, (40, 48))
    other = make_config()
    other.seed = 1
    first, second = read(source, make_config(), steps=1)[0], read(source, other, steps=1)[0]
    assert not np.array_equal(first["index"], second["index"])


@given(
    num_images=st.integers(1, 60),
    groups=st.sampled_from([1, 2, 4]),
    per_group=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_an_epoch_visits_images_once(num_images, groups, per_group, epoch):
    config = make_config(batch_size=groups * per_group)
    with config.unlocked():
        config.replica_groups = groups
    samples = pipeline.TrainSamples(Source(num_images), config)
    steps = pipeline.steps_per_epoch(num_images, groups * per_group, groups)
    size = steps * groups * per_group
    located = [samples.locate(epoch * size + item) for item in range(size)]
    assert {place[0] for place in located} == {epoch}
    assert [place[1] for place in located] == list(range(size))
    visits = np.bincount([place[2] for place in located], minlength=num_images)
    assert visits.max() - visits.min() <= 1


def test_epochs_have_different_orders_and_draws():
    samples = pipeline.TrainSamples(Source(40), make_config())
    orders = {tuple(samples.locate(e * 40 + i)[2] for i in range(40)) for e in range(4)}
    assert len(orders) == 4
    # With one image, every item shows it differently augmented.
    alone = pipeline.TrainSamples(Shapes("train", 1, (40, 48)), make_config(batch_size=1))
    assert len({alone[item]["image"].tobytes() for item in range(6)}) == 6


@pytest.mark.parametrize(
    ("num_images", "batch_size", "groups", "expected"),
    [
        (20210, 16, 8, 1263),  # ceil(20210 / 8) = 2527, floor(2527 / 2)
        (20210, 16, 1, 1263),
        (2975, 8, 8, 372),
        (2975, 8, 1, 371),
        (367, 16, 1, 22),
        (5, 16, 1, 1),
    ],
)
def test_steps_per_epoch(num_images, batch_size, groups, expected):
    assert pipeline.steps_per_epoch(num_images, batch_size, groups) == expected


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"config.train.batch_size is 4.*number of processes.*3"):
        pipeline.train_batches(Source(), make_config(), 0, 1, process_count=3)
    with pytest.raises(UserError, match="empty"):
        pipeline.train_batches(Source(0), make_config(), 0, 1)


@pytest.mark.parametrize("threads", [0, 2])
def test_user_error_arrives_as_it_is(threads):
    with pytest.raises(UserError, match=r"^images/3.jpg: cannot be decoded$") as caught:
        read(Source(broken=3), make_config(threads=threads), steps=5)
    assert type(caught.value) is UserError


def test_other_errors_name_the_sample():
    with pytest.raises(ZeroDivisionError) as caught:
        read(CrashingSource(), make_config(threads=2))
    assert "While preparing images/" in " ".join(caught.value.__notes__)


def test_closing_early_and_twice():
    batches = pipeline.train_batches(Source(), make_config(), 0, 1000)
    next(batches)
    batches.close()
    batches.close()
    assert next(batches, None) is None
    pipeline.train_batches(Source(), make_config(), 0, 5).close()  # never asked for anything


def test_no_steps():
    assert read(Source(), make_config(), 5, 0) == []


def test_check_batch():
    label = np.zeros((3, 4, 4), np.uint8)
    label[0, 0, 0] = 10
    label[:, 1] = IGNORE_LABEL
    batch = {"label": label, "index": np.array([7, 8, 9])}
    pipeline.check_batch(batch, 11, str)
    label[1, 2, :3] = 200
    label[2, 3, 0] = 11
    with pytest.raises(UserError) as caught:
        pipeline.check_batch(batch, 11, lambda index: f"labels/{index}.png")
    message = str(caught.value)
    assert "labels/8.png: 200 (3 pixels of the crop)" in message
    assert "labels/9.png: 11 (1 pixels of the crop)" in message
    assert "labels/7.png" not in message
    assert "0..10 and 255" in message


# Worker processes: in programs of their own, as users run them.

PROGRAM = textwrap.dedent(
    """
    import hashlib, json, multiprocessing, sys, time
    from configs import common
    from memseg_jax.data import pipeline
    from memseg_jax.data.shapes import Shapes
    from memseg_jax.errors import UserError

    class Broken(Shapes):
        def __getitem__(self, index):
            raise UserError("images/a.jpg: cannot be decoded")

    def make_config(workers):
        config = common.get_config()
        config.train.batch_size = 4
        config.augment.base_size = ()
        config.augment.crop = (24, 24)
        config.data.workers = workers
        return config

    def digests(workers, start, steps):
        source = Shapes("train", 10, (40, 48))
        with pipeline.train_batches(source, make_config(workers), start, steps) as batches:
            return [hashlib.md5(batch["image"].tobytes() + batch["label"].tobytes()
                    + batch["index"].tobytes()).hexdigest() for batch in batches]

    def main():
    BODY

    if __name__ == "__main__":
        main()
    """
)


def write_program(folder, body):
    path = folder / "program.py"
    path.write_text(PROGRAM.replace("BODY", textwrap.indent(textwrap.dedent(body), "    ")))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return [sys.executable, str(path)], environment


@pytest.mark.slow
def test_workers_give_the_same_samples_and_leave_nothing_behind(tmp_path):
    command, environment = write_program(
        tmp_path,
        """
        result = {"one": digests(1, 0, 3), "two": digests(2, 1, 4)}
        batches = pipeline.train_batches(Shapes("train", 10, (40, 48)), make_config(2), 0, 1000)
        next(batches)
        batches.close()
        try:
            next(pipeline.train_batches(Broken("train", 10, (40, 48)), make_config(2), 0, 9))
        except UserError as error:
            result["error"] = str(error)
        result["alive"] = len(multiprocessing.active_children())
        print(json.dumps(result))
        """,
    )
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stderr == ""  # in particular no leaked shared memory
    result = json.loads(done.stdout)

    batches = read(Shapes("train", 10, (40, 48)), make_config(), 0, 5)
    expected = [
        hashlib.md5(b"".join(batch[name].tobytes() for name in ("image", "label", "index")))
        for batch in batches
    ]
    expected = [digest.hexdigest() for digest in expected]
    assert result["one"] == expected[:3]
    assert result["two"] == expected[1:]
    assert result["error"] == "images/a.jpg: cannot be decoded"
    assert result["alive"] == 0


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_workers_end_when_the_program_is_killed(tmp_path):
    command, environment = write_program(
        tmp_path,
        """
        batches = pipeline.train_batches(Shapes("train", 10, (40, 48)), make_config(1), 0, 10**6)
        next(batches)
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        time.sleep(600)
        """,
    )
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as program:
        workers = [int(word) for word in program.stdout.readline().split()]
        assert len(workers) == 1
        program.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlives its program"
        time.sleep(0.1)


def is_running(pid):
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"  # a zombie has ended
