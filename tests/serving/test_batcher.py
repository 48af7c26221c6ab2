"""Jobs are joined, answered in order, and fail alone."""

import threading
from concurrent.futures import CancelledError

import pytest

from memseg_jax.serving.batcher import Batcher

PATIENCE = 60


class Calls:
    """Takes the place of the model: items are doubled; the first call waits for `go`."""

    def __init__(self):
        self.made = []
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, kind, items):
        self.made.append((kind, list(items)))
        self.begun.set()
        assert self.go.wait(PATIENCE)
        for item in items:
            if isinstance(item, BaseException):
                raise item
        return [2 * item for item in items]


@pytest.fixture
def calls():
    return Calls()


@pytest.fixture
def batcher(calls):
    """At work on an item, so that what is submitted has to wait."""
    batcher = Batcher(calls, 3)
    first = batcher.submit("first", 0)
    assert calls.begun.wait(PATIENCE)
    yield batcher
    calls.go.set()
    batcher.close()
    assert first.result(PATIENCE) == 0


def results(calls, futures):
    calls.go.set()
    return [future.result(PATIENCE) for future in futures]


def test_what_waits_is_joined_by_kind_and_the_oldest_comes_first(batcher, calls):
    kinds = ["a", "b", "a", "b", "a", "a", "c"]
    futures = [batcher.submit(kind, number) for number, kind in enumerate(kinds)]
    assert results(calls, futures) == [0, 2, 4, 6, 8, 10, 12]
    assert calls.made[1:] == [("a", [0, 2, 4]), ("b", [1, 3]), ("a", [5]), ("c", [6])]


def test_jobs_without_a_kind_are_alone(batcher, calls):
    futures = [batcher.submit(None, number) for number in (1, 2)]
    assert results(calls, futures) == [2, 4]
    assert calls.made[1:] == [(None, [1]), (None, [2])]


@pytest.mark.parametrize("error", [ValueError("bad"), SystemExit(3), MemoryError()])
def test_only_the_job_that_cannot_be_done_fails(batcher, calls, error):
    futures = [batcher.submit("a", item) for item in (1, error, 3)]
    calls.go.set()
    with pytest.raises(type(error)):
        futures[1].result(PATIENCE)
    assert results(calls, [futures[0], futures[2], batcher.submit("a", 4)]) == [2, 6, 8]
    assert batcher.alive


def test_a_call_that_returns_too_little_fails_all_of_its_jobs_and_none_waits(calls):
    calls.go.set()
    batcher = Batcher(lambda kind, items: [], 3)
    with pytest.raises(ValueError, match="zip"):
        batcher.submit("a", 1).result(PATIENCE)
    batcher.close()


def test_a_cancelled_job_leaves_the_queue(batcher, calls):
    gone, stays = batcher.submit("a", 1), batcher.submit("a", 2)
    assert gone.cancel()
    assert results(calls, [stays]) == [4]
    assert calls.made[1:] == [("a", [2])]
    with pytest.raises(CancelledError):
        gone.result()


def test_closing_answers_what_was_submitted(batcher, calls):
    futures = [batcher.submit("a", number) for number in range(5)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    assert results(calls, futures) == [0, 2, 4, 6, 8]
    closing.join(PATIENCE)
    assert not batcher.alive
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit("a", 1)
