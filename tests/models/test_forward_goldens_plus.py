"""Every layer of MCIBI++'s evaluation forward against the numbers of the PyTorch reference."""

import functools
import pathlib
import re

import numpy as np
import pytest

from converters import names, taps
from memseg_jax.training.state import abstract_variables
from tests.goldens import pixels, stored_taps
from tests.goldens_plus import (
    assert_forward,
    golden_files,
    load,
    manifest,
    manifest_models,
    rule_image,
)
from tests.reference_models_plus import METHOD, reference_model, rule_variables
from tests.small_models import FAST_COMPILE

# The plainest head, and that of all parts on the smallest backbone.
QUICK = {
    "plus/forward/resnet50os8_ade20k__2x3x64x96.npz",
    "plus/forward/upernet_swinreduced_ade20k__2x3x64x96.npz",
}
# Every model at its odd size; a pyramid pooling is part of UPerNet.
IN_CI = {
    name.split("__")[0]: name
    for name in sorted(golden_files("forward"), key=pixels)
    if "ppm" not in name
}
# What our modules offer besides, and the files do not have.
OTHER_TAPS = (
    r"stem|stem_bn1|maxpool|layer\d(_block\d)?|stage\d\.\d|aspp_branch\.\d|aspp_global|aspp"
    r"|pyramid_pooling"
)


def cases():
    """All check values of programs that XLA hardly optimises but one, which is as users run it."""
    for name in golden_files("forward"):
        marks = [] if name in QUICK else [pytest.mark.slow]
        marks += [pytest.mark.exhaustive] * (name not in (*QUICK, *IN_CI.values()))
        options = {} if "aspp_resnet50" in name else FAST_COMPILE
        yield pytest.param(name, options, marks=marks, id=name)


@functools.lru_cache(maxsize=1)
def filled_model(tag):
    model = reference_model(tag)
    return model, rule_variables(model)


@pytest.mark.golden
@pytest.mark.parametrize(("name", "options"), list(cases()))
def test_forward_equals_the_reference(name, options, monkeypatch):
    monkeypatch.setattr(taps, "COMPILER_OPTIONS", options)
    case = pathlib.Path(name).stem
    tag, size = case.split("__")
    golden = load(name)
    images = rule_image(f"image:{case}", tuple(int(n) for n in size.split("x")))
    np.testing.assert_array_equal(images.reshape(-1)[:8], golden["image_check"])
    found = taps.taps_of(*filled_model(tag), images)
    others = found.keys() - stored_taps(golden)
    assert all(re.fullmatch(OTHER_TAPS, tap) for tap in others), others
    assert_forward(golden, {tap: x for tap, x in found.items() if tap not in others})


def tags():
    """Tracing the large backbones takes seconds."""
    for tag in manifest_models():
        large = re.search("hrnet|resnest|swin", tag)
        yield pytest.param(tag, marks=[pytest.mark.slow] if large else [], id=tag)


@pytest.mark.golden
@pytest.mark.parametrize("tag", list(tags()))
def test_every_tensor_is_that_of_the_reference(tag):
    flat = names.flatten(abstract_variables(reference_model(tag)))
    keys = {path: names.torch_key(path, METHOD) for path in flat}
    ours = {key: names.torch_shape(flat[path].shape, key) for path, key in keys.items()}
    ours |= dict.fromkeys(names.counter_keys(ours), ())
    ours |= {key: x.shape for key, x in names.index_buffers(ours).items()}
    assert ours == {key: shape for key, shape, _ in manifest(tag)}
