import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from memseg_jax import checkpoint
from memseg_jax.errors import UserError
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.training.initial import initial_variables
from memseg_jax.training.state import abstract_variables, init_variables
from tests import tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with a model that has no neutral value anywhere."""
    return tiny.save_random_model(tmp_path_factory.mktemp("trained"))


def start(config):
    return flatten_dict(initial_variables(config, build_segmentor(config)), sep="/")


def saved(workdir):
    abstract = abstract_variables(build_segmentor(tiny.get_config()))
    return flatten_dict(checkpoint.restore_for_inference(workdir, abstract)[0], sep="/")


def fresh(config):
    return flatten_dict(init_variables(build_segmentor(config), config.seed), sep="/")


def test_nothing_given_is_random():
    config = tiny.get_config()
    jax.tree.map(np.testing.assert_array_equal, start(config), fresh(config))


def test_a_checkpoint_of_the_same_classes_is_taken_whole(trained):
    config = tiny.get_config()
    config.init.checkpoint = str(trained)
    jax.tree.map(np.testing.assert_array_equal, start(config), saved(trained))


def test_other_classes_keep_everything_but_what_belongs_to_classes(trained):
    config = tiny.get_config()
    config.init.checkpoint = str(trained)
    config.data.class_names = ("a", "b", "c", "d")
    found, before, random = start(config), saved(trained), fresh(config)
    assert found.keys() == random.keys()
    anew = {path for path in found if found[path].shape != before[path].shape}
    classifiers = ("decoder_stage1", "decoder_stage2", "auxiliary_decoders_0")
    arrays = [f"params/{name}/classifier/conv" for name in classifiers]
    assert anew == {"memory", *(f"{a}/kernel" for a in arrays), *(f"{a}/bias" for a in arrays)}
    for path, value in found.items():
        np.testing.assert_array_equal(value, random[path] if path in anew else before[path])


def test_equally_many_classes_of_other_names_start_anew_too(trained):
    config = tiny.get_config()
    config.init.checkpoint = str(trained)
    config.data.class_names = ("a", "b", "c")
    assert not start(config)["memory"].any()
    assert saved(trained)["memory"].any()


def test_auxiliary_heads_may_be_on_one_side_only(trained):
    config = tiny.get_config()
    config.init.checkpoint = str(trained)
    config.model.auxiliary = False
    found = start(config)
    assert found.keys() < saved(trained).keys()


PLAIN = {"model.memory.enabled": False}
RESIDUAL = {"model.memory.fusion": "residual"}


@pytest.mark.parametrize(
    ("before", "now", "anew"),
    [
        (PLAIN, {}, {"bottleneck", "decoder_stage1", "decoder_stage2", "memory_module", "memory"}),
        (PLAIN, RESIDUAL, {"bottleneck", "decoder_stage1", "memory_module", "memory"}),
        (PLAIN, PLAIN | {"class_names": "abcd"}, {"auxiliary_decoders_0", "classifier"}),
        ({}, PLAIN, {"classifier", "memory"}),  # which is empty
        ({}, RESIDUAL, {"classifier", "memory_module"}),
    ],
)
def test_a_model_may_start_from_one_with_another_head(tmp_path, before, now, anew):
    """What both have is taken, and only that is random which the other one has not."""

    def config_of(changes):
        config = tiny.get_config()
        for name, value in changes.items():
            if name == "class_names":
                config.data.class_names = tuple(value)
            else:
                config.update_from_flattened_dict({name: value})
        return config

    trained = tiny.save_random_model(tmp_path, config_of(before))
    old = flatten_dict(
        checkpoint.restore_for_inference(
            trained, abstract_variables(build_segmentor(config_of(before)))
        )[0],
        sep="/",
    )
    config = config_of(now)
    config.init.checkpoint = str(trained)
    found, random = start(config), fresh(config)
    assert found.keys() == random.keys()
    changed = set()
    for path, value in found.items():
        module = path.split("/")[1] if "/" in path else path
        if path in old and np.array_equal(value, old[path]):
            continue
        np.testing.assert_array_equal(value, random[path])
        changed.add(module)
    assert changed == anew


def test_a_residual_start_from_the_baseline_computes_what_it_does(tmp_path):
    plain, residual = tiny.get_config(), tiny.get_config()
    plain.model.memory.enabled = False
    residual.model.memory.fusion = "residual"
    residual.init.checkpoint = str(tiny.save_random_model(tmp_path, plain))
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    plain_model, model = build_segmentor(plain), build_segmentor(residual)
    before = checkpoint.restore_for_inference(
        residual.init.checkpoint, abstract_variables(plain_model)
    )[0]
    expected, found = (
        compute.apply(
            {k: v for k, v in variables.items() if k != "memory"}, images, variables["memory"]
        )
        for compute, variables in (
            (plain_model, before),
            (model, initial_variables(residual, model)),
        )
    )
    expected, found = expected["logits"], found["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.std(expected))


def test_a_checkpoint_from_before_a_field_is_taken(tmp_path, monkeypatch):
    real = checkpoint.make_meta

    def make_older(*args):
        meta = real(*args)
        del meta["config"]["model"]["memory"]["fusion"]
        return meta

    monkeypatch.setattr(checkpoint, "make_meta", make_older)
    config = tiny.get_config()
    config.init.checkpoint = str(tiny.save_random_model(tmp_path))
    assert start(config)["memory"].any()


def test_another_model_is_refused(trained):
    config = tiny.get_config()
    config.init.checkpoint = str(trained)
    config.model.feature_dim = 24
    with pytest.raises(UserError, match=r"(?s)checkpoint of another model.*bottleneck"):
        start(config)
    config.init.checkpoint = str(trained / "absent")
    with pytest.raises(UserError, match="there is no checkpoint in"):
        start(config)


def test_two_things_to_start_from_are_one_too_many(trained):
    config = tiny.get_config()
    config.init.checkpoint = str(trained)
    config.init.backbone = "resnet50.pth"
    with pytest.raises(UserError, match=r"several weights to start from.*Choose one"):
        start(config)


@pytest.mark.usefixtures("quiet_entry", "compilations")
@pytest.mark.slow
def test_training_starts_from_a_checkpoint(trained, tmp_path, monkeypatch):
    tiny.count_steps(monkeypatch)
    arguments = [f"--config.data.root={tiny.data_root()}", "--workdir", tmp_path / "run"]
    assert tiny.run(*arguments, f"--config.init.checkpoint={trained}") == 0
    jax.tree.map(np.testing.assert_array_equal, saved(tmp_path / "run"), saved(trained))
