"""Checkpoints: exact round trips, what is kept, and clear refusals."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memseg_jax import checkpoint
from memseg_jax.checkpoint import Checkpointer
from memseg_jax.checkpoint.meta import sealed
from memseg_jax.errors import UserError
from memseg_jax.runtime import files
from tests.checkpoints import (
    State,
    abstract,
    assert_same,
    files_of,
    make_meta,
    make_state,
    remove,
    save_one,
)

# ------------------------------------------------------------------------------- round trips


def test_round_trip_is_bit_exact(place):
    state = make_state(3)
    with Checkpointer(place, keep=2) as checkpointer:
        assert checkpointer.latest_step() is None
        checkpointer.save(state, make_meta(3))
    with Checkpointer(place, keep=2) as checkpointer:
        assert checkpointer.latest_step() == 3
        restored, meta = checkpointer.restore(abstract(state))
    assert isinstance(restored, State)
    assert_same(restored, state)
    assert meta["step"] == meta["data_position"] == 3
    assert meta["config"]["train"]["batch_size"] == 16
    assert meta["class_names"] == [f"class{index}" for index in range(5)]
    assert meta["fingerprint"] == "f00d"
    assert {"memseg_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy", "python"} <= set(
        meta["versions"]
    )


@pytest.mark.parametrize("memory", [None, {}, jnp.zeros((0, 1, 8))], ids=["none", "{}", "empty"])
def test_round_trip_without_memory(place, memory):
    state = make_state(1).replace(memory=memory)
    save_one(place, 1, state=state)
    with Checkpointer(place, keep=1) as checkpointer:
        assert_same(checkpointer.restore(abstract(state))[0], state)
    variables = {"params": state.params, "batch_stats": state.batch_stats, "memory": memory}
    assert_same(checkpoint.restore_for_inference(place, abstract(variables))[0], variables)


def test_files_on_disk_are_plain_nested_dicts(place):
    save_one(place)
    metadata = json.loads((place / "checkpoints/3/state/_METADATA").read_text())
    names = {
        ".".join(key["key"] for key in entry["key_metadata"])
        for entry in metadata["tree_metadata"].values()
    }
    assert {
        "step",
        "params.backbone.conv1.kernel",
        "batch_stats.backbone.bn.var",
        "memory",
    } <= names
    assert "opt_state.1.0.trace.head.kernel" in names


def test_saved_values_survive_donation(place):
    # The loop donates the state to the next step while the save is still under way.
    advance = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = make_state(1, width=4096)
    expected = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
    with Checkpointer(place, keep=1) as checkpointer:
        checkpointer.save(state, make_meta(1))
        for _ in range(5):
            state = advance(state)
        jax.block_until_ready(state)
        restored, _ = checkpointer.restore(abstract(state))
    assert_same(restored, expected)


def test_works_under_a_transfer_guard(place):
    state = make_state(1)
    target = abstract(state)
    jax.config.update("jax_transfer_guard", "disallow")
    try:
        with Checkpointer(place, keep=1) as checkpointer:
            checkpointer.save(state, make_meta(1))
            restored, _ = checkpointer.restore(target)
    finally:
        jax.config.update("jax_transfer_guard", "allow")
    assert_same(restored, state)


def test_restores_for_inference_without_the_optimizer(place):
    state = make_state(3)
    save_one(place, state=state)
    variables = {
        "params": state.params,
        "batch_stats": state.batch_stats,
        "memory": state.memory,
    }
    shapes = jax.eval_shape(lambda: variables)  # no shardings
    restored, meta = checkpoint.restore_for_inference(place, shapes, "last")
    assert_same(restored, variables)
    assert meta["step"] == 3


def test_restores_on_another_number_of_devices(place):
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    split = jax.NamedSharding(mesh, jax.P("data"))
    whole = jax.NamedSharding(mesh, jax.P())

    def sharded(leaf):
        fits = leaf.ndim and leaf.shape[0] % mesh.size == 0
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split if fits else whole)

    one = make_state(1)
    many = jax.tree.map(lambda leaf: jax.device_put(leaf, sharded(leaf).sharding), one)
    save_one(place / "many", 1, state=many)
    save_one(place / "one", 1, state=one)
    for workdir, target in (("many", abstract(one)), ("one", jax.tree.map(sharded, one))):
        with Checkpointer(place / workdir, keep=1) as checkpointer:
            restored, _ = checkpointer.restore(target)
        assert_same(restored, one)
        for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(target)):
            assert leaf.sharding == wanted.sharding


# ------------------------------------------------------------------------------ what is kept


@given(
    st.sets(st.integers(0, 50), max_size=12),
    st.dictionaries(st.integers(0, 50), st.none() | st.floats(0, 1), max_size=12),
    st.integers(1, 5),
)
def test_kept_steps(steps, miou, keep):
    scores = {step: {"mIoU": value, "mAcc": 1 - (value or 0)} for step, value in miou.items()}
    kept = checkpoint.kept_steps(steps, scores, keep)
    assert kept <= steps
    assert set(sorted(steps)[-keep:]) <= kept
    assert len(kept) <= keep + 1 + (0 in steps)
    assert 0 in kept or 0 not in steps  # what a run started from
    values = [miou[step] for step in steps if miou.get(step) is not None]
    if values:
        assert max(values) in [miou.get(step) for step in kept]
        best = checkpoint.best_step(steps, scores)
        assert best == max(step for step in steps if miou.get(step) == max(values))
    else:
        assert checkpoint.best_step(steps, scores) is None


def test_keeps_the_last_and_the_best(place):
    scores = {1: 0.3, 2: 0.7, 3: None, 4: 0.7, 5: 0.2, 6: float("nan"), 7: None}
    expected = {1: [1], 2: [1, 2], 3: [2, 3], 4: [3, 4], 5: [4, 5], 6: [4, 5, 6], 7: [4, 6, 7]}
    with Checkpointer(place, keep=2) as checkpointer:
        for step, miou in scores.items():
            checkpointer.save(make_state(step), make_meta(step))
            if miou is not None:
                checkpointer.record_scores(step, {"mIoU": miou})
            checkpointer.wait_until_finished()
            assert checkpoint.all_steps(place) == expected[step]
    assert checkpoint.read_meta(place, "best")[0] == 4
    assert checkpoint.read_meta(place, "last")[0] == 7
    # The same rule after reopening: scores are read from disk.
    with Checkpointer(place, keep=2) as checkpointer:
        checkpointer.save(make_state(8), make_meta(8))
        checkpointer.record_scores(8, {"mIoU": 0.9})
        checkpointer.wait_until_finished()
        assert checkpoint.all_steps(place) == [7, 8]
        restored, _ = checkpointer.restore(abstract(make_state(7)), step=7)
    assert_same(restored, make_state(7))


@pytest.mark.parametrize(
    ("mious", "count"),
    [
        ([], 0), ([0.3], 0), ([None], 1), ([0.3, 0.3], 1), ([0.3, 0.2, 0.4], 0),
        ([0.5, 0.4, 0.45, 0.5], 3), ([0.5, 0.6, None, 0.1], 2),
    ],
)  # fmt: skip
def test_evaluations_without_gain(place, mious, count):
    with Checkpointer(place, keep=1) as checkpointer:
        for step, miou in enumerate(mious, 9):  # 10 comes after 9, which it does not as text
            checkpointer.record_scores(step, {"mIoU": miou})
        assert checkpointer.evaluations_without_gain() == count


def test_best_without_scores_is_the_last(place):
    save_one(place, 1)
    save_one(place, 2)
    assert checkpoint.read_meta(place, "best")[0] == 2


def test_a_complete_checkpoint_is_never_written_to_again(place):
    def content(step):
        return {path: path.read_bytes() for path in files_of(place, step)}

    with Checkpointer(place, keep=1) as checkpointer:
        checkpointer.save(make_state(1), make_meta(1))
        checkpointer.record_scores(1, {"mIoU": 0.4})
        checkpointer.save(make_state(2), make_meta(2))
        checkpointer.wait_until_finished()
        assert checkpoint.all_steps(place) == [1, 2]
        before = content(2)
        assert not checkpointer.has_scores(2)
        checkpointer.record_scores(2, {"mIoU": 0.6})
        assert checkpointer.has_scores(2)
        assert checkpoint.all_steps(place) == [2]  # step 1 is no longer the best
        checkpointer.save(make_state(2, seed=9), make_meta(2))
        checkpointer.wait_until_finished()
        assert content(2) == before
        assert_same(checkpointer.restore(abstract(make_state(2)))[0], make_state(2))
        checkpointer.save(make_state(3), make_meta(3))
    assert checkpoint.all_steps(place) == [2, 3]


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"a": {}}', '{"2": 3}'])
def test_scores_that_cannot_be_read(place, caplog, text):
    for step in (1, 2):
        save_one(place, step, miou=0.5)
    (place / "scores.json").write_text(text)
    with pytest.raises(
        UserError, match=r"scores\.json cannot be read .* 'last', or remove the file"
    ):
        checkpoint.read_meta(place, "best")
    assert checkpoint.read_meta(place, "last")[0] == 2
    # A run goes on without them, and its next evaluation writes the file anew.
    with Checkpointer(place, keep=2) as checkpointer:
        assert int(checkpointer.resume(abstract(make_state(1)))[0].step) == 2
        assert "scores.json cannot be read" in caplog.text
        assert not checkpointer.has_scores(2)
        checkpointer.record_scores(2, {"mIoU": 0.25})
    assert checkpoint.read_scores(place) == {2: {"mIoU": 0.25}}


def test_scores_after_the_step_a_run_goes_on_from_are_forgotten(place):
    for step in (1, 2, 3):
        save_one(place, step, miou=step / 10)
    remove(place / checkpoint.FOLDER / "3")
    with Checkpointer(place, keep=3) as checkpointer:
        checkpointer.resume(abstract(make_state(1)))
    assert set(checkpoint.read_scores(place)) == {1, 2}


@pytest.fixture
def calls_of_the_disk(monkeypatch):
    """Records what is flushed and renamed, in order."""
    made = []

    def flush(descriptor):
        made.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))

    rename, replace = os.rename, os.replace
    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(
        os, "rename", lambda a, b, **kw: (made.append(("name", str(b))), rename(a, b, **kw))[1]
    )
    monkeypatch.setattr(
        os, "replace", lambda a, b, **kw: (made.append(("name", str(b))), replace(a, b, **kw))[1]
    )
    return made


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, calls_of_the_disk):
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(make_state(1), make_meta(1))
        checkpointer.wait_until_finished()
        named = calls_of_the_disk.index(("name", str(tmp_path / checkpoint.FOLDER / "1")))
        flushed = [path for kind, path in calls_of_the_disk[:named] if kind == "flush"]
        for name in ("meta/metadata", "state/_METADATA"):
            assert any(path.endswith(name) for path in flushed), flushed
        # The old checkpoint goes when the new one's name is on the disk.
        del calls_of_the_disk[:]
        checkpointer.save(make_state(2), make_meta(2))
    folder = str(tmp_path / checkpoint.FOLDER)
    named = calls_of_the_disk.index(("name", f"{folder}/2"))
    removed = next(i for i, (kind, path) in enumerate(calls_of_the_disk) if "removed" in path)
    assert ("flush", folder) in calls_of_the_disk[named:removed]


def test_a_file_is_replaced_by_one_that_is_on_the_disk(tmp_path, calls_of_the_disk):
    files.write_text(tmp_path / "a.json", "new")
    (first, temporary), *rest = calls_of_the_disk
    assert (first, temporary.endswith(".tmp")) == ("flush", True)
    assert rest == [("name", str(tmp_path / "a.json")), ("flush", str(tmp_path))]


def test_removing_a_folder_by_hand_is_noticed(place):
    with Checkpointer(place, keep=3) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(make_state(step), make_meta(step))
        checkpointer.wait_until_finished()
        remove(place / "checkpoints/3")
        assert checkpointer.latest_step() == 2
        checkpointer.save(make_state(3), make_meta(3))
        assert_same(checkpointer.restore(abstract(make_state(3)))[0], make_state(3))


# ---------------------------------------------------------------------------------- refusals


def test_later_format_is_refused(place):
    save_one(place)
    path = place / "checkpoints/3/meta/metadata"
    path.write_text(json.dumps(sealed(dict(json.loads(path.read_text()), format_version=2))))
    with pytest.raises(UserError, match=r"format version 2.*reads up to 1"):
        checkpoint.read_meta(place)


def test_missing_checkpoints_are_named(place):
    with pytest.raises(UserError, match=r"no checkpoint in .*checkpoints"):
        checkpoint.read_meta(place / "nowhere")
    save_one(place)
    with pytest.raises(UserError, match=r"no checkpoint of step 8 .* There are: 3"):
        checkpoint.read_meta(place, 8)


@pytest.mark.parametrize(
    ("other", "named", "cause"),
    [
        (
            {"classes": 7},
            r"memory: float32\[5,1,8\] in the checkpoint, float32\[7,1,8\] in this model",
            "another number of classes",
        ),
        (
            {"conv": "stem"},
            r"params.backbone.conv1.kernel: float32\[3,3,4,8\] in the checkpoint, absent",
            "another backbone",
        ),
        ({"width": 16}, r"batch_stats.backbone.bn.mean: float32\[8\]", "other widths"),
    ],
)
def test_checkpoint_of_another_model(place, other, named, cause):
    save_one(place)
    with (
        Checkpointer(place, keep=2) as checkpointer,
        pytest.raises(UserError, match="another model") as caught,
    ):
        checkpointer.restore(abstract(make_state(3, **other)))
    message = str(caught.value)
    assert str(place / "checkpoints/3/state") in message
    assert cause in message
    assert '5 classes, model.backbone = "resnet50"' in message
    state = make_state(3, **other)
    variables = {"params": state.params, "batch_stats": state.batch_stats, "memory": state.memory}
    with pytest.raises(UserError, match=named):
        checkpoint.restore_for_inference(place, abstract(variables))


def test_prepare_workdir(tmp_path):
    made = checkpoint.prepare_workdir(tmp_path / "a" / "b")
    assert made.is_dir()
    assert not list(made.iterdir())


@pytest.mark.parametrize("workdir", ["{tmp}/file/run", "{tmp}/file", "/proc/run"])
def test_unwritable_workdir(tmp_path, workdir):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot write to the workdir .*--workdir"):
        checkpoint.prepare_workdir(workdir.format(tmp=tmp_path))
