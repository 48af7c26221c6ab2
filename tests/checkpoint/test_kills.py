"""kill -9 in the middle of a save, at many moments: what is on disk is right, and a run goes on."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from memseg_jax import checkpoint
from memseg_jax.checkpoint import Checkpointer
from memseg_jax.modes import verify
from memseg_jax.runtime import files
from tests.checkpoints import abstract, assert_same, files_of, make_meta, make_state

WIDTH = 40000
CHILD = """
    import sys
    sys.path[:0] = [{root!r}]
    from memseg_jax.checkpoint import Checkpointer
    from tests.checkpoints import make_meta, make_state
    state = make_state(1, {width})
    with Checkpointer({workdir!r}, keep=2) as checkpointer:
        print("ready", flush=True)
        for step in range(int(sys.stdin.readline()), 10**6):
            checkpointer.save(make_state(step, {width}), make_meta(step))
            print(step, flush=True)
"""


def start(workdir):
    root = str(Path(__file__).resolve().parents[2])
    code = textwrap.dedent(CHILD.format(root=root, width=WIDTH, workdir=str(workdir)))
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=env, **pipes)


@pytest.mark.slow
def test_killed_at_many_moments_of_a_save(place):
    # The moments are counted in changes of the folder, which come in the order of a save: the
    # temporary folder, its items, their files, the new name, and an old checkpoint's end. How many
    # are seen of a save depends on the machine: the later moments wait for whole checkpoints too.
    names, first = set(), 1
    moments = {1: 0, 2: 0, 4: 0, 7: 0, 11: 0, 16: 1, 22: 1, 30: 2}  # changes: new checkpoints
    for moment, complete in moments.items():
        newest = first + complete - 1
        child = start(place)
        try:
            assert child.stdout.readline() == "ready\n"
            before = listing(place)
            child.stdin.write(f"{first}\n")
            child.stdin.flush()
            changes, limit = 0, time.monotonic() + 120
            while changes < moment or max(checkpoint.all_steps(place), default=0) < newest:
                now = listing(place)
                changes += now != before
                before = now
                assert child.poll() is None
                assert time.monotonic() < limit
        finally:
            child.send_signal(signal.SIGKILL)
            child.communicate()
        names |= unfinished(place)
        steps = checkpoint.all_steps(place)
        for step in steps[-2:]:  # an old one may be half deleted
            assert verify.check(place, step).problems == []
        with Checkpointer(place, keep=2) as checkpointer:
            resumed = checkpointer.resume(abstract(make_state(1, WIDTH)))
            if steps:
                assert_same(resumed[0], make_state(steps[-1], WIDTH))
            else:
                assert resumed is None
            assert not unfinished(place)
            first = steps[-1] + 1 if steps else 1
    assert steps
    assert len(names) > 3  # it did hit saves that were under way
    with Checkpointer(place, keep=1) as checkpointer:
        checkpointer.save(make_state(first, WIDTH), make_meta(first))
    assert checkpoint.all_steps(place) == [first]


def listing(workdir):
    """All files and folders of the checkpoints, without those that vanish while it is made."""
    if files.in_bucket(workdir):
        return {str(path) for path in files.files_below(workdir / checkpoint.FOLDER)}
    found = set()
    for folder, folders, others in os.walk(workdir / checkpoint.FOLDER):
        found |= {os.path.relpath(os.path.join(folder, name), workdir) for name in folders + others}
    return found


def unfinished(workdir):
    """The files and folders of saves that were not complete."""
    folder = workdir / checkpoint.FOLDER
    complete = [f"/{name}/" for name in files.complete_folders(folder)]
    below = (f"/{path.relative_to(folder).as_posix()}" for path in files.files_below(folder))
    return {name for name in below if not name.startswith(tuple(complete))}


def test_what_killed_saves_leave_is_removed(place):
    with Checkpointer(place, keep=2) as checkpointer:
        checkpointer.save(make_state(1), make_meta(1))
    folder = place / checkpoint.FOLDER
    left = ["2.orbax-checkpoint-tmp", "3.orbax-checkpoint-tmp-17"]
    content = {path.relative_to(folder / "1").as_posix(): path for path in files_of(place, 1)}
    if files.in_bucket(place):  # a save has the final name, and its marker at the end
        left = ["2", "3"]
        del content["commit_success.txt"]
    for name, path in content.items():
        for copy in (folder / other / name for other in left):
            files.make_folder(copy.parent)
            copy.write_bytes(path.read_bytes())
    assert checkpoint.all_steps(place) == [1]
    with Checkpointer(place, keep=2) as checkpointer:
        assert files.names(folder) == ["1"]
        for step in (2, 3):
            checkpointer.save(make_state(step), make_meta(step))
    assert checkpoint.all_steps(place) == [2, 3]
