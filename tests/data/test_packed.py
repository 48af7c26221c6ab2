import concurrent.futures
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import common
from memseg_jax.data import open_split, packed, pipeline, shapes
from memseg_jax.data.records import open_records
from memseg_jax.errors import UserError
from memseg_jax.modes import pack
from tests import official_trees, tiny

REAL = Path(os.environ.get("MEMSEG_DATA", ""), "official_layouts")


def official_data(name, root, **fields):
    config = official_trees.recipe_of(name)
    config.data.root = str(root)
    config.data.update(fields)
    return config.data


def folder_data(root, **fields):
    data = common.get_config().data
    data.update(name="folder", root=str(root), class_names=tiny.get_config().data.class_names)
    data.update(fields)
    return data


def write_packed(data, folder, *splits):
    """Packs splits without the entry point; returns the config that reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits or (data.train_split, data.eval_split):
        pack.pack_split(open_split(data, split, needs_labels=False), data, split, folder)
    data = data.copy_and_resolve_references()
    data.packed = str(folder)
    return data


@pytest.fixture
def small_shards(monkeypatch):
    """A few samples of 40 x 36 pixels a shard."""
    monkeypatch.setattr(pack, "SHARD_BYTES", 12_000)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with 10 training and 3 other samples."""
    root = tmp_path_factory.mktemp("files")
    return tiny.write_folder(root, {"train": [(40, 36)] * 10, "val": [(32, 34)] * 3})


@pytest.fixture
def data(files, tmp_path, small_shards):
    """The config that reads it packed, in several shards."""
    return write_packed(folder_data(files), tmp_path / "packed")


def assert_equal(sample, other):
    assert sample.keys() == other.keys() == {"image", "label", "name"}
    assert sample["name"] == other["name"]
    for key in ("image", "label"):
        assert sample[key].dtype == other[key].dtype == np.uint8
        np.testing.assert_array_equal(sample[key], other[key])


def assert_same_source(data, packed_data, split):
    source = open_split(data, split, needs_labels=False)
    other = open_split(packed_data, split, needs_labels=False)
    assert isinstance(other, packed.PackedSource)
    assert len(other) == len(source) > 0
    assert other.fingerprint() == source.fingerprint()
    assert other.has_labels == getattr(source, "has_labels", True)
    assert other.official_size == getattr(source, "official_size", None)
    for index in range(len(source)):
        assert_equal(source[index], other[index])
        assert source[index]["name"] in other.describe(index)
    return other


# ---- The same samples ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", official_trees.SPLITS)
def test_generated_trees_of_the_official_data_sets(name, tmp_path):
    counts = dict.fromkeys(official_trees.SPLITS[name], 3)
    root = official_trees.write_tree(name, tmp_path / "root", counts)
    data = official_data(name, root)
    splits = official_trees.SPLITS[name]
    packed_data = write_packed(data, tmp_path / "packed", *splits)
    for split in splits:
        other = assert_same_source(data, packed_data, split)
        assert other.has_labels == (split != "test" or name == "cocostuff10k")
    if name == "cityscapes":
        with pytest.raises(UserError, match="labels are not public"):
            open_split(packed_data, "test")


@pytest.mark.parametrize("name", ["ade20k", "cocostuff10k", "lip"])
def test_real_samples(name, tmp_path):
    if not (REAL / name).is_dir():
        pytest.skip("needs MEMSEG_DATA")
    data = official_data(name, REAL / name)
    packed_data = write_packed(data, tmp_path / "packed")
    source = assert_same_source(data, packed_data, data.eval_split)
    # The photographs are stored as they are.
    shard = source.manifest.shards[0]
    records = open_records([(tmp_path / "packed" / shard.file, shard.count)])
    for index, path in enumerate(open_split(data, data.eval_split).images):
        assert packed.parse(records[index])["image"] == Path(path).read_bytes()


def test_generated_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "SHARD_BYTES", 8_000)
    data = common.get_config().data
    data.update(name="shapes", class_names=shapes.CLASS_NAMES, image_size=(32, 48))
    data.update(num_train=5, num_val=2)
    packed_data = write_packed(data, tmp_path / "packed")
    other = assert_same_source(data, packed_data, "train")
    assert len(other.manifest.shards) > 1
    assert_same_source(data, packed_data, "val")
    packed_data.num_train = 6
    with pytest.raises(UserError, match=r"num_train is 6, and was 5 when it was packed"):
        open_split(packed_data, "train")


def test_images_and_labels_of_every_kind(tmp_path):
    """What the folder reader turns, widens or maps comes out the same."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    images = {
        "turned.jpg": (Image.fromarray(rgb), {"exif": turned}),
        "grey.jpg": (Image.fromarray(rgb[..., 0]), {}),
        "cmyk.jpg": (Image.fromarray(rgb).convert("CMYK"), {}),
        "deep.png": (Image.fromarray(rng.integers(0, 65536, (20, 30), dtype=np.uint16)), {}),
        "palette.png": (Image.fromarray(rgb).quantize(9), {}),
        "clear.png": (Image.fromarray(rgb).convert("RGBA"), {}),
        "plain.bmp": (Image.fromarray(rgb), {}),
        "turned.tiff": (Image.fromarray(rgb), {"exif": turned}),
        "plain.webp": (Image.fromarray(rgb), {}),
    }
    values = np.array([1, 2, 3, 9], np.uint8)[rng.integers(0, 4, (20, 30))]
    for number, (name, (image, options)) in enumerate(images.items()):
        stem = f"{number}_{Path(name).stem}"
        path = tmp_path / "root/images/train" / f"{stem}{Path(name).suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)
        label = np.rot90(values, -1) if options else values
        kind = Image.fromarray(np.ascontiguousarray(label))
        if number % 2:
            kind.putpalette(list(range(256)) * 3)
        (tmp_path / "root/labels/train").mkdir(parents=True, exist_ok=True)
        kind.save(tmp_path / "root/labels/train" / f"{stem}.png")
    data = folder_data(tmp_path / "root", class_names=("none", "a", "b", "c"), ignore_label=9)
    packed_data = write_packed(data, tmp_path / "packed", "train")
    assert len(assert_same_source(data, packed_data, "train")) == len(images)


def test_names_of_any_kind(tmp_path):
    names = ("street/a b", "Ämter/ß", os.fsdecode(b"broken_\xff"))
    for name in names:
        image, label = tiny.picture(1, 8, 8)
        tiny.write(tmp_path / f"root/images/up/{name}.png", image)
        tiny.write(tmp_path / f"root/labels/up/{name}.png", label)
    data = folder_data(tmp_path / "root", image_dir="images/up", label_dir="labels/up")
    data.class_names = ("thing", "thing", "thing")  # allowed, and not to tensorflow-datasets
    for split in ("2024/up", "all"):
        packed_data = write_packed(data, tmp_path / "packed", split)
        assert_same_source(data, packed_data, split)
    assert tfds_split(tmp_path / "packed", "2024_up") == len(names)
    assert tfds_split(tmp_path / "packed", "all_") == len(names)


def tfds_split(folder, split):
    import tensorflow_datasets as tfds

    return len(tfds.builder_from_directory(str(folder)).as_data_source(split))


# ---- Reading ------------------------------------------------------------------------------------


def test_tensorflow_datasets_reads_it(data, files):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(data.packed)
    assert builder.info.features["label"].names == list(data.class_names)
    assert {name: one.num_examples for name, one in builder.info.splits.items()} == {
        "train": 10,
        "val": 3,
    }
    assert builder.info.splits["train"].num_shards > 2
    for split in ("train", "val"):
        source = open_split(folder_data(files), split)
        theirs = builder.as_data_source(split)
        assert len(theirs) == len(source)
        for index in (len(source) - 1, 0, 1):
            example, sample = theirs[index], source[index]
            np.testing.assert_array_equal(example["image"], sample["image"])
            np.testing.assert_array_equal(example["label"][..., 0], sample["label"])
            assert example["name"].decode() == sample["name"]


def test_neither_packing_nor_reading_imports_tensorflow(files, tmp_path):
    code = f"""
import sys
import tensorflow_datasets as tfds
from memseg_jax import main
from memseg_jax.data import open_split
from memseg_jax.command_line import load_config
config = load_config({str(tiny.CONFIG)!r})
config.data.update(packed={str(tmp_path / "packed")!r}, root={str(files)!r})
flags = [f"--config.data.{{name}}={{config.data[name]}}" for name in ("root", "packed")]
assert main.main(["main", "--config", {str(tiny.CONFIG)!r}, *flags, "--mode", "pack"]) == 0
sample = open_split(config.data, "val")[2]
theirs = tfds.builder_from_directory(config.data.packed).as_data_source("val")[2]
assert (theirs["image"] == sample["image"]).all()
assert not {{"tensorflow", "jax"}} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_no_import_is_lazy_while_threads_read(files, tmp_path):
    """While etils imports lazily, no other thread can import what it needs, as Pillow does."""
    code = f"""
import builtins, concurrent.futures, contextlib, threading
from etils import epy
counts, plain, lazy_imports = [], builtins.__import__, epy.lazy_imports
@contextlib.contextmanager
def counting(**options):
    counts.append(threading.active_count())
    with lazy_imports(**options):
        yield
epy.lazy_imports = counting
from memseg_jax import main
from memseg_jax.command_line import load_config
from memseg_jax.data import open_split
config = load_config({str(tiny.CONFIG)!r})
config.data.update(packed={str(tmp_path / "packed")!r}, root={str(files)!r}, threads=8)
flags = [f"--config.data.{{name}}={{config.data[name]}}" for name in ("root", "packed", "threads")]
assert main.main(["main", "--config", {str(tiny.CONFIG)!r}, *flags, "--mode", "pack"]) == 0
source = open_split(config.data, "train")
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert len(list(pool.map(source.__getitem__, range(10)))) == 10
assert set(counts) == {{1}}, counts
assert builtins.__import__ is plain
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_command_line_does_not_import_tensorflow_datasets():
    code = (
        "import sys\nfrom memseg_jax import main\nimport memseg_jax.data\n"
        "main.main(['main', '--help'])\n"
        "assert not {'tensorflow_datasets', 'array_record', 'jax'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_copies_and_threads_read_the_same(data, files):
    plain = open_split(folder_data(files), "train")
    source = open_split(data, "train")
    assert_equal(source[-1], plain[9])
    with pytest.raises(IndexError):
        source[10]
    copy = pickle.loads(pickle.dumps(source))
    assert_equal(copy[3], plain[3])
    order = np.random.default_rng(0).integers(0, 10, 300).tolist()
    fresh = pickle.loads(pickle.dumps(source))  # threads open its files at the same time
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for index, sample in zip(order, pool.map(fresh.__getitem__, order)):
            assert_equal(sample, plain[index])


@pytest.mark.parametrize(("workers", "process"), [(0, (0, 1)), (1, (0, 1)), (0, (1, 2))])
def test_training_sees_the_same_batches(data, files, workers, process):
    batches = []
    for section, count in ((folder_data(files), 0), (data, workers)):
        config = tiny.get_config()
        config.data = section
        config.data.workers = count
        config.train.batch_size = 4
        source = open_split(config.data, "train")
        with pipeline.train_batches(source, config, 3, 4, *process) as stream:
            batches.append(list(stream))
    assert len(batches[0]) == len(batches[1]) == 4
    for one, other in zip(*batches):
        assert len(one["image"]) == 4 // process[1]
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


# ---- What is wrong ------------------------------------------------------------------------------


def shard_path(data, split, number):
    source = open_split(data, split)
    return Path(source.folder, source.manifest.shards[number].file)


def damage(path, fragment):
    """Turns one bit in the middle of some bytes of a file."""
    content = bytearray(path.read_bytes())
    place = content.find(fragment)
    assert place >= 0
    content[place + len(fragment) // 2] ^= 4
    path.write_bytes(content)


def test_damaged_record(data, files):
    path = shard_path(data, "train", 1)
    source = open_split(data, "train")
    number = source.manifest.shards[0].count + 1
    damage(path, (files / f"images/train/{number:02d}.png").read_bytes())
    source = open_split(data, "train")
    with pytest.raises(UserError) as caught:
        source[number]
    for text in (f"{path}, record 1 (sample", "is damaged", "hash mismatch", "--mode pack"):
        assert text in str(caught.value)
    source[number - 1], source[number + 1]


def test_sound_record_of_another_packing(data, tmp_path, files):
    """The file is good in itself and as long, but it is not the one of the manifest."""
    other = folder_data(tiny.write_folder(tmp_path / "other", {"train": [(40, 36)] * 10}))
    for path in (tmp_path / "other/images/train").iterdir():
        tiny.write(path, np.array(Image.open(path))[::-1])
    write_packed(other, tmp_path / "packed2", "train")
    path = shard_path(data, "train", 0)
    there = tmp_path / "packed2" / path.name
    if there.stat().st_size != path.stat().st_size:
        pytest.fail("the test needs shards of one size")
    path.write_bytes(there.read_bytes())
    with pytest.raises(UserError, match=r"record 0 .*checksum is not the one"):
        open_split(data, "train")[0]


def test_truncated_and_missing_shards(data):
    first, second = (shard_path(data, "train", number) for number in (0, 1))
    size = second.stat().st_size
    os.truncate(second, size - 100)
    first.unlink()
    with pytest.raises(UserError) as caught:
        open_split(data, "train")
    for text in (
        "2 of ", "No such file", f"{first.name} (", f"{second.name} ({size - 100} bytes instead of",
        "--mode pack",
    ):  # fmt: skip
        assert text in str(caught.value)
    open_split(data, "val")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_names": ("a", "b")}, r"class_names has 2 entries, and had 3"),
        ({"class_names": ("ground", "box", "x")}, r"class_names has 'x' at 2, and had 'disc'"),
        ({"ignore_label": 0}, r"ignore_label is 0, and was 255"),
        ({"label_dir": "masks/{split}"}, r"label_dir is 'masks/\{split\}', and was 'labels"),
        ({"name": "lip"}, r"config.data.name is 'lip', and was 'folder'"),
    ],
)
def test_other_settings_than_it_was_packed_with(data, fields, message):
    data.update(fields)
    with pytest.raises(UserError, match=message) as caught:
        open_split(data, "train")
    assert data.packed in str(caught.value)


def test_settings_that_do_not_matter(data):
    data.update(root="", workers=3, threads=0, prefetch=9, palette=((1, 2, 3),) * 3)
    assert len(open_split(data, "train")) == 10


def test_manifests_of_other_versions(data):
    """New fields of the config, and fields that are no more, are no difference."""
    path = packed.manifest_path(Path(data.packed), "train")
    content = json.loads(path.read_text())
    del content["settings"]["list_file"]
    content["settings"]["of_the_past"] = 3
    path.write_text(json.dumps(content))
    assert len(open_split(data, "train")) == 10
    path.write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(UserError, match=r"packed in format 2; .* reads 1"):
        open_split(data, "train")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format": 1}', b"\xff\xfe", b'{"format"'])
def test_damaged_manifest(data, content):
    path = packed.manifest_path(Path(data.packed), "train")
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read") as caught:
        open_split(data, "train")
    assert str(path) in str(caught.value)


def test_what_is_not_packed(data, tmp_path):
    with pytest.raises(UserError, match=r"split 'test' is not packed there .* train, val\."):
        open_split(data, "test")
    manifest = packed.read_manifest(packed.manifest_path(Path(data.packed), "train"))
    shards = [*manifest.shards[:-1], dataclasses.replace(manifest.shards[-1], size=0)]
    manifest = dataclasses.replace(manifest, complete=False, shards=shards)
    packed.write_manifest(Path(data.packed), manifest)
    done = len(shards) - 1
    with pytest.raises(UserError, match=rf"not completely packed: {done} of {done + 1} shards"):
        open_split(data, "train")
    (tmp_path / "empty").mkdir()
    data.packed = str(tmp_path / "empty")
    with pytest.raises(UserError, match=r"holds no packed split\. Write it with --mode pack"):
        open_split(data, "train")
    data.packed = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="does not exist"):
        open_split(data, "train")
