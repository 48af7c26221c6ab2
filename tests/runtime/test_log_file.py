"""The log of a run as a file of its folder."""

import logging
import time

import pytest

from memseg_jax.errors import Stopped, UserError
from memseg_jax.runtime import distributed, files, log_file
from memseg_jax.runtime.log_file import LogFile, say

OURS = logging.getLogger("memseg_jax.some.module")


@pytest.fixture(autouse=True)
def level():
    """As the program sets it."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.INFO)
    yield
    root.setLevel(before)


def lines(folder):
    """The lines of the file without their times."""
    found = files.read_text(folder / "log.txt").splitlines()
    return [line.split(" ", 2)[2] for line in found]


def test_what_is_shown_is_kept_and_continued(place, capsys):
    with LogFile(place):
        OURS.info("compiling %s", "it")
        say("step 1\nstep 2")
        logging.getLogger("library").info("not shown")
        logging.getLogger("library").warning("odd")
    first = lines(place)
    assert first[0].startswith("---- started: ")
    assert first[1:] == ["compiling it", "step 1", "step 2", "odd", "---- ended"]
    assert capsys.readouterr().out == "step 1\nstep 2\n"
    OURS.info("not in a run")
    with LogFile(place):
        say("step 3")
    assert lines(place) == [*first, first[0], "step 3", "---- ended"]


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (UserError("no data"), "---- error: no data"),
        (Stopped("at step 3"), "---- stopped: at step 3"),
        (KeyError("bug"), "KeyError: 'bug'"),
    ],
)
def test_the_last_entry_says_why_the_run_ended(tmp_path, error, last):
    with pytest.raises(type(error)), LogFile(tmp_path):
        raise error
    assert lines(tmp_path)[-1] == last


def test_what_is_said_after_the_end_is_not_written(tmp_path, capsys):
    """Another thread may end the program while this one works on."""
    with LogFile(tmp_path):
        (handler,) = (x for x in logging.getLogger().handlers if isinstance(x, log_file._Handler))
        say("before")
        handler.close()
        OURS.warning("after")
        say("after")
    assert [line for line in lines(tmp_path) if "started" not in line] == ["before"]
    assert "Traceback" not in capsys.readouterr().err


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_primary", lambda: False)
    with LogFile(tmp_path):
        OURS.warning("of another process")
    assert list(tmp_path.iterdir()) == []


def test_of_earlier_starts_the_end_is_kept(place, monkeypatch):
    monkeypatch.setattr(log_file, "_KEPT", 1000)
    files.write_text(place / "log.txt", "".join(f"2026 12:00 line {n}\n" for n in range(1000)))
    with LogFile(place):
        say("now")
    found = lines(place)
    assert found[0].startswith("line 9")
    assert found[-4:-2] == ["line 999", found[-3]]
    assert found[-2:] == ["now", "---- ended"]
    assert len(found) < 60


def test_trouble_with_it_ends_no_run_and_is_told_once(door, impatient, capsys, caplog, monkeypatch):
    monkeypatch.setattr(files, "_SECONDS_BETWEEN_LOOKS", 0.01)
    with LogFile(door.folder):
        door.answer = lambda method, path: 403
        for number in range(20):
            say(f"step {number}")
        while "cannot write" not in caplog.text:
            time.sleep(0.01)
        door.answer = lambda method, path: None
    assert [f"step {number}" for number in range(20)] == lines(door.folder)[1:21]
    assert caplog.text.count("cannot write gs://") == 1
    caplog.clear()
    door.answer = lambda method, path: 403
    with LogFile(door.folder):
        say("going on")
    assert "no log is kept in gs://" in caplog.text
    assert "going on" in capsys.readouterr().out
