"""ResNeSt-101: names and sizes of its tensors, its pools, padding, the reference's numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import names
from memseg_jax.models import resnest
from memseg_jax.models.layers import ValidSize, mask_padding
from tests.reference_models import checksum, reference_list
from tests.small_models import fast_jit, random_tree


class ShortResNeSt(resnest.ResNeSt):
    """Every kind of block there is, but few of them."""

    variants = {"short": (resnest.SplitAttentionBottleneck, (1, 1, 2, 1))}  # noqa: RUF012


def abstract(model):
    """Shapes of the variables of `model`, without computing anything."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    tree = jax.eval_shape(functools.partial(model.init, train=False), key, images)
    return {kind: tree[kind] for kind in ("params", "batch_stats")}


@functools.cache
def short_backbone():
    model = ShortResNeSt("short", 0.125)
    return model, random_tree(abstract(model), 0)


def draw_images(*size, seed=0):
    return np.random.default_rng(seed).standard_normal((*size, 3)).astype(np.float32)


# ---- names and shapes ------------------------------------------------------------------------


def test_the_tensors_are_those_of_the_reference():
    variables = abstract(resnest.build("resnest101"))
    lines = reference_list(variables)
    assert lines["backbone_net.stem.6.weight"] == "128x64x3x3"
    assert lines["backbone_net.layer1.0.downsample.1.weight"] == "256x128x1x1"
    assert lines["backbone_net.layer1.0.downsample.2.running_mean"] == "256"
    assert lines["backbone_net.layer1.0.conv2.conv.weight"] == "128x32x3x3"
    assert lines["backbone_net.layer1.0.conv2.fc1.weight"] == "32x64x1x1"
    assert lines["backbone_net.layer1.0.conv2.bn1.running_var"] == "32"
    assert lines["backbone_net.layer3.22.conv2.bn0.weight"] == "512"
    assert lines["backbone_net.layer4.1.conv2.fc2.bias"] == "1024"
    assert lines["backbone_net.layer4.2.bn3.bias"] == "2048"
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 46_226_016
    # The checksum of the complete list of the reference (without its counters of batches).
    assert len(lines) == 794
    assert checksum(lines) == 0x37C57ADB


@pytest.mark.parametrize(
    "size", [pytest.param((64, 64), marks=pytest.mark.slow), (97, 129), (1, 1)]
)
def test_four_maps(size):
    model = resnest.build("resnest101")
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    run = functools.partial(model.apply, train=False)
    maps = jax.eval_shape(run, abstract(model), images)
    sizes = [tuple(-(-side // stride) for side in size) for stride in (4, 8, 8, 8)]
    assert [m.shape for m in maps] == [
        (2, *side, channels) for side, channels in zip(sizes, (256, 512, 1024, 2048))
    ]
    assert (model.output_stride, model.auxiliary_levels) == (8, (2,))


def test_any_width_gives_equal_splits():
    model = resnest.build("resnest101", 0.1)
    shapes = {path: leaf.shape for path, leaf in names.flatten(abstract(model)).items()}
    assert shapes["params/layer3_0/split_attention/conv/kernel"] == (3, 3, 13, 52)
    assert shapes["params/layer3_0/conv3/conv/kernel"] == (1, 1, 26, 100)


# ---- pools -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (4, 7), (5, 6)])
def test_pools_by_hand(size):
    x = draw_images(2, *size)
    height, width = (-(-side // 2) for side in size)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    zeros_count = np.zeros((2, height, width, 3), np.float32)
    blocks = np.zeros((2, height, width, 3), np.float32)
    for i in range(height):
        for j in range(width):
            window = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            zeros_count[:, i, j] = window.sum(axis=(1, 2)) / 9
            blocks[:, i, j] = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean(axis=(1, 2))
    np.testing.assert_allclose(resnest.average_pool(x, 2), zeros_count, atol=1e-6)
    np.testing.assert_allclose(resnest.average_pool_valid(x, 2), blocks, atol=1e-6)
    np.testing.assert_array_equal(resnest.average_pool_valid(x, 1), x)


@pytest.mark.parametrize("pool", [resnest.average_pool, resnest.average_pool_valid])
@pytest.mark.parametrize("size", [(1, 1), (4, 7), (5, 6), (8, 8)])
def test_pools_of_padded_maps(pool, size):
    x = draw_images(1, *size)
    valid_size = ValidSize(jnp.array([size]), (8, 8))
    padded = np.full((1, 8, 8, 3), 9.0, np.float32)
    padded[:, : size[0], : size[1]] = x
    actual = pool(mask_padding(padded, valid_size), 2, valid_size)
    expected = pool(x, 2)
    inside = actual[:, : expected.shape[1], : expected.shape[2]]
    np.testing.assert_allclose(inside, expected, rtol=1e-6)
    assert np.sum(np.abs(actual)) == pytest.approx(np.sum(np.abs(inside)))


# ---- the whole backbone ----------------------------------------------------------------------


@pytest.mark.slow
def test_padding_changes_no_number():
    model, variables = short_backbone()
    forward = fast_jit(functools.partial(model.apply, train=False))
    images = [draw_images(1, *size, seed=i) for i, size in enumerate([(33, 47), (1, 1)])]
    batch = np.full((2, 48, 64, 3), 5.0, np.float32)
    for row, image in zip(batch, images):
        row[: image.shape[1], : image.shape[2]] = image[0]
    valid_size = ValidSize(jnp.array([image.shape[1:3] for image in images]), (48, 64))
    together = forward(variables, mask_padding(batch, valid_size), valid_size=valid_size)
    for index, image in enumerate(images):
        for expected, padded in zip(forward(variables, image), together):
            actual = padded[index, : expected.shape[1], : expected.shape[2]]
            limit = 1e-5 * max(np.std(expected), 1)
            np.testing.assert_allclose(actual, expected[0], rtol=0, atol=limit)
            outside = np.array(padded[index])
            outside[: expected.shape[1], : expected.shape[2]] = 0
            assert not outside.any()


@pytest.mark.slow
def test_every_parameter_gets_a_gradient_and_every_statistic_moves():
    model, variables = short_backbone()
    images = draw_images(4, 33, 47)
    weights = np.random.default_rng(1).standard_normal((4, 5, 6, 256)).astype(np.float32)

    def loss(params):
        rest = {"batch_stats": variables["batch_stats"]}
        maps, new = model.apply(
            {"params": params} | rest, images, train=True, mutable=["batch_stats"]
        )
        return jnp.mean(maps[-1] * weights), new["batch_stats"]

    gradient, statistics = fast_jit(jax.grad(loss, has_aux=True))(variables["params"])
    for path, value in names.flatten(gradient).items():
        # A normalisation follows the bias of fc1, so that no batch can tell it.
        if path.endswith("fc1/bias"):
            assert np.abs(value).max() < 1e-6, path
        else:
            assert np.isfinite(value).all(), path
            assert np.abs(value).max() > 1e-6, path
    old = names.flatten(variables["batch_stats"])
    for path, value in names.flatten(statistics).items():
        assert np.any(value != old[path]), path
