"""Damaged checkpoints: what is found, what is said, and what a run goes on from."""

import itertools
import json
import logging

import jax
import numpy as np
import pytest

from memseg_jax import checkpoint
from memseg_jax.checkpoint import Checkpointer, DamagedCheckpoint
from memseg_jax.checkpoint.meta import sealed
from memseg_jax.errors import UserError
from memseg_jax.runtime import files
from tests import tiny
from tests.checkpoints import (
    DAMAGES,
    abstract,
    assert_same,
    damage_step,
    files_of,
    flip,
    halve,
    largest,
    make_meta,
    make_state,
    save_one,
    size,
)

# A failed read leaves unfinished work inside the library, which complains when it is collected.
pytestmark = [
    pytest.mark.usefixtures("quiet_entry"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning"),
]
WIDTH = 256  # of the states here: some arrays get files of their own, some share one


@pytest.fixture(scope="module")
def saved():
    """Of each kind of place: all files of a workdir with the steps 1, 2 and 3, to be copied."""
    return {}


@pytest.fixture
def workdir(saved, place_of_run):
    """A workdir with the steps 1, 2 and 3."""
    kind, origin = files.in_bucket(place_of_run), place_of_run / "saved"
    if kind not in saved:
        for step in (1, 2, 3):
            save_one(origin, step, step / 10, make_state(step, width=WIDTH))
        found = files.files_below(origin)
        saved[kind] = {p.relative_to(origin).as_posix(): p.read_bytes() for p in found}
    folder = place_of_run / "run"
    for name, content in saved[kind].items():
        files.make_folder((folder / name).parent)
        (folder / name).write_bytes(content)
    return folder


def resume(workdir, state=None):
    with Checkpointer(workdir, keep=5) as checkpointer:
        return checkpointer.resume(abstract(state or make_state(1, width=WIDTH)))


def verify(workdir):
    return tiny.run("--mode=verify", "--workdir", workdir)


def rewrite(path, change):
    """Changes a description as a tool would that knows its checksum."""
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(sealed(meta)))


# ---- One flipped bit ----------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_is_reported_or_changes_nothing(workdir):
    expected = make_state(3, width=WIDTH)
    meta = checkpoint.read_meta(workdir, 3)[1]
    reported = {}
    for path in files_of(workdir, 3):
        content = path.read_bytes()
        for position in (0, len(content) // 3, len(content) // 2, len(content) * 2 // 3):
            flip(path, position)
            with Checkpointer(workdir, keep=5) as checkpointer:
                try:
                    restored, found = checkpointer.restore(abstract(expected))
                except DamagedCheckpoint as error:
                    reported.setdefault(path, []).append(error)
                else:
                    assert_same(restored, expected)
                    assert found == meta
            path.write_bytes(content)
    for error in itertools.chain(*reported.values()):
        assert "step 3 is damaged" in str(error)
        assert str(workdir / checkpoint.FOLDER / "3") in error.what
    # In what holds values and descriptions it is always found, with the name of the array.
    values = reported[largest(workdir, 3)]
    assert len(values) == 4
    for error in values:
        assert any(f" {name}" in error.what for name in meta["checksums"]), error.what
    assert len(reported[workdir / "checkpoints/3/meta/metadata"]) == 4


def test_a_changed_value_is_named_with_both_checksums(workdir):
    path = largest(workdir, 3)
    flip(path, size(path) // 2)
    with pytest.raises(DamagedCheckpoint) as caught, Checkpointer(workdir, keep=5) as checkpointer:
        checkpointer.restore(abstract(make_state(3, width=WIDTH)))
    record = checkpoint.read_meta(workdir, 3)[1]["checksums"]
    (name,) = [name for name in record if f" {name} has the checksum " in str(caught.value)]
    assert f"expected {record[name].split()[1]}" in str(caught.value)
    assert "Other checkpoints of this run: 1, 2." in str(caught.value)
    # The checkpoint's other half is as it was, and is used: only what is read has to be right.
    variables = make_state(3, width=WIDTH).__dict__
    part = {"memory": variables["memory"]}
    restored, _ = checkpoint.restore_for_inference(workdir, abstract(part), 3)
    assert_same(restored, part)


@pytest.mark.parametrize("which", ["last", "best", 3])
def test_inference_takes_no_other_checkpoint(workdir, which):
    state = make_state(3, width=WIDTH)
    variables = {"params": state.params, "batch_stats": state.batch_stats, "memory": state.memory}
    rewrite(
        workdir / "checkpoints/3/meta/metadata",
        lambda meta: meta["checksums"].update(
            {"memory": meta["checksums"]["memory"][:-8] + "0" * 8}
        ),
    )
    with pytest.raises(DamagedCheckpoint, match=r"step 3 is damaged.*memory.*--checkpoint STEP"):
        checkpoint.restore_for_inference(workdir, abstract(variables), which)
    _, meta = checkpoint.restore_for_inference(workdir, abstract(variables), 2)
    assert meta["step"] == 2
    # Which one is the best cannot be known without the scores.
    halve(workdir / "scores.json")
    with pytest.raises(UserError, match=r"scores\.json cannot be read"):
        checkpoint.read_meta(workdir, "best")
    assert checkpoint.read_meta(workdir, "last")[0] == 3


# ---- Going on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_goes_on_from_the_last_good_step(workdir, capsys, caplog, damage):
    named = damage_step(workdir, 3, damage)
    before = [path.read_bytes() for path in files_of(workdir, 3)]
    assert verify(workdir) == 1
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()[1:3]] == ["1", "2"]
    assert "DAMAGED" in table.splitlines()[3]
    assert "are damaged: steps 3. Training goes on from step 2." in table

    state, meta = resume(workdir)
    assert_same(state, make_state(2, width=WIDTH))
    assert meta["step"] == 2
    warnings = [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]
    assert any("step 3 is damaged" in text and named in text for text in warnings)
    assert any("going on from step 2 instead of step 3" in text for text in warnings)
    # Kept as it is, where nothing takes it for a checkpoint.
    assert checkpoint.all_steps(workdir) == [1, 2]
    assert not files.exists(workdir / "checkpoints/3")
    kept = files.files_below(workdir / "damaged/3")
    assert [path.read_bytes() for path in kept] == before
    assert verify(workdir) == 0
    assert "found damaged earlier and not used: 3" in capsys.readouterr().out


def test_a_run_goes_on_twice_from_before_the_same_step(workdir):
    for count in (1, 2):
        halve(largest(workdir, 3))
        state, _ = resume(workdir)
        assert int(state.step) == 2
        assert len(files.names(workdir / "damaged")) == count
        save_one(workdir, 3, state=make_state(3, width=WIDTH))
    assert_same(resume(workdir)[0], make_state(3, width=WIDTH))


def test_a_run_without_a_good_checkpoint_does_not_start_again(workdir):
    for step in (1, 2, 3):
        halve(largest(workdir, step))
    with pytest.raises(UserError, match=r"no good checkpoint.*\n  step 3: .*\n  step 2: .*\n  st"):
        resume(workdir)
    assert checkpoint.all_steps(workdir) == [1, 2, 3]
    assert not files.exists(workdir / "damaged")


def test_a_run_does_not_go_back_to_the_weights_it_started_from(place):
    state = make_state(0, width=8)
    variables = {"params": state.params, "batch_stats": state.batch_stats, "memory": state.memory}
    checkpoint.write_weights(
        place, jax.tree.map(np.asarray, variables), make_meta(0) | {"origin": {"file": "x"}}
    )
    assert resume(place, state) is None
    save_one(place, 5)
    halve(largest(place, 5))
    with pytest.raises(UserError, match="no good checkpoint of this run is left"):
        resume(place, state)


def test_another_run_is_refused_before_anything_is_moved(workdir):
    halve(largest(workdir, 3))

    def refuse(meta):
        raise UserError(f"refused at step {meta['step']}")

    # The description of step 3 is good: it is asked first.
    with (
        Checkpointer(workdir, keep=5) as saver,
        pytest.raises(UserError, match="refused at step 3"),
    ):
        saver.resume(abstract(make_state(1, width=WIDTH)), refuse)
    assert checkpoint.all_steps(workdir) == [1, 2, 3]


# ---- The mode -----------------------------------------------------------------------------------


def test_all_is_well(workdir, capsys):
    assert verify(workdir) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "3"]
    total = sum(np.asarray(x).nbytes for x in jax.tree.leaves(make_state(1, width=WIDTH)))
    assert all(line.endswith(f"{total / 1e6:.1f}  ok") for line in lines[1:4])
    assert lines[4].startswith("all 3 checkpoints in ")


def test_every_damaged_array_is_listed(workdir, capsys):
    names = ["memory", "params.head.scale"]
    rewrite(
        workdir / "checkpoints/2/meta/metadata",
        lambda meta: meta["checksums"].update(
            {name: meta["checksums"][name][:-1] + "x" for name in names}
        ),
    )
    halve(workdir / "checkpoints/1/meta/metadata")
    assert verify(workdir) == 1
    shown = capsys.readouterr().out
    for name in names:
        assert f"{name} has the checksum " in shown
    assert "2 of 3 checkpoints" in shown
    assert "steps 1, 2. Training goes on from step 3." in shown


def test_a_workdir_without_checkpoints(place, capsys):
    assert verify(place) == 1
    assert "there is no checkpoint in" in capsys.readouterr().err
    assert files.names(place) == []
