"""Every form of a convolution and of its gradients against XLA's own; what a program contains."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from memseg_jax.models import convolution
from memseg_jax.models import convolution_gradients as gradients
from memseg_jax.models.convolution import convolve
from memseg_jax.models.convolution_forms import ConvParams, convolve_by_group, convolve_plainly
from memseg_jax.models.winograd import convolve_by_tiles
from memseg_jax.runtime.sharding import make_mesh
from tests.small_models import FAST_COMPILE, fast_jit

FORMS = [
    gradients.filter_gradient_by_group,
    gradients.filter_gradient_by_shifts,
    gradients.filter_gradient_by_folding,
]


def forms_for(conv_params):
    return FORMS if conv_params.stride == 1 else FORMS[:2]


def random_case(height, width, window, conv_params, dtype, batch=2, channels=(2, 3)):
    """Input, kernel and gradient by the result; channels are per group."""
    rng = np.random.default_rng(0)
    inside, outside = channels
    size = [-(-side // conv_params.stride) for side in (height, width)]
    shapes = (
        (batch, height, width, inside * conv_params.groups),
        (*window, inside, outside * conv_params.groups),
        (batch, *size, outside * conv_params.groups),
    )
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def plain_results(x, kernel, dy, conv_params):
    """The convolution, its input gradient and its filter gradient, all by XLA."""
    y, pull_back = jax.vjp(lambda x, kernel: convolve_plainly(x, kernel, conv_params), x, kernel)
    return y, *pull_back(dy)


def our_results(x, kernel, dy, conv_params):
    options = {name: getattr(conv_params, name) for name in ("stride", "dilation", "groups")}
    y, pull_back = jax.vjp(lambda x, kernel: convolve(x, kernel, **options), x, kernel)
    return y, *pull_back(dy)


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    window=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3])),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 10),
    groups=st.integers(1, 3),
)
@example(height=2, width=9, window=(3, 3), stride=2, dilation=1, groups=1)  # a tap sees nothing
@example(height=9, width=9, window=(3, 3), stride=1, dilation=8, groups=1)  # ... one corner
@example(height=9, width=9, window=(3, 3), stride=1, dilation=9, groups=2)  # ... unreachable
def test_all_forms_equal_xla(height, width, window, stride, dilation, groups):
    conv_params = ConvParams(stride, dilation, groups)
    with jax.enable_x64(True):
        x, kernel, dy = random_case(height, width, window, conv_params, jnp.float64)
        expected, actual, found = fast_jit(
            lambda x, kernel, dy: (
                plain_results(x, kernel, dy, conv_params),
                our_results(x, kernel, dy, conv_params),
                [form(x, dy, window, conv_params) for form in forms_for(conv_params)],
            )
        )(x, kernel, dy)
        for name, ours, theirs in zip(("y", "dx", "dw"), actual, expected, strict=True):
            assert ours.dtype == jnp.float64
            np.testing.assert_allclose(ours, theirs, atol=1e-12, err_msg=name)
        for form, gradient in zip(forms_for(conv_params), found, strict=True):
            np.testing.assert_allclose(gradient, expected[2], atol=1e-12, err_msg=str(form))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dilation", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_float32_and_bfloat16_to_rounding(dilation, groups):
    conv_params = ConvParams(1, dilation, groups)
    case = random_case(12, 13, (3, 3), conv_params, jnp.bfloat16, channels=(4, 4))
    single = [array.astype(jnp.float32) for array in case]
    with jax.enable_x64(True):
        exact = plain_results(*(jnp.asarray(array, jnp.float64) for array in case), conv_params)[2]
        exact = np.asarray(exact)
    for form in FORMS:
        # Up to 312 terms of size 1: float32 loses digits near 1e-7 of sums near 18.
        gradient = form(single[0], single[2], (3, 3), conv_params)
        assert gradient.dtype == jnp.float32
        np.testing.assert_allclose(gradient, exact, atol=2e-5)
    # Sums in float32, one rounding to 8 binary digits at the end.
    ours = our_results(*case, conv_params)
    exact_results = plain_results(*single, conv_params)
    for mine, theirs in zip(ours, exact_results, strict=True):
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs, rtol=2**-7, atol=2e-2)
    gradient = gradients.filter_gradient_by_shifts(case[0], case[2], (3, 3), conv_params)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(gradient.astype(jnp.float32), exact, rtol=2**-8, atol=2e-5)


def lowered_gradient(platform, size, conv_params):
    """The text of the filter gradient of a 3x3 convolution as it is lowered for a platform."""
    x, _, dy = random_case(size, size, (3, 3), conv_params, jnp.float32)
    gradient = jax.jit(lambda x, dy: convolution.filter_gradient(x, dy, (3, 3), conv_params))
    return gradient.trace(x, dy).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("platform", "size", "conv_params", "convolutions", "products"),
    [
        ("cuda", 24, ConvParams(dilation=4), 1, 0),
        ("cuda", 24, ConvParams(dilation=5), 0, 9),
        ("cuda", 24, ConvParams(dilation=2, groups=2), 1, 0),
        ("cuda", 24, ConvParams(stride=2, dilation=2), 0, 9),
        ("cuda", 24, ConvParams(groups=2), 1, 0),
        ("rocm", 24, ConvParams(dilation=5), 0, 9),
        ("tpu", 24, ConvParams(dilation=5), 1, 0),
        ("cpu", 24, ConvParams(dilation=3), 1, 0),
        ("cpu", 24, ConvParams(dilation=4), 0, 9),
        ("cpu", 24, ConvParams(groups=2), 2, 0),
    ],
)
def test_form_of_the_filter_gradient(platform, size, conv_params, convolutions, products):
    text = lowered_gradient(platform, size, conv_params)
    assert text.count("stablehlo.convolution") == convolutions
    assert text.count("stablehlo.dot_general") == products
    if platform == "cuda":
        # XLA would make the dilation of the forward pass a stride of the gradient.
        assert not re.search(r"stride = \[[2-9]", text) or conv_params.dilation == 1


@pytest.mark.parametrize(
    ("platform", "dilation", "groups", "convolutions", "products"),
    [
        ("cpu", 3, 1, 2, 0),  # forward and input gradient
        ("cpu", 4, 1, 0, 18),
        ("cpu", 4, 2, 0, 36),
        ("cuda", 4, 1, 2, 0),
        ("tpu", 4, 2, 4, 0),
    ],
)
def test_form_of_the_convolution(platform, dilation, groups, convolutions, products):
    case = random_case(24, 24, (3, 3), ConvParams(1, dilation, groups), jnp.float32)

    def forward_and_input_gradient(x, kernel, dy):
        y, pull_back = jax.vjp(lambda x: convolve(x, kernel, dilation=dilation, groups=groups), x)
        return y, pull_back(dy)

    lowered = jax.jit(forward_and_input_gradient).trace(*case).lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    assert text.count("stablehlo.convolution") == convolutions
    assert text.count("stablehlo.dot_general") == products


@settings(max_examples=3, deadline=None)
@given(
    height=st.integers(1, 15),
    width=st.integers(1, 15),
    dilation=st.integers(1, 3),
    groups=st.integers(1, 2),
)
@example(height=1, width=2, dilation=1, groups=1)
@example(height=15, width=14, dilation=2, groups=2)
def test_tiles_equal_xla(height, width, dilation, groups):
    conv_params = ConvParams(1, dilation, groups)
    tiles = functools.partial(convolve_by_group, conv_params=conv_params, form=convolve_by_tiles)
    with jax.enable_x64(True):
        x, kernel, dy = random_case(height, width, (3, 3), conv_params, jnp.float64)

        def by_tiles(x, kernel, dy):
            y, pull_back = jax.vjp(tiles, x, kernel)
            return y, *pull_back(dy)

        expected, actual = fast_jit(
            lambda *case: (plain_results(*case, conv_params), by_tiles(*case))
        )(x, kernel, dy)
        for ours, theirs in zip(actual, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-12)


MANY = convolution.CHANNELS_TO_TILE


@pytest.mark.parametrize("conv_params", [ConvParams(dilation=2, groups=2)])
def test_many_channels_go_by_tiles(conv_params):
    """The results of `convolve` are those of float64 to float32 rounding."""
    case = random_case(13, 14, (3, 3), conv_params, jnp.float32, channels=(MANY, MANY + 1))
    ours = jax.jit(our_results, static_argnums=3)(*case, conv_params)
    plain = plain_results(*case, conv_params)
    with jax.enable_x64(True):
        exact = plain_results(*(jnp.asarray(x, jnp.float64) for x in case), conv_params)
        for mine, xla, true in zip(ours, plain, exact, strict=True):
            assert mine.dtype == jnp.float32
            error, usual = (float(jnp.abs(x - true).max() / true.std()) for x in (mine, xla))
            assert error < 8 * usual
            assert error < 1e-5


@pytest.mark.parametrize(
    ("platform", "dtype", "channels", "stride", "products"),
    [
        ("cpu", jnp.float32, (MANY, MANY), 1, 16),
        ("cpu", jnp.float32, (MANY, MANY - 1), 1, 0),
        ("cpu", jnp.float32, (MANY, MANY), 2, 0),
        ("cpu", jnp.bfloat16, (MANY, MANY), 1, 0),
        ("cuda", jnp.float32, (MANY, MANY), 1, 0),
        ("tpu", jnp.float32, (MANY, MANY), 1, 0),
    ],
)
def test_where_tiles_are_used(platform, dtype, channels, stride, products):
    conv_params = ConvParams(stride)
    x, kernel, _ = random_case(8, 8, (3, 3), conv_params, dtype, channels=channels)
    traced = jax.jit(lambda x, kernel: convolve(x, kernel, stride=stride)).trace(x, kernel)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.dot_general") == products
    assert text.count("stablehlo.convolution") == (0 if products else 1)


def test_tiles_of_very_large_inputs_are_not_made(monkeypatch):
    case = random_case(8, 8, (3, 3), ConvParams(), jnp.float32, channels=(MANY, MANY))
    monkeypatch.setattr(convolution, "LARGEST_INPUT_TO_TILE", case[0].size - 1)
    assert "dot_general" not in str(jax.make_jaxpr(convolve)(*case[:2]))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3))
def test_one_position_is_a_matrix_product(height, width, stride):
    conv_params = ConvParams(stride)
    with jax.enable_x64(True):
        x, kernel, dy = random_case(height, width, (1, 1), conv_params, jnp.float64)
        expected = plain_results(x, kernel, dy, conv_params)
        actual = our_results(x, kernel, dy, conv_params)
        for ours, theirs in zip(actual, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-13)
    traced = jax.jit(lambda x, kernel: convolve(x, kernel, stride=stride)).trace(x, kernel)
    for platform, convolutions in (("cpu", 0), ("cuda", 1)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.convolution") == convolutions


def test_plain_convolutions_are_left_alone():
    x, kernel, _ = random_case(8, 8, (3, 3), ConvParams(), jnp.float32)
    text = str(jax.make_jaxpr(lambda x, kernel: convolve(x, kernel, stride=2))(x, kernel))
    assert text.count("conv_general_dilated[") == 1
    assert "custom_vjp" not in text
    assert "slice" not in text


@pytest.mark.parametrize(
    ("size", "dilation", "window"),
    [((4, 5), 4, "1x3"), ((5, 4), 4, "3x1"), ((5, 5), 4, "3x3"), ((5, 1), 1, "3x1")],
)
def test_taps_outside_of_the_map_cost_nothing(size, dilation, window):
    x, kernel, _ = random_case(*size, (3, 3), ConvParams(dilation=dilation), jnp.float32)
    convolved = jax.jit(lambda x, kernel: convolve(x, kernel, dilation=dilation))
    text = convolved.trace(x, kernel).lower(lowering_platforms=("tpu",)).as_text()
    assert f"tensor<{window}x2x3xf32>) -> tensor<2x" in text


@pytest.mark.parametrize(
    "conv_params",
    [
        ConvParams(dilation=3, groups=2),
        pytest.param(ConvParams(dilation=2), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "platform_form",
    ["cpu", pytest.param("tiles", marks=pytest.mark.slow), *range(len(FORMS))],
)
def test_batch_split_over_devices(conv_params, platform_form, monkeypatch):
    """The same numbers, and no device collects what belongs to another one."""
    case = random_case(7, 6, (3, 3), conv_params, jnp.float32, batch=8)
    if platform_form in ("cpu", "tiles"):
        if platform_form == "tiles":
            monkeypatch.setattr(convolution, "CHANNELS_TO_TILE", 1)
            monkeypatch.setattr(convolution, "DILATIONS_PER_MAP_TO_SHIFT", 0)
        step = lambda x, kernel, dy: our_results(x, kernel, dy, conv_params)  # noqa: E731
    else:
        form = FORMS[platform_form]
        step = lambda x, kernel, dy: form(x, dy, (3, 3), conv_params)  # noqa: E731
    mesh = make_mesh()
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    placed = [jax.device_put(array, place) for array, place in zip(case, (split, whole, split))]
    compiled = jax.jit(step).lower(*placed).compile(compiler_options=FAST_COMPILE)
    assert mesh.size == 8
    assert "all-gather" not in compiled.as_text()
    assert "all-reduce" in compiled.as_text()
    for actual, expected in zip(
        jax.tree.leaves(compiled(*placed)), jax.tree.leaves(step(*case)), strict=True
    ):
        np.testing.assert_allclose(actual, expected, atol=2e-5)
