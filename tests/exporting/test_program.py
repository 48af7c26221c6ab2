"""The exported program computes what the network does, at any size, for every platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseg_jax.data.transforms import normalise
from memseg_jax.exporting import program
from memseg_jax.exporting.folding import fold, unfold, without_normalisations
from memseg_jax.exporting.weights import pack
from memseg_jax.inference.predictor import network_scores
from memseg_jax.models.layers import resize_bilinear
from memseg_jax.models.segmentor import build_segmentor
from tests.small_models import (
    FAST_COMPILE,
    ThreeConvolutions,
    fast_jit,
    random_variables,
    shallow_hrnet,
    shallow_swin,
    small_config,
)

SIZES = [(40, 56), (33, 47), (64, 25)]


def picture(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def expected(model, variables, image):
    """The network's scores of every class at the picture's size."""

    def scores(variables, image):
        scores = network_scores(model, variables, image[None], None, softmax=False)
        return resize_bilinear(scores, image.shape[:2])[0]

    return np.asarray(fast_jit(scores)(variables, normalise(image)))


def assert_segmented(found, scores):
    """Labels and confidences are those of the scores, but for ties and rounding.

    Scores of a random network are large; a probability changes by half of what its score does.
    """
    labels, confidence = map(np.asarray, found)
    probabilities = np.asarray(jax.nn.softmax(scores, axis=-1))
    rounding = 1e-4 * max(np.std(scores), 1)
    assert labels.dtype == np.uint8
    assert confidence.dtype == np.float32
    assert labels.shape == confidence.shape == probabilities.shape[:2]
    np.testing.assert_allclose(confidence, probabilities.max(axis=-1), atol=rounding)
    chosen = np.take_along_axis(probabilities, labels[..., None].astype(int), axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, confidence, atol=rounding)
    assert len(np.unique(labels)) > 1


def padded(image, unit):
    height, width = image.shape[:2]
    return np.pad(image, ((0, -height % unit), (0, -width % unit), (0, 0)), constant_values=77)


def assert_any_size(model, variables, sizes):
    """One program is right for pictures of several sizes, whatever their padding holds."""
    weights = pack({"params": fold(variables), "memory": variables["memory"]}, "float32")
    exported = program.exported(model, weights, None, False)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    call = jax.jit(exported.call, compiler_options=FAST_COMPILE)
    for size in sizes:
        image = picture(size)
        results = call(weights, padded(image, model.coarsest_stride), np.array(size, np.int32))
        cut = [x[: size[0], : size[1]] for x in results]
        assert_segmented(cut, expected(model, variables, image))


def small_model(method="mcibi"):
    config = small_config()
    config.model.method = method
    model = build_segmentor(config).clone(auxiliary=False, backbone=ThreeConvolutions())
    return model, random_variables(model, 1)


def test_folded_normalisations_and_the_way_back():
    model, variables = small_model()
    image = jnp.asarray(normalise(picture((40, 56))))[None]
    scores = fast_jit(network_scores, static_argnums=(0, 3), static_argnames="softmax")
    before = scores(model, variables, image, None, softmax=False)
    folded = fold(variables)
    assert set(folded["bottleneck"]["norm"]) == {"bias"}
    np.testing.assert_allclose(
        scores(model, unfold(folded, variables), image, None, softmax=False), before, atol=1e-4
    )
    rest = {"params": folded, "batch_stats": {}, "memory": variables["memory"]}
    bare = fast_jit(
        lambda rest, image: without_normalisations(network_scores)(
            model, rest, image, None, softmax=False
        )
    )
    np.testing.assert_allclose(bare(rest, image), before, atol=1e-4)
    assert np.std(before) > 0.1


def test_one_size():
    model, variables = small_model("mcibi_plus_plus")
    weights = pack({"params": fold(variables), "memory": variables["memory"]}, "float32")
    image = picture((33, 47))
    exported = program.exported(model, weights, (33, 47), False)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    found = jax.jit(exported.call, compiler_options=FAST_COMPILE)(weights, image)
    assert_segmented(found, expected(model, variables, image))


def test_any_size():
    assert_any_size(*small_model(), SIZES)


BACKBONES = {
    "resnet18": {},
    "resnest101": {},
    "hrnetv2w48": {},
    "vitbase": {},
    "swintiny": {"context": "pyramid_pooling", "fpn": True, "fpn_dim": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone",
    # In CI, a ResNeSt's convolutions are those of a ResNet.
    [pytest.param(x, marks=[pytest.mark.exhaustive] * (x == "resnest101")) for x in BACKBONES],
)
def test_any_size_of_every_backbone(backbone, monkeypatch):
    shallow_hrnet(monkeypatch)
    shallow_swin(monkeypatch)
    config = small_config()
    config.model.method = "mcibi_plus_plus"  # the draws of its rows are constants of the program
    config.model.backbone = backbone
    for field, value in BACKBONES[backbone].items():
        config.model[field] = value
    model = build_segmentor(config).clone(auxiliary=False)
    assert_any_size(model, random_variables(model, 1), [(96, 131), (65, 64)])
