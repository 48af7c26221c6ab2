"""The watchdog speaks when nothing is finished, says where, and otherwise keeps still."""

import logging
import threading
import time

from memseg_jax.runtime.watchdog import Watchdog


def where_it_hangs(event):
    event.wait(60)


def wait_for(condition):
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_a_hang_is_shown_with_the_stacks_of_all_threads(tmp_path, caplog):
    release = threading.Event()
    hanging = threading.Thread(target=where_it_hangs, args=(release,))
    hanging.start()
    path = tmp_path / "stacks"
    with open(path, "w") as stream, Watchdog(0.2 / 60, stream) as dog:
        dog.beat("step 7")
        wait_for(lambda: path.read_text().count("where_it_hangs") >= 2)  # it says so again
    release.set()
    hanging.join()
    assert "nothing was finished for" in caplog.text
    assert "under way: step 7" in caplog.text
    assert "test_watchdog.py" in path.read_text()


def test_beats_keep_it_still(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), open(tmp_path / "stacks", "w") as stream:
        with Watchdog(1.0, stream) as dog:
            dog.beat("step 1")
        with Watchdog(0, stream) as none:
            none.beat("step 1")
            assert "watchdog" not in {thread.name for thread in threading.enumerate()}
    assert caplog.text == ""
    assert (tmp_path / "stacks").read_text() == ""
