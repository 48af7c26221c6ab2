"""Requests to a bucket that fails for a while: made again, told once, given up in the end."""

import asyncio
import logging
import threading
import types

import pytest

from memseg_jax.errors import Unreachable, UserError
from memseg_jax.runtime import files
from memseg_jax.runtime.watchdog import Watchdog
from tests.gcs import Door


@pytest.fixture
def client(bucket):
    """The module, which is imported where the environment names the server."""
    from memseg_jax.runtime import bucket_client

    return bucket_client


def fail(door, kind, times, part=""):
    """The next requests whose method and path have a part in them fail."""
    left = [times]

    def answer(method, path):
        if part in f"{method} {path}" and left[0] > 0:
            left[0] -= 1
            return kind
        return None

    door.answer = answer


def fill(folder, count):
    threads = [
        threading.Thread(target=files.write_text, args=(folder / str(number), str(number)))
        for number in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def content(folder):
    return {path.name: files.read_text(path) for path in files.files_below(folder)}


@pytest.mark.parametrize("kind", [429, 500, 503, 504, Door.DROP, Door.LOSE])
def test_a_storm_loses_nothing_and_is_told_once(door, impatient, caplog, kind):
    fail(door, kind, 60)
    fill(door.folder, 8)
    door.answer = lambda method, path: None
    assert content(door.folder) == {str(number): str(number) for number in range(8)}
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"answers {kind}" in line if kind > 0 else "cannot be reached" in line
    assert "Requests are made again" in line


def test_one_failure_is_not_told(door, impatient, caplog):
    fail(door, 503, 1)
    files.write_text(door.folder / "a", "b")
    assert files.read_text(door.folder / "a") == "b"
    assert caplog.text == ""


def test_in_the_end_it_is_given_up(door, impatient):
    files.write_text(door.folder / "a", "before")
    door.answer = lambda method, path: 503
    with pytest.raises(UserError, match=r"gs://.*/a: 127\.0\.0\.1 answers 503, since 2s"):
        files.write_text(door.folder / "a", "after")
    door.answer = lambda method, path: None
    assert files.read_text(door.folder / "a") == "before"


@pytest.mark.parametrize("kind", [Door.DROP, Door.STALL, Door.LOSE, 503])
@pytest.mark.parametrize("part", ["uploadType=resumable", "upload_id="])  # its start, its parts
def test_a_large_upload_that_breaks_off_or_stalls_is_made_again(door, impatient, kind, part):
    pieces = bytes(range(256)) * (9 * 2**20 // 256)  # sent in two parts
    files.write_text(door.folder / "large", "before")
    fail(door, kind, 1, part)
    with files.replacing(door.folder / "large") as temporary:
        temporary.write_bytes(pieces)
    assert files.read_bytes(door.folder / "large") == pieces
    assert len([request for request in door.passed if part in request]) >= 2


def test_a_change_whose_answer_is_lost_was_made_once(door, impatient):
    path = door.folder / "a"
    fail(door, Door.LOSE, 1, "POST")
    assert files.replace_if(path, None, "one")
    fail(door, Door.LOSE, 1, "POST")
    assert files.replace_if(path, "one", "two")
    assert not files.replace_if(path, "one", "three")
    fail(door, Door.LOSE, 1, "DELETE")
    files.remove_if(path, "two")
    assert files.names(door.folder) == []


def test_what_stalls_is_shown_by_the_watchdog_and_made_again(door, impatient, tmp_path, caplog):
    fail(door, Door.STALL, 1, "POST")
    with open(tmp_path / "stacks", "w") as stream, Watchdog(0.3 / 60, stream) as watchdog:
        watchdog.beat("writing")
        files.write_text(door.folder / "a", "b")
    assert "under way: writing" in caplog.text
    assert "write_text" in (tmp_path / "stacks").read_text()
    assert files.read_text(door.folder / "a") == "b"


def test_an_account_that_is_not_known_for_a_moment(door, impatient):
    fail(door, 401, 1)
    files.write_text(door.folder / "a", "b")
    fail(door, 401, 1)
    assert files.read_text(door.folder / "a") == "b"
    door.answer = lambda method, path: 401
    with pytest.raises(Unreachable, match=r"nobody .* lacks the permission storage\.objects\.get"):
        files.read_text(door.folder / "a")


def test_a_bucket_that_is_gone(door):
    files.write_text(door.folder / "a", "b")
    door.answer = lambda method, path: 404
    for act in (lambda: files.names(door.folder), lambda: files.write_text(door.folder / "a", "")):
        with pytest.raises(UserError, match="there is no bucket gs://memseg-tests that nobody"):
            act()


# ---- Without a server ---------------------------------------------------------------------------


class Account:
    """Credentials whose tokens are numbered."""

    number = 0

    def refresh(self, request):
        self.number += 1

    def apply(self, headers):
        headers["Authorization"] = f"token {self.number}"


def send_all(client, statuses, monkeypatch, account=None):
    """Makes a request that is answered so; returns the answer's status, the pauses, the tokens."""
    pauses, tokens, answers = [], [], iter(statuses)

    async def pause(seconds):
        pauses.append(seconds)

    async def send(request):
        tokens.append(request.headers.get("Authorization"))
        return types.SimpleNamespace(status=next(answers), release=lambda: None)

    system = types.SimpleNamespace(credentials=types.SimpleNamespace(credentials=account))
    monkeypatch.setattr(client, "file_system", lambda: system)
    monkeypatch.setattr(client.asyncio, "sleep", pause)
    monkeypatch.setattr(client.random, "uniform", lambda low, high: high)
    request = types.SimpleNamespace(headers={}, url=types.SimpleNamespace(host="bucket"))
    answer = asyncio.run(client.Patiently()(request, send))
    return answer.status, pauses, tokens


def test_pauses_grow(client, monkeypatch):
    status, pauses, _ = send_all(client, [503] * 9 + [200], monkeypatch)
    assert status == 200
    assert pauses == [0.25, 0.5, 1, 2, 4, 8, 16, 30, 30]


def test_a_token_that_came_to_its_end_is_replaced(client, monkeypatch):
    status, _, tokens = send_all(client, [401, 200], monkeypatch, Account())
    assert (status, tokens) == (200, [None, "token 1"])
    status, _, tokens = send_all(client, [401] * 9, monkeypatch, Account())
    assert (status, tokens) == (401, [None, "token 1", "token 2"])


@pytest.mark.parametrize("status", [200, 206, 308, 400, 403, 404, 412])
def test_answers_that_are_for_good_are_not_asked_for_again(client, monkeypatch, status):
    assert send_all(client, [status], monkeypatch) == (status, [], [None])


def test_two_troubles_are_told_twice_and_one_once(client, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(client, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    told = client.Patiently()
    for when, lines in ((1000, 1), (1010, 1), (1069, 1), (1140, 2), (1150, 2)):
        now[0] = when
        for attempt in range(1, 6):
            told._tell("the bucket answers 503", attempt)
        assert len(caplog.records) == lines
    assert all(record.levelno == logging.WARNING for record in caplog.records)
