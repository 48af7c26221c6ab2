"""A server in a thread of the test's process, over a model that computes nothing."""

import contextlib
import http.client
import io
import json
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from memseg_jax.inference import Prediction
from tests.tiny_config import CLASSES, COLOURS, get_config

PATIENCE = 60  # seconds; what is waited for takes milliseconds


class FakeEngine:
    """Segments a picture by its red values: class 0, 1 or 2, with a confidence of 0.75."""

    most = 4

    def __init__(self, **limits):
        config = get_config()
        config.serve.update(limits)
        self.model = SimpleNamespace(
            config=config, class_names=CLASSES, palette=np.array(COLOURS, np.uint8), step=7
        )
        self.batches = []

    def kind(self, image):
        return image.shape

    def run(self, kind, items):
        self.batches.append(len(items))
        if kind is None:
            return [self.look(x.image, x.pixel) for x in items]
        return [self.segment(x) for x in items]

    def look(self, image, pixel):
        first = int(self.segment(image).label[pixel])
        ordered = [first, *({0, 1, 2} - {first})]
        classes = [
            {"class_id": k, "name": CLASSES[k], "probability": p}
            for k, p in zip(ordered, (0.75, 0.2, 0.05))
        ]
        rows = [{"class_id": k, "name": CLASSES[k], "weight": w} for k, w in ((2, 0.9), (1, 0.1))]
        attention = {"memory": [[0.0, 0.25], [0.25, 0.5]], "image": None}
        found = {"row": pixel[0], "column": pixel[1], "classes": classes}
        return found | {"rows": rows, "attention": attention}

    def segment(self, image):
        label = np.minimum(image[..., 0] // 100, 2)
        return Prediction(None, label, np.full(label.shape, 0.75, np.float32))


class Blocked(FakeEngine):
    """Computes when `go` is set; `begun` says that it wants to."""

    def __init__(self, **limits):
        super().__init__(**limits)
        self.begun, self.go = threading.Event(), threading.Event()

    def run(self, kind, items):
        self.begun.set()
        assert self.go.wait(PATIENCE)
        return super().run(kind, items)


@contextlib.contextmanager
def running(engine, bound="127.0.0.1", examples=()):
    """Serves at a free port; yields the `Server`, which gets `port`."""
    uvicorn = pytest.importorskip("uvicorn")
    from memseg_jax.serving.app import Server
    from memseg_jax.serving.http_server import settings

    server = Server(engine, examples, bound)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server.port = listener.getsockname()[1]
        http_server = uvicorn.Server(settings(server.app, engine.model.config.serve))
        thread = threading.Thread(target=http_server.run, args=([listener],))
        thread.start()
        try:
            yield server
        finally:
            if hasattr(engine, "go"):
                engine.go.set()
            http_server.should_exit = True
            thread.join(PATIENCE)
            server.batcher.close()
            assert not thread.is_alive()


def ask(server, method, path, body=None, headers=()):
    """One request; returns status, headers and body, which is decoded if it is JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        content = response.read()
        if response.getheader("content-type") == "application/json":
            content = json.loads(content)
        return response.status, response.headers, content


def png(array):
    """An array as the content of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return file.getvalue()


def wait_until(reached):
    """Returns when `reached()` is true; fails if it never is."""
    end = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)
