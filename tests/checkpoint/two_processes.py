"""One of two processes of a run that meets damaged checkpoints; see test_two_processes.

Arguments: address of process 0, number of this process, an empty folder that both see.
"""

import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memseg_jax import checkpoint
from memseg_jax.checkpoint import manager, steps
from memseg_jax.errors import UserError
from memseg_jax.runtime import distributed
from tests.checkpoints import (
    DAMAGES,
    assert_same,
    damage_step,
    files_of,
    halve,
    make_meta,
    make_state,
)

WIDTH = 256


def sharding_of(leaf):
    """Every process holds a part of the large arrays."""
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    axes = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
    return NamedSharding(
        mesh, PartitionSpec(*[None] * axes[-1], "fsdp") if axes else PartitionSpec()
    )


def placed(state):
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(
            x.shape, sharding_of(x), lambda index: np.asarray(x)[index]
        ),
        state,
    )


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x)), state
    )


def own_parts(state):
    return jax.tree.map(lambda x: [np.asarray(shard.data) for shard in x.addressable_shards], state)


def resume(workdir):
    with checkpoint.Checkpointer(workdir, keep=5) as checkpointer:
        return checkpointer.resume(abstract(make_state(1, width=WIDTH)))


def once(function, *arguments):
    """Does something in the folder by process 0 alone, before any process goes on."""
    if distributed.is_primary():
        function(*arguments)
    distributed.wait_for_all("once")


def goes_on_from_step_2(workdir, what):
    state, meta = resume(workdir)
    assert meta["step"] == 2, what
    assert_same(own_parts(state), own_parts(placed(make_state(2, width=WIDTH))))
    print(f"{what}: step 2", flush=True)


def of_process_1(workdir):
    """The file that only process 1 reads."""
    files = [
        p for p in files_of(workdir, 3) if "ocdbt.process_1" in str(p) and p.parent.name == "d"
    ]
    return max(files, key=lambda path: path.stat().st_size)


def main(address, index, folder):
    distributed.start("on", address, "2", index)
    folder = Path(folder)
    saved = folder / "saved"
    with checkpoint.Checkpointer(saved, keep=5) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(placed(make_state(step, width=WIDTH)), make_meta(step))

    for number, damage in enumerate(DAMAGES):
        run = folder / f"run{number}"
        once(shutil.copytree, saved, run)
        once(damage_step, run, 3, damage)
        goes_on_from_step_2(run, damage)
    for number, change in enumerate((halve, Path.unlink)):
        run = folder / f"part{number}"
        once(shutil.copytree, saved, run)
        once(lambda run=run, change=change: change(of_process_1(run)))
        goes_on_from_step_2(run, f"{change.__name__} of process 1")

    # All damaged: both processes are told the same, and nothing is moved.
    run = folder / "all"
    once(shutil.copytree, saved, run)
    for step in (1, 2, 3):
        once(damage_step, run, step, "truncated file")
    with pytest.raises(UserError, match="no good checkpoint of this run is left"):
        resume(run)
    assert steps.all_steps(run) == [1, 2, 3]
    print("all damaged: refused", flush=True)

    # A shared file system that shows process 1 something else.
    real = steps.all_steps
    for shown in ([], [1], [1, 2, 3, 9]):
        if not distributed.is_primary():
            manager.all_steps = lambda workdir, shown=shown: shown
        _, meta = resume(saved)
        assert meta["step"] == 3
        with checkpoint.Checkpointer(saved, keep=5) as checkpointer:
            assert checkpointer.latest_step() == 3
            checkpointer.save(placed(make_state(3, width=WIDTH)), make_meta(3))
            checkpointer.save(placed(make_state(4, width=WIDTH)), make_meta(4))
            checkpointer.wait_until_finished()
        assert real(saved) == [1, 2, 3, 4]
        distributed.wait_for_all("listed")  # or process 0 removes what process 1 still looks for
        once(shutil.rmtree, saved / checkpoint.FOLDER / "4")
        print(f"another list {shown}: step 3", flush=True)
    distributed.finish(0)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except BaseException as error:
        distributed.failed(error)  # or the other process waits for this one
        raise
