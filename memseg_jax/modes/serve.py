"""The serve mode: a web page and an HTTP API over one loaded model."""

import contextlib
import importlib
import io
import itertools
import logging
import socket
from collections.abc import Iterator
from typing import Any

import ml_collections
from PIL import Image

from memseg_jax import config_rules
from memseg_jax.data import images, shapes
from memseg_jax.errors import UserError
from memseg_jax.runtime import files
from memseg_jax.serving import engine as engines

log = logging.getLogger(__name__)

_EXAMPLES = 6
_SHOWN = (".jpg", ".jpeg", ".png")  # that every browser shows


def run(
    config: ml_collections.ConfigDict,
    workdir: str,
    checkpoint: str | int = "best",
    examples: str | None = None,
    host: str = "127.0.0.1",
    port: str = "8000",
) -> int:
    """Serves until SIGTERM or Ctrl-C, and then answers what has been asked.

    Args:
        config: the whole config; `config.serve` has the limits.
        workdir: folder of the run or of a converted model.
        checkpoint: "best", "last" or a step.
        examples: pictures that the page offers: a file, a folder or a pattern; None: generated
            ones, for a model of generated images.
        host: address to listen at. Any but 127.0.0.1 lets other machines ask.
        port: 0: one that is free.

    Returns:
        The exit status: 0.

    Raises:
        UserError: a package is missing, the address cannot be had, or the model not be loaded.
    """
    config_rules.check(config)
    http_server = _import_server()
    with _bound(host, port) as listener:  # before the model is loaded, which takes longer
        offered = list(_examples(config, examples))
        engine = engines.load(workdir, config, checkpoint)
        log.info("loaded %r", engine.model)
        engine.warm_up()
        http_server.serve(engine, offered, listener, host)
    log.info("stopped; all that was asked is answered")
    return 0


def _import_server() -> Any:
    try:
        return importlib.import_module("memseg_jax.serving.http_server")
    except ModuleNotFoundError as error:
        if str(error.name).startswith("memseg_jax"):
            raise
        raise UserError(
            f'--mode serve needs the package {error.name}: pip install "memseg_jax[serve]"'
        ) from None


@contextlib.contextmanager
def _bound(host: str, port: str) -> Iterator[socket.socket]:
    if not port.isdecimal() or int(port) > 65535:
        raise UserError(f"--port {port}: expected a number from 0 (any that is free) to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)  # it listens when the model can answer
    except OSError as error:
        raise UserError(
            f"cannot listen at {host}, port {port} ({error.strerror}). Choose another with --port "
            "or --host; --port 0 takes one that is free."
        ) from None
    with listener:
        yield listener


def _generated(config: ml_collections.ConfigDict) -> Iterator[bytes]:
    """Images of the evaluation split, which the model was never trained on."""
    data: Any = config.data
    source = shapes.open_split(data, data.eval_split)
    for index in range(min(_EXAMPLES, len(source))):
        file = io.BytesIO()
        Image.fromarray(source[index]["image"]).save(file, format="PNG")
        yield file.getvalue()


def _examples(config: ml_collections.ConfigDict, pattern: str | None) -> Iterator[bytes]:
    """The files of some pictures."""
    data: Any = config.data
    if pattern is None:
        if data.name == "shapes":
            yield from _generated(config)
        return
    path = files.place(pattern, "--input")
    if files.is_file(path):
        found = [path]
    else:
        found = files.files_below(path) if files.exists(path) else files.matching(path)
    found = [x for x in found if x.suffix.lower() in _SHOWN]
    if not found:
        raise UserError(
            f"--input={pattern}: no {', '.join(_SHOWN)} file found to offer as an example"
        )
    for place in itertools.islice(sorted(found, key=str), _EXAMPLES):
        content = files.read_bytes(place)
        images.image_size(place, content)  # raises if it is not a picture
        yield content
