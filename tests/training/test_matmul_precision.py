"""float32 means float32: the precision of every convolution and product, whatever JAX's default."""

import collections
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import Precision

from converters.taps import _forward as forward_with_taps
from memseg_jax.hlo import topologies
from memseg_jax.inference.predictor import network_scores
from memseg_jax.models.layers import ValidSize
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import sharding
from memseg_jax.training.program import training_program
from memseg_jax.training.state import abstract_variables
from tests import tiny
from tests.compiled_program import equations
from tests.small_models import ThreeConvolutions, shallow_hrnet

SIDE = 264  # more positions at the network's stride than attention takes at once
# Tracing the last three takes half a minute.
BACKBONES = [
    "resnet18",
    pytest.param("vitlarge", marks=pytest.mark.slow),
    pytest.param("resnest101", marks=[pytest.mark.slow, pytest.mark.exhaustive]),
    pytest.param("hrnetv2w48", marks=pytest.mark.slow),  # shallow, and still the longest
]
WIDTHS = {"resnet18": 1 / 8, "resnest101": 1 / 16, "hrnetv2w48": 1 / 12, "vitlarge": 1 / 16}


@pytest.fixture(autouse=True)
def _shallow(monkeypatch):
    shallow_hrnet(monkeypatch)


def config_of(precision="highest", backbone="resnet18"):
    config = tiny.get_config()
    config.augment.crop = (SIDE, SIDE)
    config.model.backbone, config.model.backbone_width = backbone, WIDTHS[backbone]
    config.model.precision = precision
    return config


def precisions(function, *args):
    """{(types of the factors, precision): number} of the products and convolutions of a program.

    Of all platforms: where the program depends on the platform, all branches are in it.
    """
    found = collections.Counter()
    # The worst that a user may have set.
    with jax.default_matmul_precision("bfloat16"):
        jaxpr = jax.make_jaxpr(function)(*args)
    for equation in equations(jaxpr):
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            types = " x ".join(x.aval.dtype.name for x in equation.invars)
            found[types, equation.params["precision"]] += 1
    return found


def of_training(config):
    model = build_segmentor(config)
    program = training_program(config, model, sharding.make_mesh(jax.devices()[:1]), 10)
    return precisions(program.step, program.state, program.batch)


def of_evaluation(config, forward, *more):
    images = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), np.float32)
    model = build_segmentor(config)
    return precisions(
        lambda variables, images: forward(model, variables, images, *more),
        abstract_variables(model),
        images,
    )


def scores(model, variables, images, valid_size):
    return network_scores(model, variables, images, valid_size, softmax=False)


HIGHEST = {("float32 x float32", (Precision.HIGHEST, Precision.HIGHEST))}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_float32_is_trained_with_all_digits(backbone):
    found = of_training(config_of(backbone=backbone))
    assert found.keys() == HIGHEST
    assert found.total() > 200


@pytest.mark.parametrize(("remat", "accumulate"), [("blocks", 1), ("none", 2)])
def test_other_ways_to_train(remat, accumulate):
    config = config_of()
    config.model.remat, config.train.accumulate = remat, accumulate
    assert of_training(config).keys() == HIGHEST


@pytest.mark.parametrize("backbone", BACKBONES)
def test_float32_is_evaluated_with_all_digits(backbone):
    found = of_evaluation(config_of(backbone=backbone), scores, None)
    assert found.keys() == HIGHEST
    assert found.total() > 60


def test_padded_images_and_parity_checks():
    valid_size = ValidSize(jnp.array([[SIDE - 1, SIDE]]), (SIDE, SIDE))
    assert of_evaluation(config_of(), scores, valid_size).keys() == HIGHEST
    assert of_evaluation(config_of(), forward_with_taps).keys() == HIGHEST


@pytest.mark.parametrize("name", ["high", pytest.param("default", marks=pytest.mark.slow)])
def test_less_is_taken_where_it_is_asked_for(name):
    """The memory and resizes keep all digits."""
    asked = getattr(Precision, name.upper())
    mixed = HIGHEST | {("float32 x float32", (asked, asked))}
    training = of_training(config_of(name))
    assert training.keys() == mixed
    assert training[("float32 x float32", (asked, asked))] > 200
    assert of_evaluation(config_of(name), scores, None).keys() <= mixed


def test_bfloat16_takes_no_precision():
    """What meets a factor of bfloat16 is multiplied in one pass, at any precision."""
    found = {}
    for precision in ("default", "highest"):
        config = config_of(precision)
        config.model.compute_dtype = "bfloat16"
        found[precision] = of_training(config)
    assert found["default"] == found["highest"]
    highest = {types for types, precision in found["highest"] if Precision.HIGHEST in precision}
    assert highest == {"float32 x float32"}  # memory and resizes


# ---- What the compiler for TPUs makes of it -----------------------------------------------------


def compile_for_tpu():
    """Prints {program: {[type of the result, precision]: number of convolutions}} as JSON.

    XLA for TPUs makes convolutions of all matrix products.
    """
    config = tiny.get_config()
    config.augment.crop = (64, 64)
    config.train.batch_size = 2
    devices = topologies.open_devices(topologies.parse("v5e:1x1"))
    mesh = sharding.make_mesh(devices.devices)
    everywhere = sharding.replicated(mesh)
    model = build_segmentor(config).clone(backbone=ThreeConvolutions())
    program = training_program(config, model, mesh, 10)
    variables, images = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        (abstract_variables(model), jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)),
    )
    programs = {
        "training": (program.step, program.state, program.batch),
        "evaluation": (
            jax.jit(lambda variables, images: scores(model, variables, images, None)),
            variables,
            images,
        ),
    }
    result = {}
    for name, (function, *args) in programs.items():
        lowered = function.trace(*args).lower()
        text = lowered.compile(compiler_options=devices.compiler_options).as_text()
        found = collections.Counter()
        for line in text.splitlines():
            if match := re.search(r" = (\w+)\[\S* (?:convolution|dot)\(", line):
                precision = re.search(r"operand_precision=\{(.*?)\}", line)
                found[f"{match[1]} {precision[1] if precision else 'default'}"] += 1
        result[name] = found
    print(json.dumps(result))


@pytest.mark.slow
def test_float32_on_a_tpu():
    if reason := topologies.missing("v5e"):
        pytest.skip(reason)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "tests.training.test_matmul_precision"]
    done = subprocess.run(  # the compiler's settings stay in that process
        command, cwd=tiny.ROOT, env=env, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    for name, least in (("training", 60), ("evaluation", 15)):
        assert found[name].keys() == {"f32 highest,highest"}, name
        assert found[name]["f32 highest,highest"] > least, name


if __name__ == "__main__":
    compile_for_tpu()
