"""Mode pack into a bucket: prepared on a disk, sent whole, manifests last."""

import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from memseg_jax.data import open_split, staging
from memseg_jax.errors import UserError
from memseg_jax.modes import pack
from memseg_jax.runtime import files
from tests import tiny
from tests.test_pack import CODE, assert_same_samples, config_of, contents, flags, run

pytestmark = pytest.mark.usefixtures("quiet_entry", "stage")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pack, "SHARD_BYTES", 12_000)


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """The folder for what is sent and copied, and no copies of other tests."""
    monkeypatch.setattr(staging, "_AUTO_FOLDER", str(tmp_path / "stage"))
    monkeypatch.setattr(staging, "_copies", {})
    return tmp_path / "stage"


@pytest.fixture
def root(tmp_path):
    return tiny.write_folder(tmp_path / "root", {"train": [(40, 36)] * 9, "val": [(40, 36)] * 3})


def test_what_is_sent_is_what_is_written_to_a_disk(bucket, root, stage, tmp_path, capsys):
    remote = bucket / "packed"
    assert run(root, tmp_path / "local") == 0
    capsys.readouterr()
    assert run(root, remote) == 0
    assert f"--config.data.packed={remote}" in capsys.readouterr().out
    assert [path.name for path in stage.iterdir()] == []
    local = contents(tmp_path / "local")
    assert {content.name for content in files.contents(remote)} == local.keys()
    for content in files.contents(remote):
        assert files.has_content(tmp_path / "local" / content.name, content)
    assert_same_samples(root, remote)

    assert run(root, remote) == 0  # packs anew, and compares
    assert f"sending 0 files, 0.0 MB, to {remote}" in capsys.readouterr().out
    label = root / "labels/train/04.png"
    tiny.write(label, (np.array(Image.open(label)) == 0).astype(np.uint8))
    assert run(root, remote) == 1
    assert f"{remote / 'train.packed.json'} is there, and is of other samples" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_killed_while_it_sends(door, root, tmp_path, stage):
    remote = door.folder / "packed"
    code = f"""
from memseg_jax.data import staging
from memseg_jax.runtime import files
staging._AUTO_FOLDER = {str(stage)!r}
original, calls = files.copy_file, []
def counted(source, target):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    original(source, target)
files.copy_file = counted
"""
    command = [sys.executable, "-c", CODE.format(code), "--config", str(tiny.CONFIG)]
    command += [*flags(root, remote), "--config.data.threads=1"]
    child = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    with pytest.raises(UserError, match=r"split 'train' is not packed there"):
        open_split(config_of(root, remote).data, "train")
    door.passed.clear()
    assert run(root, remote) == 0
    there = len(files.contents(remote))
    uploads = [text for text in door.passed if text.startswith("POST") and "/upload/" in text]
    assert len(uploads) == there - 2 + 1  # those that were there, and the probe
    assert_same_samples(root, remote)


def test_a_split_is_added(bucket, root):
    remote = bucket / "packed"
    assert run(root, remote, "pack", "--config.data.train_split=val") == 0
    assert run(root, remote, "pack", "--config.data.eval_split=train") == 0
    assert_same_samples(root, remote)
    info = files.read_text(remote / "dataset_info.json")
    assert '"train"' in info
    assert '"val"' in info


def test_a_bucket_that_is_not_there(door, root, stage, capsys):
    assert run(root, "gs://memseg-no-such-bucket/packed") == 1
    assert "there is no bucket gs://memseg-no-such-bucket" in capsys.readouterr().err
    assert run(root, door.folder, "pack", "--config.data.stage=none") == 1
    assert "config.data.stage is 'none'" in capsys.readouterr().err
