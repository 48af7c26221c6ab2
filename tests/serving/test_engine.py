"""Joined, padded and large pictures get the classes that `predict` gives them."""

import numpy as np
import pytest

import memseg_jax
from memseg_jax.serving import engine as engines
from memseg_jax.serving.engine import Engine, Look
from tests import tiny
from tests.tiny_config import get_config

pytestmark = pytest.mark.usefixtures("quiet_entry", "compilations", "three_convolutions")

SIZES = [(32, 32), (20, 31), (31, 32), (32, 9), (16, 16)]
LARGE = (70, 80)


def config_with(**limits):
    config = get_config()
    config.eval.size_multiple = 64
    config.serve.update(limits)
    return config


@pytest.fixture(scope="module")
def made():
    """What is made by the first test that needs it, when all is patched."""
    return {}


@pytest.fixture
def workdir(made, tmp_path_factory):
    if "workdir" not in made:
        folder = tmp_path_factory.mktemp("random_model")
        made["workdir"] = str(tiny.save_random_model(folder, config_with()))
    return made["workdir"]


@pytest.fixture
def engine(made, workdir):
    """For up to two pictures at a time."""
    if "engine" not in made:
        made["engine"] = engines.load(workdir, config_with(batch_size=2), "best")
    return made["engine"]


@pytest.fixture
def expected(made, workdir):
    """What `predict` says of the pictures of all sizes, and of a large one."""
    if "expected" not in made:
        made["images"] = [tiny.picture(n, *size)[0] for n, size in enumerate([*SIZES, LARGE])]
        made["expected"] = memseg_jax.load(workdir).predict(made["images"])
    return made["expected"]


def check(prediction, expected):
    assert prediction.label.shape == expected.labels.shape
    np.testing.assert_allclose(prediction.confidence, expected.confidence, atol=1e-5)
    certain = expected.confidence > 0.5001  # the class cannot depend on rounding
    assert certain.any()
    np.testing.assert_array_equal(prediction.label[certain], expected.labels[certain])


def test_pictures_of_like_sizes_share_passes_without_blank_ones(
    engine, made, expected, monkeypatch
):
    passes = []
    monkeypatch.setattr(engine, "on_pass", lambda pictures, seconds: passes.append(pictures))
    images = made["images"][:-1]
    kinds = {engine.kind(image) for image in images}
    assert kinds == {(32, 32)}  # that of the crops, although config.eval.size_multiple is more
    for prediction, one in zip(engine.run(*kinds, images), expected[:-1], strict=True):
        check(prediction, one)
    assert passes == [2, 2, 1]


def test_a_large_picture_is_alone(engine, made, expected):
    image = made["images"][-1]
    assert engine.kind(image) is None
    (prediction,) = engine.run(None, [image])
    check(prediction, expected[-1])


@pytest.mark.parametrize(
    ("field", "value"),
    [("flip", True), ("scales", (0.5, 1.0)), ("scales", (0.5,)), ("mode", "slide")],
)
def test_what_cannot_share_a_pass(engine, monkeypatch, field, value):
    evaluation = engines.serving_config(config_with()).eval
    evaluation[field] = value
    monkeypatch.setattr(engine, "_evaluation", evaluation)
    assert engine.kind(np.zeros((32, 32, 3), np.uint8)) is None


def test_the_limit_on_programs(workdir):
    config = config_with(batch_size=4, max_megapixels=3.0)
    before = config.to_dict()
    served = engines.serving_config(config)
    assert config.to_dict() == before
    assert (served.eval.exact_sizes, served.eval.max_megapixels) == (0, 3.0)
    engine = Engine(engines.trained_model.load(workdir, served))
    rng = np.random.default_rng(0)
    kinds = {engine.kind(np.zeros((*rng.integers(1, 65, 2), 3), np.uint8)) for _ in range(200)}
    assert kinds == {(32, 32), (64, 64)}
    assert engine.most == 4


def test_a_look_says_what_the_overlay_says(engine, made, expected):
    for number in (0, 1):
        image, segmentation = made["images"][number], expected[number]
        for pixel in ((0, 0), (7, 8), (image.shape[0] - 1, image.shape[1] - 1)):
            (found,) = engine.run(None, [Look(image, pixel)])
            assert (found["row"], found["column"]) == pixel
            probabilities = [x["probability"] for x in found["classes"]]
            assert sum(probabilities) == pytest.approx(1, abs=1e-5)
            assert probabilities == sorted(probabilities, reverse=True)
            assert probabilities[0] == pytest.approx(segmentation.confidence[pixel], abs=1e-4)
            if probabilities[0] > probabilities[1] + 1e-4:
                assert found["classes"][0]["class_id"] == segmentation.labels[pixel]


def test_a_look_says_what_is_read_from_the_memory(engine, made):
    image = made["images"][0]
    (found,) = engine.run(None, [Look(image, (7, 8))])
    looked = engine.model.look(image).at(7, 8)
    assert [x["class_id"] for x in found["rows"]] == looked.rows
    weights = [x["weight"] for x in found["rows"]]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] == pytest.approx(looked.weights.max(), abs=1e-6)
    for attention in found["attention"].values():
        assert np.sum(attention) == pytest.approx(1, abs=1e-3)


def test_a_look_at_a_large_picture_is_at_a_window_around_the_pixel(engine, made):
    image, pixel = made["images"][-1], (40, 45)
    (found,) = engine.run(None, [Look(image, pixel)])
    (window,) = engine.run(None, [Look(image[24:56, 29:61], (16, 16))])
    assert found["classes"] == window["classes"]
    (corner,) = engine.run(None, [Look(image, (69, 79))])
    (window,) = engine.run(None, [Look(image[38:, 48:], (31, 31))])
    assert corner["classes"] == window["classes"]


def test_warming_up_compiles_what_pictures_of_the_crops_size_need(engine, made, compilations):
    engine.warm_up()
    done = len(compilations)
    images = made["images"][:2] if "images" in made else [np.zeros((32, 32, 3), np.uint8)] * 2
    engine.run((32, 32), images)
    engine.run((32, 32), images[:1])
    assert len(compilations) == done
