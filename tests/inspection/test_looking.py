"""What a picture reads: weights, rows and attention maps, for both methods."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseg_jax.data.transforms import evaluation_transform
from memseg_jax.errors import UserError
from memseg_jax.inspection.looking import LEAST_WEIGHT, Looker
from memseg_jax.inspection.samples import PER_CLASS, sample_features
from memseg_jax.models.attention import attend
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import compilation
from tests import tiny
from tests.small_models import ThreeConvolutions, fast_jit, random_variables
from tests.tiny_config import get_config

CASES = {
    "mcibi": {},
    "mcibi of two slots, hard": {"slots": 2, "hard": True},
    "mcibi++": {"method": "mcibi_plus_plus", "downsample": 2},
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(compilation, "compile_with_notice", tiny.compile_quickly)


@functools.cache
def model_of(case, exact_sizes=1):
    config = get_config()
    fields = dict(CASES[case])
    config.model.method = fields.pop("method", "mcibi")
    config.model.memory.update(fields)
    config.eval.exact_sizes = exact_sizes
    model = build_segmentor(config).clone(backbone=ThreeConvolutions())
    return model, random_variables(model, 3), Looker(model, config), config


@pytest.mark.parametrize("case", CASES)
def test_what_is_seen_is_what_the_network_does(case):
    model, variables, looker, config = model_of(case)
    image = tiny.picture(1, 40, 36)[0]
    look = looker.look(variables, image)
    images = evaluation_transform(image, config.eval)[None]
    rest = {name: variables[name] for name in ("params", "batch_stats")}
    out, offered = fast_jit(functools.partial(model.apply, mutable=["taps"]))(
        rest, images, variables["memory"]
    )
    prediction = np.asarray(jax.nn.softmax(out["logits"], axis=-1))[0]
    np.testing.assert_allclose(look.prediction, prediction, atol=1e-5)
    np.testing.assert_allclose(look.features, out["memory_input"][0], rtol=1e-4, atol=1e-5)
    # What the network has read is the rows, weighed as the look says.
    read = np.einsum("hwk,ksc->hwsc", look.weights, model.rows_of(variables["memory"]))[:, :, 0]
    if case != "mcibi++":  # there, a convolution comes before what is offered
        selected = offered["taps"]["memory_module"]["selected_memory"][0]
        np.testing.assert_allclose(read, selected, atol=1e-5)
    for row, column in ((0, 0), (39, 35), (17, 22)):
        found = look.at(row, column)
        assert found.weights.sum() == pytest.approx(1, abs=1e-5)
        assert found.prediction.sum() == pytest.approx(1, abs=1e-5)
        assert found.rows[0] == np.argmax(found.weights)
        assert all(found.weights[k] >= LEAST_WEIGHT for k in found.rows)
        assert len(found.memory_attention) == model.rows_of(variables["memory"]).shape[1]
        for attention in (*found.memory_attention, found.image_attention):
            assert attention.sum() == pytest.approx(1, abs=1e-5)
            assert attention.min() >= 0
        plain = found.as_plain()
        assert plain["pixel"] == [row, column]
        assert np.array(plain["memory_attention"]).shape == found.memory_attention.shape


def test_attention_maps_are_the_weights_of_the_attention():
    """Values that are a one for every key make the result of `attend` its weights."""
    _, variables, looker, _ = model_of("mcibi")
    look = looker.look(variables, tiny.picture(1, 40, 36)[0])
    for kind, found in (("memory", "memory_attention"), ("image", "image_attention")):
        query, key = (x.reshape(1, -1, x.shape[-1]) for x in look.attentions[kind][0])
        keys = key.shape[1]
        weights = attend(jnp.asarray(query), jnp.asarray(key), jnp.eye(keys)[None])[0]
        shape = look.weights.shape[:2]
        for row, column in ((0, 0), (39, 35), (17, 22)):
            position = row * shape[0] // 40 * shape[1] + column * shape[1] // 36
            attention = np.squeeze(getattr(look.at(row, column), found))
            expected = np.asarray(weights[position]).reshape(shape)
            np.testing.assert_allclose(attention, expected, atol=1e-6)


@pytest.mark.parametrize("case", ["mcibi", "mcibi++"])
def test_padding_changes_nothing(case):
    image = tiny.picture(2, 41, 50)[0]
    exact, padded = (model_of(case, sizes)[2].look(model_of(case)[1], image) for sizes in (9, 0))
    assert padded.weights.shape == exact.weights.shape == (6, 7, 3)
    np.testing.assert_allclose(padded.prediction, exact.prediction, atol=1e-4)
    for a, b in zip(
        (padded.at(40, 3).memory_attention, padded.at(40, 3).image_attention),
        (exact.at(40, 3).memory_attention, exact.at(40, 3).image_attention),
    ):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_large_picture_is_shrunk():
    """What is segmented in windows is more than four crops of 32x32: here as wide again."""
    _, variables, looker, _ = model_of("mcibi")
    look = looker.look(variables, tiny.picture(1, 80, 128)[0])
    assert look.size == (80, 128)
    height, width = look.weights.shape[:2]
    assert (height, width) == (7, 10)  # of 50x80 pixels
    assert look.at(79, 127).memory_attention.shape == (1, 7, 10)


def test_a_pixel_that_is_none():
    look = model_of("mcibi")[2].look(model_of("mcibi")[1], tiny.picture(1, 40, 36)[0])
    for pixel in ((40, 0), (0, 36), (-1, 0)):
        with pytest.raises(UserError, match="it has 40 rows and 36 columns"):
            look.at(*pixel)


def test_a_model_without_memory():
    config = get_config()
    config.model.memory.enabled = False
    with pytest.raises(UserError, match=r"no memory .* config.model.memory.enabled = True"):
        Looker(build_segmentor(config), config)


class Source:
    """Two images, of which the second has one pixel of class 2."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        image, label = tiny.picture(index, 40, 36)
        label = np.full_like(label, 255 if index == 0 else 1)
        if index == 1:
            label[20, 18] = 2  # the centre of position 2, 2 of 5 x 5
        return {"image": image, "label": label, "name": str(index)}


def test_features_are_of_the_classes_at_their_centres():
    _, variables, looker, _ = model_of("mcibi")
    features, labels = sample_features(looker, variables, Source(), 3)
    look = looker.look(variables, Source()[1]["image"])
    assert look.features.shape[:2] == (5, 5)
    assert labels.tolist() == sorted(labels.tolist())
    counts = np.bincount(labels, minlength=3)
    assert counts.tolist() == [0, min(24, PER_CLASS), 1]
    np.testing.assert_array_equal(features[labels == 2], look.features[2, 2][None])
