"""Files of ImageNet weights that are refused, and what the message says."""

import os
import re

import numpy as np
import pytest
import torch

from converters.backbone_files import SOURCES, read_backbone
from memseg_jax.errors import UserError
from memseg_jax.models.segmentor import build_backbone
from tests.backbone_weights import (
    CNNS,
    abstract_of,
    narrow,
    save_bare,
    save_old_format,
    small_vit,
    timm_dict,
    torch_dict,
    with_extras,
)


def refused(tmp_path, tensors, name="resnet18", abstract=None):
    torch.save(tensors, tmp_path / "bad.pth")
    read_backbone(tmp_path / "bad.pth", name, abstract or narrow(name))


@pytest.mark.parametrize("name", CNNS)
@pytest.mark.parametrize("other", CNNS)
def test_another_backbone_is_named(tmp_path, name, other):
    if name == other:
        return
    with pytest.raises(UserError) as raised:
        refused(tmp_path, with_extras(torch_dict(narrow(other))), name)
    message = str(raised.value)
    assert f"does not fit config.model.backbone = {name!r}" in message
    assert re.search(r"\d+ (missing in the file|not in the model):\n    \S+ \[", message)
    assert f"--config.model.backbone={other}" in message
    assert SOURCES[name] in message


@pytest.mark.parametrize("name", ["resnet50", "hrnetv2w48"])
def test_a_vit_for_a_convolutional_network(tmp_path, name):
    with pytest.raises(UserError, match="seems to hold a vitlarge"):
        refused(tmp_path, timm_dict(64, 2, 4), name)


def test_a_resnet_for_a_vit(tmp_path):
    with pytest.raises(UserError, match="seems to hold a resnet50"):
        refused(tmp_path, torch_dict(narrow("resnet50")), "vitlarge", abstract_of(small_vit()))


def test_a_deeper_resnet_is_named(tmp_path):
    tensors = torch_dict(narrow("resnet50"))
    tensors |= {key.replace("layer3.5", "layer3.6"): x for key, x in tensors.items()}
    with pytest.raises(UserError, match="seems to hold a resnet101"):
        refused(tmp_path, tensors, "resnet50")


def test_another_width(tmp_path):
    wide = abstract_of(build_backbone("resnet18", 1 / 8, np.float32))
    with pytest.raises(UserError, match="resnet18 of another depth or width") as raised:
        refused(tmp_path, torch_dict(wide))
    assert re.search(r"of another shape:\n    \S+ \[8\], expected \[4\]", str(raised.value))
    assert "backbone_width" in str(raised.value)


@pytest.mark.parametrize(
    ("stem", "words"),
    [("conv1.weight", "one 7x7 convolution"), ("conv1.0.weight", "the files of OpenMMLab")],
)
def test_other_stems_are_explained(tmp_path, stem, words):
    tensors = {key: x for key, x in torch_dict(narrow("resnet50")).items() if "stem" not in key}
    with pytest.raises(UserError, match=words) as raised:
        refused(tmp_path, tensors | {stem: torch.zeros(4, 3, 7, 7)}, "resnet50")
    assert "resnet50_v1c-2cccc1ad.pth" in str(raised.value)


@pytest.mark.parametrize("key", ["stem.0.weight", "layer2.1.bn2.running_var", "layer3.0.bn1.bias"])
def test_a_missing_key_is_named(tmp_path, key):
    tensors = torch_dict(narrow("resnet18"))
    shape = list(tensors.pop(key).shape)
    with pytest.raises(UserError, match=re.escape(f"1 missing in the file:\n    {key} {shape}")):
        refused(tmp_path, tensors)


@pytest.mark.parametrize("key", ["layer1.0.conv9.weight", "stem.0.bias", "neck.fc.weight"])
def test_an_unknown_key_is_named(tmp_path, key):
    tensors = torch_dict(narrow("resnet18")) | {key: torch.zeros(3, 2)}
    with pytest.raises(UserError, match=re.escape(f"1 not in the model:\n    {key} [3, 2]")):
        refused(tmp_path, tensors)


def test_a_key_of_another_shape_is_named(tmp_path):
    tensors = torch_dict(narrow("resnet18")) | {"layer4.1.bn1.bias": torch.zeros(9)}
    line = "1 of another shape:\n    layer4.1.bn1.bias [9], expected [32]"
    with pytest.raises(UserError, match=re.escape(line)):
        refused(tmp_path, tensors)


def test_names_of_timm_are_used_in_messages(tmp_path):
    tensors = timm_dict(64, 2, 4)
    del tensors["blocks.1.attn.qkv.bias"]
    with pytest.raises(UserError, match=re.escape("blocks.1.attn.qkv.bias [192]")):
        refused(tmp_path, tensors, "vitlarge", abstract_of(small_vit()))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", ["stem.0.weight", "layer4.1.bn2.running_var"])
def test_values_that_are_not_finite(tmp_path, key, value):
    tensors = torch_dict(narrow("resnet18"))
    tensors[key].view(-1)[1] = value
    with pytest.raises(UserError, match=f"in {re.escape(key)}, 1 of .* not finite"):
        refused(tmp_path, tensors)


def test_values_too_large_for_float32(tmp_path):
    tensors = {key: x.double() for key, x in torch_dict(narrow("resnet18")).items()}
    tensors["stem.1.bias"][0] = 1e300
    with pytest.raises(UserError, match=r"in stem\.1\.bias, 1 of 2 values are not finite"):
        refused(tmp_path, tensors)


def test_integers_are_refused(tmp_path):
    tensors = torch_dict(narrow("resnet18"))
    tensors["stem.1.weight"] = tensors["stem.1.weight"].int()
    with pytest.raises(UserError, match=r"stem\.1\.weight is int32; expected float32"):
        refused(tmp_path, tensors)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("save", [save_bare, save_old_format])
def test_a_truncated_file(tmp_path, share, save):
    path = tmp_path / "a.pth"
    save(torch_dict(narrow("resnet18")), path)
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(UserError, match="damaged"):
        read_backbone(path, "resnet18", narrow("resnet18"))


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html></html>", b"hello", bytes(999)])
def test_a_file_that_is_something_else(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match="damaged, or not a file") as raised:
        read_backbone(tmp_path / "a.pth", "resnet18", narrow("resnet18"))
    assert "In PyTorch" not in str(raised.value)  # where it advises to read the file unsafely


class Hostile:
    """What runs a command when it is read without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code(tmp_path, zipped):
    trap, path = tmp_path / "trap", tmp_path / "a.pth"
    content = torch_dict(narrow("resnet18")) | {"stem.0.weight": Hostile(trap)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="could run code"):
        read_backbone(path, "resnet18", narrow("resnet18"))
    assert not trap.exists()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pth cannot be read: No such file"):
        read_backbone(tmp_path / "nowhere.pth", "resnet18", narrow("resnet18"))


@pytest.mark.parametrize("shape", [(1, 18, 64), (1, 17, 32), (17, 64), (1, 0, 64)])
def test_positions_that_are_no_square_are_refused(tmp_path, shape):
    tensors = timm_dict(64, 2, 4) | {"pos_embed": torch.zeros(shape)}
    with pytest.raises(
        UserError, match=re.escape(f"pos_embed {list(shape)}, expected [1, 26, 64]")
    ):
        refused(tmp_path, tensors, "vitlarge", abstract_of(small_vit(5)))
