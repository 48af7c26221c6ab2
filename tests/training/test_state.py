"""Initial variables: a function of seed and name, and PyTorch's distributions."""

import functools

import jax
import numpy as np
import pytest

from converters import names
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.training.optimizer import from_config, schedule_from_config
from memseg_jax.training.state import abstract_state, abstract_variables, init_array, init_state
from memseg_jax.training.state import init_variables as fresh_variables
from tests.small_models import small_config


@functools.cache
def model():
    return build_segmentor(small_config())


@functools.cache
def flat(seed=0):
    return names.flatten(fresh_variables(model(), seed))


def fan_in(path):
    kernel = flat()[path.rsplit("/", 1)[0] + "/kernel"]
    return int(np.prod(kernel.shape[:-1]))


def test_shapes_and_types_are_the_abstract_ones():
    abstract = names.flatten(abstract_variables(model()))
    assert list(abstract) == list(flat())
    for path, value in flat().items():
        assert value.shape == abstract[path].shape, path
        assert value.dtype == abstract[path].dtype == np.float32, path
    assert sum(v.size for v in flat().values()) == sum(
        int(np.prod(v.shape)) for v in abstract.values()
    )


def test_same_seed_gives_the_same_numbers():
    again = names.flatten(fresh_variables(model(), 0))
    for path, value in flat().items():
        np.testing.assert_array_equal(value, again[path], path)


@pytest.mark.parametrize("seed", [1, -1, 2**40])
def test_another_seed_gives_other_numbers(seed):
    other = flat(seed)
    for path, value in flat().items():
        if path.endswith("kernel"):
            assert (value != other[path]).mean() > 0.99, path


def test_every_name_has_numbers_of_its_own():
    firsts = [value.reshape(-1)[0] * fan_in(path) ** 0.5 for path, value in flat().items()
              if path.endswith("kernel")]  # fmt: skip
    assert len(set(np.round(firsts, 5))) > 0.98 * len(firsts)


def test_an_array_does_not_depend_on_the_rest_of_the_model():
    config = small_config()
    config.model.memory.enabled = False
    config.model.aspp_dim = 24
    other = names.flatten(fresh_variables(build_segmentor(config), 0))
    shared = [path for path in other if path.startswith("params/backbone/")]
    assert shared
    for path in shared:
        np.testing.assert_array_equal(other[path], flat()[path], path)


def test_kernels_are_uniform_with_pytorchs_bound():
    for path, value in flat().items():
        if path.endswith("kernel"):
            bound = fan_in(path) ** -0.5
            assert np.abs(value).max() <= bound * (1 + 1e-6), path
            if value.size > 500:
                assert np.abs(value).max() > 0.97 * bound, path
                assert value.std() == pytest.approx(bound / 3**0.5, rel=0.1), path
                assert abs(value.mean()) < 0.15 * bound, path


def test_biases_of_classifiers_have_the_bound_of_their_kernel():
    biases = [path for path in flat() if path.endswith("classifier/conv/bias")]
    assert len(biases) == 3
    for path in biases:
        bound = fan_in(path) ** -0.5
        assert 0 < np.abs(flat()[path]).max() <= bound, path


def test_normalisation_and_memory_start_neutral():
    neutral = {"norm/scale": 1, "norm/bias": 0, "norm/mean": 0, "norm/var": 1, "memory": 0}
    seen = set()
    for path, value in flat().items():
        for ending, start in neutral.items():
            if path.endswith(ending):
                np.testing.assert_array_equal(value, start, path)
                seen.add(ending)
    assert seen == set(neutral)
    assert flat()["memory"].shape == (5, 1, 16)


def test_unknown_kind_of_variable():
    with pytest.raises(ValueError, match="params/backbone/gamma"):
        init_array("params/backbone/gamma", (3,), 0, np.random.default_rng(0))


def test_fresh_state_has_the_abstract_shapes():
    config = small_config()
    tx = from_config(config, schedule_from_config(config, 10))
    state, abstract = init_state(fresh_variables(model(), 0), tx), abstract_state(model(), tx)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for value, shape in zip(jax.tree.leaves(state), jax.tree.leaves(abstract)):
        assert value.shape == shape.shape
        assert value.dtype == shape.dtype
    assert state.step == 0
    assert all(not leaf.any() for leaf in jax.tree.leaves(state.opt_state))
    assert set(state.variables) == {"params", "batch_stats", "memory"}
