"""ViT: names and sizes, the rule for positions, and the numbers of the PyTorch reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import names
from memseg_jax.models.layers import LayerNorm, ValidSize, resize_bilinear
from memseg_jax.models.vit import VARIANTS, ViT, build, fit_positions, fit_positions_to_valid


def abstract_params(model):
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    tree = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    return names.flatten({"params": {"backbone": tree["params"]}})


def small(**kwargs):
    return ViT(**{"grid": 4, "width": 1 / 16, "outputs": (0, 1, 2, 3)} | kwargs)


@functools.cache
def small_params():
    """Parameters that are all different from zero; PyTorch's scale for the kernels."""
    rng = np.random.default_rng(0)
    flat = {}
    for path, leaf in abstract_params(small()).items():
        scale = leaf.shape[0] ** -0.5 if len(leaf.shape) == 2 else 0.3
        flat[path] = scale * rng.standard_normal(leaf.shape).astype(np.float32)
    return names.unflatten(flat)["params"]["backbone"]


@functools.cache
def small_forward(**kwargs):
    model = small(**kwargs)
    return jax.jit(lambda params, x: model.apply({"params": params}, x, train=False))


def images_of(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal((*shape, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "tokens", "count"),
    [("vitlarge", 1025, 304_147_456), ("vitlarge_473", 842, 303_960_064)],
)
def test_parameters_are_those_of_the_reference(name, tokens, count):
    shapes = {
        names.torch_key(path): names.torch_shape(leaf.shape)
        for path, leaf in abstract_params(build(name)).items()
    }
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count
    assert len(shapes) == 4 + 24 * 12
    prefix = "backbone_net."
    assert shapes[prefix + "cls_token"] == (1, 1, 1024)
    assert shapes[prefix + "pos_embed"] == (1, tokens, 1024)
    assert shapes[prefix + "patch_embed.projection.weight"] == (1024, 3, 16, 16)
    assert shapes[prefix + "patch_embed.projection.bias"] == (1024,)
    block = prefix + "layers.23."
    assert {key.removeprefix(block): shapes[key] for key in shapes if key.startswith(block)} == {
        "ln1.weight": (1024,),
        "ln1.bias": (1024,),
        "attn.attn.in_proj_weight": (3072, 1024),
        "attn.attn.in_proj_bias": (3072,),
        "attn.attn.out_proj.weight": (1024, 1024),
        "attn.attn.out_proj.bias": (1024,),
        "ln2.weight": (1024,),
        "ln2.bias": (1024,),
        "ffn.layers.0.0.weight": (4096, 1024),
        "ffn.layers.0.0.bias": (4096,),
        "ffn.layers.1.weight": (1024, 4096),
        "ffn.layers.1.bias": (1024,),
    }


def test_map_normalisations_have_their_names():
    assert names.torch_key("params/norm_layers_2/scale") == "norm_layers.2.weight"
    assert names.torch_key("params/norm_layers_3/bias") == "norm_layers.3.bias"


@pytest.mark.parametrize("shape", [(5, 7), (3, 3)])
def test_linear_weights_are_transposed(shape):
    ours = np.arange(np.prod(shape)).reshape(shape)
    assert names.torch_shape(shape) == shape[::-1]
    np.testing.assert_array_equal(names.from_torch_layout(ours.T), ours)


@pytest.mark.parametrize(("width", "channels"), [(1.0, 1024), (0.5, 512), (1 / 16, 64), (0.0, 64)])
def test_width_counts_in_heads(width, channels):
    assert abstract_params(build("vitlarge", width))["params/backbone/cls_token"].shape[2] == (
        channels
    )


def test_equal_token_counts_keep_the_table():
    table = jnp.asarray(images_of(1, 1 + 32 * 32))
    for grid in ((32, 32), (16, 64), (1, 1024)):
        assert fit_positions(table, grid) is table


@pytest.mark.parametrize("grid", [(7, 9), (32, 16), (1, 1), (29, 29)])
def test_other_token_counts_resize_the_square(grid):
    table = images_of(1, 1 + 32 * 32)
    fitted = fit_positions(jnp.asarray(table), grid)
    assert fitted.shape == (1, 1 + grid[0] * grid[1], 3)
    np.testing.assert_array_equal(fitted[:, 0], table[:, 0])
    square = resize_bilinear(jnp.asarray(table[:, 1:].reshape(1, 32, 32, 3)), grid)
    np.testing.assert_array_equal(fitted[:, 1:].reshape(square.shape), square)


@pytest.mark.parametrize("grid", VARIANTS.values())
def test_a_plane_of_positions_stays_a_plane(grid):
    """Half-pixel centres: values that grow evenly do so after the resize, but for the border."""
    ramp = np.broadcast_to(np.arange(grid, dtype=np.float32)[:, None], (grid, grid))
    table = np.concatenate([[0], ramp.reshape(-1)]).reshape(1, -1, 1).astype(np.float32)
    fitted = fit_positions(jnp.asarray(table), (16, 24))[0, 1:, 0].reshape(16, 24)
    expected = np.clip((np.arange(16) + 0.5) * grid / 16 - 0.5, 0, grid - 1)
    np.testing.assert_allclose(fitted, np.broadcast_to(expected[:, None], (16, 24)), atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (97, 33), (1, 16), (16, 17)])
def test_maps_have_the_rounded_up_size(size):
    maps = small_forward()(small_params(), images_of(2, *size))
    expected = (2, -(-size[0] // 16), -(-size[1] // 16), 64)
    assert [x.shape for x in maps] == [expected] * 4


def test_odd_sizes_are_padded_by_zeros_at_the_bottom_and_the_right():
    images = images_of(1, 35, 50)
    padded = np.pad(images, ((0, 0), (0, 13), (0, 14), (0, 0)))
    for x, y in zip(
        small_forward()(small_params(), images), small_forward()(small_params(), padded)
    ):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_images_of_a_batch_do_not_see_each_other():
    images = images_of(2, 48, 32)
    forward = small_forward(width=1 / 8)  # two heads
    rng = np.random.default_rng(1)
    params = {
        path: 0.1 * rng.standard_normal(leaf.shape).astype(np.float32)
        for path, leaf in abstract_params(small(width=1 / 8)).items()
    }
    params = names.unflatten(params)["params"]["backbone"]
    both = forward(params, images)
    for index in range(2):
        alone = forward(params, images[index : index + 1])
        for x, y in zip(both, alone):
            np.testing.assert_allclose(x[index], y[0], atol=1e-5)


def test_every_token_sees_all_of_the_image():
    params = small_params()

    def corner(x):
        return small_forward()(params, x)[0][0, 0, 0].sum()

    gradient = np.asarray(jax.grad(corner)(jnp.asarray(images_of(1, 48, 48))))
    patches = np.abs(gradient).reshape(3, 16, 3, 16, 3).max(axis=(1, 3, 4))
    assert (patches > 0).all()


def test_bfloat16_is_near_float32():
    images = images_of(1, 64, 64)
    exact = small_forward()(small_params(), images)[-1]
    rough = small_forward(dtype=jnp.bfloat16)(small_params(), images)[-1]
    assert rough.dtype == jnp.bfloat16
    assert float(jnp.abs(rough.astype(jnp.float32) - exact).mean()) < 0.05 * float(exact.std())


@pytest.mark.parametrize("grid", [(7, 9), (4, 4), (2, 8), (1, 16), (16, 1), (1, 1), (12, 16)])
def test_positions_of_padded_images_are_those_of_the_real_size(grid):
    table = jnp.asarray(images_of(1, 1 + 4 * 4))
    canvas = (16, 16)
    sizes = jnp.array([[16 * grid[0] - 5, 16 * grid[1]], [256, 256]])
    found = fit_positions_to_valid(table, ValidSize(sizes, (256, 256)), canvas)
    expected = fit_positions(table, grid)
    real = found[0, 1:].reshape(*canvas, 3)[: grid[0], : grid[1]]
    np.testing.assert_allclose(real.reshape(-1, 3), expected[0, 1:], atol=1e-6)
    np.testing.assert_array_equal(found[:, 0], jnp.broadcast_to(table[:, 0], (2, 3)))
    np.testing.assert_allclose(found[1], fit_positions(table, canvas)[0], atol=1e-6)


@pytest.mark.parametrize(("mean", "std"), [(1000, 10), (0, 1), (0, 1e-3)])
def test_layer_norm_normalises_channels(mean, std):
    x = mean + std * images_of(2, 5, seed=3)
    variables = {"params": {"scale": jnp.asarray([1.0, 2, 3]), "bias": jnp.asarray([0.0, 1, -1])}}
    x64 = x.astype(np.float64)
    normal = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-6)
    expected = normal * [1, 2, 3] + [0, 1, -1]
    np.testing.assert_allclose(LayerNorm().apply(variables, x), expected, rtol=1e-4, atol=1e-3)
