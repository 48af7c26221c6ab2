"""The maps of a Swin, and what is before them, against the numbers of the PyTorch reference."""

import functools
import pathlib

import jax
import numpy as np
import pytest

from converters import names
from memseg_jax.models.swin import build
from tests.backbone_weights import abstract_of
from tests.goldens import assert_taps, stored_taps
from tests.goldens_plus import golden_files, load, rule_array, rule_image
from tests.reference_models_plus import reduced_swin
from tests.small_models import FAST_COMPILE

TAPS = ("patch_embed", "stage0_block", "backbone.")


def cases():
    """In CI, the large network is a part of its model (test_forward_goldens_plus.py)."""
    for name in golden_files("forward"):
        if "_swin" in name:
            marks = [pytest.mark.slow, pytest.mark.exhaustive] if "swinlarge" in name else []
            yield pytest.param(name, marks=marks, id=name)


@functools.lru_cache(maxsize=1)
def reference_backbone(is_large):
    backbone = build("swinlarge") if is_large else reduced_swin()
    filled = {}
    for path, leaf in names.flatten(abstract_of(backbone)).items():
        if path.startswith("params/backbone/"):
            key = names.torch_key(path)
            value = rule_array(key, names.torch_shape(leaf.shape))
            filled[path.removeprefix("params/backbone/")] = names.from_torch_layout(value)
    return backbone, names.unflatten(filled)


@pytest.mark.golden
@pytest.mark.parametrize("name", list(cases()))
def test_forward_equals_the_reference(name):
    case = pathlib.Path(name).stem
    shape = tuple(int(n) for n in case.split("__")[1].split("x"))
    golden = load(name)
    images = rule_image(f"image:{case}", shape)
    np.testing.assert_array_equal(images.reshape(-1)[:8], golden["image_check"])
    backbone, params = reference_backbone("swinlarge" in name)

    def forward(params, x):
        return backbone.apply({"params": params}, x, train=False, mutable=["taps"])[1]["taps"]

    taps = jax.jit(forward, compiler_options=FAST_COMPILE)(params, images.transpose(0, 2, 3, 1))
    taps = {
        path.rsplit("/", 1)[-1]: np.asarray(x).transpose(0, 3, 1, 2) if x.ndim == 4 else x
        for path, x in names.flatten(taps).items()
    }
    assert set(taps) == {tap for tap in stored_taps(golden) if tap.startswith(TAPS)}
    assert len(taps) == 7
    assert_taps(golden, taps)
