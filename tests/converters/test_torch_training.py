"""Training in PyTorch: memory update and steps against the reference, and against ours."""

import pathlib

import jax
import numpy as np
import pytest
import torch

from converters import names
from converters.orbax_to_torch import state_dict
from converters.torch_model import build_torch_model
from converters.torch_model.head import MemoryModule
from converters.torch_model.memory_update import update_memory
from converters.torch_model.training import build_optimizer, train_step
from memseg_jax.data import IGNORE_LABEL
from memseg_jax.errors import UserError
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.training import optimizer
from memseg_jax.training.state import TrainState, abstract_variables
from memseg_jax.training.step import make_train_step
from tests.goldens import (
    golden_files,
    load,
    rule_array,
    rule_train_image,
    rule_train_label,
    take_slice,
)
from tests.reference_models import reference_config
from tests.small_models import fast_jit, random_variables, small_config
from tests.training.test_goldens import (
    OUR_NAMES,
    RECIPES,
    SHAPES,
    assert_memory,
    assert_norms,
    assert_slices,
)

MEMORY = golden_files("memory")
READ = [name for name in MEMORY if "/forward_" in name]
UPDATE = [name for name in MEMORY if "memory_after" in load(name) and "features" in load(name)]
SEQUENCES = [name for name in MEMORY if "memory_1" in load(name)]
RANKS = [name for name in MEMORY if "features_rank0" in load(name)]


def momentum_of(golden, lr):
    tied = golden.get("adjust_by_learning_rate", True)
    return float(golden["base_momentum"]) * (float(lr) / float(golden["base_lr"]) if tied else 1)


def assert_update(memory, golden, features, labels, expected, lr):
    """Updates `memory` in place and compares; NaN where the reference has NaN."""
    strategy = "mean" if "mean" in str(golden.get("strategy", "")) else "cosine"
    features, labels = torch.from_numpy(golden[features]), torch.from_numpy(golden[labels])
    update_memory(memory, features, labels, momentum_of(golden, lr), strategy)
    limit = 1e-5 * np.nanstd(golden[expected])
    np.testing.assert_allclose(memory, golden[expected], rtol=0, atol=limit, equal_nan=True)


@pytest.mark.golden
@pytest.mark.parametrize("name", UPDATE)
def test_memory_update_equals_the_reference(name):
    golden = load(name)
    memory = torch.from_numpy(golden["memory_before"].copy())
    lr = golden["learning_rate"]
    assert_update(memory, golden, "features", "labels", "memory_after", lr)


@pytest.mark.golden
@pytest.mark.parametrize("name", SEQUENCES)
def test_memory_updates_in_a_row_equal_the_reference(name):
    golden = load(name)
    memory = torch.from_numpy(golden["memory_0"].copy())
    for step, lr in enumerate(golden["learning_rate"]):
        after = f"memory_{step + 1}"
        assert_update(memory, golden, f"features_{step}", f"labels_{step}", after, lr)


@pytest.mark.golden
@pytest.mark.parametrize("name", RANKS)
def test_the_update_of_each_process_equals_the_reference(name):
    golden = load(name)
    for rank in (0, 1):
        memory = torch.from_numpy(golden["memory_before"].copy())
        expected, lr = f"memory_rank{rank}_local", golden["learning_rate"]
        assert_update(memory, golden, f"features_rank{rank}", f"labels_rank{rank}", expected, lr)


@pytest.mark.golden
@pytest.mark.parametrize("name", READ)
def test_memory_read_equals_the_reference(name):
    golden = load(name)
    classes, slots, features = golden["w/memory"].shape
    module = MemoryModule(
        classes,
        slots,
        features,
        features,
        golden[next(key for key in golden if "value_project.0.weight" in key)].shape[0],
        "relu",
        hard=bool(golden["use_hard_aggregate"]),
        within_image_context=bool(golden["use_context_within_image"]),
    )
    weights = {k[2:]: torch.from_numpy(golden[k]) for k in golden if k.startswith("w/")}
    result = module.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in result.missing_keys)
    inputs = [golden.get(key) for key in ("feats", "preds", "feats_ms")]
    inputs = [None if value is None else torch.from_numpy(value) for value in inputs]
    module.train(bool(golden["train_mode"]))
    with torch.no_grad():
        output = module(*inputs)
    limit = 1e-4 * golden["output"].std()
    np.testing.assert_allclose(output, golden["output"], rtol=0, atol=limit)
    statistics = module.state_dict()
    for key in (key for key in golden if key.startswith("after/")):
        actual = statistics[key.removeprefix("after/")]
        np.testing.assert_allclose(actual, golden[key], rtol=1e-5, atol=1e-6, err_msg=key)


def training_config():
    """Everything that a step can have: slots, class weights, factors, consistency, auxiliary."""
    config = small_config()
    config.model.dropout = 0.0
    config.model.activation = "leaky_relu"
    config.model.memory.slots = 2
    config.model.memory.base_lr = 0.02
    config.loss.consistency = 0.5
    config.loss.class_weights = (1.0, 0.5, 2.0, 1.0, 1.5)
    config.optimizer.multipliers.backbone = (0.1, 0.2)
    config.optimizer.multipliers.auxiliary_decoders_0 = (2.0, 0.0)
    config.train.epochs = 2
    return config


@pytest.mark.slow
def test_steps_equal_those_of_our_model(double_precision):
    config, steps_per_epoch = training_config(), 1
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, 2, 3, 40, 56))
    labels = rng.integers(0, 6, (2, 2, 5, 7)).repeat(8, axis=2).repeat(8, axis=3)
    labels = np.where(labels == 5, IGNORE_LABEL, labels)

    ours = build_segmentor(config)
    variables = jax.tree.map(np.float64, random_variables(ours, 0))
    variables["memory"][1, 1] = 0  # one slot is filled in the first step
    ours = ours.clone(dtype=np.float64, backbone=ours.backbone.clone(dtype=np.float64))
    model = build_torch_model(config).double()
    model.load_state_dict(state_dict(variables, config))

    schedule = optimizer.schedule_from_config(config, config.train.epochs * steps_per_epoch)
    tx = optimizer.from_config(config, schedule)
    state = TrainState(step=np.int64(0), opt_state=tx.init(variables["params"]), **variables)
    step = fast_jit(make_train_step(ours, config, tx, schedule, steps_per_epoch))
    sgd = build_optimizer(model, config)
    for index in range(2):
        batch = {"image": images[index].transpose(0, 2, 3, 1), "label": labels[index]}
        state, metrics = step(state, batch)
        losses = train_step(
            model,
            sgd,
            torch.from_numpy(images[index]),
            torch.from_numpy(labels[index]),
            index,
            config,
            steps_per_epoch,
        )
        assert ("loss_memory" in losses) == (index == 1)
        for name, value in losses.items():
            assert float(value) == pytest.approx(float(metrics[name]), rel=1e-8), name

    expected = state_dict(jax.tree.map(np.asarray, state.variables), config)
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            assert int(value) == (3 if key.startswith("decoder_stage2") else 2)
            continue
        scale = max(float(expected[key].abs().max()), 1e-6)
        assert float((value - expected[key]).abs().max()) <= 1e-6 * scale, key


def test_factors_that_name_no_module_are_refused():
    config = training_config()
    config.optimizer.multipliers.backbones = (1.0, 1.0)
    with torch.device("meta"):
        model = build_torch_model(config)
    with pytest.raises(UserError, match=r"names 'backbones', .*Did you mean backbone\?"):
        build_optimizer(model, config)


def test_the_training_in_pytorch_freezes_nothing():
    config = training_config()
    config.train.freeze = ("backbone",)
    with torch.device("meta"):
        model = build_torch_model(config)
    with pytest.raises(UserError, match=r"config\.train\.freeze is \('backbone',\)"):
        build_optimizer(model, config)


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", "lars"), ("base_batch", 4)],
)
def test_the_training_in_pytorch_is_the_published_one(field, value):
    config = training_config()
    config.optimizer[field] = value
    with torch.device("meta"):
        model = build_torch_model(config)
    with pytest.raises(UserError, match=rf"^config\.optimizer\.{field} is {value!r}; expected "):
        build_optimizer(model, config)


@pytest.mark.parametrize("backbone", ["resnet18", "vitlarge", "hrnetv2w48"])
def test_factors_go_to_the_same_parameters_as_in_our_model(backbone):
    config = small_config()
    config.model.backbone = backbone
    config.model.downsample = 2 if backbone.startswith("hrnet") else 1
    ours = build_segmentor(config)
    paths = names.flatten(abstract_variables(ours)["params"])
    modules = sorted({path.split("/")[0] for path in paths})
    config.optimizer.multipliers = {name: (1.0 + i, 1.0) for i, name in enumerate(modules)}
    with torch.device("meta"):
        model = build_torch_model(config)
    keys = {id(p): key for key, p in model.named_parameters()}
    factors = {
        keys[id(p)]: group["lr_factor"]
        for group in build_optimizer(model, config).param_groups
        for p in group["params"]
    }
    expected = {
        names.torch_key(f"params/{path}"): 1.0 + modules.index(path.split("/")[0]) for path in paths
    }
    assert factors == expected


def golden_training(tag):
    """Model with the rule's weights in double precision, its config, and its training batches."""
    backbone, dataset = tag.split("_")
    config = reference_config(tag)
    config.model.dropout = 0.0
    config.loss.consistency_from_epoch = 1  # the stored run is in epoch 2 from its first step
    o = config.optimizer
    o.lr, o.min_lr, o.weight_decay, config.model.memory.base_lr, epochs = RECIPES[backbone][dataset]
    config.train.epochs = epochs
    if backbone == "vitlarge":
        o.multipliers.backbone = (0.1, 0.1)
    with torch.device("meta"):
        model = build_torch_model(config)
    weights = {
        key: torch.from_numpy(rule_array(key, value.shape))
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(weights, assign=True)
    shape = SHAPES.get(backbone, (2, 3, 64, 96))
    batches = []
    for step in range(3):
        images = rule_train_image(tag, step, shape).astype(np.float64)
        size = (shape[0], *shape[2:])
        labels = rule_train_label(tag, step, size, len(config.data.class_names), IGNORE_LABEL)
        batches.append((torch.from_numpy(images), torch.from_numpy(labels)))
    return model.double(), config, batches


# In CI, of the other backbones the forward pass (test_torch_model.py): gradients are PyTorch's own.
STEPS = [
    pytest.param(name, marks=[pytest.mark.exhaustive] * ("resnet50" not in name), id=name)
    for name in golden_files("train")
]


@pytest.mark.golden
@pytest.mark.slow
@pytest.mark.large  # a whole network in double precision
@pytest.mark.parametrize("name", STEPS)
def test_three_steps_equal_the_reference(name):
    tag = pathlib.Path(name).stem
    golden = load(name)
    model, config, batches = golden_training(tag)
    config.loss.consistency = 1.0 if "loss_memory" in golden["loss_names"] else 0.0
    sgd = build_optimizer(model, config)
    for index, (images, labels) in enumerate(batches):
        losses = train_step(model, sgd, images, labels, index, config, 10)
        rate = max(group["lr"] for group in sgd.param_groups)
        assert rate == pytest.approx(golden["learning_rate"][index], rel=1e-12)
        for loss_name, expected in zip(golden["loss_names"], golden["losses"][index]):
            ours = OUR_NAMES.get(str(loss_name), str(loss_name)).replace("loss_total", "loss")
            limit = (1e-10, 1e-8, 1e-6)[index]
            assert float(losses[ours]) == pytest.approx(expected, rel=limit), loss_name
        if index == 1:
            continue
        state = {key: value.numpy() for key, value in model.state_dict().items()}
        limit = 1e-8 if index == 0 else 1e-5
        if index == 0:
            gradients = {
                key: p.grad.numpy() for key, p in model.named_parameters() if p.grad is not None
            }
            assert_norms(golden, "grad_norm", "param_names", gradients, 1e-7)
            assert_slices(golden, "grad_slice", gradients, 1e-6)
            assert_norms(golden, "buffer_norm_step1", "buffer_names", state, 1e-8)
            for key, count in zip(
                golden["num_batches_tracked_names"], golden["num_batches_tracked_step1"]
            ):
                assert int(state[str(key)]) == count, key
        assert_norms(golden, f"param_norm_step{index + 1}", "param_names", state, limit)
        assert_memory(golden, f"memory_after_step{index + 1}", state[names.MEMORY_KEY], limit)
    with torch.no_grad():
        logits = model.eval()(batches[0][0]).numpy()
    expected = golden["eval_logits_after_step3__slice"]
    limit = 1e-4 * golden["eval_logits_after_step3__stats"][1]
    np.testing.assert_allclose(take_slice(logits, 512), expected, rtol=0, atol=limit)
