"""What XLA makes of the training step on an H200, compiled without one."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from memseg_jax.hlo import gpu
from memseg_jax.models import convolution_gradients as gradients
from memseg_jax.models.convolution_forms import ConvParams
from memseg_jax.runtime import sharding
from tests import h200
from tests.tiny import ROOT

LARGEST_WINDOW = 7  # no network has a larger kernel
DEVICES = 2


def compile_steps(*backbones):
    """The contents of the compiled programs; in a process of its own, with the GPU plugin."""
    if reason := gpu.missing():
        pytest.skip(reason)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    result = subprocess.run(
        [sys.executable, "-m", "tests.h200", "0.125", str(DEVICES), *backbones],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


def sides(window):
    return [int(side) for side in window.split("x")]


def check(programs, *backbones):
    # This is what must not be there; where it is gone, XLA has learnt it and ours can go, too.
    assert programs["plain gradient"]["windows"] == ["40x40"]
    for backbone in backbones:
        found = programs[backbone]
        convolutions = found["convolutions"]
        assert sum(convolutions.values()) > 50
        assert any("convBackwardFilter" in name for name in convolutions)
        assert "3x3" in found["windows"]
        too_large = [x for x in found["windows"] if max(sides(x)) > LARGEST_WINDOW]
        assert not too_large, (backbone, convolutions)
        assert all(" bf16 " in name for name in convolutions), convolutions
        # Every device works on its own images; only sums over all of them are exchanged.
        assert set(found["collectives"]) == {"all-reduce"}, (backbone, found["collectives"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone",
    # In CI, what the others do not have: blocks of three convolutions, grouped ones, branches.
    [
        pytest.param("resnet18", marks=pytest.mark.exhaustive),
        "resnet50",
        "resnest101",
        "hrnetv2w48",
    ],
)
def test_no_large_windows(backbone):
    check(compile_steps(backbone), backbone)


def unsuitable(text):
    """Convolutions of a lowered program that XLA finds no native form for on a GPU.

    Filter gradients have a feature map as their kernel. The stride of the forward convolution is
    its dilation then, which is native; the dilation becomes the stride, which is not.
    """
    found = []
    for line in text.splitlines():
        if "stablehlo.convolution" not in line:
            continue
        stride = re.search(r"stride = \[(\d+), (\d+)\]", line)
        kernel = re.search(r"dim_numbers = \[.*?\]x\[(.*?)\]", line)[1].split(", ")
        shape = re.search(r": \(tensor<\S+, tensor<([\dx]+)x\w+>\)", line)[1].split("x")
        size = [int(side) for side, name in zip(shape, kernel, strict=True) if name.isdigit()]
        if stride and max(map(int, stride.groups())) > 1 and max(size) > LARGEST_WINDOW:
            found.append(line.strip())
    return found


@pytest.mark.slow
def test_no_unsuitable_convolution_is_lowered():
    """The same question to the program that XLA gets; needs no plugin."""

    def lower(jitted, *args):
        return jitted.trace(*args).lower(lowering_platforms=("cuda",)).as_text()

    x = jnp.ones((1, 40, 40, 2))
    conv_params = ConvParams(dilation=2)
    plain = lower(
        jax.jit(lambda x: gradients.filter_gradient_plainly(x, x, (3, 3), conv_params)), x
    )
    assert len(unsuitable(plain)) == 1
    program = gpu.step_of(
        h200.small_config("resnet18", 0.125, 1), sharding.make_mesh(jax.devices()[:1])
    )
    step = lower(program.step, program.state, program.batch)
    assert step.count("stablehlo.convolution") > 100
    assert not unsuitable(step)
