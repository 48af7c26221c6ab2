"""Every layer of the evaluation forward against the numbers of the PyTorch reference."""

import functools
import pathlib

import numpy as np
import pytest

from converters import taps
from memseg_jax.models.segmentor import build_segmentor
from tests.goldens import assert_forward, golden_files, load, pixels, rule_image
from tests.reference_models import reference_config, rule_variables
from tests.small_models import FAST_COMPILE

# In CI, the same model, or that of another data set, at an odd size; of HRNets, one with the first
# ReLU, and as to those without it the training steps of LIP's.
EXHAUSTIVE = {
    "forward/resnest101os8_cocostuff10k__2x3x64x96.npz",
    "forward/resnet50os8_lip__1x3x97x129.npz",
    "forward/resnet50os8_lip__2x3x64x96.npz",
    "forward/resnet50os8_ade20k__1x3x97x129.npz",
    "forward/resnet101os8_ade20k__1x3x97x129.npz",
    "forward/resnet101os8_lip__2x3x64x96.npz",
    "forward/vitlarge_ade20k__2x3x64x96.npz",
    "forward/hrnetv2w48_cityscapes__2x3x64x96.npz",
    "forward/hrnetv2w48_lip__1x3x97x129.npz",
}


def cases():
    """All golden files; that with the smallest images of every kind of backbone is quick.

    The quick ones check values of programs that XLA hardly optimises, and so do those of HRNets and
    ResNeSts, which take a minute to optimise; the others check programs as users run them.
    Compiling these two and drawing the weights of a ViT take long in any case, and a ResNet-101 has
    nothing that a ResNet-50 has not.
    """
    seen = set()
    for name in sorted(golden_files("forward"), key=pixels):
        backbone = pathlib.Path(name).stem.split("_")[0]
        takes_long = backbone.startswith(("hr", "vit", "resnest", "resnet101"))
        slow = backbone in seen or takes_long
        hardly = backbone.startswith(("hr", "resnest")) or not slow
        seen.add(backbone)
        options = FAST_COMPILE if hardly else {}
        marks = [pytest.mark.slow] * slow + [pytest.mark.exhaustive] * (name in EXHAUSTIVE)
        yield pytest.param(name, options, marks=marks, id=name)


@functools.lru_cache(maxsize=1)
def reference_model(name):
    model = build_segmentor(reference_config(name))
    return model, rule_variables(model)


@pytest.mark.golden
@pytest.mark.parametrize(("name", "options"), sorted(cases(), key=lambda case: case.id))
def test_forward_equals_the_reference(name, options, monkeypatch):
    monkeypatch.setattr(taps, "COMPILER_OPTIONS", options)
    compare(name)


@pytest.mark.golden
@pytest.mark.slow
def test_forward_with_the_convolutions_of_a_tpu(forms_of):
    """A GPU has the same in the forward pass."""
    forms = forms_of("tpu")
    compare(next(name for name in golden_files("forward") if "resnet50" in name))
    for case in forms.cases:
        gpu, tpu = (forms.choose(platform, *case) for platform in ("gpu", "tpu"))
        assert gpu.convolve is tpu.convolve
    assert len(forms.cases) > 50


def compare(name):
    case = pathlib.Path(name).stem
    model_name, size = case.split("__")
    shape = tuple(int(n) for n in size.split("x"))
    golden = load(name)
    model, variables = reference_model(model_name)
    images = rule_image(f"image:{case}", shape)
    np.testing.assert_array_equal(images.reshape(-1)[:8], golden["image_check"])
    assert_forward(golden, taps.taps_of(model, variables, images))
