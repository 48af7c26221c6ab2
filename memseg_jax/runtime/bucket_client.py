"""The client of buckets: one for all, which tries again what fails for a while.

Through gcsfs go the requests of `memseg_jax.runtime.bucket`, and those that orbax (the markers and
descriptions of checkpoints) and JAX (compiled programs) make by themselves. All of them follow the
rules of this file. The arrays of checkpoints go through TensorStore, which has rules of its own: it
tries again 32 times, with pauses of up to half a minute.

An answer that tells of a passing trouble (429: too many requests, 5xx: the service is not well), an
answer that does not come, and a connection that breaks are followed by another try, after pauses
that grow. A log line says so once for all the requests of such a time.
"""

import asyncio
import functools
import logging
import math
import os
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import aiohttp
from gcsfs.retry import HttpError

from memseg_jax.runtime.text import format_duration

log = logging.getLogger(__name__)


class Patience(NamedTuple):
    """How long is waited for what, in seconds.

    Attributes:
        first_pause: before the second try; each further pause is twice as long, and a bit of
            chance keeps many hosts from coming back all at once.
        longest_pause: what the pauses grow to.
        answer: for one answer, the sending of what is to be written included.
        silence: without a byte, while what was asked for comes in.
        give_up: after which a request counts as failed.
    """

    first_pause: float = 0.25
    longest_pause: float = 30.0
    answer: float = 120.0
    silence: float = 60.0
    give_up: float = float(os.environ.get("MEMSEG_BUCKET_SECONDS") or 300)


PATIENCE = Patience()


class GaveUp(Exception):
    """A request was made again and again, in vain; gcsfs does not begin anew after it."""


# What gcsfs raises, also to the libraries below, if the trouble does not pass.
ERRORS = (GaveUp, HttpError, aiohttp.ClientError, TimeoutError)
_PASSING = frozenset({408, 429, 500, 502, 503, 504})
_WITH_NEW_TOKENS = 3  # tries after which an account that is not known (401) is not going to be
_TOLD_AT_TRY = 3  # one or two failures happen every day
_APART = 60.0  # seconds without a failure after which the next one is another time of trouble


@functools.cache
def file_system() -> Any:
    """The client, of gcsfs."""
    import fsspec

    # gcsfs reports what it raises once more, with a traceback.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    # TensorStore reads these when it makes its first request. By default it waits for ever.
    os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", "30")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", f"{PATIENCE.answer:.0f}")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    # For all who use gcsfs, the libraries below included.
    settings = fsspec.config.conf.setdefault("gcs", {})
    # Other programs and other hosts write there, too.
    settings.setdefault("use_listings_cache", False)
    settings.setdefault("session_kwargs", {"middlewares": (PATIENTLY,)})
    settings.setdefault(
        "requests_timeout",
        aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=PATIENCE.silence),
    )
    client = fsspec.filesystem("gcs")
    # Every other client would look for an account again.
    settings.setdefault("token", client.credentials.credentials or "anon")
    return client


def account() -> str:
    """Words for the account whose requests these are."""
    credentials = file_system().credentials.credentials
    if credentials is None:
        return "nobody (no credentials were found: gcloud auth application-default login)"
    email = getattr(credentials, "service_account_email", None)
    if email:
        return f"the service account {email}"
    return f"your account ({type(credentials).__module__}.{type(credentials).__name__})"


class Patiently:
    """Makes a request again while it fails; aiohttp calls it instead of sending by itself."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """What fails next is told, however short the time since the last trouble."""
        self._last_failure = -math.inf  # of any request; all are made by one thread
        self._told = False

    async def __call__(
        self,
        request: aiohttp.ClientRequest,
        send: Callable[[aiohttp.ClientRequest], Awaitable[aiohttp.ClientResponse]],
    ) -> aiohttp.ClientResponse:
        """Returns the first answer that is not about a passing trouble."""
        started, pause, tries = time.monotonic(), PATIENCE.first_pause, 0
        while True:
            tries += 1
            response = None
            try:
                response = await asyncio.wait_for(send(request), PATIENCE.answer)
            except (aiohttp.ClientError, ConnectionError) as error:
                found = f"cannot be reached ({type(error).__name__}: {error})"
            except TimeoutError:
                found = f"gives no answer for {format_duration(PATIENCE.answer)}"
            else:
                if response.status == 401 and tries < _WITH_NEW_TOKENS:
                    await _renew_token(request)
                elif response.status not in _PASSING:
                    return response
                response.release()
                found = f"answers {response.status}"
            waited = time.monotonic() - started
            if waited + pause > PATIENCE.give_up:
                raise GaveUp(f"{request.url.host} {found}, since {format_duration(waited)}")
            self._tell(f"{request.url.host} {found}", tries)
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, PATIENCE.longest_pause)

    def _tell(self, found: str, tries: int) -> None:
        now = time.monotonic()
        if now - self._last_failure >= _APART:
            self._told = False
        self._last_failure = now
        if tries >= _TOLD_AT_TRY and not self._told:
            self._told = True
            log.warning(
                "%s. Requests are made again, for up to %s; nothing is lost meanwhile.",
                found,
                format_duration(PATIENCE.give_up),
            )


PATIENTLY = Patiently()


async def _renew_token(request: aiohttp.ClientRequest) -> None:
    """Asks for another token than the one that was refused, though it had not come to its end."""
    import google.auth.exceptions
    import google.auth.transport.requests

    credentials = file_system().credentials.credentials
    if credentials is None:
        return
    try:
        await asyncio.to_thread(credentials.refresh, google.auth.transport.requests.Request())
    except google.auth.exceptions.GoogleAuthError as error:
        log.debug("no new token: %s", error)
        return
    credentials.apply(request.headers)
