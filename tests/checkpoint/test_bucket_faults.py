"""Checkpoints in a bucket that fails: nothing complete is lost, nothing good counts as damaged."""

import itertools
import os
import subprocess
import sys
import textwrap

import pytest

from memseg_jax import checkpoint
from memseg_jax.checkpoint import Checkpointer
from memseg_jax.errors import Unreachable, UserError
from memseg_jax.modes import verify
from memseg_jax.runtime import files
from tests import tiny
from tests.checkpoints import abstract, assert_same, make_meta, make_state, save_one
from tests.gcs import Door

WIDTH = 512
# A failed read or write leaves unfinished work inside the library, which then complains.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def of_arrays(path):
    """Whether a request is TensorStore's, which has other rules than all others."""
    return "ocdbt" in path or "%2Fd%2F" in path


def fail(door, kind, times=None, part=lambda method, path: True):
    """The next requests, or all, of those that are meant fail."""
    left = itertools.count() if times is None else iter(range(times))

    def answer(method, path):
        return kind if part(method, path) and next(left, None) is not None else None

    door.answer = answer


def open_again(door):
    door.answer = lambda method, path: None


def state(step):
    return make_state(step, width=WIDTH)


def save_and_wait(checkpointer, step):
    checkpointer.save(state(step), make_meta(step))
    checkpointer.wait_until_finished()


def resume(workdir):
    with Checkpointer(workdir, keep=5) as checkpointer:
        return checkpointer.resume(abstract(state(1)))


# ---- What passes --------------------------------------------------------------------------------


# TensorStore waits for a second or two before it tries again, and no setting of orbax changes that.
@pytest.mark.slow
@pytest.mark.parametrize("kind", [503, 429, Door.DROP])
def test_arrays_are_written_and_read_in_spite_of_failures(door, kind):
    with Checkpointer(door.folder, keep=5) as checkpointer:
        fail(door, kind, 1, lambda method, path: method == "POST" and of_arrays(path))
        save_and_wait(checkpointer, 1)
        fail(door, kind, 1, lambda method, path: method == "GET" and of_arrays(path))
        assert_same(checkpointer.restore(abstract(state(1)))[0], state(1))


@pytest.mark.parametrize("kind", [503, pytest.param(Door.LOSE, marks=pytest.mark.slow)])
def test_the_rest_is_written_and_read_in_spite_of_failures(door, impatient, kind):
    fail(door, kind, 20, lambda method, path: not of_arrays(path))
    with Checkpointer(door.folder, keep=1) as checkpointer:
        save_and_wait(checkpointer, 1)
        save_and_wait(checkpointer, 2)
        checkpointer.record_scores(2, {"mIoU": 0.5})
        fail(door, kind, 20, lambda method, path: not of_arrays(path))
        assert_same(checkpointer.resume(abstract(state(1)))[0], state(2))
    assert checkpoint.all_steps(door.folder) == [2]
    assert verify.check(door.folder, 2).problems == []


STALLED = """
    import os
    from tests.gcs import Door
    door = Door(os.environ["BEHIND"])
    os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://{{door.address}}"
    left = [1]
    def answer(method, path):
        if method == "POST" and "%2Fd%2F" in path and left:
            return Door.STALL if left.pop() else None
    door.answer = answer
    from memseg_jax.checkpoint import Checkpointer
    from memseg_jax.runtime.watchdog import Watchdog
    from tests.checkpoints import *
    with Watchdog(0.5 / 60) as watchdog, Checkpointer({workdir!r}, keep=2) as checkpointer:
        checkpointer.save(make_state(1), make_meta(1))
        watchdog.beat("the save of step 1")
        checkpointer.wait_until_finished()
    assert not left
"""


@pytest.mark.slow
def test_arrays_whose_sending_stalls_are_sent_again(bucket):
    # In a process of its own: TensorStore reads the limit when it makes its first request.
    code = textwrap.dedent(STALLED.format(workdir=str(bucket)))
    env = os.environ | {
        "BEHIND": os.environ["STORAGE_EMULATOR_HOST"].removeprefix("http://"),
        "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "2",
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tiny.ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "under way: the save of step 1" in result.stderr
    assert "wait_until_finished" in result.stderr
    with Checkpointer(bucket, keep=2) as checkpointer:
        assert_same(checkpointer.restore(abstract(make_state(1)))[0], make_state(1))


# ---- What does not ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (403, "PERMISSION_DENIED.* answered by the test: 403"),
        (401, "PERMISSION_DENIED.* answered by the test: 401"),
        (404, "there is no such bucket, or not any more"),
    ],
)
def test_a_save_that_fails_is_reported_and_the_next_takes_its_place(door, caplog, kind, words):
    def writing(method, path):
        return method == "POST" and of_arrays(path)

    with Checkpointer(door.folder, keep=5) as checkpointer:
        save_and_wait(checkpointer, 1)
        fail(door, kind, part=writing)
        checkpointer.save(state(2), make_meta(2))
        with pytest.raises(UserError, match=f"step 3 failed: {words}.*, which is of step 1"):
            checkpointer.save(state(3), make_meta(3))
        assert "saving the checkpoint of step 2 in gs://" in caplog.text
        assert "The last good one is of step 1" in caplog.text
        open_again(door)
        save_and_wait(checkpointer, 4)
    assert checkpoint.all_steps(door.folder) == [1, 4]
    assert files.names(door.folder / checkpoint.FOLDER) == ["1", "4"]
    assert_same(resume(door.folder)[0], state(4))


def test_a_bucket_that_is_gone_in_the_middle_of_a_run(door, impatient):
    with Checkpointer(door.folder, keep=5) as checkpointer:
        save_and_wait(checkpointer, 1)
        fail(door, 404)
        with pytest.raises(UserError, match=r"there is no bucket gs://memseg-tests that nobody"):
            save_and_wait(checkpointer, 2)
        open_again(door)
    assert_same(resume(door.folder)[0], state(1))


def arrays(method, path):
    return method == "GET" and of_arrays(path)


def description(method, path):
    return "meta%2Fmetadata" in path


def list_of_arrays(method, path):
    return "_METADATA" in path


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (401, arrays),  # 503: TensorStore would try for a quarter of an hour
        (403, arrays),
        (403, description),
        (403, list_of_arrays),
        (503, description),
    ],
)
def test_what_cannot_be_read_for_now_is_not_damaged(door, impatient, caplog, kind, part):
    for step in (1, 2):
        save_one(door.folder, step, step / 10, state(step))
    fail(door, kind, part=part)
    with pytest.raises(Unreachable, match=rf"{kind}"):
        resume(door.folder)
    if kind != 503:  # it takes as long once more
        with pytest.raises(Unreachable, match=rf"{kind}"):
            verify.check(door.folder, 2)
    assert "damaged" not in caplog.text
    open_again(door)
    assert files.names(door.folder / checkpoint.DAMAGED_FOLDER) == []
    assert_same(resume(door.folder)[0], state(2))


def test_scores_that_cannot_be_read_for_now_remove_no_checkpoint(door, caplog):
    with Checkpointer(door.folder, keep=1) as checkpointer:
        save_and_wait(checkpointer, 1)
        checkpointer.record_scores(1, {"mIoU": 0.5})
        fail(door, 403, part=lambda method, path: "scores.json" in path)
        save_and_wait(checkpointer, 2)
        save_and_wait(checkpointer, 3)
        assert "checkpoints that need not be kept stay for now: nobody (no cred" in caplog.text
        assert checkpoint.all_steps(door.folder) == [1, 2, 3]
        with pytest.raises(Unreachable, match=r"storage\.objects\.get"):
            checkpointer.record_scores(3, {"mIoU": 0.4})
        open_again(door)
        checkpointer.record_scores(3, {"mIoU": 0.4})
    assert checkpoint.all_steps(door.folder) == [1, 3]
    assert set(checkpoint.read_scores(door.folder)) == {1, 3}
