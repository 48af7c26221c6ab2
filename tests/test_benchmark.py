"""Mode benchmark: the row, what it is made of, and that it needs neither data nor a workdir."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseg_jax.data import IGNORE_LABEL
from memseg_jax.hlo.chips import nominal_peak
from memseg_jax.hlo.flops import count_flops, network_flops
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.modes import benchmark
from memseg_jax.runtime import compilation
from memseg_jax.training.program import random_batch
from tests import tiny

COMPILED = {}  # all tests here use the same programs


@pytest.fixture
def quick(monkeypatch, compilations):
    """Measures for no longer than it must; returns the list of what was compiled."""

    def compile_and_count(function, what, *args):
        compilations.append(what)
        if what not in COMPILED:
            COMPILED[what] = tiny.compile_quickly(function, what, *args)
        return COMPILED[what]

    monkeypatch.setattr(compilation, "compile_with_notice", compile_and_count)
    monkeypatch.setattr(benchmark, "_SECONDS", 0.0)
    return compilations


# ---- The mode -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_data_and_workdir(
    quick, quiet_entry, three_convolutions, capsys, caplog, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO"):
        assert tiny.run("--mode", "benchmark") == 0
    assert "random images: config.data.root is not set" in caplog.text
    header, line, row, *notes = capsys.readouterr().out.splitlines()
    names, cells = ([cell.strip() for cell in x.split("|")[1:-1]] for x in (header, row))
    assert line.count("---") == len(names) == len(cells)
    shown = dict(zip(names, cells))
    assert shown["model"] == "resnet18, 3 classes"
    assert shown["batch"] == "8 x 32x32, float32"
    assert shown["data wait"] == "-"
    assert float(shown["train img/s"]) > 0
    assert any(note.startswith("data wait: not measured") for note in notes)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_with_data_and_workdir(quick, quiet_entry, three_convolutions, capsys, tmp_path):
    arguments = (f"--config.data.root={tiny.data_root()}", "--workdir", tmp_path / "run")
    assert tiny.run("--mode", "benchmark", *arguments) == 0
    result = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    assert 0 <= result["data_wait"] <= 1
    assert result["data_images_per_second"] > 0
    assert result["peak_bytes"] > 4 * 3 * 1000
    assert result["images_per_second"] == pytest.approx(8 / result["step_seconds"])
    rate = result["train_flops_per_image"] * 8 / result["step_seconds"]
    assert result["flops_per_second"] == pytest.approx(rate)
    assert result["evaluation_image"] == [tiny.SIDE, tiny.SIDE]
    assert quick[0] == "the training step"
    assert "img/s" in capsys.readouterr().out


def test_a_wrong_config_leaves_no_folder(quick, quiet_entry, capsys, tmp_path):
    arguments = ("--config.eval.mode=tiles", "--workdir", tmp_path / "run")
    assert tiny.run("--mode", "benchmark", *arguments) == 1
    assert "config.eval.mode is 'tiles'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_batch_that_does_not_fit_is_explained(quick, quiet_entry, capsys, monkeypatch):
    def compile_for_nothing(function, what, *args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    tiny.replace_training_step(monkeypatch, compile_for_nothing)
    assert tiny.run("--mode", "benchmark") == 1
    message = capsys.readouterr().err
    assert "batches of 8 crops of 32x32 do not fit" in message
    assert "lower config.train.batch_size" in message


# ---- Its parts ----------------------------------------------------------------------------------


def test_random_batch():
    batch = random_batch(3, (20, 36), 5, seed=1)
    assert batch["image"].shape == (3, 20, 36, 3)
    assert batch["image"].dtype == np.float32
    label = batch["label"]
    assert label.shape == (3, 20, 36)
    assert label.dtype == np.uint8
    assert set(np.unique(label)) <= {0, 1, 2, 3, 4, IGNORE_LABEL}
    assert (label[:, :16, :16] == label[:, :1, :1]).all()
    np.testing.assert_array_equal(label, random_batch(3, (20, 36), 5, seed=1)["label"])


@pytest.mark.parametrize(
    ("device", "dtype", "precision", "expected"),
    [
        ("NVIDIA H200", "bfloat16", "highest", 989e12),
        ("NVIDIA A100-SXM4-80GB", "float32", "default", 156e12),
        ("NVIDIA A100-SXM4-80GB", "float32", "high", 156e12),
        ("NVIDIA A100-SXM4-80GB", "float32", "highest", 19.5e12),
        ("TPU v5 lite", "bfloat16", "highest", 197e12),
        ("TPU v5p", "bfloat16", "highest", 459e12),
        ("TPU v5 lite", "float32", "default", 197e12),
        ("TPU v5 lite", "float32", "high", 197e12 / 3),
        ("TPU v5 lite", "float32", "highest", 197e12 / 6),
        ("cpu", "float32", "highest", None),
    ],
)
def test_nominal_peak(device, dtype, precision, expected):
    assert nominal_peak(device, dtype, precision) == expected


def test_the_first_steps_do_not_count(monkeypatch):
    monkeypatch.setattr(benchmark, "_SECONDS", 0.0)
    calls = []

    def step(state, batch):
        calls.append(batch)
        return state + 1, {"loss": jnp.zeros(())}

    batches = iter(range(100))
    state, seconds, wait = benchmark._time_steps(step, 0, lambda: next(batches), 2)
    assert state == len(calls)
    assert calls == list(range(len(calls)))
    assert seconds > 0
    assert 0 <= wait <= 1


def test_network_flops_of_training_are_three_times_the_forward_pass():
    config = tiny.get_config()
    config.model.auxiliary = False
    config.model.dropout = 0.0
    model = build_segmentor(config)
    size = (tiny.SIDE, tiny.SIDE)
    forward = network_flops(model, size, train=False)
    assert network_flops(model, size, train=True) == 3 * forward
    assert network_flops(model, (64, 32), train=False) > 2 * forward  # the attentions


# ---- Counting -----------------------------------------------------------------------------------


def test_products_and_convolutions():
    x, kernel = jnp.zeros((2, 9, 7, 6)), jnp.zeros((3, 3, 3, 4))

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), [(1, 1), (1, 1)], rhs_dilation=(1, 1), feature_group_count=2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    forward = 2 * (2 * 5 * 4 * 4) * (3 * 3 * 3)
    assert count_flops(convolve, x, kernel) == forward
    a, b = jnp.zeros((5, 3, 4)), jnp.zeros((5, 4, 7))
    assert count_flops(lambda a, b: jnp.tanh(a @ b), a, b) == 2 * 5 * 3 * 4 * 7


def test_gradients_of_a_convolution_cost_as_much_as_the_convolution():
    x, kernel = jnp.zeros((2, 16, 16, 6)), jnp.zeros((3, 3, 6, 4))

    def convolve(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        padding = [(1, 1), (1, 1)]
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), padding, dimension_numbers=numbers)

    def loss(x, kernel):
        return jnp.sum(convolve(x, kernel) ** 2)

    forward = count_flops(convolve, x, kernel)
    assert count_flops(jax.grad(loss, (0, 1)), x, kernel) == 3 * forward


def test_loops_branches_and_rules():
    x = jnp.zeros((4, 4))
    once = 2 * 4**3

    def loop(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0]

    def branch(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x, x)

    @jax.custom_vjp
    def rule(x):
        return x @ x

    rule.defvjp(lambda x: (rule(x), x), lambda x, g: (g,))
    assert count_flops(loop, x) == 7 * once
    assert count_flops(branch, x) == 2 * once
    assert count_flops(rule, x) == once
    assert count_flops(jax.jit(jax.checkpoint(loop)), x) == 7 * once


def test_the_count_is_that_of_the_compiler_where_nothing_is_padded():
    x, kernel = jnp.zeros((2, 8, 8, 4)), jnp.zeros((1, 1, 4, 6))

    def function(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=numbers)
        return y.reshape(-1, 6) @ jnp.ones((6, 5))

    seen = jax.jit(function).lower(x, kernel).cost_analysis()["flops"]
    assert math.isclose(count_flops(function, x, kernel), seen, rel_tol=0.01)
