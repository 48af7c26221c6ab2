"""Steps that are not finite: on the device, and in the run under every policy."""

import csv
import functools
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from memseg_jax import checkpoint
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.modes import train
from memseg_jax.runtime import compilation, files
from memseg_jax.training import guards, optimizer
from memseg_jax.training.state import TrainState, abstract_state
from memseg_jax.training.step import make_train_step
from tests import tiny
from tests.small_models import ThreeConvolutions, fast_jit

pytestmark = [
    pytest.mark.usefixtures("quiet_entry"),
]


def small_model(config):
    return build_segmentor(config).clone(backbone=ThreeConvolutions())


# ---- The choice between two states --------------------------------------------------------------


def make_state(step, value):
    def full(*shape):
        return jnp.full(shape, value, jnp.float32)

    opt_state = {
        "trace": full(3),
        "schedule": optax.ScaleByScheduleState(jnp.int32(step)),
    }
    return TrainState(
        jnp.int32(step), {"w": full(2, 2)}, {"mean": full(2)}, full(2, 1, 2), opt_state
    )


@functools.partial(jax.jit, static_argnames="halts")
def choose(before, after, loss, halts):
    return guards.keep_finite(before, after, (loss, after), halts)


PLACES = ("params", "batch_stats", "memory", "opt_state", "loss")


def step_with(bad, place):
    """A step from 5 to 6 with one bad number somewhere."""
    after, loss = make_state(6, 2.0), jnp.float32(1)
    if place == "loss":
        return after, jnp.float32(bad)
    part = getattr(after, place)
    if place == "memory":
        return after.replace(memory=part.at[1, 0, 1].set(bad)), loss
    name = next(iter(part))
    changed = part | {name: part[name].at[(-1,) * part[name].ndim].set(bad)}
    return after.replace(**{place: changed}), loss


def assert_same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("halts", [False, True])
def test_a_good_step_is_taken_as_it_is(halts):
    chosen, flag = choose(make_state(5, 1.0), make_state(6, 2.0), jnp.float32(1), halts=halts)
    assert_same(chosen, make_state(6, 2.0))
    assert flag == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", PLACES)
def test_a_bad_step_moves_the_clocks_only(place, bad):
    before = make_state(5, 1.0)
    chosen, flag = choose(before, *step_with(bad, place), halts=False)
    assert flag == 1
    assert_same(chosen, make_state(6, 1.0))  # the new clocks, the old numbers


@pytest.mark.parametrize("place", PLACES)
def test_a_bad_step_halts_all_that_follow(place):
    before = make_state(5, 1.0)
    chosen, flag = choose(before, *step_with(np.nan, place), halts=True)
    assert flag == 1
    assert int(chosen.step) < 0
    for value in (3.0, np.nan):  # good steps and bad ones
        chosen, _ = choose(
            chosen, make_state(int(chosen.step) + 1, value), jnp.float32(1), halts=True
        )
    assert_same(guards.before_halt(chosen), before)


def test_halting_in_the_very_first_step():
    before = make_state(0, 1.0)
    chosen, _ = choose(before, *step_with(np.nan, "loss"), halts=True)
    assert int(chosen.step) < 0
    assert_same(guards.before_halt(chosen), before)


def test_at_step_sets_all_clocks():
    assert_same(guards.at_step(make_state(5, 1.0), 9), make_state(9, 1.0))


# ---- The real step ------------------------------------------------------------------------------


@functools.cache
def real_step(policy, accumulate):
    config = tiny.get_config()
    config.train.on_nonfinite = policy
    config.train.accumulate = accumulate
    model = small_model(config)
    schedule = optimizer.schedule_from_config(config, 16)
    tx = optimizer.from_config(config, schedule)
    return fast_jit(make_train_step(model, config, tx, schedule, 1), donate_argnums=0)


@functools.cache
def a_state():
    config = tiny.get_config()
    model = small_model(config)
    tx = optimizer.from_config(config, optimizer.schedule_from_config(config, 16))
    rng = np.random.default_rng(0)
    shapes = abstract_state(model, tx)
    filled = jax.tree.map(
        lambda x: (
            rng.uniform(0.01, 0.1, x.shape).astype(x.dtype)
            if jnp.issubdtype(x.dtype, jnp.floating)
            else np.full(x.shape, 4, x.dtype)
        ),
        shapes,
    )
    return jax.tree.map(np.asarray, filled)


def a_batch(number):
    images, labels = zip(*(tiny.picture(100 * number + k) for k in range(8)))
    return {
        "image": ((np.stack(images) - 120.0) / 60).astype(np.float32),
        "label": np.stack(labels),
    }


def a_bad_batch():
    batch = a_batch(1)
    batch["image"][6, 3, 3, 0] = np.nan
    return batch


@pytest.mark.parametrize(
    ("policy", "accumulate"),
    [("skip", 1), pytest.param("raise", 2, marks=pytest.mark.slow)],
)
def test_a_bad_batch_changes_nothing(policy, accumulate):
    step = real_step(policy, accumulate)
    state, metrics = step(jax.tree.map(jnp.array, a_state()), a_bad_batch())
    assert metrics["nonfinite"] == 1
    assert not np.isfinite(metrics["loss"])
    if policy == "raise":
        state, metrics = step(state, a_batch(2))  # in flight already
        assert_same(guards.before_halt(state), a_state())
        return
    assert_same(state, guards.at_step(jax.tree.map(jnp.array, a_state()), 5))
    # What follows is what would have followed if there had been no such batch.
    expected, _ = step(guards.at_step(jax.tree.map(jnp.array, a_state()), 5), a_batch(2))
    state, metrics = step(state, a_batch(2))
    assert metrics["nonfinite"] == 0
    assert_same(state, expected)
    assert np.abs(np.asarray(state.memory) - a_state().memory).max() > 0


def test_a_bad_update_changes_nothing():
    """Loss and gradients are finite; the momentum, and so the update, is not."""
    state = jax.tree.map(np.copy, a_state())
    momentum = max(jax.tree.leaves(state.opt_state), key=np.size)
    momentum.flat[7] = np.inf
    after, metrics = real_step("skip", 1)(jax.tree.map(jnp.array, state), a_batch(1))
    assert np.isfinite(metrics["loss"])
    assert np.isfinite(metrics["grad_norm"])
    assert metrics["nonfinite"] == 1
    assert_same(after, guards.at_step(jax.tree.map(jnp.array, state), 5))


def test_without_labels_a_batch_is_good_and_leaves_the_memory():
    batch = a_batch(1)
    batch["label"][:] = 255
    state, metrics = real_step("skip", 1)(jax.tree.map(jnp.array, a_state()), batch)
    assert metrics["nonfinite"] == 0
    assert metrics["loss_stage2"] == 0
    assert np.asarray(state.memory).tobytes() == a_state().memory.tobytes()
    assert guards.all_finite(state)


def test_the_state_is_still_donated():
    state = jax.tree.map(jnp.array, a_state())
    compiled = real_step("skip", 1).lower(state, a_batch(1)).compile()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= size


# ---- The run ------------------------------------------------------------------------------------


class Spoiled:
    """Batches of which some have a number that is not finite."""

    def __init__(self, batches, first, bad):
        self._batches, self._step, self._bad = batches, first, bad

    def __next__(self):
        batch = next(self._batches)
        self._step += 1
        if self._step in self._bad:
            batch["image"][0, 5, 5, 1] = np.nan
        return batch

    def close(self):
        self._batches.close()


PROGRAMS = {}


@pytest.fixture
def run(tmp_path, monkeypatch, compilations, three_convolutions):
    """Trains with bad batches at some steps; returns the exit status."""
    read = train.train_batches

    def start(bad, *flags, root=None, workdir=tmp_path):
        def spoiled(source, config, first, *rest):
            return Spoiled(read(source, config, first, *rest), first, bad)

        def compile_once(function, what, *args):
            key = what, str(args), "on_nonfinite" in str(flags)
            if key not in PROGRAMS:
                PROGRAMS[key] = tiny.compile_quickly(function, what, *args)
            return PROGRAMS[key]

        monkeypatch.setattr(train, "train_batches", spoiled)
        monkeypatch.setattr(compilation, "compile_with_notice", compile_once)
        flags = (f"--config.data.root={root or tiny.data_root()}", "--workdir", workdir, *flags)
        return tiny.run(*flags)

    return start


def load(workdir, step):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), a_state())
    with checkpoint.Checkpointer(workdir, 9) as checkpointer:
        return jax.device_get(checkpointer.restore(shapes, step)[0])


def rows(workdir, column):
    found = csv.DictReader((workdir / "metrics.csv").read_text().splitlines())
    return {int(row["step"]): row[column] for row in found if row[column]}


KEEP = "--config.checkpoint.keep=9"


@pytest.mark.parametrize("log_every", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_raise(run, place_of_run, capsys, log_every):
    workdir = place_of_run
    log = f"--config.train.log_every={log_every}"
    assert run({8}, KEEP, log, workdir=workdir) == 1
    error = capsys.readouterr().err
    folder = workdir / "nonfinite_step_8"
    assert "error: step 8: grad_norm, loss, " in error
    assert "Traceback" not in error
    assert str(folder) in error
    with files.readable(folder / "batch.npz") as local:
        kept = dict(np.load(local))
    assert np.isnan(kept["image"][0, 5, 5, 1])
    assert kept["label"].shape == (8, tiny.SIDE, tiny.SIDE)
    assert len(kept["files"]) == 8
    for name in kept["files"]:
        assert f"  {name}\n" in error
        assert "images/train/" in name
    # The state is that before the step, though two more steps were under way.
    assert checkpoint.all_steps(workdir) == [3, 6]
    assert checkpoint.all_steps(folder) == [7]
    assert run(set(), KEEP, log, "--config.checkpoint.every=7", workdir=workdir) == 0
    assert checkpoint.all_steps(workdir) == [3, 6, 7, 14, 16]
    assert_same(load(folder, 7), load(workdir, 7))


@pytest.mark.slow
def test_skip(run, tmp_path, capsys, caplog):
    skip = "--config.train.on_nonfinite=skip"
    with caplog.at_level(logging.WARNING):
        assert run({2, 8, 9}, KEEP, skip) == 0, capsys.readouterr().err
    assert caplog.text.count(" not finite. Its batch:\n  ") == 3
    counts = rows(tmp_path, "nonfinite")
    assert {step for step, count in counts.items() if float(count) == 1} == {2, 8, 9}
    assert guards.all_finite(load(tmp_path, 16))
    assert int(load(tmp_path, 16).step) == 16
    assert not list(tmp_path.glob("nonfinite*"))
    assert all(np.isfinite(float(x)) for x in rows(tmp_path, "eval_mIoU").values())


def test_skip_gives_up_after_too_many_in_a_row(run, tmp_path, capsys):
    limit = "--config.train.max_nonfinite=3"
    assert run({2, 3, 5, *range(8, 17)}, "--config.train.on_nonfinite=skip", limit, KEEP) == 1
    error = capsys.readouterr().err
    assert "error: step 10: " in error
    assert "3 skipped steps in a row (config.train.max_nonfinite is 3)" in error
    assert (tmp_path / "nonfinite_step_10" / "batch.npz").exists()
    assert checkpoint.all_steps(tmp_path) == [3, 6, 9]
    assert guards.all_finite(load(tmp_path, 9))


@pytest.mark.slow
def test_rollback(run, place_of_run, capsys, caplog):
    rollback = "--config.train.on_nonfinite=rollback"
    with caplog.at_level(logging.WARNING):
        assert run({8}, KEEP, rollback, workdir=place_of_run) == 0, capsys.readouterr().err
    assert (
        "going back to the state of step 6; the data of steps 7 to 8 are passed over" in caplog.text
    )
    assert checkpoint.all_steps(place_of_run) == [3, 6, 8, 9, 12, 15, 16]
    back = guards.at_step(jax.tree.map(jnp.asarray, load(place_of_run, 6)), 8)
    assert_same(back, load(place_of_run, 8))
    end = load(place_of_run, 16)
    assert guards.all_finite(end)
    metas = [checkpoint.read_meta(place_of_run, step)[1] for step in (6, 8, 16)]
    updates = [meta["memory_updates"] for meta in metas]
    assert updates[0] == updates[1]  # what was passed over has moved nothing
    assert [max(x["steps"]) for x in updates] == [6, 6, 14]
    # Whoever resumes after the rollback passes over the same data: the same end.
    files.remove_folders(place_of_run / "checkpoints", ["9", "12", "15", "16"])
    assert run(set(), KEEP, rollback, workdir=place_of_run) == 0
    assert_same(load(place_of_run, 16), end)


def test_rollback_without_a_checkpoint(run, tmp_path, capsys):
    assert run({2}, "--config.train.on_nonfinite=rollback") == 1
    assert "step 2 was not finite, and there is no checkpoint yet" in capsys.readouterr().err


@pytest.mark.slow
def test_rollback_gives_up(run, tmp_path, capsys):
    flags = ("--config.train.on_nonfinite=rollback", "--config.train.max_nonfinite=2")
    assert run({4, 5, 11, 12}, KEEP, "--config.checkpoint.every=2", *flags) == 1
    error = capsys.readouterr().err
    assert "error: step 5: " in error
    assert "2 rollbacks in a row" in error
    assert checkpoint.all_steps(tmp_path) == [2, 4]


@pytest.mark.slow
def test_a_class_that_is_absent_for_a_whole_epoch(run, tmp_path, capsys, caplog):
    # The training images of the first epoch, and all others, lack a class.
    root = shutil.copytree(tiny.data_root(), tmp_path / "data")
    for path in (root / "labels" / "train").iterdir():
        label = np.array(Image.open(path))
        label[label == 2] = 0
        tiny.write(path, label)
    with caplog.at_level(logging.INFO):
        assert run(set(), KEEP, root=root) == 0, capsys.readouterr().err
    state = load(tmp_path, 16)
    assert guards.all_finite(state)
    assert (np.linalg.norm(state.memory[:, 0], axis=-1) > 0).tolist() == [True, True, False]
    assert {round(float(x), 4) for x in rows(tmp_path, "memory_never_seen").values()} == {0.3333}
    assert float(rows(tmp_path, "memory_age_max")[16]) < 4
    assert float(rows(tmp_path, "memory_norm_min")[16]) > 0
    assert "1 of 3 classes never seen: disc" in caplog.text
    assert checkpoint.read_meta(tmp_path, 16)[1]["memory_ages"][:2] == [0, 0]


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        (
            "train.on_nonfinite=ignore",
            "config.train.on_nonfinite is 'ignore'; expected one of 'raise', 'skip', 'rollback'",
        ),
        ("train.max_nonfinite=0", "config.train.max_nonfinite is 0"),
        ("train.watchdog_minutes=-1", "config.train.watchdog_minutes is -1"),
    ],
)
def test_values_that_mean_nothing(run, capsys, flag, answer):
    assert run(set(), f"--config.{flag}") == 1
    assert answer in capsys.readouterr().err


# ---- Other optimisers ---------------------------------------------------------------------------


def schedules(state):
    """The positions of all schedules of an optimiser's state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))
    return [int(x.count) for x in nodes if isinstance(x, optax.ScaleByScheduleState)]


def state_of(tx, step, updates):
    """A state after some updates, all by the same gradient."""
    params = {"w": jnp.ones((2, 2))}
    opt_state = tx.init(params)
    for _ in range(updates):
        _, opt_state = tx.update({"w": jnp.full((2, 2), 0.5)}, opt_state, params)
    return TrainState(jnp.int32(step), params, {}, jnp.ones((2, 1, 2)), opt_state)


RATE = optax.linear_schedule(0.1, 0.0, 100)


def ours(name):
    config = tiny.get_config()
    config.optimizer.name = name
    return optimizer.from_config(config, RATE)


OPTIMISERS = {name: ours(name) for name in ("sgd", "adamw", "lars")}
OPTIMISERS["finite"] = optax.apply_if_finite(optax.adamw(RATE), 3)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_clocks_are_positions_in_schedules_and_nothing_else(name):
    tx = OPTIMISERS[name]
    before, after = state_of(tx, 5, 3), state_of(tx, 6, 4)
    skipped, _ = choose(before, after, jnp.float32(np.nan), halts=False)
    assert int(skipped.step) == 6
    assert schedules(skipped.opt_state) == [4]
    moved = guards.at_step(before, 9)
    assert int(moved.step) == 9
    assert schedules(moved.opt_state) == [9]
    # What counts updates, such as Adam's correction of its means, stays with the updates.
    for state in (skipped, moved):
        assert_same(guards.at_step(state, 0).opt_state, guards.at_step(before, 0).opt_state)


def test_steps_of_several_batches_keep_their_own_time():
    tx = optax.MultiSteps(optax.adamw(RATE), every_k_schedule=2)
    before, after = state_of(tx, 5, 3), state_of(tx, 6, 4)
    assert int(before.opt_state.mini_step) == 1
    skipped, _ = choose(before, after, jnp.float32(np.nan), halts=False)
    assert int(skipped.step) == 6
    assert_same(skipped.opt_state, before.opt_state)
    assert_same(guards.at_step(before, 9).opt_state, before.opt_state)
    good, _ = choose(before, after, jnp.float32(1), halts=False)
    assert_same(good.opt_state, after.opt_state)
