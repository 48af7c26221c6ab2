"""Devices that one does not have: their names, shapes, and compilers."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from memseg_jax.errors import UserError
from memseg_jax.hlo import topologies
from tests import tiny


@pytest.mark.parametrize("text", topologies.EXAMPLES)
def test_examples_are_topologies(text):
    topology = topologies.parse(text)
    assert topology.name == text
    assert topology.chips == np.prod(topology.shape)


def test_shapes_and_rings():
    assert topologies.parse(" V5E:2x4 ").shape == (2, 4)
    assert topologies.parse("v5e:16x8").rings == (True, False)
    assert topologies.parse("v4:2x4x8").rings == (False, True, True)
    assert not topologies.parse("h200:16").is_tpu


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v9:2x2", "there is no kind 'v9'"),
        ("v5e", "no shape"),
        ("v5e:", "no shape"),
        ("v5e:0x4", "no shape"),
        ("v5e:axb", "no shape"),
        ("v5e:8", "v5e takes 2 axes"),
        ("v4:4x4", "v4 takes 3 axes"),
        ("h200:2x4", "h200 takes one number"),
        ("h200:12", "whole hosts"),
    ],
)
def test_what_is_no_topology(text, words):
    with pytest.raises(UserError, match=words) as error:
        topologies.parse(text)
    if "hosts" not in words:
        assert all(example in str(error.value) for example in topologies.EXAMPLES)


def test_missing_compilers(monkeypatch):
    def no_package(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib.metadata, "version", no_package)
    assert topologies.missing("cpu") is None
    assert f'pip install "jax[tpu]=={jax.__version__}"' in topologies.missing("v5e")
    assert "jax-cuda13-plugin is not installed" in topologies.missing("h200")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1")
    assert f"jax-cuda13-pjrt=={jax.__version__}" in topologies.missing("h200")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: jax.__version__)
    assert topologies.missing("h200") is None


def test_too_many_cpu_devices():
    jax.devices()  # from now on their number cannot be changed
    assert len(topologies.open_devices(topologies.parse("cpu:3")).devices) == 3
    with pytest.raises(UserError, match=r"cpu:99999: this process has \d+ CPU device"):
        topologies.open_devices(topologies.parse("cpu:99999"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology", ["v4:2x2x1", "v5p:2x2x1", "v5e:2x4", "v6e:2x4", "v5e:8x8", "h200:8"]
)
def test_a_device_is_a_chip(topology):
    wanted = topologies.parse(topology)
    if reason := topologies.missing(wanted.kind):
        pytest.skip(reason)
    code = "from memseg_jax.hlo.topologies import open_devices, parse; "
    code += f"print(len(open_devices(parse({topology!r})).devices))"
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]  # the compilers' settings stay in that process
    found = subprocess.run(
        command, cwd=tiny.ROOT, env=env, check=True, timeout=300, capture_output=True, text=True
    )
    assert int(found.stdout) == wanted.chips
