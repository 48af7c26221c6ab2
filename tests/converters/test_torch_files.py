import hashlib

import numpy as np
import pytest
import torch

from converters import torch_files
from memseg_jax.errors import UserError
from tests.converters import files


@pytest.fixture(scope="module")
def tensors():
    rng = np.random.default_rng(0)
    shapes = {"conv.weight": (4, 3, 3, 3), "bn.running_var": (4,), "memory": (5, 1, 4)}
    arrays = {key: rng.standard_normal(s).astype(np.float32) for key, s in shapes.items()}
    found = {key: torch.from_numpy(array) for key, array in arrays.items()}
    return found | {"bn.num_batches_tracked": torch.tensor(7)}


SAVERS = [files.save_2021, files.save_now, files.save_bare, files.save_safetensors, "old"]


@pytest.mark.parametrize("saver", SAVERS, ids=lambda s: getattr(s, "__name__", s))
def test_every_layout_gives_the_same_tensors(tmp_path, tensors, saver):
    if saver == "old":
        path = tmp_path / "x.pth"
        torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=False)
    else:
        path = saver(tmp_path / "x.pth", tensors)
    file = torch_files.read(path)
    assert file.tensors.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(file.tensors[key], value.numpy())
        assert file.tensors[key].dtype == value.numpy().dtype
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_lies_beside_the_tensors_is_told(tmp_path, tensors):
    file = torch_files.read(files.save_now(tmp_path / "x.pth", tensors))
    assert file.entries == ("cur_epoch", "cur_iter", "optimizer")
    assert "cur_epoch" in file.layout
    bare = torch_files.read(files.save_bare(tmp_path / "y.pth", tensors))
    assert bare.entries == ()
    assert "module." in bare.layout


def test_a_prefix_that_only_some_names_have_stays(tmp_path, tensors):
    path = tmp_path / "x.pth"
    torch.save({"module.a": torch.zeros(1), "b": torch.zeros(1)}, path)
    assert torch_files.read(path).tensors.keys() == {"module.a", "b"}


def test_the_checksum_is_compared(tmp_path, tensors):
    path = files.save_2021(tmp_path / "x.pth", tensors)
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert torch_files.read(path, right.upper()).sha256 == right
    with pytest.raises(UserError, match=f"{right}.*not 00ff"):
        torch_files.read(path, "00ff")


@pytest.mark.parametrize("saver", [files.save_hostile, files.save_hostile_old])
def test_code_in_a_pickle_does_not_run(tmp_path, saver):
    victim = tmp_path / "victim"
    path = saver(tmp_path / "x.pth", victim)
    with pytest.raises(UserError, match=r"x\.pth.*refused"):
        torch_files.read(path)
    assert not victim.exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_named(tmp_path, tensors, share, suffix):
    saver = files.save_2021 if suffix == ".pth" else files.save_safetensors
    path = saver(tmp_path / "x.pth", tensors)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=rf"x\{suffix}.*(damaged|refused)"):
        torch_files.read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "holds a list"),
        ({"model": {}}, "no tensors"),
        ({"a": 3}, "'a' is a int"),
        ({"a": torch.zeros(2, dtype=torch.bfloat16)}, "'a' is of type torch.bfloat16"),
    ],
)
def test_other_content_is_explained(tmp_path, content, message):
    path = tmp_path / "x.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=message):
        torch_files.read(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.pth cannot be read"):
        torch_files.read(tmp_path / "absent.pth")
    with pytest.raises(UserError, match="cannot be read"):
        torch_files.read(tmp_path)


def test_an_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    with pytest.raises(UserError, match=r"2\.5\.1 is too old.*2\.10"):
        torch_files.import_torch()


def test_the_tensors_of_a_pth_are_mapped_not_read(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model": {"big": torch.zeros(1000, 1000)}}, path)
    array = torch_files.read(path).tensors["big"]
    with open("/proc/self/maps") as maps:
        assert any(str(path) in line for line in maps)
    assert array.shape == (1000, 1000)
