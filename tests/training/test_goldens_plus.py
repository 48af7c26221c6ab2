"""Two training steps of MCIBI++ in double precision against those of the PyTorch reference."""

import functools
import pathlib

import jax
import numpy as np
import optax
import pytest

from converters import names
from memseg_jax.models import statistics_memory
from memseg_jax.training import optimizer
from memseg_jax.training.state import TrainState
from memseg_jax.training.step import make_train_step
from tests.goldens import assert_slices, take_slice
from tests.goldens_plus import golden_files, load, rule_train_image, rule_train_label
from tests.reference_models_plus import METHOD, reference_config, reference_model, rule_variables

SHAPES = {"ppm_resnet50os8_lip": (4, 3, 64, 96), "upernet_swinreduced_ade20k": (2, 3, 96, 128)}
OUR_NAMES = {
    "loss_cls": "loss_stage2",
    "loss_cwi": "loss_context",
    "loss_pr": "loss_stage1",
    "loss_total": "loss",
    "returned": "loss",
}
ITERATIONS_PER_EPOCH = 10
# Relative limits of what the first and what the second step give.
LOSS, GRADIENT, AFTER = (1e-9, 1e-7), (1e-7, 1e-5), (1e-8, 1e-6)


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def by_torch_key(collection, tree):
    """{reference name: array in the reference's layout} of params or batch statistics."""
    flat = {f"{collection}/{path}": np.asarray(x) for path, x in names.flatten(tree).items()}
    return {names.torch_key(path, METHOD): names.to_torch_layout(x) for path, x in flat.items()}


def keeping_gradients(tx):
    """The same optimiser, whose state also has the gradients of the last step."""

    def init(params):
        return tx.init(params), params

    def update(gradients, state, params):
        updates, inner = tx.update(gradients, state[0], params)
        return updates, (inner, gradients)

    return optax.GradientTransformation(init, update)


@functools.cache
def draws_of_pytorch(classes, features):
    """The fixed numbers of the rows to the bit: our own logarithm differs in the last digit."""
    torch = pytest.importorskip("torch")
    generators = [torch.Generator().manual_seed(index) for index in range(classes)]
    return np.stack([torch.randn(features, generator=g).numpy() for g in generators])


def rows_of_pytorch(memory, features):
    """The rows to the bit: fused with the sum, a product in float32 would not be rounded."""
    mean, deviation = (memory[:, i : i + 1].astype(np.float32) for i in (0, 1))
    product = draws_of_pytorch(len(memory), features).astype(np.float64) * deviation
    return product.astype(np.float32) + mean


def assert_norms(golden, name, key_names, arrays, limit):
    worst = {}
    for key, expected in zip(golden[key_names], golden[name]):
        if key != names.MEMORY_KEY:
            scale = max(expected, 1e-8 * golden[name].max())
            worst[key] = abs(np.linalg.norm(arrays[str(key)]) - expected) / scale
    key = max(worst, key=worst.get)
    assert worst[key] <= limit, f"{name} {key}: {worst[key]:.1e}"


# In CI, an HRNet has the first step of MCIBI (test_goldens.py): compiling it takes minutes; and a
# pyramid pooling is part of UPerNet.
CASES = [
    pytest.param(name, marks=[pytest.mark.exhaustive] * ("hrnet" in name or "ppm" in name), id=name)
    for name in golden_files("train")
]


@pytest.mark.golden
@pytest.mark.slow
@pytest.mark.large  # a whole network in double precision
@pytest.mark.parametrize("name", CASES)
def test_two_steps_equal_the_reference(name, double_precision, monkeypatch):
    monkeypatch.setattr(statistics_memory, "draw_rows", rows_of_pytorch)
    tag, golden = pathlib.Path(name).stem, load(name)
    config = reference_config(tag)
    config.replica_groups = 1
    config.model.dropout = config.model.drop_path = 0.0
    model = reference_model(tag, config)
    model = model.clone(dtype=np.float64, backbone=model.backbone.clone(dtype=np.float64))
    total_steps = ITERATIONS_PER_EPOCH * config.train.epochs
    o = config.optimizer
    schedule = optimizer.poly_schedule(o.lr, o.min_lr, o.power, total_steps)
    if o.warmup_steps:  # more than this short run has, so that it cannot be asked for by a config
        schedule = optimizer.with_warmup(schedule, o.warmup_steps, o.warmup_start)
    tx = keeping_gradients(optimizer.from_config(config, schedule))
    variables = double(rule_variables(model))
    np.testing.assert_array_equal(variables["memory"], golden["memory_before"])
    state = TrainState(step=np.int64(0), opt_state=tx.init(variables["params"]), **variables)
    step = jax.jit(
        make_train_step(model, config, tx, schedule, ITERATIONS_PER_EPOCH), donate_argnums=0
    )
    shape = SHAPES.get(tag, (2, 3, 64, 96))
    first_images = None
    for index in range(2):
        images = rule_train_image(tag, index, shape)
        if first_images is None:
            np.testing.assert_array_equal(images.reshape(-1)[:8], golden["image_check"])
            first_images = images.transpose(0, 2, 3, 1).astype(np.float64)
        labels = rule_train_label(tag, index, (shape[0], *shape[2:]), len(config.data.class_names))
        images = images.transpose(0, 2, 3, 1).astype(np.float64)
        state, metrics = step(state, {"image": images, "label": labels})

        number = index + 1
        assert float(metrics["lr"]) == pytest.approx(golden["learning_rate"][index], rel=1e-9)
        for loss_name, expected in zip(golden["loss_names"], golden["losses"][index]):
            ours = OUR_NAMES.get(str(loss_name), str(loss_name))
            assert float(metrics[ours]) == pytest.approx(expected, rel=LOSS[index]), loss_name
        gradients = by_torch_key("params", state.opt_state[1])
        norm = f"grad_norm_step{number}"
        assert_norms(golden, norm, "param_names", gradients, GRADIENT[index])
        if index == 0:
            assert_slices(golden, "grad_slice", gradients, 10 * GRADIENT[index])
        for kind, collection in (("buffer", "batch_stats"), ("param", "params")):
            arrays = by_torch_key(collection, getattr(state, collection))
            norm = f"{kind}_norm_step{number}"
            assert_norms(golden, norm, f"{kind}_names", arrays, AFTER[index])
            assert_slices(golden, f"{kind}_slice_step{number}", arrays, AFTER[index])
        expected = golden[f"memory_after_step{number}"]
        np.testing.assert_allclose(state.memory, expected, rtol=0, atol=AFTER[index])

    def predict(state, images):
        rest = {"params": state.params, "batch_stats": state.batch_stats}
        return model.apply(rest, images, state.memory)["logits"]

    logits = np.asarray(jax.jit(predict)(state, first_images)).transpose(0, 3, 1, 2)
    worst = np.abs(take_slice(logits, 512) - golden["eval_logits__slice"]).max()
    assert worst <= 1e-5 * golden["eval_logits__stats"][1]
