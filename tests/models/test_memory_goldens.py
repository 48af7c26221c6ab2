"""The memory module and its update rule against the numbers of the PyTorch reference."""

import jax
import numpy as np
import pytest

from converters import names
from memseg_jax.models.layers import resize_bilinear
from memseg_jax.models.memory import MemoryModule
from memseg_jax.models.memory_update import memory_momentum, update_memory, update_memory_groups
from tests.goldens import golden_files, load, take_slice

CASES = golden_files("memory")
READ = [name for name in CASES if "/forward_" in name]
RANKS = [name for name in CASES if "_ranks_" in name or "/two_ranks" in name]
SEQUENCES = [name for name in CASES if name.endswith("_sequence.npz")]
UPDATE = [name for name in CASES if name not in READ + RANKS + SEQUENCES]


def nhwc(array):
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))


def momentum_of(golden, lr):
    tied = golden.get("adjust_by_learning_rate", True)
    base_lr = float(golden["base_lr"]) if tied else 0
    return float(memory_momentum(float(lr), float(golden["base_momentum"]), base_lr))


def assert_memory(actual, expected, before, message=""):
    """Agreement to 1e-5 of the standard deviation; where the reference has NaN the row stayed."""
    actual, stayed = np.asarray(actual), np.isnan(expected).any(axis=-1)
    np.testing.assert_array_equal(actual[stayed], before[stayed], message)
    limit = 1e-5 * expected[~stayed].std()
    np.testing.assert_allclose(actual[~stayed], expected[~stayed], rtol=0, atol=limit)


@pytest.mark.golden
@pytest.mark.parametrize("name", UPDATE)
def test_update(name):
    golden = load(name)
    before, features = golden["memory_before"], nhwc(golden["features"])
    momentum = momentum_of(golden, golden["learning_rate"])
    assert momentum == pytest.approx(float(golden["momentum"]), rel=1e-6)
    strategy = "cosine" if "cosine" in str(golden["strategy"]) else "mean"
    after = update_memory(before, features, golden["labels"], momentum, strategy=strategy)
    assert_memory(after, golden["memory_after"], before)
    if "upsampled_slice" in golden:
        upsampled = resize_bilinear(features, golden["labels"].shape[1:]).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(
            take_slice(upsampled, 1024), golden["upsampled_slice"], rtol=0, atol=1e-5
        )


@pytest.mark.golden
@pytest.mark.parametrize("name", SEQUENCES)
def test_update_sequence(name):
    golden = load(name)
    memory = golden["memory_0"]
    for step, lr in enumerate(golden["learning_rate"]):
        features, labels = nhwc(golden[f"features_{step}"]), golden[f"labels_{step}"]
        before = np.asarray(memory)
        memory = update_memory(memory, features, labels, momentum_of(golden, lr))
        assert_memory(memory, golden[f"memory_{step + 1}"], before, f"step {step}")


@pytest.mark.golden
@pytest.mark.parametrize("name", RANKS)
def test_update_of_two_processes(name):
    golden = load(name)
    memory = golden["memory_before"]
    for prefix in ("", "step2_"):
        features = np.concatenate([nhwc(golden[f"{prefix}features_rank{r}"]) for r in (0, 1)])
        labels = np.concatenate([golden[f"{prefix}labels_rank{r}"] for r in (0, 1)])
        momentum = momentum_of(golden, golden[f"{prefix}learning_rate"])
        before = np.asarray(memory)
        memory, local = update_memory_groups(before, features, labels, momentum, groups=2)
        if not prefix:
            for rank in (0, 1):
                assert_memory(local[rank], golden[f"memory_rank{rank}_local"], before)
        assert_memory(memory, golden[f"{prefix}memory_after"], before)


@pytest.mark.golden
@pytest.mark.parametrize("name", READ)
def test_read(name):
    golden = load(name)
    memory = golden["w/memory"]
    features = golden["output"].shape[1]
    module = MemoryModule(
        features=features,
        attention_dim=golden[next(k for k in golden if "value_project.0.weight" in k)].shape[0],
        hard=bool(golden["use_hard_aggregate"]),
        within_image_context=bool(golden["use_context_within_image"]),
    )
    pixels, logits = nhwc(golden["feats"]), nhwc(golden["preds"])
    context = nhwc(golden["feats_ms"]) if "feats_ms" in golden else pixels
    inputs = (pixels, logits, context, memory)
    abstract = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, train=False))
    variables = {}
    for path in names.flatten({k: abstract[k] for k in ("params", "batch_stats")}):
        collection, _, inner = path.partition("/")
        key = names.torch_key(f"{collection}/memory_module/{inner}").removeprefix("memory_module.")
        variables[path] = names.from_torch_layout(golden[f"w/{key}"])
    variables = names.unflatten(variables)

    train = bool(golden["train_mode"])
    output, mutated = module.apply(variables, *inputs, train=train, mutable=["batch_stats"])
    expected = nhwc(golden["output"])
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-4 * expected.std())
    if train:
        for path, value in names.flatten(mutated["batch_stats"]).items():
            key = names.torch_key(f"batch_stats/memory_module/{path}")
            stored = golden[f"after/{key.removeprefix('memory_module.')}"]
            np.testing.assert_allclose(value, stored, rtol=1e-5, atol=1e-6)
