"""What serving costs: many clients over HTTP, beside the bare predictor on the same pictures.

    python -m benchmarks.serving --workdir runs/quickstart
    python -m benchmarks.serving --config MINE.py --workdir runs/mine --requests 400 --clients 32

The real program is started as a user starts it. Clients ask one picture after the other, each on a
connection of its own, without a pause: generated pictures of the size of the training crops. They
run on the same cores as the server. Rounds alternate with `memseg_jax.load(...).predict` on the
same pictures. An answer other than 200 counts as lost.
"""

import contextlib
import http.client
import io
import json
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

import memseg_jax
from benchmarks import measure
from memseg_jax import command_line
from memseg_jax.data import shapes
from memseg_jax.errors import UserError

FLAGS = {
    "workdir": "folder of a run (required)",
    "requests": "how many, in each round (default: 200)",
    "clients": "how many ask at a time (default: 16)",
    "rounds": "how often, in turn with the bare predictor (default: 3)",
}
_PATIENCE = 600  # seconds for one answer


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    values = measure.parse(argv, FLAGS, __doc__, config=True, default_config=measure.SMALL_CONFIG)
    if not values.workdir:
        raise UserError("--workdir is required; --help says what it is")
    requests = measure.number("requests", values.requests, 200)
    clients = measure.number("clients", values.clients, 16)
    rounds = measure.number("rounds", values.rounds, 3)
    size = tuple(values.config.augment.crop)
    pictures = [shapes.Shapes("serving", requests, size)[n]["image"] for n in range(requests)]
    files = [_png(picture) for picture in pictures]
    model = memseg_jax.load(values.workdir, values.config)
    model.predict(pictures)  # compiles
    given = [word for word in argv[1:] if word.split("=")[0].startswith("--config.")]
    arguments = [f"--config={values.config_flag}", *given, f"--workdir={values.workdir}"]
    statuses: Counter[int] = Counter()
    latencies: list[float] = []
    served, bare = [], []
    with _program(arguments) as port:
        for number in range(rounds):
            start = time.monotonic()
            with ThreadPoolExecutor(clients) as pool:
                parts = [files[n::clients] for n in range(clients)]
                for answers in pool.map(_ask_all, parts, [port] * clients):
                    statuses.update(status for status, _ in answers)
                    latencies += [seconds for _, seconds in answers]
            served.append(requests / (time.monotonic() - start))
            start = time.monotonic()
            model.predict(pictures)
            bare.append(requests / (time.monotonic() - start))
            print(f"round {number + 1}: {served[-1]:.1f} and {bare[-1]:.1f} images/s", flush=True)
    result = {
        "benchmark": "serving",
        "config": values.config_flag,
        "size": size,
        "requests": requests * rounds,
        "clients": clients,
        "lost": sum(count for status, count in statuses.items() if status != 200),
        "p50": float(np.percentile(latencies, 50)),
        "p95": float(np.percentile(latencies, 95)),
        "images_per_second": statistics.median(served),
        "bare_images_per_second": statistics.median(bare),
        "ratio": statistics.median(x / y for x, y in zip(served, bare)),
    }
    print(
        f"{result['requests']} requests of {clients} clients, {result['lost']} lost: "
        f"p50 {1000 * result['p50']:.0f} ms, p95 {1000 * result['p95']:.0f} ms, "
        f"{result['images_per_second']:.1f} images/s; bare predictor "
        f"{result['bare_images_per_second']:.1f} images/s (ratio {result['ratio']:.2f})"
    )
    print(json.dumps(result), flush=True)
    return 0


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


@contextlib.contextmanager
def _program(arguments: Sequence[str]) -> Iterator[int]:
    """Starts the server; yields its port, and stops it as an operator does."""
    command = [sys.executable, "-m", "memseg_jax.main", *arguments, "--mode=serve", "--port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        said = process.stdout.readline()
        if not said.startswith("serving at http://127.0.0.1:"):
            raise UserError("the server did not start; it says above why")
        yield int(said.split(":")[2].split("/")[0])
        process.send_signal(signal.SIGTERM)
        if process.wait(_PATIENCE) != 0:
            raise UserError(f"the server ended with status {process.returncode}")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _ask_all(files: Sequence[bytes], port: int) -> list[tuple[int, float]]:
    """One client: status and seconds of each request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)
    answers = []
    with contextlib.closing(connection):
        for file in files:
            start = time.monotonic()
            connection.request("POST", "/segment?format=rle", file)
            response = connection.getresponse()
            response.read()
            answers.append((response.status, time.monotonic() - start))
    return answers


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
