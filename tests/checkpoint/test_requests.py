"""What checkpoints in a bucket cost: requests are counted at the server's door."""

import re

from memseg_jax import checkpoint
from memseg_jax.checkpoint import Checkpointer
from tests.checkpoints import abstract, make_meta, make_state


def test_a_save_makes_no_more_requests_as_a_run_grows_older(door):
    with Checkpointer(door.folder, keep=2) as checkpointer:
        for step in range(1, 11):
            door.passed.clear()
            checkpointer.save(make_state(step), make_meta(step))
            checkpointer.record_scores(step, {"mIoU": 0.5})
            checkpointer.wait_until_finished()
            # Whose objects were asked for: of the checkpoints that are kept, the new one, and the
            # one that goes. How often the library below asks differs from one save to the next.
            steps = re.findall(r"checkpoints(?:%2F|/)(\d+)", " ".join(door.passed))
            assert set(map(int, steps)) <= {step - 2, step - 1, step}
            assert len(door.passed) < 400
    assert checkpoint.all_steps(door.folder) == [9, 10]


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
