"""A trace of some steps of a run."""

import jax
import jax.numpy as jnp
import pytest

from memseg_jax.errors import UserError
from memseg_jax.runtime import files
from memseg_jax.training.profiling import StepProfiler


def run(profiler, first, last):
    """Steps `first` to `last` of a run."""
    compute = jax.jit(lambda x: x @ x)
    x = jnp.ones((8, 8))
    for step in range(first, last + 1):
        with profiler.step(step):
            x = compute(x)
        profiler.end_of_step(step, {"x": x})


def traces(folder):
    return [path for path in files.files_below(folder) if path.name.endswith(".xplane.pb")]


@pytest.mark.parametrize("last", [16, 15])
def test_some_steps_are_traced(place, caplog, last):
    """Also if the run ends before the trace is complete."""
    with caplog.at_level("INFO"), StepProfiler(place, first_step=10, count=3) as profiler:
        run(profiler, 11, 13)
        assert not files.exists(place / "profile")  # the first steps are slower than the others
        run(profiler, 14, last)
    (trace,) = traces(place / "profile")
    content = trace.read_bytes()
    assert content.count(b"step_num") > 0
    assert b"train" in content
    told = "wrote the trace of steps 14 to 16" in caplog.text
    assert told == (last == 16)


def test_nothing_is_traced_by_default(tmp_path):
    with StepProfiler(tmp_path, first_step=0, count=0) as profiler:
        run(profiler, 1, 9)
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_cannot_be_written_ends_no_run(door, caplog):
    with StepProfiler(door.folder, first_step=0, count=1) as profiler:
        door.answer = lambda method, path: 403
        run(profiler, 1, 5)
    assert "the trace could not be written: cannot write gs://" in caplog.text


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "profile").touch()
    with StepProfiler(tmp_path, first_step=0, count=1) as profiler:
        with pytest.raises(UserError, match="cannot make the folder"), profiler.step(4):
            pass
        run(profiler, 5, 6)
