"""Images split by rows: every piece of a step gives the numbers of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from memseg_jax.hlo.flops import count_flops
from memseg_jax.models import attention, memory_update
from memseg_jax.models.convolution import convolve
from memseg_jax.models.layers import max_pool, resize_bilinear
from memseg_jax.models.resnest import average_pool, average_pool_valid
from memseg_jax.runtime import rows, sharding
from memseg_jax.training import losses
from tests.small_models import fast_jit

pytestmark = pytest.mark.usefixtures("double_precision")
LAYOUTS = [pytest.param((4, 2), marks=[pytest.mark.slow, pytest.mark.exhaustive]), (2, 4), (1, 8)]


def mesh_of(data, height):
    return sharding.make_mesh(layout={"data": data, "rows": height})


def by_rows(function, layout, *args):
    """`function` of arrays [8, height, ...], compiled for devices that have some rows each."""
    mesh = mesh_of(*layout)
    heights = [x.shape[1] for x in args]
    split = sharding.split_batch(mesh)
    padded = [sharding._pad_rows(np.asarray(x), mesh) for x in args]
    placed = [jax.device_put(x, split) for x in padded]

    def cut(*args):
        return function(*(rows.split(x[:, :n]) for x, n in zip(args, heights)))

    return jax.device_get(fast_jit(sharding.traced_by_rows(cut, mesh))(*placed))


def assert_same(function, layout, *args):
    expected = jax.device_get(fast_jit(function)(*args))
    found = by_rows(function, layout, *args)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    return expected


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def labels(seed, *shape, classes=3):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < 0.2, 255, rng.integers(0, classes, shape)).astype(np.uint8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "size", [(16, 97), (13, 97), (5, 33), (8, 11), (33, 12), (16, 16), (3, 40)]
)
def test_cross_entropy_and_its_gradient(layout, size):
    height, label_height = size
    weights = np.array([1.0, 2.0, 0.5])

    def function(logits, labels):
        def loss(logits):
            # Blocks of a few rows.
            return losses.cross_entropy(
                logits, labels, groups=2, class_weights=jnp.asarray(weights), block_bytes=24 * 9 * 5
            )

        return jax.value_and_grad(loss)(logits)

    logits, labelled = normal(0, 8, height, 6, 3), labels(1, 8, label_height, 9)
    assert_same(function, layout, logits, labelled)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("size", [(16, 97), (13, 97), (9, 70), (1, 5), (5, 5)])
def test_sums_of_the_memory(layout, slots, size):
    height, label_height = size
    rows_of_memory = normal(3, 3, slots, 4)
    rows_of_memory[1, 0] = 0

    def function(features, labels):
        return memory_update.memory_sums_groups(
            jnp.asarray(rows_of_memory), features, labels, groups=2, strategy="cosine"
        )

    features, labelled = normal(0, 8, height, 6, 4), labels(1, 8, label_height, 9)
    sums = assert_same(function, layout, features, labelled)
    assert np.sum(sums.count) == np.sum(labelled != 255)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("height", [16, 13, 3])
@pytest.mark.parametrize("block", [1024, 5])
def test_attention_and_its_gradients(monkeypatch, layout, height, block):
    monkeypatch.setattr(attention, "BLOCK", block)

    def function(query, key, value):
        def flat(x):
            return x.reshape(len(x), -1, x.shape[-1])

        def total(query, key, value):
            result = attention.attend(flat(query), flat(key), flat(value))
            return jnp.sum(jnp.sin(result)), result

        return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(query, key, value)

    assert_same(function, layout, *(normal(seed, 8, height, 2, 4) for seed in range(3)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_attention(layout):
    def function(query, key, value, mask):
        flat = [x.reshape(len(x), -1, x.shape[-1]) for x in (query, key, value)]
        return attention.attend(*flat, key_mask=mask.reshape(len(mask), -1))

    mask = np.arange(13)[:, None] < np.array([[13], [7], [1], [9]] * 2)[:, :, None]
    mask = np.broadcast_to(mask, (8, 13, 2))
    assert_same(function, layout, *(normal(seed, 8, 13, 2, 4) for seed in range(3)), mask)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(4, 32), (7, 13), (13, 7), (16, 16)])
def test_resizing(layout, size):
    def function(x):
        def total(x):
            y = resize_bilinear(x, (size[1], 9))
            return jnp.sum(jnp.sin(y)), y

        return jax.value_and_grad(total, has_aux=True)(x)

    assert_same(function, layout, normal(0, 8, size[0], 5, 3))


@pytest.mark.parametrize("layout", [(2, 4), (1, 8)])
@pytest.mark.parametrize(
    ("height", "options"),
    [
        (114, {"stride": 2}),  # where XLA's own partitioning makes a wrong filter gradient
        (57, {"stride": 2}),
        (57, {}),
        (29, {"dilation": 2}),
        (29, {"dilation": 12}),
        (13, {"groups": 2}),
        (8, {"stride": 2}),
        (16, {}),
    ],
)
def test_convolutions_and_their_gradients(layout, height, options):
    kernel = normal(1, 3, 3, 4 // options.get("groups", 1), 6)

    def function(x):
        def total(x, kernel):
            y = convolve(x, kernel, **options)
            return jnp.sum(jnp.sin(y)), y

        return jax.value_and_grad(total, (0, 1), has_aux=True)(x, jnp.asarray(kernel))

    assert_same(function, layout, normal(0, 8, height, 5, 4))


@pytest.mark.parametrize("layout", [(2, 4), (1, 8)])
@pytest.mark.parametrize("height", [57, 58, 13, 16])
@pytest.mark.parametrize(
    "pool",
    [
        max_pool,
        functools.partial(average_pool, stride=2),
        functools.partial(average_pool_valid, stride=2),
    ],
)
def test_pools_and_their_gradients(layout, height, pool):
    def function(x):
        def total(x):
            y = pool(x)
            return jnp.sum(jnp.sin(y)), y

        return jax.value_and_grad(total, has_aux=True)(x)

    assert_same(function, layout, normal(0, 8, height, 5, 4))


@pytest.mark.parametrize("border", [(0, 0), (1, 0), (0, 1), (2, 3), (5, 4)])
def test_a_border_and_its_transpose(border):
    """Two rows for each part: a border may reach beyond the next part."""
    mesh = mesh_of(1, 8)
    x = normal(0, 2, 16, 3)

    @functools.partial(sharding.traced_by_rows, mesh=mesh)
    def function(x):
        def of_part(x):
            bordered = rows.with_border(x, *border)
            return bordered[None], rows.add_border(bordered, *border)

        return rows.by_rows(of_part, rows.MAPS, (rows.BY_PART, rows.MAPS))(x)

    split = NamedSharding(mesh, PartitionSpec(None, "rows"))
    bordered, added = jax.jit(function)(jax.device_put(x, split))
    above, below = border
    padded = np.pad(x, ((0, 0), (above, below), (0, 0)))
    times = np.zeros(16 + above + below)
    for part in range(8):
        seen = slice(2 * part, 2 * part + 2 + above + below)
        np.testing.assert_array_equal(bordered[part], padded[:, seen])
        times[seen] += 1
    expected = x * times[above : above + 16, None]
    np.testing.assert_allclose(added, expected, rtol=1e-12)


def test_the_arithmetic_of_all_parts_counts():
    mesh = mesh_of(2, 4)
    arrays = [normal(seed, 8, 16, 2, 4).reshape(8, 32, 4) for seed in range(3)]
    whole = count_flops(attention.attend, *arrays)
    assert count_flops(sharding.traced_by_rows(attention.attend, mesh), *arrays) == whole > 0
