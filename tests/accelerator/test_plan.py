"""The plan of the command that measures an accelerator."""

import importlib

import pytest

from benchmarks.accelerator import plan
from memseg_jax import command_line, main
from memseg_jax.errors import UserError


def test_what_matters_most_comes_first():
    names = [x.name for x in plan.steps(plan.FULL)]
    assert names[:2] == ["machine", "goldens-resnet50os8"]
    reached, total = set(), 0.0
    for x in plan.steps(plan.FULL):
        total += x.seconds
        if total < 20 * 60:
            reached.add(x.name)
    assert reached >= {
        "parity-resnet50",
        "training-resnet50",
        "benchmark-resnet50-bfloat16",
        "benchmark-large-images",
    }
    assert {f"benchmark-{x}-{y}" for x in plan.FULL.models for y in plan.FULL.dtypes} <= set(names)


def test_camvid_is_trained_on_where_there_is_camvid():
    without = [x.name for x in plan.steps(plan.FULL)]
    with_it = [x.name for x in plan.steps(plan.FULL, "/camvid")]
    assert [name for name in with_it if not name.startswith("camvid-")] == without
    trained = [name for name in with_it if name.startswith("camvid-")]
    assert trained[:3] == ["camvid-memory-0", "camvid-baseline-0", "camvid-memory-1"]
    assert len(trained) == 2 * plan.SEEDS
    first, last = (with_it.index(name) for name in (trained[0], trained[-1]))
    assert first < with_it.index("benchmark-resnet101-bfloat16") < last == len(with_it) - 1


def test_reduced_steps_fit_into_ten_minutes():
    assert sum(x.seconds for x in plan.steps(plan.REDUCED)) < 600


@pytest.mark.usefixtures("keep_threads")
@pytest.mark.parametrize("sizes", [plan.FULL, plan.REDUCED], ids=lambda x: x.name)
def test_every_program_accepts_its_arguments(sizes, monkeypatch):
    """The plan is not tried at full size here: at least its flags and configs are right."""
    from benchmarks import models

    seen = set()
    for x in plan.steps(sizes, "/camvid"):
        for _, module, *arguments in x.commands:
            if module == "benchmarks.accelerator.machine":
                continue
            found = importlib.import_module(module)
            if module == "memseg_jax.main":
                assert found is main
                flags = {name: (value[0], value[-1]) for name, value in found.FLAGS.items()}
            else:
                flags = dict(getattr(found, "FLAGS", models.FLAGS)) | {"seconds": ""}
            with_config = command_line.names_config(arguments)
            command_line.parse([module, *arguments], flags, with_config=with_config)
            seen.add(module.rpartition(".")[2])
    assert seen >= {"device_parity", "training_step", "convolutions", "longest_kernels", "main"}


def test_only_some_steps():
    steps = plan.steps(plan.FULL, "/camvid")
    chosen = plan.choose(steps, "camvid-*-0, loss")
    assert [x.name for x in chosen] == ["machine", "loss", "camvid-memory-0", "camvid-baseline-0"]
    assert plan.choose(steps, None) == steps
    with pytest.raises(
        UserError, match=r"--only los: there is no step of that name\. Did you mean"
    ):
        plan.choose(steps, "los")
