"""Damaged checkpoints: what is found, what is said, and what a run goes on from."""

import itertools
import json
import logging
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from memseg_jax import checkpoint, run_record
from memseg_jax.checkpoint import Checkpointer, DamagedCheckpoint
from memseg_jax.checkpoint.meta import sealed
from memseg_jax.errors import UserError
from tests import tiny
from tests.checkpoints import abstract, assert_same, halve, make_meta, make_state, save_one

# A failed read leaves unfinished work inside the library, which complains when it is collected.
pytestmark = [
    pytest.mark.usefixtures("quiet_entry"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning"),
]
WIDTH = 256  # of the states here: some arrays get files of their own, some share one


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the steps 1, 2 and 3, to be copied."""
    workdir = tmp_path_factory.mktemp("saved")
    for step in (1, 2, 3):
        save_one(workdir, step, miou=step / 10, state=make_state(step, width=WIDTH))
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def files_of(workdir, step):
    folder = workdir / checkpoint.FOLDER / str(step)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, position, bit=4):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def largest(workdir, step):
    """The file that holds most of the arrays' values."""
    return max(files_of(workdir, step), key=lambda path: path.stat().st_size)


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
    flip(path, path.stat().st_size // 2)
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
    # Which one is the best cannot be known without all scores.
    halve(workdir / "checkpoints/1/meta/metadata")
    with pytest.raises(DamagedCheckpoint, match="step 1 is damaged"):
        checkpoint.read_meta(workdir, "best")
    assert checkpoint.read_meta(workdir, "last")[0] == 3


# ---- Going on -----------------------------------------------------------------------------------


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def forget_array(path):
    """The list of arrays lacks one."""
    listed = json.loads(path.read_text())
    name = next(name for name in listed["tree_metadata"] if "'memory'" in name)
    del listed["tree_metadata"][name]
    path.write_text(json.dumps(listed))


DAMAGES = {
    "flipped byte": (None, lambda path: flip(path, path.stat().st_size // 2), "kernel"),
    "truncated file": (None, halve, "cannot be read"),
    "missing file": (None, Path.unlink, "cannot be read"),
    "missing array": ("state/_METADATA", forget_array, "memory: found none, expected float32"),
    "missing list": ("state/_METADATA", Path.unlink, "the list of arrays"),
    "missing item": ("state", remove, "the list of arrays"),
    "missing description": ("meta", remove, "meta/metadata cannot be read"),
    "half a description": ("meta/metadata", halve, "meta/metadata cannot be read"),
    "changed description": (
        "meta/metadata",
        lambda path: path.write_text(path.read_text().replace('"step": 3', '"step": 4')),
        "it was changed after it had been written",
    ),
    "empty folder": ("", lambda path: (remove(path), path.mkdir()), "meta/metadata cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_goes_on_from_the_last_good_step(workdir, capsys, caplog, damage):
    place, change, named = DAMAGES[damage]
    change(largest(workdir, 3) if place is None else workdir / "checkpoints/3" / place)
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
    assert not (workdir / "checkpoints/3").exists()
    kept = sorted(path for path in (workdir / "damaged/3").rglob("*") if path.is_file())
    assert [path.read_bytes() for path in kept] == before
    assert verify(workdir) == 0
    assert "found damaged earlier and not used: 3" in capsys.readouterr().out


def test_a_run_goes_on_twice_from_before_the_same_step(workdir):
    for count in (1, 2):
        halve(largest(workdir, 3))
        state, _ = resume(workdir)
        assert int(state.step) == 2
        assert len(list((workdir / "damaged").iterdir())) == count
        save_one(workdir, 3, state=make_state(3, width=WIDTH))
    assert_same(resume(workdir)[0], make_state(3, width=WIDTH))


def test_a_run_without_a_good_checkpoint_does_not_start_again(workdir):
    for step in (1, 2, 3):
        halve(largest(workdir, step))
    with pytest.raises(UserError, match=r"no good checkpoint.*\n  step 3: .*\n  step 2: .*\n  st"):
        resume(workdir)
    assert checkpoint.all_steps(workdir) == [1, 2, 3]
    assert not (workdir / "damaged").exists()


def test_a_run_does_not_go_back_to_the_weights_it_started_from(tmp_path):
    state = make_state(0, width=8)
    variables = {"params": state.params, "batch_stats": state.batch_stats, "memory": state.memory}
    checkpoint.write_weights(
        tmp_path, jax.tree.map(np.asarray, variables), make_meta(0) | {"origin": {"file": "x"}}
    )
    assert resume(tmp_path, state) is None
    save_one(tmp_path, 5)
    halve(largest(tmp_path, 5))
    with pytest.raises(UserError, match="no good checkpoint of this run is left"):
        resume(tmp_path, state)


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


# ---- Checkpoints of earlier versions ------------------------------------------------------------


def test_without_checksums(workdir, capsys, caplog):
    path = workdir / "checkpoints/3/meta/metadata"
    meta = json.loads(path.read_text())
    del meta["checksums"], meta["meta_checksum"]
    path.write_text(json.dumps(meta))
    with caplog.at_level(logging.INFO):
        assert_same(resume(workdir)[0], make_state(3, width=WIDTH))
    assert "step 3 has no checksums" in caplog.text
    assert verify(workdir) == 0
    assert "no checksums" in capsys.readouterr().out.splitlines()[3]


def test_a_score_that_is_added_keeps_the_checksums(workdir):
    before = checkpoint.read_meta(workdir, 3)[1]
    save_one(workdir, 3, miou=0.75, state=make_state(3, width=WIDTH))
    after = checkpoint.read_meta(workdir, 3)[1]
    assert after["miou"] == 0.75
    assert after["checksums"] == before["checksums"]
    assert set(after["checksums"]) == set(run_record.flatten(_plain(make_state(3, width=WIDTH))))
    assert_same(resume(workdir)[0], make_state(3, width=WIDTH))


def _plain(state):
    import flax.serialization

    return flax.serialization.to_state_dict(state)


# ---- The mode -----------------------------------------------------------------------------------


def test_all_is_well(workdir, capsys):
    assert verify(workdir) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "3"]
    size = sum(np.asarray(x).nbytes for x in jax.tree.leaves(make_state(1, width=WIDTH)))
    assert all(line.endswith(f"{size / 1e6:.1f}  ok") for line in lines[1:4])
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


def test_a_workdir_without_checkpoints(tmp_path, capsys):
    assert verify(tmp_path) == 1
    assert "there is no checkpoint in" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert os.path.isdir(tmp_path)
