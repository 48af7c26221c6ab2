"""A whole training step with the convolutions of a GPU and of a TPU, computed on the CPU."""

import functools

import jax
import numpy as np
import pytest

from memseg_jax.models import convolution_gradients as gradients
from memseg_jax.models.convolution import PLAIN
from memseg_jax.models.convolution_forms import (
    convolve_by_shifts,
    convolve_plainly,
    convolve_positions,
)
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.training import optimizer
from memseg_jax.training.program import random_batch
from memseg_jax.training.state import init_state
from memseg_jax.training.step import make_train_step
from tests import tiny
from tests.small_models import ThreeConvolutions, fast_jit, random_variables

CROP = (96, 96)  # maps of 12x12 positions


def step_result():
    """State and metrics after one step in double precision: its sums may be in any order."""
    config = tiny.get_config()
    config.model.dropout = 0.0
    config.model.aspp_dilations = (1, 2, 3)
    config.loss.consistency_from_epoch = 1
    config.augment.crop = CROP
    model = build_segmentor(config).clone(backbone=ThreeConvolutions())
    variables = jax.tree.map(lambda x: x.astype(np.float64), random_variables(model, 0))
    model = model.clone(dtype=np.float64, backbone=ThreeConvolutions(np.float64))
    schedule = optimizer.schedule_from_config(config, 100)
    tx = optimizer.from_config(config, schedule)
    batch = random_batch(2, CROP, len(config.data.class_names))
    batch["image"] = batch["image"].astype(np.float64)
    step = fast_jit(make_train_step(model, config, tx, schedule, 10))
    return jax.device_get(step(init_state(variables, tx), batch))


@functools.cache
def on_cpu():
    return step_result()


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_training_step(platform, double_precision, forms_of):
    expected = on_cpu()
    forms = forms_of(platform)
    found = step_result()
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        scale = max(np.abs(theirs).max(), 1e-3)
        assert np.abs(ours - theirs).max() < 1e-9 * scale, jax.tree_util.keystr(path)
    chosen = [forms.choose(platform, *case) for case in forms.cases]
    own = {gradients.filter_gradient_by_folding, gradients.filter_gradient_by_shifts}
    own = own if platform == "gpu" else set()
    assert {x.filter_gradient for x in chosen} == {PLAIN.filter_gradient} | own
    assert {x.convolve for x in chosen} == {convolve_plainly}
    here = {forms.choose("cpu", *case).convolve for case in forms.cases}
    assert here == {convolve_plainly, convolve_positions, convolve_by_shifts}
