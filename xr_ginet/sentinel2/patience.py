"""What is read over a network is asked for again, after growing pauses, before it counts as lost.

A server that answers 429 or 5xx, hangs, drops the connection or sends half a block is asked four times in all; then the
error names what was asked for. Nothing that could not be read becomes missing pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential, wait_random

from .addresses import is_remote

if TYPE_CHECKING:
    from pystac_client import Client

ATTEMPTS = 4
FIRST_PAUSE = 0.5
"""Seconds before the second attempt; each later pause is twice as long."""

RETRIED_STATUS = (429, 500, 502, 503, 504)
STAC_TIMEOUT = (10.0, 60.0)
"""Seconds to connect, and between two pieces of an answer."""


def patiently(href: str, *errors: type[BaseException]) -> Callable[..., Any]:
    """Return what calls a function, again where it raises one of ``errors`` (OSError) and ``href`` is remote."""
    from aiohttp import ClientError

    return Retrying(
        stop=stop_after_attempt(ATTEMPTS if is_remote(href) else 1),
        wait=wait_exponential(multiplier=FIRST_PAUSE) + wait_random(0, FIRST_PAUSE / 2),
        retry=retry_if_exception_type(errors or (OSError, ClientError)),
        reraise=True,
    )


def open_catalog(url: str) -> Client:
    """Return a STAC API that is asked again after errors that pass, and never without a limit of time."""
    from pystac_client import Client
    from pystac_client.stac_api_io import StacApiIO
    from urllib3 import Retry

    again = Retry(
        ATTEMPTS - 1,
        backoff_factor=FIRST_PAUSE,
        status_forcelist=RETRIED_STATUS,
        allowed_methods=None,  # a search is posted
        raise_on_status=False,
    )
    return Client.open(url, stac_io=StacApiIO(max_retries=again), timeout=STAC_TIMEOUT)
