"""HRNetV2-W48: names and sizes of its tensors, its fusions, and the reference's numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import names
from memseg_jax.models import hrnet
from memseg_jax.models.layers import BATCH_NORM_EPSILON, ValidSize, resize_bilinear
from tests.reference_models import checksum, reference_list
from tests.small_models import fast_jit, random_tree, shallow_hrnet


def abstract(model, inputs, **options):
    """Shapes of the variables of `model`, without computing anything."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    tree = jax.eval_shape(lambda k, x: model.init(k, x, train=False, **options), key, inputs)
    return {kind: tree[kind] for kind in ("params", "batch_stats")}


def abstract_backbone(variant, width=1.0):
    return abstract(hrnet.build(variant, width), jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32))


@pytest.mark.parametrize(
    "variant", ["hrnetv2w48", pytest.param("hrnetv2w48_relu", marks=pytest.mark.slow)]
)
def test_the_tensors_are_those_of_the_reference(variant):
    variables = abstract_backbone(variant)
    lines = reference_list(variables)
    assert lines["backbone_net.conv2.weight"] == "64x64x3x3"
    assert lines["backbone_net.transition1.0.0.weight"] == "48x256x3x3"
    assert lines["backbone_net.transition3.3.0.0.weight"] == "384x192x3x3"
    assert lines["backbone_net.stage3.3.branches.2.3.bn2.running_var"] == "192"
    assert lines["backbone_net.stage4.2.fuse_layers.3.0.2.0.weight"] == "384x48x3x3"
    assert lines["backbone_net.stage4.2.fuse_layers.0.3.1.bias"] == "48"
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 65_325_120
    # The checksum of the complete list of the reference (without its counters of batches).
    assert len(lines) == 1525
    assert checksum(lines) == 0x77772C87


@pytest.mark.parametrize("size", [(97, 129), (64, 64), (33, 50)])
def test_one_map_at_stride_four(size, monkeypatch):
    shallow_hrnet(monkeypatch)
    model = hrnet.build("hrnetv2w48")
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    variables = abstract(model, images)
    maps = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, images)
    stride = model.output_stride
    assert [m.shape for m in maps] == [(2, -(-size[0] // stride), -(-size[1] // stride), 720)]


def test_a_coarse_branch_is_interpolated_twice():
    rng = np.random.default_rng(0)
    fine = rng.uniform(0.1, 1, (1, 5, 7, 2)).astype(np.float32)
    coarse = rng.uniform(0.1, 1, (1, 3, 4, 4)).astype(np.float32)
    module = hrnet.ExchangeModule((2, 4), jnp.float32, False)
    variables = random_tree(abstract(module, [fine, coarse]), 0)
    for name, block in variables["params"].items():
        if name.startswith("branch"):  # a residual of zero: blocks return their positive input
            block["conv2"]["norm"] = jax.tree.map(np.zeros_like, block["conv2"]["norm"])
    result, _ = fast_jit(functools.partial(module.apply, train=False))(variables, [fine, coarse])

    fuse = variables["params"]["fuse_0_1"]
    statistics = variables["batch_stats"]["fuse_0_1"]["norm"]
    lifted = (coarse @ fuse["conv"]["kernel"][0, 0] - statistics["mean"]) / np.sqrt(
        statistics["var"] + BATCH_NORM_EPSILON
    ) * fuse["norm"]["scale"] + fuse["norm"]["bias"]
    once = np.maximum(fine + resize_bilinear(lifted, (5, 7)), 0)
    twice = np.maximum(fine + resize_bilinear(resize_bilinear(lifted, (6, 8)), (5, 7)), 0)
    np.testing.assert_allclose(result, twice, atol=1e-5)
    assert np.abs(once - twice).max() > 1e-2


@functools.cache
def small_backbone(variant):
    model = hrnet.build(variant, 1 / 48)
    return model, random_tree(abstract_backbone(variant, 1 / 48), 0)


def draw_images(*size):
    return np.random.default_rng(0).standard_normal((*size, 3)).astype(np.float32)


@pytest.mark.slow
def test_only_the_published_stem_has_no_first_relu():
    images, seen = draw_images(1, 33, 50), []
    for variant in ("hrnetv2w48", "hrnetv2w48_relu"):
        model, variables = small_backbone(variant)

        def early_taps(variables, model=model):  # what is not returned is not compiled
            _, taps = model.apply(variables, images, train=False, mutable=["taps"])
            return taps["taps"]["stem_bn1"], taps["taps"]["layer1"]

        seen.append(fast_jit(early_taps)(variables))
    (stem, layer1), (stem_relu, layer1_relu) = seen
    np.testing.assert_array_equal(stem, stem_relu)
    assert (stem < 0).any()
    assert np.abs(layer1 - layer1_relu).max() > 1e-3


@pytest.mark.slow
def test_every_parameter_gets_a_gradient_and_every_statistic_moves(monkeypatch):
    shallow_hrnet(monkeypatch)  # the golden steps have the gradients of the whole network
    model = hrnet.build("hrnetv2w48", 1 / 48)
    variables = random_tree(abstract_backbone("hrnetv2w48", 1 / 48), 0)

    def loss(params):
        rest = {"batch_stats": variables["batch_stats"]}
        (features,), new = model.apply(
            {"params": params} | rest, images, train=True, mutable=["batch_stats"]
        )
        return (features * weights).sum(), new["batch_stats"]

    images = draw_images(2, 65, 97)
    weights = np.random.default_rng(1).standard_normal((2, 17, 25, 15)).astype(np.float32)
    gradient, statistics = fast_jit(jax.grad(loss, has_aux=True))(variables["params"])
    for path, value in names.flatten(gradient).items():
        assert np.isfinite(value).all(), path
        assert np.any(value), path
    old = names.flatten(variables["batch_stats"])
    for path, value in names.flatten(statistics).items():
        assert np.any(value != old[path]), path


@pytest.mark.slow
@pytest.mark.exhaustive  # in CI: test_segmentor.py, with one block of each kind
def test_padding_changes_no_number_of_the_whole_backbone():
    model, variables = small_backbone("hrnetv2w48_relu")
    forward = fast_jit(functools.partial(model.apply, train=False))
    image = draw_images(1, 41, 77)
    padded = np.zeros((1, 64, 96, 3), np.float32)
    padded[:, :41, :77] = image
    (alone,) = forward(variables, image)
    valid_size = ValidSize(jnp.array([[41, 77]]), (64, 96))
    (together,) = forward(variables, padded, valid_size=valid_size)
    limit = 1e-5 * np.std(alone)
    np.testing.assert_allclose(together[:, :11, :20], alone, rtol=0, atol=limit)
    assert not np.asarray(together)[:, 11:].any()
    assert not np.asarray(together)[:, :, 20:].any()
