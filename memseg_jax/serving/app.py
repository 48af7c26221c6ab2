"""What is answered to whom: the routes, the queue's limit, the time limit, the headers."""

import asyncio
import importlib.resources
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memseg_jax import __version__
from memseg_jax.serving import bodies, formats
from memseg_jax.serving.batcher import Batcher
from memseg_jax.serving.bodies import Refused
from memseg_jax.serving.engine import Engine, Look
from memseg_jax.serving.measures import CONTENT_TYPE, Measures
from memseg_jax.serving.openapi import description

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_COUNTED = {"/", "/segment", "/look", "/model", "/health", "/metrics"}
_HEADERS = {
    # Nothing is loaded from or sent to another host, and nothing inline runs.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' blob: data:; media-src 'self' blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "cache-control": "no-store",
}


class Server:
    """The answers of one model.

    Args:
        engine: the model.
        examples: PNG or JPEG files that the page offers.
        bound: the address that the server listens at.

    Attributes:
        app: the ASGI application.
        measures: its figures.
        batcher: the thread with the devices; whoever stops the server closes it.
    """

    def __init__(self, engine: Engine, examples: Sequence[bytes] = (), bound: str = "127.0.0.1"):
        self._engine, self._examples = engine, examples
        self._limits: Any = engine.model.config.serve
        self._most_bytes = int(self._limits.max_megabytes * 1e6)
        self._origin = self._limits.origin.rstrip("/")  # as browsers write it
        self._in_flight = 0
        self.measures = Measures()
        engine.on_pass = self.measures.add_pass
        self.batcher = Batcher(engine.run, engine.most)
        self.app = Starlette(
            routes=[
                Route("/segment", self._segment, methods=["POST"]),
                Route("/look", self._look, methods=["POST"]),
                Route("/model", self._model),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/openapi.json", self._openapi),
                Route("/examples/{number:int}", self._example),
                *[Route(path, _static(name)) for path, name in _pages()],
            ],
            middleware=[
                Middleware(_Outermost, self.measures, bound),
                Middleware(
                    CORSMiddleware,
                    allow_origins=[self._origin] if self._origin else [],
                    allow_methods=["GET", "POST"],
                    expose_headers=["Retry-After"],
                ),
            ],
            exception_handlers={Refused: _refused, HTTPException: _http_error},
        )

    # ---- What costs something ----

    async def _segment(self, request: Request) -> Response:
        form = request.query_params.get("format", "png")
        if form not in formats.FORMATS:
            raise Refused(400, f"format={form[:20]}: expected {', '.join(formats.FORMATS)}")

        async def answer() -> Response:
            image = await self._picture(request)
            prediction = await self._computed(self._engine.kind(image), image)
            return await run_in_threadpool(self._formatted, form, prediction)

        return await self._admitted(request, answer)

    async def _look(self, request: Request) -> Response:
        pixel = [request.query_params.get(name, "") for name in ("row", "column")]
        if not all(text.isdecimal() and len(text) < 6 for text in pixel):
            raise Refused(400, "expected ?row=ROW&column=COLUMN, whole numbers from 0")
        row, column = map(int, pixel)

        async def answer() -> Response:
            image = await self._picture(request)
            height, width = image.shape[:2]
            if row >= height or column >= width:
                raise Refused(400, f"the picture has {height} rows and {width} columns")
            return JSONResponse(await self._computed(None, Look(image, (row, column))))

        return await self._admitted(request, answer)

    async def _admitted(
        self, request: Request, answer: Callable[[], Awaitable[Response]]
    ) -> Response:
        """Answers within the limits of the queue and of time.

        What is held in memory is bounded by the places of the queue, as nothing of a request is
        read before it has one.
        """
        bodies.check_origin(request, self._origin)
        if self._in_flight >= self._limits.queue or not self.batcher.alive:
            raise Refused(503, f"{self._in_flight} requests are waiting", retry_after=1)
        self._in_flight += 1
        self.measures.in_flight.set(self._in_flight)
        try:
            async with asyncio.timeout(self._limits.seconds):
                return await answer()
        except TimeoutError:
            message = f"there was no result within {self._limits.seconds:g} s"
            raise Refused(503, message, retry_after=5) from None
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        finally:
            self._in_flight -= 1
            self.measures.in_flight.set(self._in_flight)

    async def _picture(self, request: Request) -> np.ndarray:
        data = await bodies.read_body(request, self._most_bytes)
        return await run_in_threadpool(bodies.decode, data, self._limits.max_megapixels)

    async def _computed(self, kind: Any, item: Any) -> Any:
        try:
            job: Future = self.batcher.submit(kind, item)
        except RuntimeError:
            raise Refused(503, "the server is stopping", retry_after=5) from None
        try:
            # Cancelled with this request, it leaves the queue if it has not begun.
            return await asyncio.wrap_future(job)
        except (asyncio.CancelledError, TimeoutError):
            raise
        except BaseException:  # the batcher has logged it
            raise Refused(500, "the model failed on this picture; the server's log says how") from (
                None
            )

    def _formatted(self, form: str, prediction: Any) -> Response:
        model = self._engine.model
        if form == "png":
            return Response(formats.label_png(prediction, model.palette), media_type="image/png")
        if form == "values":
            return Response(formats.values_png(prediction), media_type="image/png")
        make = formats.polygons if form == "polygons" else formats.run_lengths
        return JSONResponse(make(prediction, model.class_names))

    # ---- What costs nothing ----

    async def _model(self, request: Request) -> Response:
        model, limits = self._engine.model, self._limits
        settings: Any = model.config
        return JSONResponse(
            {
                "name": f"{settings.model.backbone}, step {model.step}",
                "classes": [
                    {"class_id": k, "name": name, "color": model.palette[k].tolist()}
                    for k, name in enumerate(model.class_names)
                ],
                "max_megabytes": limits.max_megabytes,
                "max_megapixels": limits.max_megapixels,
                "examples": len(self._examples),
                "version": __version__,
            }
        )

    async def _health(self, request: Request) -> Response:
        alive = self.batcher.alive
        return JSONResponse(
            {"status": "ok" if alive else "stopping", "in_flight": self._in_flight},
            status_code=200 if alive else 503,
        )

    async def _metrics(self, request: Request) -> Response:
        return Response(self.measures.text(), media_type=CONTENT_TYPE)

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(description(self._limits))

    async def _example(self, request: Request) -> Response:
        number = request.path_params["number"]
        if number >= len(self._examples):
            raise HTTPException(404)
        data = self._examples[number]
        kind = "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
        return Response(data, media_type=kind)


class _Outermost:
    """Adds the headers that every answer has, counts it, and refuses foreign names of the host."""

    def __init__(self, app: ASGIApp, measures: Measures, bound: str):
        self._app, self._measures, self._bound = app, measures, bound

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, status, request = time.monotonic(), 500, Request(scope)

        async def with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = [(k.encode(), v.encode()) for k, v in _HEADERS.items()]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        try:
            bodies.check_host(request, self._bound)
            await self._app(scope, receive, with_headers)
        except Refused as error:
            await (await _refused(request, error))(scope, receive, with_headers)
        finally:
            route = scope["path"] if scope["path"] in _COUNTED else "other"
            self._measures.requests.labels(route, str(status)).inc()
            self._measures.seconds.labels(route).observe(time.monotonic() - start)


def _pages() -> list[tuple[str, str]]:
    """The paths of the page's files: only these names are ever opened."""
    folder = importlib.resources.files("memseg_jax.serving") / "page"
    names = sorted(x.name for x in folder.iterdir() if x.name.partition(".")[2] in _TYPES)
    return [
        ("/", "index.html"),
        ("/docs", "docs.html"),
        *[(f"/page/{name}", name) for name in names],
    ]


def _static(name: str) -> Callable[[Request], Awaitable[Response]]:
    folder = importlib.resources.files("memseg_jax.serving") / "page"
    content, kind = (folder / name).read_bytes(), _TYPES[name.partition(".")[2]]

    async def answer(request: Request) -> Response:
        return Response(content, media_type=kind)

    return answer


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    return JSONResponse({"error": error.message}, error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)
