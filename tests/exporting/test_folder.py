"""The folder of an export appears whole or not at all, on a disk and in a bucket."""

import hashlib
import json

import pytest

from memseg_jax.errors import UserError
from memseg_jax.exporting import folder as exports
from memseg_jax.runtime import files


def test_whole(place_of_run):
    target = place_of_run / "export"
    with exports.whole(target) as folder:
        exports.write(folder, {"weights.npz": b"numbers"}, {"step": 3})
        assert not files.exists(target)
    assert files.names(target) == ["load.py", "model.json", "weights.npz"]
    description = json.loads(files.read_bytes(target / "model.json"))
    assert description["step"] == 3
    assert description["sha256"]["weights.npz"] == hashlib.sha256(b"numbers").hexdigest()
    with pytest.raises(UserError, match="exists already"), exports.whole(target):
        pass


def test_nothing_after_an_error(place_of_run):
    target = place_of_run / "export"

    def fail():
        with exports.whole(target) as folder:
            exports.write(folder, {"weights.npz": b"numbers"}, {})
            raise UserError("too different")

    with pytest.raises(UserError, match="too different"):
        fail()
    assert not files.exists(target)
    assert files.names(place_of_run) == []
