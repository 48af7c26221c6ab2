"""Reading the picture of a request, within limits, and checking who asks.

A picture is decoded by `memseg_jax.data.images`: only common formats, by their content and never by
a name that the client gave, and only after the size in the file's header is found to be allowed.
"""

from urllib.parse import urlsplit

import numpy as np
import python_multipart  # noqa: F401  starlette imports it when the first form comes
from starlette.requests import Request
from starlette.types import Message

from memseg_jax.data import images
from memseg_jax.errors import UserError

_LONGEST_SIDE = 2**14  # pixels: a picture of one row would be padded to many times its area
_LOCAL = {"localhost", "127.0.0.1", "::1"}


class Refused(Exception):
    """A request is answered with an error.

    Args:
        status: of HTTP.
        message: for the client.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after


async def read_body(request: Request, most: int) -> bytes:
    """Returns the image file that a request brings: its body, or the part "image" of a form.

    Args:
        request: whose body was not read yet.
        most: bytes of the body.

    Raises:
        Refused: there is none, or it is too large; nothing beyond the limit is kept.
    """
    too_large = Refused(
        413, f"the request is larger than {most / 1e6:g} MB (config.serve.max_megabytes)"
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise too_large
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > most:
            raise too_large
        return message

    limited = Request(request.scope, receive)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        data = await limited.body()
    else:
        # A broken form is starlette's HTTPException 400, which the app answers as it is.
        async with limited.form(max_files=1, max_fields=4) as form:
            part = form.get("image")
            if part is None or isinstance(part, str):
                raise Refused(400, 'the form has no file "image"')
            data = await part.read()
    if not data:
        raise Refused(400, "there is no picture in the request: its body is empty")
    return data


def decode(data: bytes, max_megapixels: float) -> np.ndarray:
    """Decodes a picture, upright.

    Args:
        data: an image file.
        max_megapixels: `config.serve.max_megapixels`.

    Returns:
        RGB uint8 [height, width, 3].

    Raises:
        Refused: it is not a picture, is damaged, or has too many pixels.
    """
    try:
        height, width = images.image_size("the picture", data)
        if height * width > max_megapixels * 1e6 or max(height, width) > _LONGEST_SIDE:
            raise Refused(
                413,
                f"the picture has {width}x{height} pixels; at most {max_megapixels:g} megapixels "
                f"(config.serve.max_megapixels) and {_LONGEST_SIDE} a side are allowed",
            )
        return images.read_image("the picture", data)
    except images.TooLargeError as error:  # so large that Pillow did not tell
        raise Refused(413, str(error)) from None
    except UserError as error:
        raise Refused(400, str(error)) from None


def check_host(request: Request, bound: str) -> None:
    """Refuses names of this machine that a foreign page may have made up (DNS rebinding).

    Args:
        request: any.
        bound: the address that the server listens at. If others can reach it, its names are not
            known, and all are allowed.

    Raises:
        Refused: with 421.
    """
    name = urlsplit(f"//{request.headers.get('host', '')}").hostname
    if bound in _LOCAL and name not in _LOCAL:
        raise Refused(421, "this server answers to localhost alone; see --host")


def check_origin(request: Request, allowed: str) -> None:
    """Refuses requests that a browser sends for a page of another origin.

    Args:
        request: any that costs something.
        allowed: the other origin that is allowed, or "".

    Raises:
        Refused: with 403.
    """
    origin = request.headers.get("origin")
    own = urlsplit(origin or "").netloc == request.headers.get("host")
    if origin is not None and not own and origin != allowed:
        raise Refused(403, "pages of this origin are not allowed (config.serve.origin)")
