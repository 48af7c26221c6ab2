"""Which programs images of many sizes share: sizes of inputs, and arrays that know no sizes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs import ade20k_hrnet, ade20k_resnet50, cocostuff10k_resnet50, common
from memseg_jax.data.transforms import resized_size
from memseg_jax.inference import score_maps, sizes, windows
from memseg_jax.inference.predictor import network_scores
from memseg_jax.models.layers import ValidSize, bilinear_matrix
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import sharding
from tests.compiled_program import collectives, largest_array
from tests.small_models import FAST_COMPILE, fast_jit, random_variables, small_config

sides = st.integers(1, 40)
size_pairs = st.tuples(sides, sides)


# ---- Sizes of inputs ----------------------------------------------------------------------------


@given(st.integers(1, 10_000), st.sampled_from([32, 128, 512]))
def test_sides_are_rounded_up_in_growing_steps(side, multiple):
    rounded = sizes.round_up_coarsely(side, multiple)
    assert rounded >= side
    assert rounded % multiple == 0
    assert rounded < max(side + multiple, 1.5 * side)
    assert sizes.round_up_coarsely(rounded, multiple) == rounded


def test_few_sides():
    found = {sizes.round_up_coarsely(side, 128) for side in range(1, 4097)}
    assert sorted(x // 128 for x in found) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]


def test_the_smallest_canvas_that_holds_an_image():
    policy = sizes.SizePolicy(1, 64, ((128, 256), (256, 128), (256, 256)))
    assert policy.padded((7, 9)) == ((7, 9), True)  # the first size
    assert policy.padded((100, 130)) == ((128, 256), False)
    assert policy.padded((130, 100)) == ((256, 128), False)
    assert policy.padded((130, 130)) == ((256, 256), False)
    assert policy.padded((130, 257)) == ((192, 384), False)  # none holds it
    assert policy.padded((7, 9)) == ((7, 9), True)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 600), st.integers(1, 600)), max_size=30))
def test_windows_are_full_or_padded_to_the_full_one(images):
    config = common.get_config()
    config.eval.update({"mode": "slide", "window": (500, 512), "exact_sizes": 0})
    config.eval.size_multiple = 512
    policy = sizes.size_policy(config.eval, 32)
    for image in images:
        window = tuple(map(min, image, (500, 512)))
        full = window == (500, 512)
        assert policy.padded(window) == (((500, 512), True) if full else ((512, 512), False))


@functools.cache
def published_evaluations():
    modules = (ade20k_resnet50, cocostuff10k_resnet50)
    return [module.get_config(words).eval for module in modules for words in (None, "ms_flip")]


@settings(deadline=None, max_examples=100)
@given(size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)))
def test_published_canvases_hold_every_image(size):
    """So a dozen programs is what they need at most, whatever the images are."""
    for evaluation in published_evaluations():
        policy = sizes.size_policy(evaluation, 8)
        base = resized_size(*size, evaluation.base_size)
        for scale in evaluation.scales:
            at_scale = tuple(max(math.floor(side * scale), 1) for side in base)
            canvas, exact = policy.padded(at_scale)
            assert not exact
            assert canvas in policy.canvases
            assert canvas[0] >= at_scale[0]
            assert canvas[1] >= at_scale[1]
        assert len(evaluation.canvases) <= 9
    assert sizes.size_policy(ade20k_hrnet.get_config("ms_flip").eval, 32).canvases == ()


# ---- Flat score maps ----------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(real=size_pairs, target=size_pairs, mirrored=st.booleans(), seed=st.integers(0, 9))
def test_flat_resize(real, target, mirrored, seed):
    """One compiled program for maps and results of all sizes."""
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((1, 40, 40, 2)).astype(np.float32)
    scores[:, real[0] :] = scores[:, :, real[1] :] = 1e6  # what padding holds does not matter
    covers = [rng.integers(1, 5, n).astype(np.float32) for n in real]
    plan = score_maps.resize(real, 40, target, mirrored, covers)
    found = _resized()(score_maps.flatten(jnp.asarray(scores))[0], plan)
    x = scores[0, : real[0], : real[1]] / covers[0][:, None, None] / covers[1][:, None]
    x = x[:, ::-1] if mirrored else x
    rows, columns = (bilinear_matrix(*pair) for pair in zip(real, target))
    expected = np.einsum("hwc,Hh,Ww->HWc", x, rows, columns)
    found = np.asarray(found)[: math.prod(target)].reshape(expected.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@functools.cache
def _resized():
    return jax.jit(lambda scores, plan: score_maps.resized(scores, plan, 0, 1600))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(size_pairs, size_pairs), min_size=1, max_size=3), st.booleans())
def test_label_maps_of_a_batch(items, probabilities):
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 1, (3, 40, 40, 4)).astype(np.float32)
    plans = [score_maps.resize(real, 40, target) for real, target in items]
    blocks = score_maps.blocks_of(max(math.prod(target) for _, target in items))
    flat = score_maps.flatten(jnp.asarray(scores))
    labels, best = _label_maps(probabilities)(flat, score_maps.stack(plans, 3), blocks)
    for index, (real, target) in enumerate(items):
        rows, columns = (bilinear_matrix(*pair) for pair in zip(real, target))
        x = np.einsum("hwc,Hh,Ww->HWc", scores[index, : real[0], : real[1]], rows, columns)
        p = x if probabilities else np.exp(x) / np.exp(x).sum(-1, keepdims=True)
        shown = np.s_[index, : math.prod(target)]
        found = np.asarray(best)[shown].reshape(target)
        np.testing.assert_allclose(found, p.max(-1), atol=1e-5)
        own = np.take_along_axis(x, np.asarray(labels)[shown].reshape(*target, 1), -1)
        np.testing.assert_allclose(own[..., 0], x.max(-1), atol=1e-5)


@functools.cache
def _label_maps(probabilities):
    return jax.jit(
        functools.partial(
            score_maps.label_maps, pixels=score_maps.BLOCK, probabilities=probabilities
        )
    )


@given(st.integers(1, 2**27))
def test_label_maps_leave_the_device_at_about_the_size_of_the_image(pixels):
    length = score_maps.label_capacity(pixels)
    assert pixels <= length <= max(4 * pixels, score_maps.LEAST_LABELS)
    assert length % score_maps.BLOCK == 0


def test_few_lengths_of_label_maps():
    lengths = {score_maps.label_capacity(2**power) for power in range(27)}
    assert len(lengths) <= 10
    # A batch of ten images of 96x96 pixels: 160 KiB, of which 90 are labels.
    assert 10 * score_maps.label_capacity(96 * 96) == 10 * 2**14


def test_confidences_are_computed_where_they_are_asked_for():
    plan = score_maps.stack([score_maps.resize((5, 5), 5, (20, 20))], 1)
    arguments = score_maps.flatten(jnp.ones((1, 5, 5, 4))), plan, score_maps.blocks_of(400)
    compute = functools.partial(score_maps.label_maps, pixels=score_maps.BLOCK, probabilities=False)
    texts = [
        str(jax.make_jaxpr(functools.partial(compute, confidence=asked))(*arguments))
        for asked in (False, True)
    ]
    assert ["exp" in text for text in texts] == [False, True]


@pytest.mark.parametrize("size", [(20, 30), (9, 50), (25, 7), (5, 6)])
def test_windows_add_up_on_a_flat_canvas(size):
    window, stride = (12, 16), (7, 9)
    places = windows.windows_of(size, window, stride)
    scores = np.random.default_rng(0).standard_normal((len(places), *window, 2)).astype(np.float32)
    scores[:, size[0] :] = scores[:, :, size[1] :] = 0
    expected = np.zeros((*size, 2))
    for (y, x), window_scores in zip(places, scores):
        expected[y, x] += window_scores[: size[0], : size[1]]
    starts = np.array([(y.start, x.start) for y, x in places], np.int32)
    canvas = jnp.zeros((math.prod(size) + window[1], 2))
    active = np.ones(len(places), bool)
    found = jax.jit(windows.accumulate)(canvas, scores, starts, active, np.int32(size[1]))
    found = np.asarray(found)[: math.prod(size)].reshape(expected.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)


# ---- Memory -------------------------------------------------------------------------------------


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile(compiler_options=FAST_COMPILE)


def test_label_maps_hold_a_block_of_scores_and_devices_exchange_nothing():
    classes, pixels = 150, score_maps.PIXELS
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    plan = score_maps.stack([score_maps.resize((64, 86), 88, (512, 683))], 8)
    plans = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), plan)
    shape = (8, score_maps.POSITIONS, classes)
    program = compiled(
        functools.partial(score_maps.label_maps, pixels=pixels, probabilities=False),
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split), plans, np.int32(1),
    )  # fmt: skip
    assert not collectives(program)
    assert math.prod(largest_array(program)) <= score_maps.POSITIONS * classes


def test_the_sum_of_passes_is_the_only_array_at_full_size():
    total = jax.ShapeDtypeStruct((score_maps.PIXELS, 150), jnp.float32)
    scores = jax.ShapeDtypeStruct((1, score_maps.POSITIONS, 150), jnp.float32)
    plan = score_maps.resize((64, 86), 88, (512, 683))
    program = (
        jax.jit(score_maps.add_resized, donate_argnums=0)
        .lower(total, scores, np.int32(0), plan, np.int32(3), None)
        .compile(compiler_options=FAST_COMPILE)
    )
    assert program.memory_analysis().temp_size_in_bytes < math.prod(scores.shape) * 4 * 2
    canvas = jax.ShapeDtypeStruct((score_maps.PIXELS, 150), jnp.float32)
    window = jax.ShapeDtypeStruct((2, 512, 512, 150), jnp.float32)
    program = (
        jax.jit(windows.accumulate, donate_argnums=0)
        .lower(canvas, window, np.zeros((2, 2), np.int32), np.ones(2, bool), np.int32(683))
        .compile(compiler_options=FAST_COMPILE)
    )
    assert program.memory_analysis().temp_size_in_bytes < 512 * 512 * 150 * 4 * 1.1


# ---- Rows of an image on several devices --------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet18", "vitbase"])
def test_padded_images_split_by_rows_give_the_scores_of_one_device(backbone):
    """A whole network, with the masks of images of two sizes on a canvas that no part divides."""
    config = small_config()
    config.model.backbone = backbone
    config.model.auxiliary = backbone != "vitbase"
    model = build_segmentor(config)
    variables = random_variables(model, 0)
    padded = (80, 64)
    images = np.random.default_rng(0).standard_normal((2, *padded, 3)).astype(np.float32)
    valid = np.array([[80, 64], [41, 33]], np.int32)

    def scores(mesh):
        def forward(variables, images, valid):
            sizes = ValidSize(valid, padded)
            return network_scores(model, variables, images, sizes, softmax=False)

        forward = fast_jit(sharding.traced_by_rows(forward, mesh))
        split = sharding.split_images(mesh)
        placed = (jax.device_put(x, split) for x in (images, valid))
        return np.asarray(forward(jax.device_put(variables, sharding.replicated(mesh)), *placed))

    one = scores(sharding.make_mesh(jax.devices()[:1]))
    several = scores(sharding.make_mesh(layout={"data": 2, "rows": 4}))
    stride = model.output_stride
    for index, (height, width) in enumerate(-(-valid // stride)):
        found, expected = (x[index, :height, :width] for x in (several, one))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
