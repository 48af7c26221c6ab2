"""How processes find each other and what they tell each other, without a second process."""

import os
import threading

import numpy as np
import pytest

from memseg_jax import main
from memseg_jax.errors import UserError
from memseg_jax.runtime import distributed
from memseg_jax.scoring import evaluator
from memseg_jax.scoring.findings import Findings
from tests import tiny


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (("perhaps",), "--distributed=perhaps: expected one of auto, on, off"),
        (("on",), "--distributed=on: JAX knows no cluster here"),
        (("off", "host:1", "2", "0"), "--coordinator_address does not go with --distributed=off"),
        (("auto", "host:1", "2", None), "--coordinator_address without --process_id"),
        (("auto", None, "2", "0"), "--num_processes without --coordinator_address"),
        (("auto", "host", "2", "0"), "--coordinator_address=host: expected HOST:PORT"),
        (("auto", "host:1", "two", "0"), "--num_processes=two: expected a whole number"),
        (("auto", "host:1", "2", "-1"), "--process_id=-1: expected a whole number"),
        (("auto", "host:1", "2", "2"), "--process_id=2: expected 0 to 1"),
    ],
)
def test_flags_that_do_not_fit(flags, answer, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UserError, match=answer):
        distributed.start(*flags)


def test_alone_is_the_default(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_")):
            monkeypatch.delenv(name)
    distributed.start()
    distributed.start("off")
    assert (distributed.process_index(), distributed.process_count()) == (0, 1)
    assert distributed.is_primary()


def test_one_task_of_slurm_is_alone(monkeypatch):
    values = {"JOB_ID": "7", "STEP_NODELIST": "a", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    distributed.start("auto")
    assert distributed.process_count() == 1


def test_alone_everything_is_its_own():
    assert (
        distributed.reduce_on_primary("any", b"mine", lambda payloads: b"+".join(payloads))
        == b"mine"
    )
    assert distributed.on_primary("any", lambda: {"a": [1, None]}) == {"a": [1, None]}
    distributed.check_same("any", {"a": 1})
    distributed.failed(ValueError("not told to anybody"))
    distributed.finish(1)


class Unreliable:
    """In the place of the runtime's key-value store: answers after some failures only."""

    def __init__(self, failures, answers):
        self.failures, self.answers = failures, answers

    def key_value_dir_get(self, folder):
        self.failures -= 1
        if self.failures >= 0:
            raise RuntimeError("UNAVAILABLE: failed to connect to all addresses")
        return self.answers.get(folder, [])


def test_notes_are_looked_for_after_failures_too(monkeypatch):
    run = distributed._Run()
    run.client = Unreliable(5, {distributed._STOP: [("memseg_jax/stop/1", "15")]})
    monkeypatch.setattr(distributed, "_run", run)
    monkeypatch.setattr(distributed, "_LOOK_EVERY", 0.001)
    monkeypatch.setattr(distributed, "_LOOK_AT_LEAST_EVERY", 0.01)
    looking = threading.Thread(target=distributed._look_for_notes, daemon=True)
    looking.start()
    assert distributed.stop_requested().wait(60)
    run.finished.set()
    looking.join(60)
    assert not looking.is_alive()
    assert run.client.failures < 0


class Store:
    """In the place of the runtime's key-value store, for one process of two."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    key_value_set_bytes = key_value_set

    def blocking_key_value_get_bytes(self, key, milliseconds):
        if key not in self.values:
            raise RuntimeError("DEADLINE_EXCEEDED: not there")
        return self.values[key]

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]

    def key_value_delete(self, prefix):
        self.values = {k: v for k, v in self.values.items() if not k.startswith(prefix)}


def test_a_meeting_is_over_when_all_have_come_or_one_has_called_it_off(monkeypatch):
    store = Store()
    monkeypatch.setattr(distributed, "_run", distributed._Run())
    distributed._run.client, distributed._run.count = store, 2
    for name in ("a", "b", "c"):
        store.values[f"{distributed._MEETINGS}{name}/1"] = "here"
        distributed.meet(name, 60, "x")
    # What is left is that of the last one, which the others may be at.
    assert set(store.values) == {f"{distributed._MEETINGS}c/{index}" for index in range(2)}
    with pytest.raises(TimeoutError, match="process 1 did not come within 0 s"):
        distributed.meet("d", 0, "x")
    distributed._run.index = 1
    distributed.call_off("x")
    distributed._run.index = 0
    with pytest.raises(RuntimeError, match="another process could not do its part"):
        distributed.meet("e", 60, "x")
    store.values[f"{distributed._MEETINGS}f/1"] = "here"
    distributed.meet("f", 60, "y")


def test_flags_are_only_for_some_modes(capsys):
    arguments = ["main", "--config", str(tiny.CONFIG), "--mode", "predict", "--input", "x"]
    assert main.main([*arguments, "--distributed=off"]) == 1
    assert (
        "--distributed is only for --mode train and evaluate and report and benchmark"
        in capsys.readouterr().err
    )


def test_parts_of_an_evaluation_add_up():
    rng = np.random.default_rng(0)

    def part(index):
        matrix = rng.integers(0, 2**60, (3, 4))  # more than float64 holds exactly
        triple = tuple(rng.integers(0, 9, (2, 3)).astype(np.uint8) for _ in range(3))
        findings = Findings(3)
        findings.per_image.add(index, f"ä/{index}", (2, 3), matrix)
        return evaluator._Part(
            matrix, findings=findings, examples={index: triple}, sizes={f"ä/{index}": (2, 3)}
        )

    parts = [part(index) for index in range(3)]
    total = evaluator._Part(np.zeros((3, 4), np.int64), findings=Findings(3))
    for each in parts:
        total._add(each._packed(with_examples=True))
    np.testing.assert_array_equal(total.matrix, sum(each.matrix for each in parts))
    np.testing.assert_array_equal(total.findings.per_image.total(), total.matrix)
    assert total.sizes == {"ä/0": (2, 3), "ä/1": (2, 3), "ä/2": (2, 3)}
    for index, each in enumerate(parts):
        for ours, theirs in zip(total.examples[index], each.examples[index], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert total.complete
    parts[1].complete = False
    total._add(parts[1]._packed(with_examples=False))
    assert not total.complete
