"""One run per workdir: who holds it, who is refused, and what is taken over."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from memseg_jax.checkpoint import RunLock
from memseg_jax.errors import Unreachable, UserError
from memseg_jax.runtime import files
from tests import gcs, tiny

HOLDER = """
    import sys, time
    from memseg_jax.checkpoint import RunLock
    from memseg_jax.errors import Unreachable, UserError
    from memseg_jax.runtime import files
    try:
        with RunLock(files.place({folder!r}), 10):
            print("holds", flush=True)
            sys.stdin.readline()
    except UserError as error:
        print(error, flush=True)
"""


def start_holder(folder):
    code = textwrap.dedent(HOLDER.format(folder=str(folder)))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=tiny.ROOT, **pipes)


def content(folder):
    # In one request: in a bucket, a path asks for the size first and then for as many bytes of
    # what is there by then, which may be longer.
    return json.loads(files.read_text(folder / "run.lock"))


def rewrite(folder, **changes):
    (folder / "run.lock").write_text(json.dumps(content(folder) | changes))


def wait_for_renewal(folder):
    first, limit = content(folder)["renewed"], time.monotonic() + 60
    while content(folder)["renewed"] == first:
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.fixture
def left_behind(place):
    """A workdir with the lock of a holder that did not release it."""
    with RunLock(place, 10):
        text = (place / "run.lock").read_text()
    (place / "run.lock").write_text(text)
    return place


def test_held_and_released(place):
    with RunLock(place, 10) as lock:
        lock.check()
        assert content(place)["process"] == os.getpid()
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .* since 20"):
            RunLock(place, 10).__enter__()
        lock.check()
    assert files.names(place) == []
    with pytest.raises(ValueError, match="any"), RunLock(place, 10):
        raise ValueError("any error")
    assert files.names(place) == []


def test_a_process_that_lives_and_one_that_was_killed(place, caplog):
    holder = start_holder(place)
    try:
        assert holder.stdout.readline() == "holds\n"
        with pytest.raises(
            UserError, match=rf"in use by process {holder.pid} on .*another --workd"
        ):
            RunLock(place, 10).__enter__()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with RunLock(place, 10) as lock:
        assert f"taking over the workdir from process {holder.pid}" in caplog.text
        lock.check()


def test_of_two_that_start_at_the_same_moment_one_wins(place):
    holders = [start_holder(place) for _ in range(2)]
    said = [holder.stdout.readline() for holder in holders]
    for holder in holders:
        holder.communicate("\n")
    assert sorted("holds" in text for text in said) == [False, True]
    assert any("is in use by process" in text for text in said)


def test_a_number_that_another_process_has_now(left_behind, caplog):
    rewrite(left_behind, process_started="1")
    with RunLock(left_behind, 10) as lock:
        lock.check()
    assert "which has ended" in caplog.text


def test_a_holder_elsewhere_counts_as_dead_when_it_was_silent_for_long(left_behind, caplog):
    rewrite(left_behind, machine="other", host="far", renewed=time.time() - 500)
    with pytest.raises(UserError, match=r"on far.*50\d s ago; after 600 s .*lock_minutes"):
        RunLock(left_behind, 10).__enter__()
    with RunLock(left_behind, 8) as lock:
        assert "taking over the workdir from process" in caplog.text
        lock.check()


def test_it_is_renewed(place):
    with RunLock(place, 0.02) as lock:
        wait_for_renewal(place)
        lock.check()


def test_a_lost_lock_is_noticed_and_left_to_the_new_holder(place):
    with RunLock(place, 0.02) as lock:
        rewrite(place, id="another", process=7)
        with pytest.raises(UserError, match=r"process 7 on .* has taken the folder. Nothing more"):
            lock.check()
        time.sleep(0.5)  # some renewals
    assert content(place)["id"] == "another"
    (place / "run.lock").unlink()
    with pytest.raises(UserError, match="it was removed"):
        lock.check()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": 1}'])
def test_a_file_that_says_nothing_is_taken_over(place, text):
    (place / "run.lock").write_text(text)
    with RunLock(place, 10) as lock:
        lock.check()


# ---- A bucket that fails ------------------------------------------------------------------------


def test_it_is_renewed_after_a_storm_and_after_an_answer_that_was_lost(door, impatient, caplog):
    with RunLock(door.folder, 0.02) as lock:
        for kind in (503, gcs.Door.LOSE):
            door.answer = lambda method, path, kind=kind: kind if method == "POST" else None
            limit = time.monotonic() + 60
            while "cannot renew" not in caplog.text:
                assert time.monotonic() < limit
                time.sleep(0.05)
            door.answer = lambda method, path: None
            wait_for_renewal(door.folder)
            lock.check()
            caplog.clear()
    assert files.names(door.folder) == []


def test_it_is_held_while_nothing_can_be_known_until_others_may_take_it(door, caplog, monkeypatch):
    monkeypatch.setattr(files, "_SECONDS_BETWEEN_LOOKS", 0)
    with RunLock(door.folder, 10) as lock:
        door.answer = lambda method, path: 403
        lock.check()
        assert "cannot look at gs://" in caplog.text
        monkeypatch.setattr(lock, "_renewed_at", time.time() - 601)
        with pytest.raises(Unreachable, match=r"storage\.objects\.get"):
            lock.check()
        door.answer = lambda method, path: None
        lock.check()


def test_with_its_bucket_it_is_gone(door):
    with RunLock(door.folder, 10) as lock:
        door.answer = lambda method, path: 404
        with pytest.raises(UserError, match="there is no bucket gs://memseg-tests that nobody"):
            lock.check()
        # What ended the run is what is told, not that its lock cannot be removed.


# ---- The file -----------------------------------------------------------------------------------


def test_of_many_that_replace_a_file_one_wins(place):
    path = place / "file"
    for before in (None, "old"):
        won = []

        def replace(index, before=before, won=won):
            if files.replace_if(path, before, f"{before}{index}"):
                won.append(f"{before}{index}")

        threads = [threading.Thread(target=replace, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [path.read_text()]
        assert files.names(place) == ["file"]
        path.write_text("old")


def test_the_program_refuses_a_folder_in_use(place, capsys, quiet_entry):
    with RunLock(place, 10):
        arguments = f"--config.data.root={tiny.data_root()}", "--workdir", place
        assert tiny.run(*arguments) == 1
        assert "is in use by process" in capsys.readouterr().err
        assert files.names(place) == ["run.lock"]
