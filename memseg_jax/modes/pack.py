"""Mode pack: writes the splits of a data set as ArrayRecord files that training can read.

The files are those of tensorflow-datasets, and so is the description beside them, but the loop is
our own: `download_and_prepare` writes into a temporary folder that is removed if anything goes
wrong, so that a failure at the last file would lose hours of work, and no split could be added
later.

A file gets its name when it is written, synchronised and read back. The manifest of the split is
brought up to date after each, so a run that was killed goes on with the next file.
"""

import contextlib
import dataclasses
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from memseg_jax import config_rules
from memseg_jax.data import open_split, packed, staging
from memseg_jax.data.file_source import FileSource
from memseg_jax.data.images import read_image
from memseg_jax.data.reading import map_ahead
from memseg_jax.data.records import open_records
from memseg_jax.errors import PROCESS_ERRORS, UserError
from memseg_jax.runtime import bars, files

SHARD_BYTES = 128 << 20  # approximate size of a file
_PROBES = 8  # samples whose size tells how many go into a file
_LOCK = ".packing.lock"
_LEFTOVERS = (".*.array_record-*.partial", ".*.packed.json.*.tmp", ".packed-info-*")
_INFO = "dataset_info.json"


def run(config: Any) -> int:
    """Packs the training and the evaluation split, or checks them if they are packed.

    Args:
        config: the whole config; `config.data` is used. `packed` is the folder to write to. For one
            in a bucket, the files are written to a folder in `stage`, and sent when all are there.

    Returns:
        The exit status 0.

    Raises:
        UserError: a sample cannot be read, the folder cannot be written or holds other data, or a
            packed sample is no longer equal to its files.
    """
    config_rules.check(config)
    data = config.data.copy_and_resolve_references()
    if not data.packed:
        raise UserError(
            "--mode pack needs the folder to write to: --config.data.packed=FOLDER. Training then "
            "reads it with the same flag."
        )
    target = packed.folder_of(data)
    data.packed = ""  # the samples come from the data set's own folders
    splits = dict.fromkeys((data.train_split, data.eval_split))
    sources = {split: open_split(data, split, needs_labels=False) for split in splits}
    if remote := files.in_bucket(target):
        files.writable_folder(target, "the folder for packed data", "--config.data.packed")
    folder = staging.work_folder(target, data) if remote else target
    with _locked(folder):
        if remote:
            _fetch_manifests(target, folder)
        for split, source in sources.items():
            print(pack_split(source, data, split, folder), flush=True)
        if remote:
            _send(folder, target, data.threads)
    if remote:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"Read it with --config.data.packed={target}")
    return 0


def _fetch_manifests(target: files.Place, folder: Path) -> None:
    """Takes over what is known about the splits in a bucket: they belong to the same data set."""
    try:
        for name in files.names(target):
            if name.endswith(packed.MANIFEST) and not (folder / name).exists():
                with files.replacing(folder / name) as temporary:
                    temporary.write_bytes(files.read_bytes(target / name))
    except OSError as error:
        raise UserError(f"config.data.packed: {target} cannot be read: {error}.") from error


def _send(folder: Path, target: files.Place, threads: int) -> None:
    """Copies a packed folder to a bucket, manifests last, as far as it is not there.

    Raises:
        UserError: another packing is there, or it cannot be written.
    """
    own = {path.name: path for path in files.files_below(folder) if path.name[0] != "."}
    there = {content.name: content for content in files.contents(target)}
    same = {name for name in own.keys() & there if files.has_content(own[name], there[name])}
    for name in sorted(own.keys() & there):
        if name.endswith(packed.MANIFEST) and name not in same:
            raise UserError(
                f"{target / name} is there, and is of other samples: files of the data set were "
                f"changed after they were packed. Pack into another folder. {folder} has the new "
                "files, and may be removed."
            )
    missing = sorted(own.keys() - same)
    last = [name for name in missing if name.endswith(packed.MANIFEST)]
    first = [name for name in missing if name not in last]
    size = sum(own[name].stat().st_size for name in missing)
    print(f"sending {len(missing)} files, {_megabytes(size)}, to {target}", flush=True)
    for names in (first, last):
        for _ in map_ahead(lambda name: files.copy_file(own[name], target / name), names, threads):
            pass
    there = {content.name: content for content in files.contents(target)}
    for name in missing:
        if not files.has_content(own[name], there.get(name, files.Content(name, -1))):
            raise UserError(f"{target / name} is not what was sent. Start the same command again.")


class _Job(NamedTuple):
    """What it takes to pack the samples of a split.

    Attributes:
        source: the split, see `memseg_jax.data`.
        folder: to write to.
        threads: number of samples that are read at the same time.
        bar: the progress bar.
    """

    source: Any
    folder: Path
    threads: int
    bar: tqdm

    def samples(self, function: Callable[[int], Any], indices: Iterable[int]) -> Iterator[Any]:
        """Yields `function(index)` and moves the bar."""
        for result in map_ahead(function, indices, self.threads):
            self.bar.update()
            yield result


def pack_split(source: Any, data_config: Any, split: str, folder: Path) -> str:
    """Packs what is missing of a split; if nothing is, compares every sample with its files.

    Args:
        source: the split, see `memseg_jax.data`.
        data_config: `config.data`.
        split: its name.
        folder: to write to; must be there.

    Returns:
        A sentence that says what was done.

    Raises:
        UserError: see `run`.
    """
    manifest = packed.manifest_of(folder, split)
    if manifest is None:
        manifest = _plan(source, data_config, split, folder)
    packed.check_settings(folder, manifest, data_config)
    if (manifest.fingerprint, manifest.count) != (source.fingerprint(), len(source)):
        raise UserError(
            f"{folder}: split {split!r} was packed from {manifest.count} samples with the "
            f"fingerprint {manifest.fingerprint}, and now there are {len(source)} with "
            f"{source.fingerprint()}: files of the data set were added, removed or renamed. "
            "Restore them, or pack into another folder."
        )
    was_complete, written, start = manifest.complete, 0, 0
    bar = bars.bar(len(source), f"{'checking' if was_complete else 'packing'} {split}", "image")
    job = _Job(source, folder, data_config.threads, bar)
    there = {content.name: content for content in files.contents(folder)}
    with bar:
        for number, shard in enumerate(manifest.shards):
            indices = range(start, start := start + shard.count)
            fault = ""
            if shard.size and not (fault := packed.misses(shard, there) or _damage(folder, shard)):
                if was_complete or _changed_since(job, shard, indices):
                    _compare(job, shard, indices)
                else:
                    bar.update(shard.count)
                continue
            if fault:
                bar.write(f"{folder}: a shard is written again: {fault}", file=sys.stderr)
            try:
                shard = _write_shard(job, shard, indices)
            except UserError as error:
                raise UserError(
                    f"{error}\nOf split {split!r}, {number} of {len(manifest.shards)} shards are "
                    "packed and kept. Start the same command again afterwards: it goes on there."
                ) from error
            shards = (*manifest.shards[:number], shard, *manifest.shards[number + 1 :])
            manifest = dataclasses.replace(manifest, shards=shards)
            packed.write_manifest(folder, manifest)
            written += 1
    _describe(folder, data_config, manifest)
    if not was_complete:
        manifest = dataclasses.replace(manifest, complete=True)
        packed.write_manifest(folder, manifest)
    size = _megabytes(sum(shard.size for shard in manifest.shards))
    number = len(manifest.shards)
    text = f"{split}: {len(source)} samples in {number} shard{'s' * (number > 1)}, {size}"
    if not written and was_complete:
        return f"{text}: packed already; every sample was compared with its files"
    kept = number - written
    return f"{text}: packed" + (f", {kept} of the shards earlier" if kept else "")


def _plan(source: Any, data_config: Any, split: str, folder: Path) -> packed.Manifest:
    """Divides the split into shards of about equal size, and records the plan."""
    others = sorted(path.name for path in folder.iterdir() if path.name[0] != ".")
    manifests = packed.manifests(folder)
    if others and not manifests:
        raise UserError(
            f"config.data.packed: {folder} holds other files, such as {others[0]}. Give an empty "
            "or a new folder."
        )
    for manifest in manifests:  # one folder is one data set, for tensorflow-datasets too
        packed.check_settings(folder, manifest, data_config)
    count = len(source)
    if not count:
        raise UserError(f"split {split!r} is empty: there is nothing to pack")
    probes = np.unique(np.linspace(0, count - 1, _PROBES).astype(int)).tolist()
    mean = np.mean([sum(map(len, _encode(source, index).values())) for index in probes])
    per_shard = max(1, round(SHARD_BYTES / mean))
    number = -(-count // per_shard)
    free = shutil.disk_usage(folder).free
    print(f"{split}: about {_megabytes(mean * count)}; {_megabytes(free)} are free", flush=True)
    bounds = [k * count // number for k in range(number + 1)]
    stem = f"{data_config.name}-{packed.split_name(split)}.array_record"
    manifest = packed.Manifest(
        split=split,
        settings=packed.settings_of(data_config),
        fingerprint=source.fingerprint(),
        has_labels=getattr(source, "has_labels", True),
        official_size=getattr(source, "official_size", None),
        shards=tuple(
            packed.Shard(f"{stem}-{k:05d}-of-{number:05d}", bounds[k + 1] - bounds[k])
            for k in range(number)
        ),
        groups=tuple(getattr(source, "groups", ())),
    )
    packed.write_manifest(folder, manifest)
    return manifest


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def _encode(source: Any, index: int) -> dict[str, bytes]:
    """Reads a sample and returns what its record holds."""
    try:
        sample = source[index]
        image = None
        if isinstance(source, FileSource):
            data = Path(source.images[index]).read_bytes()
            # A subclass may make something else of the file.
            if np.array_equal(read_image(source.images[index], data), sample["image"]):
                image = data
        return {
            "name": os.fsencode(sample["name"]),
            "image": image or _png(cv2.cvtColor(sample["image"], cv2.COLOR_RGB2BGR)),
            "label": _png(sample["label"]),
        }
    except (UserError, *PROCESS_ERRORS):
        raise
    except Exception as error:
        raise UserError(
            f"{source.describe(index)}: the sample cannot be read ({type(error).__name__}: "
            f"{error}). Correct or remove it."
        ) from error


def _png(array: np.ndarray) -> bytes:
    """A PNG file of [height, width] or BGR [height, width, 3], uint8."""
    parameters = [cv2.IMWRITE_PNG_COMPRESSION, 9]
    # Without the filters that PNG has for photographs, label maps become smaller and are decoded
    # up to four times as fast. Early releases of OpenCV 4 cannot leave them out.
    if array.ndim == 2 and hasattr(cv2, "IMWRITE_PNG_FILTER"):
        parameters += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
    return cv2.imencode(".png", array, parameters)[1].tobytes()


def _write_shard(job: _Job, shard: packed.Shard, indices: Sequence[int]) -> packed.Shard:
    """Writes some samples into a file, which appears when it is whole."""
    path = job.folder / shard.file
    temporary = path.with_name(f".{path.name}.partial")
    names, checksums = [], []
    try:
        # Images are compressed already; groups of one are for random access.
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        try:
            for example in job.samples(lambda index: _encode(job.source, index), indices):
                writer.write(_serialised(example))
                names.append(os.fsdecode(example["name"]))
                checksums.append(packed.checksum(example))
        except BaseException:
            with contextlib.suppress(RuntimeError):
                writer.close()
            raise
        writer.close()
        files.flush(temporary)
        size = temporary.stat().st_size
        new = packed.Shard(temporary.name, shard.count, size, tuple(names), tuple(checksums))
        if fault := _damage(job.folder, new):
            raise OSError(f"read back, it is not what was written: {fault}")
        os.replace(temporary, path)
        files.flush(job.folder)
        return dataclasses.replace(new, file=shard.file)
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
        raise UserError(
            f"{path} cannot be written: {error}. Is the disk full, or the folder read-only?"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _serialised(example: dict[str, bytes]) -> bytes:
    """A tf.train.Example, as tensorflow-datasets stores it.

    Its own serializer leaves the order of the features to chance, and with it the file's bytes.
    """
    message = tf_example_pb2.Example()
    for key, value in example.items():
        message.features.feature[key].bytes_list.value.append(value)
    return message.SerializeToString(deterministic=True)


def _damage(folder: Path, shard: packed.Shard) -> str:
    """Reads a shard; returns what is wrong with it, or ""."""
    records = open_records([(folder / shard.file, shard.count)])
    for position, expected in enumerate(shard.checksums):
        try:
            good = packed.checksum(packed.parse(records[position])) == expected
            reason = "its checksum is not the one in the manifest"
        except PROCESS_ERRORS:
            raise
        except packed.RECORD_ERRORS as error:
            good, reason = False, str(error)
        if not good:
            return f"{shard.file}, record {position} is damaged: {reason}"
    return ""


def _changed_since(job: _Job, shard: packed.Shard, indices: Iterable[int]) -> bool:
    """Whether some file of the samples is newer than their shard."""
    if not isinstance(job.source, FileSource):
        return False
    written = (job.folder / shard.file).stat().st_mtime
    paths = (path for index in indices for path in job.source.files(index))
    return any(os.stat(path).st_mtime > written for path in paths)


def _compare(job: _Job, shard: packed.Shard, indices: Sequence[int]) -> None:
    """Refuses a shard whose samples are not those of the source any more."""
    path = job.folder / shard.file
    records = open_records([(path, shard.count)])

    def equal(index: int) -> bool:
        stored = packed.decode(packed.parse(records[index - indices[0]]), shard.file)
        sample = job.source[index]
        return stored["name"] == sample["name"] and all(
            np.array_equal(stored[key], sample[key]) for key in ("image", "label")
        )

    for index, good in zip(indices, job.samples(equal, indices)):
        if not good:
            raise UserError(
                f"{job.source.describe(index)} was changed after it was packed: {path}, record "
                f"{index - indices[0]} holds another picture or label. Delete {path} and start the "
                "same command again, which packs its samples anew; or pack into another folder."
            )


def _describe(folder: Path, data_config: Any, manifest: packed.Manifest) -> None:
    """Writes what tensorflow-datasets needs to know, for this split and all complete ones."""
    others = [
        one for one in packed.manifests(folder) if one.complete and one.split != manifest.split
    ]
    names = list(data_config.class_names)
    features = tfds.features.FeaturesDict({
        "name": tfds.features.Text(),
        "image": tfds.features.Image(shape=(None, None, 3)),
        # The names of a class label must differ from each other.
        "label": tfds.features.LabeledImage(
            labels=names if len(set(names)) == len(names) else len(names), encoding_format="png"
        ),
    })  # fmt: skip
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name=data_config.name, version=tfds.core.Version("1.0.0"), data_dir=str(folder),
            module_name=__name__,
        ),
        description="Packed by memseg_jax. In label maps, 255 means 'not labelled'.",
        features=features,
        disable_shuffling=True,
    )  # fmt: skip
    info.set_file_format("array_record")
    splits = []
    for one in sorted((*others, manifest), key=lambda one: one.split):
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=data_config.name, filetype_suffix="array_record",
            split=packed.split_name(one.split),
        )  # fmt: skip
        lengths = [shard.count for shard in one.shards]
        size = sum(shard.size for shard in one.shards)
        splits.append(tfds.core.SplitInfo(template.split, lengths, size, template))
    info.set_splits(tfds.core.SplitDict(splits))
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".packed-info-") as temporary:
            info.write_to_directory(temporary)
            # The one that names the splits comes last.
            for path in sorted(Path(temporary).iterdir(), key=lambda p: p.name == _INFO):
                os.replace(path, folder / path.name)
    except OSError as error:
        raise UserError(
            f"{folder}: the description for tensorflow-datasets cannot be written: {error}. All "
            "shards are kept: start the same command again afterwards."
        ) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps others from packing into it at the same time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The lock goes with the process, however that ends; the file stays.
        lock = open(folder / _LOCK, "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"config.data.packed: cannot write to {folder}: {error}. Give a folder that can be "
            "made or written."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is packing into this folder. Wait until it ends; "
                "one process is enough, however many will read the data."
            ) from None
        except OSError as error:
            raise UserError(
                f"{folder}: the folder cannot be locked against a second process ({error}). Pack "
                "into a folder of a local disk and copy that."
            ) from error
        for path in [path for pattern in _LEFTOVERS for path in folder.glob(pattern)]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        yield
