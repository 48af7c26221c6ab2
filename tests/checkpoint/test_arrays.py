"""What is said about arrays of a checkpoint that are not those that were saved."""

import flax.serialization
import numpy as np
import pytest

from memseg_jax import checkpoint
from memseg_jax.checkpoint import arrays
from memseg_jax.checkpoint.checksums import checksums
from memseg_jax.errors import UserError
from memseg_jax.runtime import files
from tests.checkpoints import abstract, make_state, save_one


def test_arrays_that_cannot_be_read_are_named(place):
    state = make_state(1, width=512)
    save_one(place, 1, state=state)
    folder = place / checkpoint.FOLDER / "1" / "state"
    tree = flax.serialization.to_state_dict(abstract(state))
    assert arrays.unreadable(folder, tree) == []
    for path in files.matching(folder / "**" / "d" / "*"):
        path.unlink()
    assert "params.backbone.conv1.kernel" in arrays.unreadable(folder, tree)


def test_a_list_of_arrays_that_was_not_saved_is_refused(place):
    save_one(place, 1)
    _, meta = checkpoint.read_meta(place)
    assert "memory" in arrays.list_arrays(place, 1, meta)
    kept = meta["checksums"]
    without = {name: text for name, text in kept.items() if name != "memory"}
    for changed, words in (
        (without, "memory: found float32[5,1,8], expected none"),
        (kept | {"other": "int32[] 00"}, "other: found none, expected int32[]"),
        (kept | {"memory": "a[] 00"}, "memory: found float32[5,1,8], expected a[]"),
        (kept | {"memory": "z[] 00"}, "memory: found float32[5,1,8], expected z[]"),
    ):
        with pytest.raises(UserError) as caught:
            arrays.list_arrays(place, 1, meta | {"checksums": changed})
        assert words in str(caught.value)


def test_arrays_that_have_changed_places_both_differ():
    tree = {"a": np.arange(3), "b": np.arange(3)[::-1].copy(), "c": np.zeros(2)}
    right = checksums(tree)
    assert arrays.differences(tree, right) == ""
    wrong = arrays.differences(tree, right | {"a": right["b"], "b": right["a"]})
    assert [line.split()[0] for line in wrong.split("; ")] == ["a", "b"]
