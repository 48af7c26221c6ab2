"""Serving until a signal comes. What is imported here needs the extra [serve]."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Sequence
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from memseg_jax.serving.app import Server
from memseg_jax.serving.engine import Engine

# More connections than requests that are answered: the others are told to come back.
_CONNECTIONS = 256


def settings(app: ASGIApp, limits: Any) -> uvicorn.Config:
    """How uvicorn serves.

    Args:
        app: the application.
        limits: `config.serve`.
    """
    return uvicorn.Config(
        app,
        http="h11",  # it reads on after an early answer, so that the client gets it
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=limits.queue + _CONNECTIONS,
        timeout_graceful_shutdown=int(limits.seconds) + 1,
    )


def serve(engine: Engine, examples: Sequence[bytes], listener: socket.socket, host: str) -> None:
    """Serves until SIGTERM or SIGINT, and then answers what has been asked.

    Args:
        engine: the model.
        examples: files of pictures that the page offers.
        listener: bound, not listening yet.
        host: what it is bound to, as the user gave it.
    """
    limits: Any = engine.model.config.serve
    server = Server(engine, examples, host)
    http = uvicorn.Server(settings(server.app, limits))
    # Uvicorn's own handling ends the process by the signal once more, with its status.
    http.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    before = {
        number: signal.signal(number, http.handle_exit)
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    address, port = listener.getsockname()[:2]
    name = f"[{address}]" if ":" in address else address
    listener.listen()  # so that whoever reads the next line can connect
    print(f"serving at http://{name}:{port}/ (Ctrl-C stops)", flush=True)
    try:
        asyncio.run(http.serve([listener]))
    finally:
        server.batcher.close()
        for number, handler in before.items():
            signal.signal(number, handler)
