"""Forms of exported weights: what NumPy reads, and how far it is from what was trained."""

import io

import jax
import numpy as np
import pytest

from memseg_jax.exporting.folder import archive
from memseg_jax.exporting.weights import FORMS, pack, unpack


def tree():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 3, 4, 6)).astype(np.float32)
    kernel *= 10.0 ** np.arange(-3, 3)  # channels of very different sizes
    kernel[..., 2] = 0
    layer = {"kernel": kernel, "bias": rng.standard_normal(6).astype(np.float32)}
    return {"params": {"block": {"conv": layer}}, "memory": rng.random((5, 2)).astype(np.float32)}


@pytest.mark.parametrize("form", FORMS)
def test_round_trip(form):
    before = tree()
    with np.load(io.BytesIO(archive(pack(before, form)))) as table:  # refuses pickles
        after = jax.jit(unpack)(dict(table))
    assert jax.tree.structure(after) == jax.tree.structure(before)
    conv, found = before["params"]["block"]["conv"], after["params"]["block"]["conv"]
    np.testing.assert_array_equal(found["bias"], conv["bias"])
    np.testing.assert_array_equal(after["memory"], before["memory"])
    error = np.abs(found["kernel"] - conv["kernel"])
    # Half of a step: of 8 significant bits, and of 254 from the least to the largest of a channel.
    limit = {
        "float32": 0,
        "bfloat16": np.abs(conv["kernel"]) * 2**-8,
        "int8": np.max(np.abs(conv["kernel"]), axis=(0, 1, 2)) / 127 * 0.5001,
    }[form]
    assert np.all(error <= limit)
    assert form == "float32" or np.max(error) > 0
    assert np.all(np.isfinite(found["kernel"]))


def test_sizes():
    kernel = tree()["params"]["block"]["conv"]["kernel"]
    bits = {form: pack({"kernel": kernel}, form)["kernel"].dtype.itemsize * 8 for form in FORMS}
    assert bits == {"float32": 32, "bfloat16": 16, "int8": 8}
