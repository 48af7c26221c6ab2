"""What checkpoints in a bucket cost: requests are counted at the server's door."""

from memseg_jax import checkpoint
from memseg_jax.checkpoint import Checkpointer
from tests.checkpoints import abstract, make_meta, make_state


def test_a_save_makes_no_more_requests_as_a_run_grows_older(door):
    counts = []
    with Checkpointer(door.folder, keep=2) as checkpointer:
        for step in range(1, 11):
            before = len(door.passed)
            checkpointer.save(make_state(step), make_meta(step))
            checkpointer.record_scores(step, {"mIoU": 0.5})
            checkpointer.wait_until_finished()
            counts.append(len(door.passed) - before)
    assert checkpoint.all_steps(door.folder) == [9, 10]
    # The first ones have nothing to remove. Libraries differ by a few from one to the next.
    assert max(counts[5:]) < 1.3 * max(counts[2:5]), counts
    assert max(counts) < 200, counts


def test_a_listing_makes_one_request_and_one_a_checkpoint(door):
    with Checkpointer(door.folder, keep=2) as checkpointer:
        for step in range(1, 6):
            checkpointer.save(make_state(step), make_meta(step))
    door.passed.clear()
    assert checkpoint.all_steps(door.folder) == [4, 5]
    assert len(door.passed) == 3, door.passed


def test_nothing_is_listed_while_nothing_changes(door):
    with Checkpointer(door.folder, keep=2) as checkpointer:
        checkpointer.save(make_state(1), make_meta(1))
        checkpointer.wait_until_finished()
        door.passed.clear()
        for _ in range(100):  # as often as the log is written
            checkpointer.tidy()
        assert door.passed == []
        assert checkpointer.resume(abstract(make_state(1)))[1]["step"] == 1
