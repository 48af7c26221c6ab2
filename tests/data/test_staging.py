"""Data in a bucket: read there and copied to this machine, with the samples of a local folder."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from memseg_jax.data import open_split, packed, pipeline, staging
from memseg_jax.errors import UserError
from memseg_jax.modes import pack
from memseg_jax.runtime import files
from tests import tiny

COUNTS = {"train": 10, "val": 3}


def config_of(root="", packed_in="", stage="none", gigabytes=1.0):
    config = tiny.get_config()
    config.data.update(root=str(root), packed=str(packed_in), stage=str(stage), stage_gb=gigabytes)
    return config


@pytest.fixture(autouse=True)
def of_one_process(monkeypatch):
    """Every test begins as a process does, and lets go of its copies."""
    monkeypatch.setattr(staging, "_copies", {})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    sizes = {split: [(40, 36)] * count for split, count in COUNTS.items()}
    return tiny.write_folder(tmp_path_factory.mktemp("root"), sizes)


@pytest.fixture(scope="module")
def folder(root, tmp_path_factory):
    """The same, packed: four files of training samples, of 128 KiB, and one of the others."""
    folder, data = tmp_path_factory.mktemp("packed"), config_of(root).data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "SHARD_BYTES", 12_000)
        for split in COUNTS:
            pack.pack_split(open_split(data, split), data, split, folder)
    return folder


@pytest.fixture
def remote(request, folder):
    """The packed folder in a bucket; behind the door, in tests that have one."""
    if "door" not in request.fixturenames:
        remote = request.getfixturevalue("bucket") / "packed"
        files.copy_folder(folder, remote)
        return remote
    door = request.getfixturevalue("door")
    files.copy_folder(folder, door.folder / "packed")
    door.passed.clear()
    return door.folder / "packed"


def assert_same_samples(source, root, split="train"):
    plain = open_split(config_of(root).data, split)
    assert len(plain) == COUNTS[split]
    tiny.assert_same_samples(source, plain)


def wait_for_copies():
    for copy in staging.copies():
        copy.wait()


def copied(stage):
    """The files of all copies, by name."""
    return {path.name: path for path in stage.glob("*/files/**/*") if path.is_file()}


def shards_of(folder, split="train"):
    return packed.manifest_of(folder, split).shards


# ---- Packed data --------------------------------------------------------------------------------


def test_without_copies_every_record_is_a_request(remote, root, door):
    source = open_split(config_of("", remote).data, "train")
    assert len(door.passed) < 6  # a list, the manifest, and whether it is there
    door.passed.clear()
    assert_same_samples(source, root)
    assert len(door.passed) == len(source) + len(shards_of(remote))  # and the index of each file


def test_what_is_expected_is_read_ahead(remote, root, door):
    source = open_split(config_of("", remote).data, "train")
    source.expect(range(3))
    deadline = time.monotonic() + 60
    # The records are in two files, of which the indices are read; and one was the manifest.
    while sum("alt=media" in request for request in door.passed) < 3 + 2 + 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    asked = list(door.passed)
    assert [source[k]["name"][-2:] for k in range(3)] == ["00", "01", "02"]
    assert door.passed == asked


def test_while_it_is_copied_and_afterwards(remote, root, door, tmp_path):
    config = config_of("", remote, tmp_path / "stage")
    source, other = (open_split(config.data, split) for split in COUNTS)
    assert_same_samples(source, root)
    wait_for_copies()
    expected = {shard.file for split in COUNTS for shard in shards_of(remote, split)}
    assert copied(tmp_path / "stage").keys() == expected
    door.passed.clear()
    assert_same_samples(source, root)
    assert_same_samples(other, root, "val")
    config.train.batch_size = 4
    with pipeline.train_batches(source, config, 0, 6) as batches:
        assert len(list(batches)) == 6
    assert door.passed == []


def test_the_next_run_copies_nothing(remote, root, door, tmp_path, monkeypatch):
    config = config_of("", remote, tmp_path / "stage")
    open_split(config.data, "train")
    wait_for_copies()
    monkeypatch.setattr(staging, "_copies", {})
    door.passed.clear()
    assert_same_samples(open_split(config.data, "train"), root)
    assert len(door.passed) < 6
    assert "array_record" not in " ".join(door.passed)


@pytest.mark.parametrize(
    ("workers", "stage"),
    [(0, "none"), (0, "stage"), pytest.param(1, "stage", marks=pytest.mark.slow)],
)
def test_training_sees_the_same_batches(remote, root, tmp_path, workers, stage):
    found = []
    for config in (config_of(root), config_of("", remote, stage)):
        if stage != "none":
            config.data.stage = str(tmp_path / "stage")
        config.data.workers = workers if config.data.packed else 0
        config.train.batch_size = 4
        source = open_split(config.data, "train")
        with pipeline.train_batches(source, config, 3, 4, 1, 2) as batches:
            found.append(list(batches))
    assert len(found[0]) == len(found[1]) == 4
    for one, other in zip(*found):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_data_that_change_in_the_bucket_are_other_data(remote, root, folder, tmp_path):
    config = config_of("", remote, tmp_path / "stage")
    open_split(config.data, "train")
    wait_for_copies()
    shard = shards_of(folder)[0]
    content = bytearray((folder / shard.file).read_bytes())
    content[-1] ^= 1  # in what fills the last block
    with files.replacing(remote / shard.file) as temporary:
        temporary.write_bytes(content)
    staging._copies.clear()
    assert_same_samples(open_split(config.data, "train"), root)
    wait_for_copies()
    assert len(list((tmp_path / "stage").glob("packed-*"))) == 2


# ---- Killed, and several processes --------------------------------------------------------------

CODE = """
import os, signal, sys, time
from memseg_jax.data import open_split, staging
from memseg_jax.runtime import files
from tests.data.test_staging import config_of
staging.PART = 30_000
staging._AT_A_TIME = 1
read, calls = files.read_range, []
def counted(path, start, size):
    calls.append(1)
    {}
    return read(path, start, size)
files.read_range = counted
config = config_of("", sys.argv[1], sys.argv[2])
source = open_split(config.data, "train")
for copy in staging.copies():
    copy.wait()
"""


def start(remote, stage, code="pass"):
    command = [sys.executable, "-c", CODE.format(code), str(remote), str(stage)]
    return subprocess.Popen(command, cwd=tiny.ROOT, stderr=subprocess.PIPE, text=True)


def test_killed_in_the_middle_of_a_file(remote, root, door, tmp_path):
    """What was written is kept, is not taken for the whole, and is not asked for again."""
    stage = tmp_path / "stage"
    child = start(remote, stage, "if len(calls) == 8: os.kill(os.getpid(), signal.SIGKILL)")
    _, err = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, err
    assert len(copied(stage)) == 1
    (part,) = stage.glob("*/parts/*")
    size = part.stat().st_size
    assert 0 < size < shards_of(remote)[1].size
    door.passed.clear()
    source = open_split(config_of("", remote, stage).data, "train")
    wait_for_copies()
    assert len(copied(stage)) == len(shards_of(remote))
    asked = [request for request in door.passed if "array_record" in request]
    assert len(asked) == len(shards_of(remote)) - 1  # one request each, here
    assert_same_samples(source, root)


@pytest.mark.slow
def test_what_was_left_of_a_file_is_not_what_it_was(remote, root, tmp_path):
    stage = tmp_path / "stage"
    child = start(remote, stage, "if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)")
    child.communicate(timeout=120)
    (part,) = stage.glob("*/parts/*")
    part.write_bytes(bytes(part.stat().st_size))  # as after a loss of power
    source = open_split(config_of("", remote, stage).data, "train")
    wait_for_copies()
    assert len(copied(stage)) == len(shards_of(remote))
    assert_same_samples(source, root)


@pytest.mark.slow
def test_one_process_copies_and_the_others_wait_even_if_it_dies(remote, root, tmp_path):
    stage, go = tmp_path / "stage", tmp_path / "go"
    first = start(remote, stage, "time.sleep(1000 if len(calls) > 7 else 0)")
    deadline = time.monotonic() + 120
    while len(copied(stage)) < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    second = start(remote, stage, f"open({str(go)!r}, 'w')")
    source = open_split(config_of("", remote, stage).data, "train")
    assert_same_samples(source, root)  # nobody waits for records
    time.sleep(2 * staging._SECONDS_BETWEEN_LOOKS)
    assert len(copied(stage)) == 1
    assert first.poll() is None
    first.kill()
    first.communicate()
    _, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    wait_for_copies()
    assert copied(stage).keys() == {shard.file for shard in shards_of(remote)}
    assert_same_samples(source, root)


# ---- What can go wrong --------------------------------------------------------------------------


def damage(path, name, root):
    """Turns one bit of an image within a packed file."""
    content, fragment = bytearray(path.read_bytes()), (root / f"{name}.png").read_bytes()
    content[content.index(fragment) + len(fragment) // 2] ^= 4
    path.write_bytes(content)


def test_a_copy_that_was_damaged_is_not_used(remote, root, tmp_path):
    source = open_split(config_of("", remote, tmp_path / "stage").data, "train")
    wait_for_copies()
    shard = shards_of(remote)[1]
    path = copied(tmp_path / "stage")[shard.file]
    damage(path, "images/train/04", root)
    assert_same_samples(source, root)
    assert not path.exists()
    staging._copies.clear()
    assert_same_samples(open_split(config_of("", remote, tmp_path / "stage").data, "train"), root)
    wait_for_copies()
    assert path.exists()


@pytest.mark.parametrize("stage", ["none", "stage"])
def test_a_file_that_is_damaged_in_the_bucket(remote, root, folder, tmp_path, stage):
    shard = shards_of(folder)[1]
    with files.replacing(remote / shard.file) as temporary:
        temporary.write_bytes((folder / shard.file).read_bytes())
        damage(temporary, "images/train/04", root)
    stage = "none" if stage == "none" else tmp_path / stage
    source = open_split(config_of("", remote, stage).data, "train")
    wait_for_copies()
    index = next(k for k in range(10) if source.describe(k).endswith("/04)"))
    with pytest.raises(UserError, match=rf"^{remote / shard.file}, record \d .*is damaged"):
        source[index]
    assert source[0]["name"].endswith("00")


def test_files_that_are_missing_in_the_bucket_or_too_short(remote, tmp_path):
    first, second, *_ = shards_of(remote)
    (remote / first.file).unlink()
    files.write_text(remote / second.file, "short")
    with pytest.raises(UserError) as caught:
        open_split(config_of("", remote, tmp_path / "stage").data, "train")
    for text in (f"{remote}: 2 of ", f"{first.file} (No such file)", "(5 bytes instead of"):
        assert text in str(caught.value)
    assert not (tmp_path / "stage").exists()


@pytest.mark.parametrize("where", ["", "gs://memseg-no-such-bucket/a"])
def test_what_is_not_there(door, where):
    where = where or str(door.folder / "nowhere")
    with pytest.raises(UserError, match=rf"config.data.packed: {where} "):
        open_split(config_of("", where).data, "train")


def test_what_arrives_is_not_what_was_sent(remote, root, tmp_path, monkeypatch, caplog):
    """Once: it is asked for again. Always: nothing is kept, and the log says so."""
    monkeypatch.setattr(staging, "_SECONDS_BETWEEN_TRIES", 0)
    read, name, wrong = files.read_range, shards_of(remote)[0].file, []

    def changed(path, start, size):
        content = read(path, start, size)
        if path.name == name and start == 0 and len(wrong) < most:
            wrong.append(1)
            return bytes(1) + content[1:]
        return content

    monkeypatch.setattr(files, "read_range", changed)
    most = 1
    source = open_split(config_of("", remote, tmp_path / "one").data, "train")
    wait_for_copies()
    assert len(copied(tmp_path / "one")) == len(shards_of(remote))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    most = 10**6
    staging._copies.clear()
    source = open_split(config_of("", remote, tmp_path / "two").data, "train")
    wait_for_copies()
    assert name not in copied(tmp_path / "two")
    assert f"{remote / name} arrived with another checksum" in caplog.text
    assert_same_samples(source, root)


def test_a_disk_that_becomes_full(remote, root, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(staging, "_SECONDS_BETWEEN_TRIES", 0)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "flush", full)
    monkeypatch.setattr(files, "write_text", lambda path, text: path.write_text(text))
    source = open_split(config_of("", remote, tmp_path / "stage").data, "train")
    wait_for_copies()
    assert caplog.text.count("No space left on device") == staging._TRIES
    assert "is read from the bucket" in caplog.text
    assert copied(tmp_path / "stage") == {}
    assert_same_samples(source, root)


def test_folders_that_cannot_be_used(remote, root, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for stage, words in ((tmp_path / "file", "cannot write to the folder"), (remote, "on a disk")):
        with pytest.raises(UserError, match=f"config.data.stage.*{words}|{words}.*config.data.st"):
            open_split(config_of("", remote, stage).data, "train")
    monkeypatch.setattr(staging, "_AUTO_FOLDER", str(tmp_path / "file"))
    assert_same_samples(open_split(config_of("", remote, "auto").data, "train"), root)


# ---- Room ---------------------------------------------------------------------------------------


def test_without_room_auto_reads_the_bucket_and_a_folder_is_an_error(
    remote, root, tmp_path, monkeypatch
):
    stage = tmp_path / "stage"
    monkeypatch.setattr(staging, "_AUTO_FOLDER", str(stage))
    for free, gigabytes in ((10**12, 1e-6), (staging._KEPT_FREE + 10_000, 1.0)):
        monkeypatch.setattr(staging.shutil, "disk_usage", lambda path, free=free: usage(free))
        with pytest.raises(UserError, match=r"no room for .*config\.data\.stage_gb"):
            open_split(config_of("", remote, stage, gigabytes).data, "train")
        source = open_split(config_of("", remote, "auto", gigabytes).data, "train")
        assert_same_samples(source, root)
        assert [path.name for path in stage.iterdir()] == [".lock"]
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage(10**12))
    open_split(config_of("", remote, "auto").data, "train")
    wait_for_copies()
    assert len(copied(stage)) == len(shards_of(remote))


def usage(free):
    return type("", (), {"free": free})


def test_what_was_not_used_for_longest_goes_first(bucket, folder, tmp_path):
    stage, size = tmp_path / "stage", sum(shard.size for shard in shards_of(folder))
    (stage / "mine").mkdir(parents=True)  # is left alone
    room = 2.5 * size / 1e9

    def use(name):
        files.copy_folder(folder, bucket / name)
        open_split(config_of("", bucket / name, stage, room).data, "train")
        wait_for_copies()
        found = sorted(path.name.split("-")[0] for path in stage.glob("*-*"))
        copies = dict(staging._copies)
        staging._copies.clear()
        return found, copies

    assert use("a")[0] == ["a"]
    assert use("b")[0] == ["a", "b"]
    _, in_use = use("a")
    assert use("c")[0] == ["a", "c"]
    assert use("d")[0] == ["a", "d"]  # a was used before c, and is in use
    _, in_use_too = use("d")
    with pytest.raises(UserError, match="no room"):
        use("e")
    assert sorted(path.name.split("-")[0] for path in stage.glob("*-*")) == ["a", "d"]
    assert len(in_use) == len(in_use_too) == 1
    in_use.clear()
    assert use("e")[0] == ["d", "e"]
    assert (stage / "mine").is_dir()


# ---- Folders of images --------------------------------------------------------------------------


def test_a_root_in_a_bucket(door, root, tmp_path):
    remote = door.folder / "set"
    files.copy_folder(root, remote)
    config = config_of(remote, "", tmp_path / "stage")
    for split in COUNTS:
        assert_same_samples(open_split(config.data, split), root, split)
    staging._copies.clear()
    door.passed.clear()
    assert_same_samples(open_split(config.data, "train"), root)
    assert len(door.passed) == 1  # the list
    with pytest.raises(UserError, match=r"config.data.root is gs://.* 'none'.*--mode pack"):
        open_split(config_of(remote).data, "train")
    with pytest.raises(UserError, match="there is nothing in gs://"):
        open_split(config_of(door.folder / "nothing", "", tmp_path / "stage").data, "train")


def test_a_root_that_cannot_be_copied(door, root, tmp_path):
    files.copy_folder(root, door.folder)
    door.answer = lambda method, path: 404 if "alt=media" in path and "05.png" in path else None
    with pytest.raises(UserError, match=r"cannot be copied to .*05.png is not there"):
        open_split(config_of(door.folder, "", tmp_path / "stage").data, "train")
    door.answer = lambda method, path: None
    assert_same_samples(
        open_split(config_of(door.folder, "", tmp_path / "stage").data, "train"), root
    )


def test_names_that_would_lead_out_of_the_folder(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "contents", lambda folder: [files.Content("../../out.png", 1, "")])
    with pytest.raises(UserError, match=r"holds '\.\./\.\./out.png', which is no name of a file"):
        open_split(config_of(bucket, "", tmp_path / "stage").data, "train")
    assert not (tmp_path / "stage").exists()


# ---- Modes --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quiet_entry")
def test_check_data(remote, root, tmp_path, capsys):
    shown = []
    for flags in (
        [f"--config.data.root={root}"],
        [f"--config.data.packed={remote}", "--config.data.stage=none"],
        [f"--config.data.packed={remote}", f"--config.data.stage={tmp_path / 'stage'}"],
    ):
        output = ["--output", tmp_path / "pictures"]
        assert tiny.run(*flags, "--mode", "check_data", *output) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] == shown[2]


@pytest.mark.slow
def test_a_run_on_data_in_a_bucket_is_the_run_on_a_disk(door, tmp_path):
    """With a worker process and a copy that is made meanwhile; evaluation included."""
    from tests.test_train import assert_same_run

    local = tmp_path / "packed"
    flags = [f"--config.data.root={tiny.data_root()}", f"--config.data.packed={local}"]
    assert tiny.program(*flags, "--mode", "pack").returncode == 0
    files.copy_folder(local, door.folder / "packed")
    result = tiny.program(
        f"--config.data.packed={door.folder / 'packed'}", "--config.data.workers=1",
        f"--config.data.stage={tmp_path / 'stage'}", "--config.data.root=",
        "--workdir", tmp_path / "run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "copied gs://" in result.stderr
    assert_same_run(tmp_path / "run", tiny.trained()[0])
