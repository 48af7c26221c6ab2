"""What tests share is made once, by whoever comes first."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests import session


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(session, "folder", lambda: tmp_path)


def test_of_several_one_makes_it_and_all_wait_for_it():
    made = []

    def make(path):
        made.append(path)
        path.mkdir()  # which fails the second time
        (path / "result").write_text("complete")

    def get(number):
        return (session.once("shared", make) / "result").read_text()

    with ThreadPoolExecutor(4) as threads:  # every call has its own lock file, as processes have
        assert list(threads.map(get, range(8))) == ["complete"] * 8
    assert len(made) == 1


def test_what_failed_is_tried_again():
    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        session.once("file", fail)
    assert session.once("file", lambda path: path.write_text("whole")).read_text() == "whole"
