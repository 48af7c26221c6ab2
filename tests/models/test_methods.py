"""Methods and baselines: their parts, padded images, the strides of their maps, bad configs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseg_jax.errors import UserError
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.training.state import abstract_variables
from tests.models.test_segmentor import assert_padding_changes_nothing, rest_of
from tests.small_models import fast_jit, random_variables, small_config
from tests.training.test_methods import CASES, config_of, slow_but

PARTS = {
    "upernet": "context bottleneck memory_module self_attention fpn decoder_stage1 decoder_context "
    "decoder_stage2",
    "late fusion": "context bottleneck memory_module fpn decoder_stage1 decoder_context "
    "decoder_stage2",
    "aspp": "context bottleneck memory_module self_attention decoder_stage1 decoder_context "
    "decoder_stage2",
    "fcn": "bottleneck memory_module decoder_stage1 decoder_stage2",
    "mcibi pspnet": "context bottleneck memory_module decoder_stage1 decoder_stage2",
    "mcibi fcn": "bottleneck memory_module decoder_stage1 decoder_stage2",
    "residual": "context bottleneck memory_module decoder_stage1 classifier",
    "residual fcn": "bottleneck memory_module decoder_stage1 classifier",
    "plain upernet": "context fpn bottleneck classifier",
    "plain fcn": "bottleneck classifier",
}


@pytest.mark.parametrize("case", CASES)
def test_parts_and_strides(case):
    model = build_segmentor(config_of(case))
    abstract = abstract_variables(model)
    assert set(abstract["params"]) == {"backbone", "auxiliary_decoders_0", *PARTS[case].split()}
    assert abstract["memory"].shape == model.memory_shape() == model.initial_memory().shape
    images = jax.ShapeDtypeStruct((1, 33, 50, 3), jnp.float32)
    out = jax.eval_shape(
        lambda rest, x, memory: model.apply(rest, x, memory),
        rest_of(abstract),
        images,
        abstract["memory"],
    )
    assert model.output_stride == (4 if model.fpn_dim else 8)
    small = [-(-side // model.output_stride) for side in (33, 50)]
    assert out["logits"].shape == (1, *small, 5)
    assert out["logits"].dtype == jnp.float32


@pytest.mark.parametrize(
    "case", slow_but(in_ci=("upernet", "aspp", "mcibi pspnet", "residual", "plain upernet"))
)
def test_padding_changes_no_number(case):
    assert_padding_changes_nothing(build_segmentor(config_of(case)), [(33, 47), (9, 5)])


@pytest.mark.slow
def test_bfloat16_is_close():
    config = config_of("upernet")
    model = build_segmentor(config)
    config.model.compute_dtype = "bfloat16"
    half = build_segmentor(config)
    variables = random_variables(model, 0)
    images = np.random.default_rng(0).standard_normal((1, 32, 32, 3)).astype(np.float32)
    exact, rough = (
        fast_jit(m.apply)(rest_of(variables), images, variables["memory"]) for m in (model, half)
    )
    for name in ("logits", "context_logits", "stage1"):
        assert rough[name].dtype == jnp.float32
        error = np.sqrt(np.mean((rough[name] - exact[name]) ** 2)) / np.std(exact[name])
        assert 0 < error < 0.1, name
    assert rough["memory_input"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fpn": True}, "config.model.fpn is True, and MCIBI predicts from one map"),
        ({"fpn": True, "context": "none"}, "another context than 'none'"),
        (
            {"fpn": True, "downsample": 2, "auxiliary": False},
            "config.model.downsample = 1, found 2",
        ),
        ({"fpn": True, "backbone": "vitbase"}, "all maps of vitbase are of one size"),
    ],
)
def test_a_pyramid_that_cannot_be(fields, message):
    config = small_config()
    config.model.update(fields)
    with pytest.raises(UserError, match=message):
        build_segmentor(config)
