"""The memory of class statistics against the numbers of the PyTorch reference and plain rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseg_jax.models import statistics_memory
from memseg_jax.models.layers import ValidSize
from memseg_jax.models.memory_update import memory_momentum
from memseg_jax.models.statistics_memory import (
    StatisticsMemoryModule,
    draw_rows,
    draws_of_classes,
    standard_draws,
    update_statistics,
)
from tests.goldens_plus import golden_files, load
from tests.models.test_memory import interpolate
from tests.small_models import fast_jit, random_tree

CASES = golden_files("memory")
ROWS = [name for name in CASES if "/rows_" in name]
DRAWS = [name for name in CASES if "draws" in name]
RANKS = [name for name in CASES if "ranks" in name]
UPDATE = [name for name in CASES if name not in ROWS + DRAWS + RANKS]

update = fast_jit(update_statistics, static_argnames="groups")


def nhwc(array):
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))


def momentum_of(golden):
    if "learning_rate" not in golden:
        return 0.1
    base_lr = float(golden["base_lr"]) if golden["adjust_by_learning_rate"] else 0
    momentum = float(golden["base_momentum"])
    return float(memory_momentum(float(golden["learning_rate"]), momentum, base_lr))


# ---- rows ------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("name", DRAWS)
def test_draws_of_a_seed(name):
    golden = load(name)
    for seed, expected in zip(golden["seeds"], golden["draws"]):
        actual = standard_draws(int(seed), len(expected))
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)


@pytest.mark.golden
@pytest.mark.parametrize("name", ROWS)
def test_rows_of_a_memory(name):
    golden = load(name)
    rows = draw_rows(jnp.asarray(golden["memory"]), golden["rows"].shape[1])
    np.testing.assert_allclose(rows, golden["rows"], rtol=0, atol=2e-6)


def test_the_last_draws_come_from_words_of_their_own():
    torch = pytest.importorskip("torch")
    for features in (16, 24, 40, 47):
        expected = torch.randn(features, generator=torch.Generator().manual_seed(5))
        np.testing.assert_allclose(standard_draws(5, features), expected, rtol=0, atol=2e-6)


def test_fewer_than_a_block_of_draws():
    np.testing.assert_array_equal(standard_draws(3, 7), standard_draws(3, 16)[:7])


def test_draws_are_made_once_and_cannot_be_changed():
    draws = draws_of_classes(3, 16)
    assert draws_of_classes(3, 16) is draws
    with pytest.raises(ValueError, match="read-only"):
        draws[0, 0] = 0


def test_rows_are_float32_in_double_precision(double_precision):
    memory = np.array([[0.3, 1.7], [-2.1, 0.4]])
    rows = draw_rows(jnp.asarray(memory), 16)
    assert rows.dtype == jnp.float32
    np.testing.assert_array_equal(rows, draw_rows(jnp.asarray(memory, jnp.float32), 16))


# ---- the update ------------------------------------------------------------------------------


def assert_memory(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * expected.std())


@pytest.mark.golden
@pytest.mark.parametrize("name", UPDATE)
def test_updates_in_a_row(name):
    golden = load(name)
    memory, steps = golden["memory_0"], sum(key.startswith("features_") for key in golden)
    assert steps
    for step in range(steps):
        features, labels = nhwc(golden[f"features_{step}"]), golden[f"labels_{step}"]
        before = memory
        memory, local = update(memory, features, labels, momentum_of(golden))
        assert_memory(memory, golden[f"memory_{step + 1}"])
        absent = ~np.isin(np.arange(len(memory)), labels)
        np.testing.assert_array_equal(np.asarray(memory)[absent], np.asarray(before)[absent])
        np.testing.assert_array_equal(local[0], memory)


@pytest.mark.golden
@pytest.mark.parametrize("name", RANKS)
def test_update_of_two_processes(name):
    golden = load(name)
    features, labels = (
        np.concatenate([golden[f"{kind}_rank{rank}"] for rank in (0, 1)])
        for kind in ("features", "labels")
    )
    memory, local = update(
        golden["memory_0"], nhwc(features), labels, momentum_of(golden), groups=2
    )
    for rank in (0, 1):
        assert_memory(local[rank], golden[f"memory_rank{rank}_local"])
    assert_memory(memory, golden["memory_1"])


@pytest.mark.parametrize("size", [(9, 13), (2, 3), (1, 1)])
def test_update_equals_the_rule_at_label_size(double_precision, size):
    rng = np.random.default_rng(0)
    features, labels = rng.standard_normal((2, *size, 20)), rng.integers(0, 5, (2, 11, 14))
    labels[labels == 4] = 255
    memory = np.abs(rng.standard_normal((6, 2)))
    pixels = np.stack([interpolate(image, labels.shape[1:]) for image in features])
    expected = memory.copy()
    for k in range(4):
        mean = pixels[labels == k].mean(axis=0)
        expected[k] = 0.7 * memory[k] + 0.3 * np.array([mean.mean(), mean.std(ddof=1)])
    actual, _ = update(memory, features, labels, 0.3)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


# ---- reading ---------------------------------------------------------------------------------


@functools.cache
def module_and_inputs(**options):
    module = StatisticsMemoryModule(features=8, attention_dim=4, **options)
    rng = np.random.default_rng(1)
    pixels, logits = (rng.standard_normal((2, 6, 8, n)).astype(np.float32) for n in (16, 3))
    memory = np.array([[0.1, 1.0], [-0.4, 0.3], [0.8, 2.0]], np.float32)
    inputs = (pixels, 3 * logits, memory)
    abstract = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, train=False))
    return module, random_tree({k: abstract[k] for k in ("params", "batch_stats")}, 2), inputs


def test_only_the_prediction_and_the_pixels_get_a_gradient():
    module, variables, inputs = module_and_inputs()

    def loss(*inputs):
        return jnp.sum(jnp.sin(module.apply(variables, *inputs, train=False)))

    pixels, logits, memory = fast_jit(jax.grad(loss, argnums=(0, 1, 2)))(*inputs)
    assert np.abs(pixels).max() > 1e-3
    assert np.abs(logits).max() > 1e-3
    assert not np.any(memory)


def test_what_is_selected_is_the_mean_row_or_the_likeliest_row():
    for hard in (False, True):
        module, variables, (pixels, logits, memory) = module_and_inputs(hard=hard)
        _, taps = module.apply(variables, pixels, logits, memory, train=False, mutable=["taps"])
        rows = np.asarray(draw_rows(memory, 16))
        share = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        expected = rows[logits.argmax(axis=-1)] if hard else share @ rows
        np.testing.assert_allclose(taps["taps"]["selected_memory"], expected, atol=1e-5)


def test_the_statistics_of_the_downsampling_move_for_both_inputs():
    module, variables, (pixels, logits, memory) = module_and_inputs(downsample=2)
    before = variables["batch_stats"]["downsampling"]["norm"]["mean"]
    conv = variables["params"]["downsampling"]["conv"]["kernel"]
    _, mutated = module.apply(
        variables, pixels, logits, memory, train=True, mutable=["batch_stats"]
    )
    share = np.asarray(jax.nn.softmax(logits, axis=-1))
    expected = before
    for x in (pixels, share @ np.asarray(draw_rows(memory, 16))):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2]
        y = np.einsum("bhwcij,ijcd->bhwd", windows, conv)
        expected = 0.9 * expected + 0.1 * y.mean(axis=(0, 1, 2))
    after = mutated["batch_stats"]["downsampling"]["norm"]["mean"]
    np.testing.assert_allclose(after, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("downsample", [1, 2])
def test_padding_changes_no_number(downsample):
    module, variables, (pixels, logits, memory) = module_and_inputs(downsample=downsample)
    run = fast_jit(functools.partial(module.apply, variables, train=False))
    size = (5, 3)  # positions; one for every 4 pixels
    alone = run(pixels[:, : size[0], : size[1]], logits[:, : size[0], : size[1]], memory)
    valid_size = ValidSize(jnp.array([[20, 11]] * 2), (24, 32))
    masked = np.where(valid_size.mask(pixels), pixels, 0)
    together = run(masked, logits, memory, valid_size=valid_size)
    np.testing.assert_allclose(together[:, : size[0], : size[1]], alone, rtol=0, atol=1e-5)
    assert not np.any(np.asarray(together)[:, size[0] :])


def test_the_module_has_constants_of_its_own_kind():
    """The draws are no parameters: nothing of them is in a checkpoint."""
    _, variables, _ = module_and_inputs()
    assert set(variables["params"]) == {"self_attention", "bottleneck"}
    assert isinstance(statistics_memory.draws_of_classes(2, 16), np.ndarray)
