"""Several scales and mirror images: properties that hold for any network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import common
from memseg_jax import inference
from memseg_jax.errors import UserError
from memseg_jax.inference.passes import mirrored_classes, passes, scaled
from memseg_jax.inference.windows import cover_counts, windows_of
from memseg_jax.models.layers import bilinear_matrix
from memseg_jax.runtime import sharding

pytestmark = pytest.mark.usefixtures("compilations")
SLIDE = {"mode": "slide", "window": (32, 48), "stride": (20, 28)}
MODES = pytest.mark.parametrize("mode", [{"mode": "whole"}, SLIDE], ids=["whole", "slide"])


class Toy:
    """In a segmentor's place: means of 4x4 pixels, and a share of what is to their left."""

    output_stride = coarsest_stride = 4
    precision = "highest"

    def __init__(self, num_classes=2, leftward=0.5):
        self.num_classes, self.leftward = num_classes, leftward

    def apply(self, variables, images, memory, valid_size):
        height, width = (-(-side // 4) * 4 for side in images.shape[1:3])
        padding = [
            (0, 0),
            *((0, m - n) for m, n in zip((height, width), images.shape[1:3])),
            (0, 0),
        ]
        x = jnp.pad(images, padding)
        x = x.reshape(len(x), height // 4, 4, width // 4, 4, 3).mean((2, 4))
        x += self.leftward * jnp.pad(x, [(0, 0), (0, 0), (1, 0), (0, 0)])[:, :, :-1]
        return {"logits": x @ variables["params"]}


def make_predictor(model, pairs=(), devices=1, rows=1, **fields):
    """A predictor and weights for it."""
    evaluation = common.get_config().eval
    evaluation.update({"mode": "whole", "exact_sizes": 0, "size_multiple": 64} | fields)
    weights = 0.7 * np.random.default_rng(5).standard_normal((3, model.num_classes))
    variables = {"params": weights.astype(np.float32), "batch_stats": {}, "memory": np.zeros(1)}
    mesh = sharding.make_mesh(jax.devices()[:devices], {"rows": rows})
    return inference.Predictor(model, evaluation, mesh, pairs, confidence=True), variables


def predict(images, model=None, pairs=(), devices=1, rows=1, **fields):
    """{number: (labels, probability of class 1)} of images that are normalised already."""
    predictor, variables = make_predictor(model or Toy(), pairs, devices, rows, **fields)
    found = {}
    for prediction in predictor.segment(
        variables, ((n, x, (50, 70)) for n, x in enumerate(images))
    ):
        label, best = prediction.label, prediction.confidence
        assert label.shape == best.shape == (50, 70)
        found[prediction.key] = label, np.where(label == 1, best, 1 - best)
    return found


@pytest.fixture(scope="module")
def images():
    sizes = [(48, 64), (33, 51), (48, 64)]
    rng = np.random.default_rng(0)
    return [rng.standard_normal((*size, 3)).astype(np.float32) for size in sizes]


def assert_same(a, b, atol=2e-6):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_allclose(a[key][1], b[key][1], rtol=0, atol=atol)
        sure = abs(a[key][1] - 0.5) > atol
        np.testing.assert_array_equal(a[key][0][sure], b[key][0][sure])
        assert 0.1 < a[key][0].mean() < 0.9  # both classes are predicted


# ---- Averages -----------------------------------------------------------------------------------


@MODES
def test_the_same_pass_twice_is_one_pass(images, mode):
    kw = mode | {"softmax_before_resize": mode != SLIDE}
    assert_same(predict(images, scales=(1.0, 1.0), **kw), predict(images, **kw))


@MODES
def test_prediction_is_the_mean_over_the_scales(images, mode):
    kw = mode | {"softmax_before_resize": True}
    single = [predict(images, scales=(scale,), **kw) for scale in (0.5, 1.75)]
    mean = {key: np.mean([one[key][1] for one in single], axis=0) for key in single[0]}
    several = predict(images, scales=(0.5, 1.75), **kw)
    assert_same(several, {key: ((p > 0.5).astype(np.uint8), p) for key, p in mean.items()})
    assert abs(single[0][0][1] - single[1][0][1]).max() > 0.01


@pytest.mark.parametrize(
    ("mode", "pairs"), [({"mode": "whole"}, ()), ({"mode": "whole"}, ((0, 1),)), (SLIDE, ((0, 1),))]
)
def test_mirrored_pass_is_mirrored_back(images, mode, pairs):
    kw = mode | {"softmax_before_resize": True}
    plain = predict(images, **kw)
    of_mirror = predict([image[:, ::-1] for image in images], **kw)
    mean = {}
    for key, (_, p) in plain.items():
        mirrored = of_mirror[key][1][:, ::-1]
        mean[key] = (p + (1 - mirrored if pairs else mirrored)) / 2
    both = predict(images, flip=True, pairs=pairs, **kw)
    assert_same(both, {key: ((p > 0.5).astype(np.uint8), p) for key, p in mean.items()})
    assert abs(plain[0][1] - mean[0]).max() > 0.01


def test_flip_changes_nothing_for_a_symmetric_network(images):
    images = [images[0], images[2]]  # whose width is a multiple of the stride
    kw = {"model": Toy(3, leftward=0)}
    plain, both = predict(images, **kw), predict(images, flip=True, **kw)
    for key in plain:
        np.testing.assert_array_equal(plain[key][0], both[key][0])


@MODES
def test_batches_devices_and_padding_change_nothing(images, mode):
    kw = mode | {"scales": (0.5, 1.25), "flip": True, "softmax_before_resize": True}
    expected = predict(images, exact_sizes=99, **kw)
    for other in (
        {"batch_size": 3},
        {"devices": 8, "size_multiple": 32},
        {"devices": 8, "rows": 4, "exact_sizes": 2},
    ):
        assert_same(predict(images, **kw, **other), expected)


@MODES
def test_the_devices_have_the_next_batch_before_results_are_used(images, mode):
    predictor, variables = make_predictor(Toy(), **mode)
    taken = []

    def inputs():
        for number, image in enumerate(images):
            taken.append(number)
            yield number, image, (50, 70)

    for prediction in predictor.segment(variables, inputs()):
        assert len(taken) >= min(prediction.key + 2, len(images))


def test_images_of_many_sizes_share_programs(compilations):
    # An eighth of photographs with short side 512 and long side up to 1024.
    sizes = [(64, n) for n in range(64, 129, 8)]
    sizes += [size[::-1] for size in sizes]
    scales = common.SCALES
    predict(
        [np.zeros((*size, 3), np.float32) for size in sizes],
        **{"scales": scales, "flip": True, "exact_sizes": 0, "size_multiple": 64},
    )
    kinds = [sum(word in what for what in compilations) for word in ("network", "sum", "label")]
    assert kinds == [8, 1, 1]
    assert sum(kinds) == len(compilations)


# ---- Their inputs -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    scale=st.sampled_from([*common.SCALES, 0.1, 0.9, 1.3, 2.0, 3.7]),
    seed=st.integers(0, 9),
)
def test_positions_follow_from_the_factor(height, width, scale, seed):
    image = np.random.default_rng(seed).standard_normal((height, width, 3)).astype(np.float32)
    size = [max(int(side * scale), 1) for side in (height, width)]
    expected = np.einsum(
        "hwc,Hh,Ww->HWc",
        image,
        bilinear_matrix(height, size[0], scale=scale),
        bilinear_matrix(width, size[1], scale=scale),
    )
    np.testing.assert_allclose(scaled(image, scale), expected, rtol=0, atol=1e-4)


def test_order_of_the_passes(images):
    found = list(passes(images[0], (0.5, 1.0), True))
    assert [x.shape[:2] for x, _ in found] == [(24, 32), (24, 32), (48, 64), (48, 64)]
    assert [mirrored for _, mirrored in found] == [False, True, False, True]
    for (x, _), (y, _) in (found[:2], found[2:]):
        np.testing.assert_array_equal(x, y[:, ::-1])
    assert found[2][0] is images[0]
    assert [mirrored for _, mirrored in passes(images[0], (0.5, 2.0), False)] == [False, False]


def test_classes_of_a_mirrored_image():
    assert mirrored_classes((), 3) is None
    assert mirrored_classes(((2, 3), (6, 5)), 7).tolist() == [0, 1, 3, 2, 4, 6, 5]


def test_pairs_that_the_model_does_not_have():
    pairs = ((0, 1), (3, 4))
    with pytest.raises(UserError, match=r"config.augment.flip_pairs is .*the classes are 0\.\.3"):
        predict([], model=Toy(4), pairs=pairs, flip=True)
    predict([], model=Toy(4), pairs=pairs)  # without mirror images they do not matter


# ---- Windows ------------------------------------------------------------------------------------


@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    window=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    share=st.floats(0.05, 1),
)
def test_windows_cover_every_pixel_and_are_counted(size, window, share):
    stride = tuple(max(int(side * share), 1) for side in window)
    places = windows_of(size, window, stride)
    covered = np.zeros(size)
    for rows, columns in places:
        assert 0 <= rows.start < rows.stop <= size[0]
        assert (rows.stop - rows.start, columns.stop - columns.start) == tuple(
            map(min, size, window)
        )
        covered[rows, columns] += 1
    assert covered.min() >= 1
    counts = np.outer(cover_counts(places, 0, size[0]), cover_counts(places, 1, size[1]))
    np.testing.assert_array_equal(counts, covered)
