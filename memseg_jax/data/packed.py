"""Packed data: the samples of any data set in a few large files, read like its folders.

    <config.data.packed>/<data set>-<split>.array_record-00003-of-00016    the samples
    <config.data.packed>/<split>.packed.json                               what belongs to a split
    <config.data.packed>/{dataset_info,features}.json, label.labels.txt    for tensorflow-datasets

The folder may be in a bucket: its files are copied while they are read (see `staging`), and what is
not copied yet, or not at all, is read record by record (see `records`).

Mode pack writes the folder; with `config.data.packed` set, `open_split` reads it. A record is a
tf.train.Example: the bytes of the image file, the class map as a PNG file, and the sample's name.
The image is decoded as in `images.read_image`, so a sample is the same array either way.

While tensorflow-datasets is imported, no other thread of the process can import anything, and
Pillow imports as it decodes. So all imports are here, which come before any thread that reads; and
this module is imported only where there is packed data, because they take a second or two.
"""

import bisect
import dataclasses
import functools
import itertools
import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from memseg_jax.data import staging
from memseg_jax.data.images import read_image
from memseg_jax.data.records import BucketRecords, open_records
from memseg_jax.errors import PROCESS_ERRORS, UserError
from memseg_jax.runtime import files
from memseg_jax.runtime.text import first_few

FORMAT = 1
MANIFEST = ".packed.json"  # ends the names of manifests
# What array_record and protobuf raise for damaged files, and a record without its features.
RECORD_ERRORS = (RuntimeError, DecodeError, LookupError)
_KEYS = ("name", "image", "label")
# The fields of config.data that do not decide what the samples are.
_NO_MATTER = frozenset({
    "root", "packed", "stage", "stage_gb", "workers", "threads", "prefetch", "train_split",
    "eval_split", "palette",
})  # fmt: skip
# What fields that came later were before, where that is not empty: manifests of then lack them.
_EARLIER = {"unknown_color": "error", "outside_polygons": "ignore"}


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of samples.

    Attributes:
        file: its name in the folder.
        count: number of samples.
        size: bytes of the file; 0 as long as it is not written.
        names: of the samples.
        checksums: of the samples, see `checksum`.
    """

    file: str
    count: int
    size: int = 0
    names: Sequence[str] = ()
    checksums: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is known about a packed split.

    Attributes:
        split: its name in the config.
        settings: the fields of `config.data` that decide what the samples are.
        fingerprint: of the source that was packed.
        has_labels: of that source.
        official_size: of that source.
        shards: all that belong to the split, in order.
        complete: whether all of them were written.
        groups: of that source, see `memseg_jax.data`.
    """

    split: str
    settings: Mapping[str, Any]
    fingerprint: str
    has_labels: bool
    official_size: int | None
    shards: Sequence[Shard]
    complete: bool = False
    groups: Sequence[int] = ()

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(shard.count for shard in self.shards)


@dataclasses.dataclass(frozen=True, repr=False)
class PackedSource:
    """Samples of one packed split; see `memseg_jax.data` for the interface.

    Attributes:
        folder: on a disk or in a bucket.
        manifest: of the split.
        copies: of a folder in a bucket: where copies of its files are, or appear, on this machine;
            "": there are none.
    """

    folder: str
    manifest: Manifest
    copies: str = ""

    def __len__(self) -> int:
        return self.manifest.count

    def __getitem__(self, index: int) -> dict:
        """Reads, checks and decodes one sample; see `file_source.FileSource`."""
        where, shard, position = self._locate(index)
        expected = shard.checksums[position]
        try:
            try:
                example = _sound(self._records[where], expected)
            except RECORD_ERRORS:
                if not self._in_bucket:
                    raise
                # The copy may be damaged, or the answer to a request.
                example = _sound(self._records.read_again(where), expected)
        except PROCESS_ERRORS:
            raise
        except RECORD_ERRORS as error:
            raise self._damaged(index, str(error)) from None
        except OSError as error:
            raise UserError(f"{self.describe(index)} cannot be read: {error}.") from None
        return decode(example, self.describe(index))

    def expect(self, indices: Sequence[int]) -> None:
        """Hears which samples are asked for next; in a bucket, they are read ahead."""
        if self._in_bucket:
            self._records.expect(self._locate(index)[0] for index in indices)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} samples, {self.fingerprint()})"

    def __getstate__(self) -> dict:
        """Leaves out the open files: a worker process opens its own."""
        return {"folder": self.folder, "manifest": self.manifest, "copies": self.copies}

    @property
    def has_labels(self) -> bool:
        """Whether there is anything to train or to score on."""
        return self.manifest.has_labels

    @property
    def groups(self) -> Sequence[int]:
        """Numbers of consecutive samples that belong together; empty if each is its own."""
        return self.manifest.groups

    @property
    def official_size(self) -> int | None:
        """How many samples the split should have; None if that is not known."""
        return self.manifest.official_size

    def describe(self, index: int) -> str:
        """Returns the shard and the record of sample `index`."""
        _, shard, position = self._locate(index)
        return f"{self.folder}/{shard.file}, record {position} (sample {shard.names[position]})"

    def fingerprint(self) -> str:
        """Returns the fingerprint of the source that was packed."""
        return self.manifest.fingerprint

    def _locate(self, index: int) -> tuple[int, Shard, int]:
        """Returns the index counted from 0, its shard, and its position there."""
        where = range(len(self))[index]
        which = bisect.bisect_right(self._starts, where) - 1
        return where, self.manifest.shards[which], where - self._starts[which]

    @functools.cached_property
    def _starts(self) -> list[int]:
        counts = (shard.count for shard in self.manifest.shards)
        return list(itertools.accumulate(counts, initial=0))[:-1]

    @functools.cached_property
    def _in_bucket(self) -> bool:
        return files.in_bucket(files.place(self.folder))

    @functools.cached_property
    def _records(self) -> Sequence[bytes] | BucketRecords:
        folder, shards = files.place(self.folder), self.manifest.shards
        if self._in_bucket:
            return BucketRecords(folder, shards, Path(self.copies) if self.copies else None)
        return open_records([(folder / shard.file, shard.count) for shard in shards])

    def _damaged(self, index: int, reason: str) -> UserError:
        return UserError(
            f"{self.describe(index)} is damaged: {reason}. Copy the file again from where it was "
            "packed; or run --mode pack with the same config where the folders of the data set "
            "are, which writes damaged files again."
        )


def parse(record: bytes) -> dict[str, bytes]:
    """Returns the `name`, the `image` and the `label` of a record, each as its file's bytes."""
    features = tf_example_pb2.Example.FromString(record).features.feature
    return {key: features[key].bytes_list.value[0] for key in _KEYS}


def checksum(example: Mapping[str, bytes]) -> int:
    """Returns the CRC-32 of what is in a record, whatever order it is stored in."""
    value = 0
    for key in _KEYS:
        value = zlib.crc32(example[key], value)
    return value


def _sound(record: bytes, expected: int) -> dict[str, bytes]:
    """Parses a record whose checksum is known."""
    example = parse(record)
    if checksum(example) != expected:
        raise RuntimeError("its checksum is not the one in the manifest")
    return example


def decode(example: Mapping[str, bytes], where: str) -> dict:
    """Turns a record into a sample.

    Args:
        example: from `parse`; its checksum was compared.
        where: for messages.

    Returns:
        `dict(image=uint8 [height, width, 3] RGB, label=uint8 [height, width], name=str)`.
    """
    # OpenCV is the faster reader of PNG files, and they are our own: 8 bits, grey.
    label = cv2.imdecode(np.frombuffer(example["label"], np.uint8), cv2.IMREAD_UNCHANGED)
    image = read_image(where, example["image"])
    return {"image": image, "label": label, "name": os.fsdecode(example["name"])}


def open_packed(data_config, split: str) -> PackedSource:
    """Opens a packed split.

    Args:
        data_config: `config.data`; `packed` is the folder. One in a bucket begins to be copied to
            `stage`, in the background.
        split: name of the split.

    Returns:
        The source.

    Raises:
        UserError: the split is not packed, not complete, or packed with other settings.
    """
    folder = folder_of(data_config)
    again = (
        "Write it with --mode pack, the same config, and config.data.root set to the folders of "
        "the data set; or leave config.data.packed empty to read those."
    )
    try:
        there = {content.name: content for content in files.contents(folder)}
    except OSError as error:
        raise UserError(f"config.data.packed: {folder} cannot be listed: {error}") from error
    if not there and not files.exists(folder):
        raise UserError(f"config.data.packed: {folder} does not exist. {again}")
    if not there and not files.in_bucket(folder) and not folder.is_dir():
        raise UserError(f"config.data.packed: {folder} is not a folder. {again}")
    manifest = manifest_of(folder, split)
    if manifest is None:
        splits = ", ".join(one.split for one in manifests(folder)) or "no packed split"
        raise UserError(
            f"{folder}: split {split!r} is not packed there (config.data.packed); the folder holds "
            f"{splits}. {again}"
        )
    check_settings(folder, manifest, data_config)
    if not manifest.complete:
        done = sum(shard.size > 0 for shard in manifest.shards)
        raise UserError(
            f"{folder}: split {split!r} is not completely packed: {done} of "
            f"{len(manifest.shards)} shards are there. Run --mode pack with the same config: it "
            "goes on where it was interrupted."
        )
    problems = [text for shard in manifest.shards if (text := misses(shard, there))]
    if problems:
        raise UserError(
            f"{folder}: {len(problems)} of {len(manifest.shards)} shards of split {split!r} are "
            f"missing or incomplete: {'; '.join(first_few(problems))}. Copy the folder again "
            "from where it was packed; or run --mode pack with the same config where the folders "
            "of the data set are, which writes missing and damaged files again."
        )
    copies = None
    if files.in_bucket(folder):
        wanted = [there[shard.file] for shard in manifest.shards]
        copies = staging.copy_in_background(folder, wanted, data_config, "config.data.packed")
    return PackedSource(str(folder), manifest, str(copies or ""))


def folder_of(data_config) -> files.Place:
    """Returns the folder that `config.data.packed` names."""
    return files.absolute(data_config.packed, "config.data.packed")


def split_name(split: str) -> str:
    """Returns a split's name for file names and for tensorflow-datasets, which reserves "all"."""
    name = re.sub(r"\W+", "_", split)
    return f"{name}_" if name == "all" else name


def manifest_path(folder: files.Place, split: str) -> files.Place:
    """Returns the file with a split's manifest."""
    return folder / f"{split_name(split)}{MANIFEST}"


def manifests(folder: files.Place) -> list[Manifest]:
    """Reads the manifests of all splits in a folder, complete or not; see `read_manifest`."""
    there = [name for name in files.names(folder) if name.endswith(MANIFEST) and name[0] != "."]
    return [read_manifest(folder / name) for name in there]


def manifest_of(folder: files.Place, split: str) -> Manifest | None:
    """Reads the manifest of a split; None if there is none; see `read_manifest`."""
    path = manifest_path(folder, split)
    if not files.is_file(path):
        return None
    manifest = read_manifest(path)
    if manifest.split != split:
        raise UserError(
            f"{path} is for split {manifest.split!r}; split {split!r} would have the same file. "
            "Pack them into two folders."
        )
    return manifest


def read_manifest(path: files.Place) -> Manifest:
    """Reads a manifest.

    Raises:
        UserError: the file is damaged or from a later version.
    """
    try:
        fields = json.loads(files.read_bytes(path).decode("utf-8"))
        version = fields.pop("format")
        if version != FORMAT:
            raise UserError(
                f"{path}: packed in format {version}; this version of memseg_jax reads {FORMAT}. "
                "Use the version it was packed with, or pack into another folder."
            )
        shards = tuple(Shard(**shard) for shard in fields.pop("shards"))
        return Manifest(**fields, shards=shards)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: the manifest of a packed split cannot be read ({error}). Copy it again from "
            "where it was packed; or delete it and run --mode pack with the same config."
        ) from None


def write_manifest(folder: files.Place, manifest: Manifest) -> None:
    """Writes or replaces the manifest of a split."""
    text = json.dumps({"format": FORMAT} | dataclasses.asdict(manifest))
    files.write_text(manifest_path(folder, manifest.split), text)


def settings_of(data_config) -> dict[str, Any]:
    """Returns the fields of `config.data` that decide what the samples are, as JSON has them."""
    fields = {key: value for key, value in data_config.items() if key not in _NO_MATTER}
    return json.loads(json.dumps(fields))


def check_settings(folder: files.Place, manifest: Manifest, data_config) -> None:
    """Refuses data that was packed with settings other than the config's.

    Raises:
        UserError: names every field that differs, with both values.
    """
    now = settings_of(data_config)
    then = {field: _EARLIER.get(field, type(value)()) for field, value in now.items()}
    then |= {field: value for field, value in manifest.settings.items() if field in now}
    differences = [
        f"config.data.{field} {_difference(then[field], now[field])}"
        for field in sorted(now)
        if then[field] != now[field]
    ]
    if differences:
        raise UserError(
            f"{folder} (config.data.packed) was packed with settings other than the config's: "
            + "; ".join(differences)
            + ". Give the folder that belongs to the config, correct the config, or pack into "
            "another folder with --mode pack."
        )


def _difference(packed: Any, now: Any) -> str:
    if isinstance(packed, list) and isinstance(now, list):
        if len(packed) != len(now):
            return f"has {len(now)} entries, and had {len(packed)} when it was packed"
        index = next(k for k, pair in enumerate(zip(packed, now)) if pair[0] != pair[1])
        return f"has {now[index]!r} at {index}, and had {packed[index]!r} when it was packed"
    return f"is {now!r}, and was {packed!r} when it was packed"


def misses(shard: Shard, there: Mapping[str, files.Content]) -> str:
    """Says what is wrong with the size of a shard's file; "" if nothing is.

    Args:
        shard: of the manifest.
        there: the files of the folder, by name.
    """
    if shard.file not in there:
        return f"{shard.file} (No such file)"
    size = there[shard.file].size
    return "" if size == shard.size else f"{shard.file} ({size} bytes instead of {shard.size})"
