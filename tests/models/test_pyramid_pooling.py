"""Pyramid pooling and the feature pyramid: against plain loops, and padded maps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseg_jax.models.fpn import FPN
from memseg_jax.models.layers import ValidSize, bilinear_matrix, resize_like
from memseg_jax.models.pyramid_pooling import PyramidPooling, adaptive_mean
from tests.small_models import fast_jit, random_tree


def maps(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def cells_of(n, s):
    return [slice(i * n // s, -(-(i + 1) * n // s)) for i in range(s)]


@pytest.mark.parametrize("size", [(12, 18), (13, 17), (5, 7), (1, 2)])
@pytest.mark.parametrize("cells", [1, 2, 3, 6])
def test_cells_are_those_of_the_rule(size, cells):
    x = maps(2, *size, 3)
    actual = adaptive_mean(x, cells)
    assert actual.shape == (2, cells, cells, 3)
    for i, down in enumerate(cells_of(size[0], cells)):
        for j, across in enumerate(cells_of(size[1], cells)):
            expected = x[:, down, across].mean(axis=(1, 2))
            np.testing.assert_allclose(actual[:, i, j], expected, atol=1e-6)


def test_cells_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    x = maps(1, 13, 17, 2)
    for cells in (1, 2, 3, 6, 20):
        expected = torch.nn.functional.adaptive_avg_pool2d(
            torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), cells
        )
        np.testing.assert_allclose(
            adaptive_mean(x, cells).transpose(0, 3, 1, 2), expected, atol=1e-6
        )


def test_means_of_bfloat16_are_float32():
    x = jnp.asarray(maps(1, 40, 50, 2)).astype(jnp.bfloat16)
    assert adaptive_mean(x, 2).dtype == jnp.float32
    np.testing.assert_array_equal(adaptive_mean(x, 2), adaptive_mean(x.astype(jnp.float32), 2))


def filled(module, *inputs):
    abstract = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, train=False))
    variables = random_tree({k: abstract[k] for k in ("params", "batch_stats")}, 1)
    return variables, fast_jit(functools.partial(module.apply, variables, train=False))


def test_padding_changes_no_number_of_pyramid_pooling():
    x = maps(3, 8, 12, 4)
    _, run = filled(PyramidPooling(features=5), x)
    sizes = [(8, 12), (5, 7), (1, 3)]
    valid_size = ValidSize(jnp.array([(4 * h - 3, 4 * w) for h, w in sizes]), (32, 48))
    together = run(np.where(valid_size.mask(x), x, 0), valid_size=valid_size)
    assert not np.any(np.asarray(together)[~np.asarray(valid_size.mask(together))[..., 0]])
    for index, (h, w) in enumerate(sizes):
        alone = run(x[index : index + 1, :h, :w])
        np.testing.assert_allclose(together[index, :h, :w], alone[0], rtol=0, atol=1e-5)


def pyramid_inputs(size):
    """Maps of strides 4, 8, 8 of images of a size, and a top of stride 8."""
    fine, coarse = ([-(-side // stride) for side in size] for stride in (4, 8))
    shapes = [(*fine, 3), (*coarse, 4), (*coarse, 5), (*coarse, 6)]
    return [maps(1, *shape, seed=seed) for seed, shape in enumerate(shapes)]


def test_levels_are_added_from_the_top_down():
    *levels, top = pyramid_inputs((33, 50))
    variables, run = filled(FPN(features=7), levels, top)
    params = variables["params"]
    assert set(params) == {f"{kind}_{i}" for kind in ("lateral", "output") for i in range(3)}
    out = run(levels, top)
    assert out.shape == (1, 9, 13, 3 * 7 + 6)

    matrices = [bilinear_matrix(n, m) for n, m in zip(top.shape[1:3], out.shape[1:3])]
    enlarged = np.einsum("bhwc,Hh,Ww->bHWc", top, *matrices)
    np.testing.assert_allclose(out[..., 21:], enlarged, atol=1e-5)
    # What is added to the finest map is the sum of all coarser ones.
    changed = [levels[0], levels[1], 2 * levels[2]]
    difference = np.abs(run(changed, top) - out)
    assert all(difference[..., 7 * i : 7 * i + 7].max() > 1e-3 for i in range(3))
    changed = [2 * levels[0], *levels[1:]]
    difference = np.abs(run(changed, top) - out)
    assert difference[..., :7].max() > 1e-3
    assert difference[..., 7:].max() == 0


def test_padding_changes_no_number_of_the_pyramid():
    *levels, top = pyramid_inputs((64, 96))
    _, run = filled(FPN(features=7), levels, top)
    for size in ((33, 47), (5, 96)):
        valid_size = ValidSize(jnp.array([size]), (64, 96))
        masked = [np.where(valid_size.mask(x), x, 0) for x in (*levels, top)]
        cut = [
            x[:, : -(-size[0] // stride), : -(-size[1] // stride)]
            for x, stride in zip(masked, (4, 8, 8, 8))
        ]
        alone = run(cut[:-1], cut[-1])
        together = run(masked[:-1], masked[-1], valid_size=valid_size)
        inside = together[:, : alone.shape[1], : alone.shape[2]]
        np.testing.assert_allclose(inside, alone, rtol=0, atol=1e-5)


def test_a_map_of_the_same_size_stays_as_it_is():
    x = maps(1, 4, 5, 2)
    valid_size = ValidSize(jnp.array([[13, 17]]), (16, 20))
    assert resize_like(x, x) is x
    assert resize_like(x, x, valid_size) is x
