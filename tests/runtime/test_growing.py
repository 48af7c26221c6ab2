"""Files that grow by lines: what is in them, and when."""

import time

import pytest

from memseg_jax.errors import UserError
from memseg_jax.runtime import files
from memseg_jax.runtime.growing import grow


def test_lines_are_added_to_the_text_that_replaced_the_file(place):
    path = place / "table.csv"
    files.write_text(path, "of another run\n")
    table = grow(path, "a\n")
    assert files.read_text(path) == "a\n"
    table.append("b\n")
    table.append("c\nd\n")
    table.flush()
    assert files.read_text(path) == "a\nb\nc\nd\n"
    table.append("e\n")
    table.close()
    table.close()
    assert files.read_text(path) == "a\nb\nc\nd\ne\n"
    assert files.names(place) == ["table.csv"]


def test_on_a_disk_a_line_is_there_at_once(tmp_path):
    table = grow(tmp_path / "a", "")
    table.append("line\n")
    assert (tmp_path / "a").read_text() == "line\n"
    table.close()


def test_in_a_bucket_lines_are_written_together_in_the_background(door, monkeypatch):
    monkeypatch.setattr(files, "_SECONDS_BETWEEN_LOOKS", 0.5)
    path = door.folder / "a"
    table = grow(path, "")
    door.passed.clear()
    lines = [f"{number}\n" for number in range(1000)]
    for line in lines:
        table.append(line)
    limit = time.monotonic() + 60
    while files.read_text(path) != "".join(lines):
        assert time.monotonic() < limit
        time.sleep(0.05)
    writes = [x for x in door.passed if x.startswith("POST")]
    assert 1 <= len(writes) < 100
    table.close()


def test_in_a_bucket_the_file_of_another_run_is_left_alone(bucket):
    table = grow(bucket / "a", "ours\n")
    files.write_text(bucket / "a", "theirs\n")
    table.append("more\n")
    with pytest.raises(UserError, match=r"a was changed by another program, and is left as it is"):
        table.flush()
    assert files.read_text(bucket / "a") == "theirs\n"


def test_what_could_not_be_written_is_written_later(door, caplog, monkeypatch):
    monkeypatch.setattr(files, "_SECONDS_BETWEEN_LOOKS", 0.01)
    table = grow(door.folder / "a", "")
    door.answer = lambda method, path: 403 if method == "POST" else None
    table.append("first\n")
    with pytest.raises(UserError, match=r"cannot write gs://.*storage\.objects\.create"):
        table.flush()
    door.answer = lambda method, path: None
    table.append("second\n")
    table.close()
    assert files.read_text(door.folder / "a") == "first\nsecond\n"
