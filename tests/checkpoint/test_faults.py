"""Checkpoints and mishaps: kills, full disks, unwritable folders, damaged files."""

import contextlib
import errno
import gc
import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import orbax.checkpoint as ocp
import pytest

from memseg_jax import checkpoint
from memseg_jax.checkpoint import Checkpointer
from memseg_jax.errors import UserError
from memseg_jax.runtime import files
from tests.checkpoints import (
    abstract,
    assert_same,
    files_of,
    halve,
    make_meta,
    make_state,
    save_one,
    tamper,
    unlink,
)

# ------------------------------------------------------------------------------------- kills

CHILD = """
    import sys
    sys.path[:0] = [{root!r}]
    from memseg_jax.checkpoint import Checkpointer
    from tests import checkpoints as t
    with Checkpointer({workdir!r}, keep=2) as checkpointer:
        step = checkpointer.latest_step() or 0
        if step:
            t.assert_same(checkpointer.restore(t.abstract(t.make_state(1, 20000)))[0],
                          t.make_state(step, 20000))
        for step in range(step + 1, step + 100):
            checkpointer.save(t.make_state(step, 20000), t.make_meta(step))
            print(step, flush=True)
"""


def test_sigkill_in_the_middle_of_a_save(place_of_run):
    root = str(Path(__file__).resolve().parents[2])
    code = CHILD.format(root=root, workdir=str(place_of_run))
    folder = place_of_run / checkpoint.FOLDER
    done = 0
    for _ in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
        )
        try:
            for _ in range(3):
                assert child.stdout.readline(), "the child failed"
            deadline = time.monotonic() + 30
            while files.names(folder) == files.complete_folders(folder):
                assert time.monotonic() < deadline
        finally:
            child.send_signal(signal.SIGKILL)
            child.communicate()
        # Two saves were complete when the third had started.
        step, meta = checkpoint.read_meta(place_of_run)
        assert step >= done + 2
        assert meta["step"] == step
        done = step
    with Checkpointer(place_of_run, keep=2) as checkpointer:
        assert files.names(folder) == files.complete_folders(folder)
        restored, _ = checkpointer.restore(abstract(make_state(1, 20000)))
        assert_same(restored, make_state(done, 20000))
        checkpointer.save(make_state(done + 1, 20000), make_meta(done + 1))
    assert checkpoint.all_steps(place_of_run)[-1] == done + 1


def test_half_deleted_old_checkpoint_does_no_harm(place):
    save_one(place, 1)
    save_one(place, 2)
    for path in files_of(place, 1):
        if path.parent == place / "checkpoints/1" or path.name == "metadata":
            path.unlink()
    with Checkpointer(place, keep=1) as checkpointer:
        assert_same(checkpointer.restore(abstract(make_state(2)))[0], make_state(2))
        checkpointer.save(make_state(3), make_meta(3))
    assert checkpoint.all_steps(place) == [3]


# ------------------------------------------------------------ full disks, unwritable folders


@contextlib.contextmanager
def small_disk(size=1_000_000):
    """No file may grow beyond a size: to the program it looks like a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def leftovers(workdir):
    return [x.name for x in (workdir / checkpoint.FOLDER).iterdir() if not x.name.isdecimal()]


def test_disk_full_in_the_background_is_reported_and_the_save_retried(tmp_path, caplog):
    large = make_state(2, width=40000)
    with Checkpointer(tmp_path, keep=5) as checkpointer:
        checkpointer.save(make_state(1), make_meta(1))
        checkpointer.wait_until_finished()
        with small_disk():
            checkpointer.save(large, make_meta(2))
            with pytest.raises(UserError, match=r"step 2 failed: File too large.*of step 1\."):
                checkpointer.wait_until_finished()
            assert checkpoint.all_steps(tmp_path) == [1]
            checkpointer.save(large, make_meta(2))
            for thread in threading.enumerate():
                if thread.name == "async_save":  # it has failed before there is space again
                    thread.join()
        assert checkpointer.latest_step() == 1
        # There is space again.
        caplog.clear()
        checkpointer.save(large, make_meta(2))
        assert checkpoint.all_steps(tmp_path) == [1, 2]  # it was waited for
        assert "step 2 in" in caplog.text
        assert "File too large. The last good one is of step 1" in caplog.text
        checkpointer.save(make_state(3), make_meta(3))
        assert_same(checkpointer.restore(abstract(large), step=2)[0], large)
    assert leftovers(tmp_path) == []
    assert checkpoint.all_steps(tmp_path) == [1, 2, 3]


def test_a_late_write_of_a_failed_save_makes_its_folder_again(tmp_path, monkeypatch):
    late = tmp_path / checkpoint.FOLDER / "2.orbax-checkpoint-tmp" / "state"
    save = ocp.AsyncCheckpointer.save

    def as_a_write_ends(*args, **kwargs):  # between Orbax's look and its making of the folder
        monkeypatch.setattr(ocp.AsyncCheckpointer, "save", save)
        late.mkdir(parents=True)
        raise FileExistsError(errno.EEXIST, "File exists", str(late.parent))

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", as_a_write_ends)
    with Checkpointer(tmp_path, keep=5) as checkpointer:
        checkpointer.save(make_state(2), make_meta(2))
        checkpointer.wait_until_finished()
        assert_same(checkpointer.restore(abstract(make_state(2)))[0], make_state(2))
    assert leftovers(tmp_path) == []


@contextlib.contextmanager
def unwritable(folder):
    """Takes away the right to write in a folder, also from root."""
    folder.chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


def save_and_wait(checkpointer, *arguments):
    checkpointer.save(*arguments)
    checkpointer.wait_until_finished()


def test_a_folder_that_becomes_unwritable():
    with tempfile.TemporaryDirectory() as name:  # not in a folder that only root may enter
        workdir = Path(name)
        workdir.chmod(0o755)
        with Checkpointer(workdir, keep=5) as checkpointer:
            checkpointer.save(make_state(1), make_meta(1))
            checkpointer.wait_until_finished()
            second = make_state(2), make_meta(2)
            with unwritable(workdir / checkpoint.FOLDER):
                with pytest.raises(UserError, match=r"step 2 failed: Permission.*of step 1\."):
                    save_and_wait(checkpointer, *second)
                with pytest.raises(UserError, match=r"cannot write to the workdir"):
                    checkpoint.prepare_workdir(workdir / checkpoint.FOLDER / "run")
            checkpointer.save(make_state(3), make_meta(3))
        assert checkpoint.all_steps(workdir) == [1, 3]


def test_a_failed_save_leaves_no_thread_that_keeps_the_program_from_ending():
    others = set(threading.enumerate())  # pytest's own
    test_a_folder_that_becomes_unwritable()
    waiting = [x for x in threading.enumerate() if not x.daemon and x not in others]
    for thread in waiting:
        thread.join(30)
    assert not [x.name for x in waiting if x.is_alive()]


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / checkpoint.FOLDER).write_text("no folder")
    with pytest.raises(UserError, match=r"cannot write to the workdir .*checkpoints: File exists"):
        Checkpointer(tmp_path, keep=1)


def test_a_disk_that_stays_full_ends_the_run_and_leaves_the_last_good_step(tmp_path, caplog):
    with Checkpointer(tmp_path, keep=5) as checkpointer:
        checkpointer.save(make_state(1), make_meta(1))
        with small_disk():
            checkpointer.save(make_state(2, width=40000), make_meta(2))
            with pytest.raises(UserError, match=r"step 3 failed: File too large.*of step 1\."):
                checkpointer.save(make_state(3, width=40000), make_meta(3))
            assert "saving the checkpoint of step 2" in caplog.text
        assert checkpoint.all_steps(tmp_path) == [1]
        checkpointer.save(make_state(4), make_meta(4))
    # Writes of the failed saves that were still under way came to their end before this one.
    assert leftovers(tmp_path) == []
    assert checkpoint.all_steps(tmp_path) == [1, 4]


# ------------------------------------------------------------------------------------ damage


# A failed read leaves unfinished work inside the library, which complains when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
@pytest.mark.parametrize(
    ("pattern", "change", "named"),
    [
        ("meta/metadata", unlink, "meta/metadata"),
        ("meta/metadata", halve, "meta/metadata"),
        ("state/_METADATA", unlink, "state"),
        ("state/_METADATA", halve, "state"),
        ("state/**/d/*", halve, "state"),
        ("state/**/d/*", unlink, "state"),
        ("state/manifest.ocdbt", unlink, "state"),
    ],
)
def test_damaged_checkpoint_is_named(place, pattern, change, named):
    state = make_state(2, width=512)
    save_one(place, 1, state=make_state(1, width=512))
    save_one(place, 2, state=state)
    tamper(place, 2, pattern, change)
    with Checkpointer(place, keep=2) as checkpointer:
        with pytest.raises(UserError, match="step 2 is damaged") as caught:
            checkpointer.restore(abstract(state))
        assert str(place / "checkpoints/2" / named) in str(caught.value)
        assert "Other checkpoints of this run: 1. Evaluate or predict" in str(caught.value)
        restored, _ = checkpointer.restore(abstract(state), step=1)
    assert_same(restored, make_state(1, width=512))
    del caught
    gc.collect()
