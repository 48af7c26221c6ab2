"""Mode pack through the entry point: what is written, kept, verified and refused."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from memseg_jax.data import open_split, packed
from memseg_jax.errors import UserError
from memseg_jax.modes import pack
from tests import tiny

pytestmark = pytest.mark.usefixtures("quiet_entry")
KINDS = ("images", "labels")
COUNTS = {"train": 9, "val": 3}
# Runs the program with small shards, after some lines that may change it.
CODE = """
import os, signal, sys
from memseg_jax import main
from memseg_jax.modes import pack
from memseg_jax.data import packed
pack.SHARD_BYTES = 12_000
{}
sys.exit(main.main(sys.argv))
"""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pack, "SHARD_BYTES", 12_000)


@pytest.fixture
def root(tmp_path):
    return tiny.write_folder(
        tmp_path / "root", {split: [(40, 36)] * count for split, count in COUNTS.items()}
    )


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "packed"


def flags(root, folder, mode="pack"):
    return [f"--config.data.root={root}", f"--config.data.packed={folder}", "--mode", mode]


def run(root, folder, mode="pack", *more):
    return tiny.run(*flags(root, folder, mode), *more)


def process(root, folder, code=""):
    """Starts the program in a process of its own."""
    command = [sys.executable, "-c", CODE.format(code), "--config", str(tiny.CONFIG)]
    return subprocess.Popen(
        [*command, *flags(root, folder)], cwd=tiny.ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def config_of(root, folder=""):
    config = tiny.get_config()
    config.data.root, config.data.packed = str(root), str(folder)
    return config


def contents(folder):
    """A digest of every file of a folder, hidden ones too."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != ".packing.lock"
    }


def shards_of(folder, split="train"):
    return packed.manifest_of(folder, split).shards


def assert_same_samples(root, folder):
    for split, count in COUNTS.items():
        source = open_split(config_of(root).data, split)
        other = open_split(config_of(root, folder).data, split)
        assert len(source) == count
        tiny.assert_same_samples(other, source)


# ---- Writing, and writing again -----------------------------------------------------------------


def test_packs_then_verifies(root, folder, capsys):
    assert run(root, folder) == 0
    out = capsys.readouterr().out
    number = len(shards_of(folder))
    assert number > 2
    assert f"train: 9 samples in {number} shards" in out
    assert f"--config.data.packed={folder}" in out
    assert "already" not in out
    assert_same_samples(root, folder)
    assert {shard.count for shard in shards_of(folder)} <= {9 // number, -(-9 // number)}
    before = contents(folder)
    assert not any(name.startswith(".") for name in before)

    assert run(root, folder) == 0
    out = capsys.readouterr().out
    assert out.count("packed already; every sample was compared with its files") == 2
    assert contents(folder) == before


def test_a_further_split_is_added(root, folder, capsys):
    config = config_of(root, folder)
    config.data.eval_split = "train"
    assert pack.run(config) == 0
    before = contents(folder)
    assert not any("val" in name for name in before)
    assert run(root, folder) == 0
    out = capsys.readouterr().out
    assert "train: 9 samples" in out
    assert "val: 3 samples" in out
    assert_same_samples(root, folder)
    assert {name: before[name] for name in before if "train" in name}.items() <= contents(
        folder
    ).items()


def test_check_data_reads_packed_data(root, folder, tmp_path, capsys):
    output = ("--output", tmp_path / "pictures")
    assert run(root, "", "check_data", *output) == 0
    expected = capsys.readouterr().out
    assert run(root, folder) == 0
    capsys.readouterr()
    assert run("", folder, "check_data", *output) == 0
    assert capsys.readouterr().out == expected
    shard = shards_of(folder)[1]
    path = folder / shard.file
    damage(path, root / "images/train" / f"{Path(shard.names[0]).name}.png")
    assert run("", folder, "check_data", *output) == 1
    out = capsys.readouterr().out
    assert out.count(f"{path}, record 0 (sample {shard.names[0]}) is damaged") == 1
    assert "1 of 12 samples are bad" in out


def damage(path, image):
    """Turns one bit of an image within a packed file."""
    content, fragment = bytearray(path.read_bytes()), image.read_bytes()
    place = content.find(fragment)
    assert place >= 0
    content[place + len(fragment) // 2] ^= 4
    path.write_bytes(content)


# ---- Killed and started again -------------------------------------------------------------------

KILL = """
original, calls = {0}, []
def counted(*arguments, **options):
    calls.append(1)
    if {1}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)
{0} = counted
"""
KILLS = {  # the function before which the process dies, and when
    "in the middle of a shard": ("pack._serialised", "len(calls) == 6"),
    "before a shard has its name": ("os.replace", "len(calls) == 2"),
    "before a shard is in the manifest": ("packed.write_manifest", "len(calls) == 2"),
    "before the description": ("pack._describe", "True"),
    "before the split is complete": ("packed.write_manifest", "arguments[1].complete"),
}


@pytest.mark.parametrize("when", KILLS)
def test_killed_and_started_again(root, folder, tmp_path, capsys, when):
    child = process(root, folder, KILL.format(*KILLS[when]))
    _, err = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, err
    manifest = packed.manifest_of(folder, "train")
    done = [shard for shard in manifest.shards if shard.size]
    assert not manifest.complete
    assert bool(done) != when.startswith("before a shard")
    with pytest.raises(UserError, match="not completely packed"):
        open_split(config_of(root, folder).data, "train")
    stamps = {shard.file: (folder / shard.file).stat().st_mtime_ns for shard in done}

    assert run(root, folder) == 0
    if done:
        assert f"{len(done)} of the shards earlier" in capsys.readouterr().out
    for name, stamp in stamps.items():
        assert (folder / name).stat().st_mtime_ns == stamp
    assert run(root, tmp_path / "unbroken") == 0
    assert contents(folder) == contents(tmp_path / "unbroken")
    assert_same_samples(root, folder)


def test_killed_at_any_time(root, folder, tmp_path):
    """By the clock: wherever it happens to be."""
    code = (
        "import time; original = pack._serialised\n"
        "def slow(example): time.sleep(0.1); return original(example)\n"
        "pack._serialised = slow"
    )
    for seconds in (0.15, 0.4):
        child = process(root, folder, code)
        while child.poll() is None and not list(folder.glob("*.packed.json")):
            time.sleep(0.01)
        time.sleep(seconds)
        child.kill()
        child.communicate()
    assert run(root, folder) == 0
    assert run(root, tmp_path / "unbroken") == 0
    assert contents(folder) == contents(tmp_path / "unbroken")


def test_two_processes_at_once(root, folder, tmp_path, capsys):
    go = tmp_path / "go"
    code = (
        "import time; original = pack._serialised\n"
        "def waiting(example):\n"
        f"    while not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
        "    return original(example)\n"
        "pack._serialised = waiting"
    )
    child = process(root, folder, code)
    deadline = time.monotonic() + 60
    while not list(folder.glob("*.packed.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert run(root, folder) == 1
    assert f"{folder}: another process is packing" in capsys.readouterr().err
    go.touch()
    _, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert_same_samples(root, folder)
    assert run(root, folder) == 0


# ---- Damaged, lost and changed ------------------------------------------------------------------


def test_damaged_and_missing_shards_are_written_again(root, folder, capsys):
    assert run(root, folder) == 0
    before = contents(folder)
    first, second, third = shards_of(folder)[:3]
    damage(folder / first.file, root / "images/train" / f"{Path(first.names[0]).name}.png")
    os.truncate(folder / second.file, 1000)
    (folder / third.file).unlink()
    assert run(root, "", "check_data", f"--output={folder}_pictures") == 0
    capsys.readouterr()
    assert run(root, folder) == 0
    captured = capsys.readouterr()
    assert f"{first.file}, record 0 is damaged" in captured.err
    assert f"{second.file} (1000 bytes instead of" in captured.err
    assert f"{third.file} (No such file" in captured.err
    assert contents(folder) == before


def test_a_label_that_was_changed_after_packing(root, folder, capsys):
    assert run(root, folder) == 0
    path = root / "labels/train/04.png"
    label = np.array(Image.open(path))
    tiny.write(path, (label == 0).astype(np.uint8))
    assert run(root, folder) == 1
    message = capsys.readouterr().err
    assert f"{path}) was changed after it was packed" in message
    shard = next(s for s in shards_of(folder) if any("04" in name for name in s.names))
    (folder / shard.file).unlink()  # as the message says
    assert str(folder / shard.file) in message
    assert run(root, folder) == 0
    assert_same_samples(root, folder)


def test_a_label_that_was_changed_between_two_parts_of_a_run(root, folder, capsys):
    path = root / "images/train/08.png"
    good = path.read_bytes()
    path.write_bytes(good[:100])
    assert run(root, folder) == 1  # the probe of the last sample finds it
    assert not folder.joinpath("train.packed.json").exists()
    path.write_bytes(good)
    assert run(root, folder) == 0
    manifest = dataclasses.replace(packed.manifest_of(folder, "train"), complete=False)
    packed.write_manifest(folder, manifest)
    label = root / "labels/train/00.png"
    tiny.write(label, np.zeros((40, 36), np.uint8))
    capsys.readouterr()
    assert run(root, folder) == 1
    assert f"{label}) was changed after it was packed" in capsys.readouterr().err


def test_files_that_came_later(root, folder, capsys):
    assert run(root, folder) == 0
    image, label = tiny.picture(5)
    tiny.write(root / "images/train/new.png", image)
    tiny.write(root / "labels/train/new.png", label)
    assert run(root, folder) == 1
    message = capsys.readouterr().err
    assert "was packed from 9 samples" in message
    assert "now there are 10" in message


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("--config.data.class_names=('a','b','c')", "class_names has 'a' at 0, and had 'ground'"),
        ("--config.data.ignore_label=2", "ignore_label is 2, and was 255"),
    ],
)
def test_a_folder_with_other_settings(root, folder, capsys, field, message):
    assert run(root, folder) == 0
    before = contents(folder)
    assert run(root, folder, "pack", field, "--config.data.train_split=val") == 1
    assert message in capsys.readouterr().err
    assert run(root, folder, "train", field) == 1
    assert message in capsys.readouterr().err
    assert contents(folder) == before


# ---- Bad input ----------------------------------------------------------------------------------


def test_an_unreadable_image(root, folder, capsys):
    path = root / "images/train/07.png"  # not one of those that tell the size of a sample
    good = path.read_bytes()
    path.write_bytes(good[:-300])
    assert run(root, folder) == 1
    message = capsys.readouterr().err
    assert str(path) in message
    assert "replace or remove it" in message
    done = sum(shard.size > 0 for shard in shards_of(folder))
    assert done > 0
    assert f"{done} of {len(shards_of(folder))} shards are packed and kept" in message
    with pytest.raises(UserError, match="not completely packed"):
        open_split(config_of(root, folder).data, "train")
    assert not (folder / "dataset_info.json").exists()
    assert not [name for name in contents(folder) if name.startswith(".")]
    path.write_bytes(good)
    assert run(root, folder) == 0
    assert_same_samples(root, folder)


def test_a_full_disk(root, folder, tmp_path, capsys):
    """A limit on the size of files makes the system refuse to write, as a full disk does."""
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    child = process(root, folder, code)  # an ArrayRecord file has at least 128 KiB
    _, message = child.communicate(timeout=60)
    assert child.returncode == 1
    assert "Traceback" not in message
    assert "File too large" in message
    assert f"{folder / shards_of(folder)[0].file} cannot be written" in message
    assert "0 of " in message
    assert "same command again" in message
    assert [n for n in contents(folder) if "array_record" in n] == []
    assert run(root, folder) == 0
    assert_same_samples(root, folder)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(mount)]
    try:
        made = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        made = False
    if not made:
        pytest.skip("needs the right to mount a file system")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_disk_that_is_full_after_some_shards(root, small_disk, capsys):
    folder = small_disk / "packed"
    assert run(root, folder) == 1
    message = capsys.readouterr().err
    assert "No space left on device" in message
    done = sum(shard.size > 0 for shard in shards_of(folder))
    assert 0 < done < len(shards_of(folder))
    assert f"{done} of {len(shards_of(folder))} shards are packed and kept" in message
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert run(root, folder) == 0
    assert f"{done} of the shards earlier" in capsys.readouterr().out
    assert_same_samples(root, folder)


def test_folders_that_cannot_be_written(root, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/packed")):
        assert run(root, folder) == 1
        message = capsys.readouterr().err
        assert str(folder) in message
        assert "config.data.packed" in message


def test_a_folder_with_other_files(root, capsys):
    (root / ".hidden.tmp").write_text("")
    assert run(root, root) == 1
    assert f"{root} holds other files, such as images" in capsys.readouterr().err
    assert sorted(path.name for path in root.iterdir()) == [".hidden.tmp", ".packing.lock", *KINDS]


def test_no_folder_is_given(root, capsys):
    assert tiny.run(f"--config.data.root={root}", "--mode", "pack") == 1
    assert "--config.data.packed=FOLDER" in capsys.readouterr().err


def test_a_data_set_that_is_not_there(folder, tmp_path, capsys):
    assert run(tmp_path / "nowhere", folder) == 1
    assert "config.data.root" in capsys.readouterr().err
    assert not folder.exists()


def test_reading_what_is_not_packed(root, folder, capsys):
    for mode in ("train", "check_data"):
        assert run(root, folder, mode) == 1
        captured = capsys.readouterr()
        assert f"{folder} does not exist" in captured.err + captured.out
        assert "--mode pack" in captured.err + captured.out


# ---- A run that changes from folders to packed data and back ------------------------------------


@pytest.mark.slow
def test_a_run_goes_on_with_packed_data(tmp_path):
    """Started on folders, killed, gone on with packed data, killed, ended on folders."""
    from tests.test_train import assert_same_run

    root, folder, workdir = tiny.data_root(), tmp_path / "packed", tmp_path / "run"
    assert run(root, folder) == 0
    for mode, stop in (("", 5), (folder, 11)):
        child = tiny.start(
            f"--config.data.root={root if not mode else ''}", f"--config.data.packed={mode}",
            "--workdir", workdir,
        )  # fmt: skip
        metrics = workdir / "metrics.csv"
        while child.poll() is None:
            if metrics.exists() and metrics.read_text().count("\n") > stop:
                break
            time.sleep(0.05)
        child.kill()
        child.communicate()
        assert child.returncode == -signal.SIGKILL
    end = tiny.program(f"--config.data.root={root}", "--workdir", workdir)
    assert end.returncode == 0, end.stderr
    assert_same_run(workdir, tiny.trained()[0])


@pytest.mark.slow
def test_evaluation_of_packed_data(root, folder, tmp_path, compilations):
    """Same scores, and the same label maps under the same names."""
    workdir = tiny.save_random_model(tmp_path / "run")
    assert run(root, folder) == 0
    found = []
    for number, (where, packed_in) in enumerate(((root, ""), ("", folder))):
        maps = tmp_path / f"maps{number}"
        flag = f"--config.eval.save_predictions={maps}"
        assert run(where, packed_in, "evaluate", "--workdir", workdir, flag) == 0
        files = {p.relative_to(maps): p.read_bytes() for p in maps.rglob("*") if p.is_file()}
        scores = json.loads((workdir / "metrics.json").read_text())
        found.append((files, {key: scores[key] for key in ("mIoU", "pixels", "images")}))
    assert found[0] == found[1]
    assert len(found[0][0]) == COUNTS["val"]
