"""`config.train.freeze`: what is frozen stays bit for bit, in parameters and in statistics."""

import functools

import jax
import numpy as np
import pytest

from converters import names
from memseg_jax import checkpoint
from memseg_jax.errors import UserError
from memseg_jax.models.segmentor import build_backbone, build_segmentor
from memseg_jax.training import optimizer
from memseg_jax.training.freezing import Frozen, matches
from memseg_jax.training.state import abstract_variables, init_state
from memseg_jax.training.step import make_train_step
from tests import checkpoints, tiny
from tests.small_models import ThreeConvolutions, fast_jit, random_tree, random_variables

BATCH = 6
PATTERNS = ("backbone/ConvNorm_[01]", "decoder_stage1/project", "context/*/kernel")


@pytest.mark.parametrize(
    ("pattern", "selected"),
    [
        ("backbone", True),
        ("backbone/layer1_0", True),
        ("backbone/layer1_*", True),
        ("backbone/layer[12]_?", True),
        ("*/norm", True),
        ("*/norm/scale", True),
        ("backbone/layer1_0/conv1/norm/scale", True),
        ("back", False),
        ("layer1_0", False),
        ("backbone/layer1", False),
        ("*/kernel", False),
        ("Backbone", False),
    ],
)
def test_what_a_pattern_selects(pattern, selected):
    assert matches("backbone/layer1_0/conv1/norm/scale", pattern) == selected


# ---- A step -------------------------------------------------------------------------------------


@functools.cache
def build(patterns, parts=1):
    """The step, and the state before it."""
    config = tiny.get_config()
    config.train.freeze = patterns
    config.train.accumulate = parts
    config.train.batch_size = BATCH
    config.loss.consistency_from_epoch = 1
    model = build_segmentor(config).clone(backbone=ThreeConvolutions())
    schedule = optimizer.schedule_from_config(config, 4)
    tx = optimizer.from_config(config, schedule)
    state = init_state(random_variables(model, 0), tx)
    return make_train_step(model, config, tx, schedule, 1), state


def batch():
    images, labels = zip(*(tiny.picture(index) for index in range(BATCH)))
    return {"image": (np.stack(images) - 120) / np.float32(60), "label": np.stack(labels)}


@pytest.mark.parametrize("parts", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_frozen_parts_stay_bit_for_bit_and_all_others_move(parts):
    step, state = build(PATTERNS, parts)
    step = fast_jit(step)
    after = state
    for _ in range(2):
        after, metrics = step(after, batch())
    assert np.isfinite(metrics["loss"])
    frozen, norms = Frozen(PATTERNS), 0
    before, after = (names.flatten(x.variables) for x in (state, after))
    for path, value in before.items():
        kind, _, name = path.partition("/")
        if kind == "params":
            stays = name in frozen
        else:
            stays = name.startswith(("backbone/ConvNorm_0", "backbone/ConvNorm_1"))
            stays |= name.startswith("decoder_stage1/project")
            norms += stays
        assert np.array_equal(value, after[path]) == stays, path
    assert norms == 2 * 3  # the context's are trained: only kernels are frozen there


def test_frozen_parts_cost_no_momentum_and_no_gradients():
    programs, momenta = {}, {}
    for patterns in ((), ("backbone",)):
        step, state = build(patterns)
        programs[patterns] = jax.jit(step).lower(state, batch()).as_text()
        momenta[patterns] = len(jax.tree.leaves(state.opt_state[1]))
        trained = jax.tree.leaves(Frozen(patterns).trained(state.params))
        assert momenta[patterns] == sum(trained)
    assert momenta[()] - momenta[("backbone",)] == 9  # a kernel, a scale and a bias three times
    convolutions = [text.count("stablehlo.convolution(") for text in programs.values()]
    # Three gradients of kernels, and two of inputs; the images have none.
    assert convolutions[0] - convolutions[1] >= 5


def test_a_state_without_all_momenta_is_saved_and_restored(tmp_path):
    _, state = build(PATTERNS)
    state = jax.tree.map(lambda x: jax.numpy.asarray(x + 1), state)
    with checkpoint.Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(state, checkpoints.make_meta(1))
        restored, _ = checkpointer.resume(checkpoints.abstract(state))
    checkpoints.assert_same(restored, state)
    # A run that froze nothing, or other modules, is another run.
    with (
        checkpoint.Checkpointer(tmp_path, keep=1) as checkpointer,
        pytest.raises(UserError, match="opt_state"),
    ):
        checkpointer.restore(checkpoints.abstract(build(())[1]))


# ---- Normalisations -----------------------------------------------------------------------------


@pytest.mark.parametrize("remat", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_frozen_normalisations_run_as_in_evaluation(remat):
    backbone = build_backbone("resnet18", 1 / 16, np.float32).clone(remat=remat)
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    tree = jax.eval_shape(lambda x: backbone.init(jax.random.key(0), x, train=False), images)
    variables = random_tree({kind: tree[kind] for kind in ("params", "batch_stats")}, 0)

    def forward(patterns, train):
        def run(variables):
            with Frozen(patterns).applied():
                return backbone.apply(variables, images, train=train, mutable=["batch_stats"])

        return fast_jit(run)(variables)

    evaluated, _ = forward((), train=False)
    maps, after = forward(("*",), train=True)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)  # rounding
    jax.tree.map(same, maps, evaluated)
    jax.tree.map(np.testing.assert_array_equal, after["batch_stats"], variables["batch_stats"])

    maps, after = forward(("stem_?", "layer1_*", "layer3_0/conv1/norm/scale"), train=True)
    same(maps[0], evaluated[0])
    assert np.abs(maps[1] - evaluated[1]).max() > 0.1
    before = names.flatten(variables["batch_stats"])
    for path, value in names.flatten(after["batch_stats"]).items():
        stays = path.startswith(("stem_", "layer1_"))
        assert np.array_equal(value, before[path]) == stays, path


# ---- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ("backbone", "backbon/layer1_*"),
            r"config\.train\.freeze names 'backbon/layer1_\*', but the model has no such module or "
            r"parameter\. Did you mean backbone/layer1_0",
        ),
        (("decoder",), r"names 'decoder', .*\. Did you mean decoder_stage1 or decoder_stage2\?"),
        (("*",), r"is \('\*',\), which is every parameter of the model: nothing would be learned"),
    ],
)
def test_patterns_that_select_nothing_or_everything_are_refused(patterns, message):
    config = tiny.get_config()
    config.train.freeze = patterns
    params = abstract_variables(build_segmentor(config))["params"]
    with pytest.raises(UserError, match=message):
        optimizer.check_names(config, params)
