"""The description of the API in the OpenAPI format, which `GET /docs` shows."""

from typing import Any

from memseg_jax import __version__
from memseg_jax.serving.formats import FORMATS

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_NAMED = {
    "class_id": {"type": "integer"},
    "name": {"type": "string"},
    "pixels": {"type": "integer"},
    "confidence": {"type": "number", "description": "mean over the pixels, 0..1"},
}
_POINT = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
_ERRORS = {
    "400": "what was sent is not a picture, is damaged, or a parameter is wrong",
    "403": "the page that sends this is of another origin",
    "413": "too many bytes or pixels",
    "500": "the model failed on this picture",
    "503": "too many requests wait, or it took too long; header Retry-After: seconds",
}


def description(limits: Any) -> dict[str, Any]:
    """Returns the description, which can be written as JSON.

    Args:
        limits: `config.serve`.
    """
    body = {
        "required": True,
        "description": (
            f"A picture of at most {limits.max_megabytes:g} MB and {limits.max_megapixels:g} "
            "megapixels: JPEG, PNG, WebP, TIFF, BMP, GIF or PPM. Either the file is the body, "
            'whatever its content type, or it is the part "image" of a form.'
        ),
        "content": {
            "image/*": _BINARY,
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {"image": _BINARY["schema"]},
                }
            },
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "memseg_jax",
            "version": __version__,
            "description": "Segments pictures with one trained model.",
        },
        "paths": {
            "/segment": {"post": _segment(body)},
            "/look": {"post": _look(body)},
            "/model": {
                "get": {
                    "summary": "The classes, their colours, and the limits",
                    "responses": {"200": _json("", _object(classes=_array(_CLASS)))},
                }
            },
            "/health": {
                "get": {
                    "summary": "Whether pictures are answered",
                    "responses": {
                        "200": _json("they are", _HEALTH),
                        "503": _json("the server is stopping", _HEALTH),
                    },
                }
            },
            "/metrics": {
                "get": {
                    "summary": "Figures for Prometheus",
                    "responses": {
                        "200": {"description": "", "content": {"text/plain": {"schema": _TEXT}}}
                    },
                }
            },
        },
    }


_TEXT = {"type": "string"}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def _array(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _json(text: str, schema: Any) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


_CLASS = _object(
    class_id=_NAMED["class_id"], name=_TEXT, color=_array({"type": "integer", "maximum": 255})
)
_HEALTH = _object(status={"enum": ["ok", "stopping"]}, in_flight={"type": "integer"})


def _errors() -> dict[str, Any]:
    return {status: _json(text, _object(error=_TEXT)) for status, text in _ERRORS.items()}


def _segment(body: dict[str, Any]) -> dict[str, Any]:
    sizes = {"height": {"type": "integer"}, "width": {"type": "integer"}}
    run_lengths = _object(size=_POINT, counts=_array({"type": "integer"}))
    segment = _object(**_NAMED, polygons=_array(_array(_POINT)), segmentation=run_lengths)
    result = _json(
        "png: class ids as a palette picture. values: red is the class id, green the confidence "
        "times 255. polygons: per area its outline and those of its holes, through the centres of "
        "its outermost pixels. rle: per class COCO's uncompressed run lengths.",
        _object(**sizes, segments=_array(segment)),
    )
    result["content"]["image/png"] = _BINARY
    return {
        "summary": "Segment a picture",
        "parameters": [
            {
                "name": "format",
                "in": "query",
                "description": "form of the result",
                "schema": {"enum": list(FORMATS), "default": "png"},
            }
        ],
        "requestBody": body,
        "responses": {"200": result, **_errors()},
    }


def _look(body: dict[str, Any]) -> dict[str, Any]:
    number = {"type": "number"}
    found = _object(class_id=_NAMED["class_id"], name=_TEXT, probability=number)
    row = _object(class_id=_NAMED["class_id"], name=_TEXT, weight=number)
    look = {**_array(_array(number)), "type": ["array", "null"]}
    return {
        "summary": "Ask about one pixel: the probabilities of all classes, and what it reads",
        "parameters": [
            {
                "name": name,
                "in": "query",
                "required": True,
                "description": f"{name} of the pixel, from 0",
                "schema": {"type": "integer", "minimum": 0},
            }
            for name in ("row", "column")
        ],
        "requestBody": body,
        "responses": {
            "200": _json(
                "the classes, the most probable first; of a model with a memory also the classes "
                "whose rows are read, and where in the picture the pixel looks",
                _object(
                    row={"type": "integer"},
                    column={"type": "integer"},
                    classes=_array(found),
                    rows=_array(row),
                    attention=_object(memory=look, image=look),
                ),
            ),
            **_errors(),
        },
    }
