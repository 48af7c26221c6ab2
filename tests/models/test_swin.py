"""Swin: windows, padded evaluation, drop path, and what else the golden numbers do not show."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import names
from memseg_jax.models.layers import ValidSize, mask_padding
from memseg_jax.models.swin import (
    VARIANTS,
    Swin,
    build,
    from_windows,
    into_windows,
    regions,
    relative_positions,
)
from tests.backbone_weights import abstract_of
from tests.compiled_program import equations
from tests.small_models import fast_jit


def tiny(**kw):
    """One head of 8 channels in the first stage; shifted windows in the first three."""
    fields = {"embed_dim": 8, "depths": (2, 2, 2, 1), "heads": (1, 2, 2, 4), "window": 3}
    return Swin(**(fields | {"mlp_ratio": 2} | kw))


@functools.cache
def params():
    rng = np.random.default_rng(0)
    filled = {}
    for path, leaf in names.flatten(abstract_of(tiny())).items():
        if path.startswith("params/backbone/"):
            value = rng.standard_normal(leaf.shape).astype(np.float32)
            if path.endswith("kernel"):
                value *= 1.5 * np.prod(leaf.shape[:-1]) ** -0.5
            filled[path.removeprefix("params/backbone/")] = value
    return names.unflatten(filled)


@functools.cache
def forward(**kw):
    backbone = tiny(**kw)
    return fast_jit(
        lambda params, x, valid=None: backbone.apply(
            {"params": params}, x, train=False, valid_size=valid
        )
    )


def images_of(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal((*shape, 3)).astype(np.float32)


@pytest.mark.parametrize("size", [(32, 64), (33, 31), (1, 4), (50, 5)])
def test_sides_are_rounded_up(size):
    out = jax.eval_shape(forward(), params(), images_of(2, *size))
    assert [x.shape for x in out] == [
        (2, -(-size[0] // s), -(-size[1] // s), 2 * s) for s in (4, 8, 16, 32)
    ]


@pytest.mark.slow
def test_padding_has_no_influence():
    """Valid parts that end inside of windows, at their ends, and before the first shift."""
    sizes = [(64, 61), (37, 96), (1, 53), (48, 24)]
    canvas = (64, 96)
    images = images_of(len(sizes), *canvas)
    valid = ValidSize(jnp.array(sizes), canvas)
    padded = mask_padding(images, valid)
    out = forward()(params(), padded, valid)
    for index, (height, width) in enumerate(sizes):
        alone = forward()(params(), images[index : index + 1, :height, :width])
        for x, y in zip(out, alone):
            rows, columns = y.shape[1:3]
            np.testing.assert_allclose(x[index, :rows, :columns], y[0], atol=2e-5)
            rest = np.array(x[index])
            rest[:rows, :columns] = 0
            assert not rest.any()


def test_windows_are_put_back():
    x = np.arange(2 * 6 * 9 * 2).reshape(2, 6, 9, 2)
    windows = into_windows(x, 3)
    np.testing.assert_array_equal(windows[1, 4].reshape(3, 3, 2), x[1, 3:6, 3:6])
    np.testing.assert_array_equal(from_windows(windows, 3, (6, 9)), x)


@pytest.mark.parametrize(("size", "window"), [((6, 9), 3), ((7, 7), 7), ((8, 4), 4)])
def test_regions_are_the_nine_of_the_reference(size, window):
    shift = window // 2
    nine = np.zeros(size, int)
    parts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for i, rows in enumerate(parts):
        for j, columns in enumerate(parts):
            nine[rows, columns] = 3 * i + j
    ours = np.asarray(regions(size, shift, window))

    def together(number):
        number = np.asarray(into_windows(number, window))
        return number[:, :, :, None] == number[:, :, None, :]

    np.testing.assert_array_equal(together(ours), together(nine[None]))


@pytest.mark.parametrize("window", [2, 7])
def test_relative_positions_are_those_of_the_reference(window):
    y, x = np.divmod(np.arange(window**2), window)
    line = (2 * window - 1) * y + x
    mirrored = (line[:, None] + line)[:, ::-1]
    np.testing.assert_array_equal(relative_positions(window), mirrored)


def test_images_of_a_batch_do_not_see_each_other():
    images = images_of(2, 40, 32)
    both = forward()(params(), images)
    alone = forward()(params(), images[1:])
    for x, y in zip(both, alone):
        np.testing.assert_allclose(x[1], y[0], atol=1e-5)


def test_bfloat16_is_near_float32():
    images = images_of(1, 64, 64)
    exact = forward()(params(), images)[-1]
    rough = forward(dtype=jnp.bfloat16)(params(), images)[-1]
    assert rough.dtype == jnp.bfloat16
    assert float(jnp.abs(rough.astype(jnp.float32) - exact).mean()) < 0.05 * float(exact.std())


def trained(drop_path, key=0):
    """The maps of 64 times the same image in training."""
    backbone = tiny(depths=(1, 1, 1, 1), drop_path=drop_path)
    kept = {k: v for k, v in params().items() if "blocks_1" not in k}
    images = np.repeat(images_of(1, 32, 32), 64, axis=0)
    return fast_jit(
        lambda params, x, key: backbone.apply(
            {"params": params}, x, train=True, rngs={"dropout": key}
        )
    )(kept, images, jax.random.key(key))


def test_drop_path_rises_from_nothing_and_skips_whole_branches():
    """Stage s of four has the rate s / 3 of the last one's."""
    maps = trained(0.75)
    counts = [len(np.unique(np.round(np.asarray(x)[:, 0, 0], 4), axis=0)) for x in maps]
    assert counts[0] == 1  # a rate of 0
    # Two branches are there or not: four results a block, of the four of the block before.
    assert counts[1] == 4
    assert 4 < counts[2] <= 16
    other = trained(0.75, key=1)
    assert not np.array_equal(maps[1], other[1])


@pytest.mark.slow
def test_drop_path_divides_what_is_kept_by_its_share():
    backbone = tiny(depths=(2, 0, 0, 0), drop_path=0.5)
    kept = {k: v for k, v in params().items() if "blocks" not in k or "stages_0" in k}
    # Without the second branch of the last block, the result is linear in what is dropped.
    nothing = jax.tree.map(np.zeros_like, kept["stages_0_blocks_1"]["ffn"])
    kept["stages_0_blocks_1"] = kept["stages_0_blocks_1"] | {"ffn": nothing}
    images = np.repeat(images_of(1, 4, 4), 16, axis=0)

    def block(train):
        kw = {"rngs": {"dropout": jax.random.key(0)}, "mutable": ["taps"]}
        _, out = backbone.apply({"params": kept}, images, train=train, **kw)
        return np.asarray(out["taps"]["stage0_block1"][:, 0])

    trained = block(True)
    assert len(np.unique(trained[:, 0])) == 2
    middle = (trained.min(axis=0) + trained.max(axis=0)) / 2
    np.testing.assert_allclose(middle, block(False)[0], atol=1e-5)


def test_every_block_is_computed_again_with_remat():
    def maps(params, x, remat):
        return tiny(remat=remat).apply({"params": params}, x, train=True)

    x = images_of(1, 32, 32)
    counts = [
        sum(
            "remat" in e.primitive.name
            for e in equations(jax.make_jaxpr(functools.partial(maps, remat=remat))(params(), x))
        )
        for remat in (False, True)
    ]
    assert counts == [0, 7]


@pytest.mark.parametrize(
    ("name", "parameters", "channels"),
    [
        # The sizes of the published classifiers without their last layer (the last network's are
        # of windows of 7, and 564 heads have larger tables here), and norms of the other maps.
        ("swintiny", 27_519_354 + 2 * (96 + 192 + 384), 768),
        ("swinsmall", 48_837_258 + 2 * (96 + 192 + 384), 768),
        ("swinbase", 86_878_584 + 2 * (128 + 256 + 512), 1024),
        ("swinlarge", 194_995_476 + 564 * (23**2 - 13**2) + 2 * (192 + 384 + 768), 1536),
    ],
)
def test_published_networks(name, parameters, channels):
    flat = names.flatten(abstract_of(build(name)))
    sizes = [np.prod(leaf.shape) for path, leaf in flat.items() if "/backbone/" in path]
    assert sum(sizes) == parameters
    assert flat["params/backbone/norm3/scale"].shape == (channels,)
    assert build(name).output_stride == build(name).coarsest_stride == 32
    assert build(name).auxiliary_levels == (2,)


def test_width_changes_the_number_of_heads():
    half, least = build("swinlarge", 0.5), build("swinbase", 0.01)
    assert (half.embed_dim, half.heads) == (96, (3, 6, 12, 24))
    assert (least.embed_dim, least.heads) == (32, (1, 2, 4, 8))
    assert half.depths == VARIANTS["swinlarge"][0]
