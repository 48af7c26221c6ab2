"""Large images in blended windows: exact where it can be, without seams where it cannot."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from configs import common
from memseg_jax import inference
from memseg_jax.data.images import read_image
from memseg_jax.inference import blending
from tests.inference.test_passes import Toy
from tests.tiny import ROOT, picture

pytestmark = pytest.mark.usefixtures("compilations")
CROP = (32, 48)
SIZES = [(104, 136), (72, 200), (408, 16), (24, 400)]  # the last two are narrower than a window


class Borders(Toy):
    """Says class 1 in the cells at the borders of its input, and nothing elsewhere."""

    def apply(self, variables, images, memory, valid_size):
        shape = images.shape[0], images.shape[1] // 4, images.shape[2] // 4, 2
        return {"logits": jnp.ones(shape).at[:, 1:-1, 1:-1].set(0).at[..., 0].set(0)}


class Neighbours(Toy):
    """Sees two cells around each, zero outside its input, as every convolution does."""

    def apply(self, variables, images, memory, valid_size):
        x = super().apply(variables, images, memory, valid_size)["logits"]
        height, width = x.shape[1:3]
        x = jnp.pad(x, [(0, 0), (2, 2), (2, 2), (0, 0)])
        around = [x[:, i : i + height, j : j + width] for i in range(5) for j in range(5)]
        return {"logits": sum(around) / 25}


def predict(images, model=None, crop=CROP, **fields):
    """The predictions for uint8 images, in order, with weights that any colour can decide."""
    model = model or Toy(8, leftward=0)
    evaluation = common.get_config().eval
    evaluation.update({"base_size": (), "exact_sizes": 99} | fields)
    weights = np.random.default_rng(1).standard_normal((3, model.num_classes))
    variables = {"params": weights.astype(np.float32), "batch_stats": {}, "memory": np.zeros(1)}
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    predictor = inference.Predictor(model, evaluation, mesh, (), True, crop)
    made = {x.key: x for x in predictor.predict(variables, enumerate(images))}
    assert len(made) == len(images)
    return [made[n] for n in range(len(images))]


@pytest.fixture(scope="module")
def images():
    return [picture(n, *size)[0] for n, size in enumerate(SIZES)]


# ---- Exact where every cell is on its own -------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"batch_size": 3, "softmax_before_resize": True},
        {"scales": (0.5, 1.0), "flip": True, "softmax_before_resize": True},
        {"base_size": (140, 100), "keep_ratio": False},
    ],
    ids=["one pass", "batches", "scales and mirror", "resized"],
)
def test_windows_of_a_local_network_are_the_whole_image(images, fields):
    assert all(blending.is_large(image.shape[:2], CROP) for image in images)
    for image, made, whole in zip(
        images, predict(images, mode="auto", **fields), predict(images, mode="whole", **fields)
    ):
        assert made.label.shape == made.confidence.shape == image.shape[:2]
        # Large images are scaled as 8-bit values, before they are normalised.
        atol = 0.01 if "scales" in fields else 2e-5
        np.testing.assert_allclose(made.confidence, whole.confidence, rtol=0, atol=atol)
        assert (made.label != whole.label).mean() < atol
        assert len(np.unique(made.label)) > 1


def test_bands_change_nothing(images, monkeypatch):
    before = predict(images, Neighbours(8), mode="auto")
    monkeypatch.setattr(blending, "BAND", 1000)
    assert len(list(blending.bands((104, 136)))) == 15
    for one, many in zip(before, predict(images, Neighbours(8), mode="auto")):
        np.testing.assert_array_equal(one.label, many.label)


def test_sides_that_are_no_multiple_of_the_stride():
    image = picture(3, 103, 137)[0]
    (made,) = predict([image], mode="auto")
    (padded,) = predict([np.pad(image, [(0, 1), (0, 3), (0, 0)], "edge")], mode="auto")
    np.testing.assert_array_equal(made.label, padded.label[:103, :137])


# ---- Borders and seams --------------------------------------------------------------------------


def test_the_border_of_a_window_has_little_weight():
    (made,) = predict([np.zeros((160, 240, 3), np.uint8)], Borders(), mode="auto")
    # A window's outermost cells have 1 / (cells / 2) / 2 of the weight of its middle.
    inner = made.confidence[16:-16, 16:-16]
    certain = 1 / (1 + np.exp(-2 / 8))  # two of the softmax's classes, and the weights of a corner
    assert (made.label[16:-16, 16:-16] == 1).any()
    assert inner.max() < certain


def photographs():
    """Real photographs where there are some, else a picture; both have more than six windows."""
    if "MEMSEG_DATA" not in os.environ:
        return [picture(7, 240, 320)[0]]
    found = sorted(Path(os.environ["MEMSEG_DATA"], "camvid", "test").glob("*.jpg"))
    return [read_image(path) for path in found[::60]]


def changed_by_a_shift(images):
    """The share of labels that change where the windows are elsewhere, away from the borders."""
    shares = []
    inputs = [*images, *(x[12:, 20:] for x in images)]
    both = predict(inputs, Neighbours(8), crop=(96, 128), mode="auto", batch_size=8)
    for one, other in zip(both, both[len(images) :]):
        assert len(np.unique(one.label)) > 1
        changed = one.label[12:, 20:] != other.label
        shares.append(changed[32:-32, 32:-32].mean())  # the border of the photograph moves, too
    return np.array(shares)


def test_a_shifted_grid_of_windows_changes_few_labels(monkeypatch):
    images = photographs()
    assert (blended := changed_by_a_shift(images)).max() < 0.005
    monkeypatch.setattr(blending, "_falling", lambda count: np.ones(count, np.float32))
    assert changed_by_a_shift(images).mean() > 1.3 * blended.mean()


# ---- What is done how ---------------------------------------------------------------------------


def test_small_images_are_whole_and_their_results_the_same_bits(images):
    small = picture(5, 64, 80)[0]
    assert not blending.is_large(small.shape[:2], CROP)
    mixed = predict([small, images[0], small, small, images[1]], mode="auto", batch_size=2)
    (whole,) = predict([small], mode="whole", batch_size=2)
    for number in (0, 2, 3):
        np.testing.assert_array_equal(mixed[number].label, whole.label)
        np.testing.assert_array_equal(mixed[number].confidence, whole.confidence)
    (large,) = predict([images[1]], mode="auto", batch_size=2)
    np.testing.assert_array_equal(mixed[4].label, large.label)


def test_the_mode_needs_a_crop():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    with pytest.raises(ValueError, match="crops"):
        inference.Predictor(Toy(), common.get_config().eval, mesh)


# ---- Memory -------------------------------------------------------------------------------------

MEASURED = """
import resource, numpy as np
from tests.inference.test_blending import Toy, predict
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
image = np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), np.uint8)
model = Toy(150, leftward=0)
predict([image[:200]], model, mode="auto", batch_size=16)
before = peak()
(made,) = predict([image], model, mode="auto", batch_size=16)
print(*made.label.shape, len(np.unique(made.label)), peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_classes_times_pixels():
    """12 megapixels of 150 classes: 7 GB of scores at full size, 450 MB at the stride of 4."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", MEASURED]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *shape, classes, grown = done.stdout.split()
    assert shape == ["3000", "4000"]
    assert int(classes) > 3
    # The label map and the confidence are 5 bytes a pixel; the rest does not depend on the height.
    assert int(grown) < 5 * 12e6 + 100e6
