"""kill -9 in the middle of a save, at many moments: what is on disk is right, and a run goes on."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from memseg_jax import checkpoint, verify
from memseg_jax.checkpoint import Checkpointer
from tests.checkpoints import abstract, assert_same, make_meta, make_state

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
def test_killed_at_many_moments_of_a_save(tmp_path):
    # The moments are counted in changes of the folder, which come in the order of a save: the
    # temporary folder, its items, their files, the new name, and an old checkpoint's end. How many
    # are seen of a save depends on the machine: the later moments wait for whole checkpoints too.
    names, first = set(), 1
    moments = {1: 0, 2: 0, 4: 0, 7: 0, 11: 0, 16: 1, 22: 1, 30: 2}  # changes: new checkpoints
    for moment, complete in moments.items():
        newest = first + complete - 1
        child = start(tmp_path)
        try:
            assert child.stdout.readline() == "ready\n"
            before = listing(tmp_path)
            child.stdin.write(f"{first}\n")
            child.stdin.flush()
            changes, limit = 0, time.monotonic() + 120
            while changes < moment or max(checkpoint.all_steps(tmp_path), default=0) < newest:
                now = listing(tmp_path)
                changes += now != before
                before = now
                assert child.poll() is None
                assert time.monotonic() < limit
        finally:
            child.send_signal(signal.SIGKILL)
            child.communicate()
        names |= {name for name in listing(tmp_path) if "tmp" in name}
        steps = checkpoint.all_steps(tmp_path)
        for step in steps[-2:]:  # an old one may be half deleted
            assert verify.check(tmp_path, step).problems == []
        with Checkpointer(tmp_path, keep=2) as checkpointer:
            resumed = checkpointer.resume(abstract(make_state(1, WIDTH)))
            if steps:
                assert_same(resumed[0], make_state(steps[-1], WIDTH))
            else:
                assert resumed is None
            assert not [name for name in listing(tmp_path) if "tmp" in name]
            first = steps[-1] + 1 if steps else 1
    assert steps
    assert len(names) > 3  # it did hit saves that were under way
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(make_state(first, WIDTH), make_meta(first))
    assert checkpoint.all_steps(tmp_path) == [first]


def listing(workdir):
    """All files and folders of the checkpoints, without those that vanish while it is made."""
    found = set()
    for folder, folders, files in os.walk(workdir / checkpoint.FOLDER):
        found |= {os.path.relpath(os.path.join(folder, name), workdir) for name in folders + files}
    return found


def test_what_killed_saves_leave_is_removed(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        checkpointer.save(make_state(1), make_meta(1))
    folder = tmp_path / checkpoint.FOLDER
    shutil.copytree(folder / "1", folder / "2.orbax-checkpoint-tmp")
    shutil.copytree(folder / "1", folder / "3.orbax-checkpoint-tmp-17")
    assert checkpoint.all_steps(tmp_path) == [1]
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert os.listdir(folder) == ["1"]
        for step in (2, 3):
            checkpointer.save(make_state(step), make_meta(step))
    assert checkpoint.all_steps(tmp_path) == [2, 3]
