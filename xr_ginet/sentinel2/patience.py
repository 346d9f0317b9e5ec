"""What is read over a network is asked for again, after growing pauses, before it counts as lost.

A server that answers 429 or 5xx, hangs, drops the connection or sends half a block is asked four times in all; then the
error names what was asked for. How long anything may take and how large an answer may be is decided here, not by the
server. Nothing that could not be read becomes missing pixels.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from .addresses import failure, is_remote, keep_secrets_from_logs, public_url

if TYPE_CHECKING:
    from pystac_client import Client

ATTEMPTS = 4
FIRST_PAUSE = 0.5
"""Seconds before the second attempt; each later pause is twice as long."""
LONGEST_PAUSE = 60.0
"""Seconds that a server may ask to be left alone (``Retry-After``); one that asks for more is not asked again."""

RETRIED_STATUS = (429, 500, 502, 503, 504)
STAC_TIMEOUT = (10.0, 60.0)
"""Seconds to connect, and between two pieces of an answer."""
ANSWER_SECONDS = 300.0
"""For a catalogue's whole answer, however small its pieces."""
LARGEST_ANSWER = 64 * 2**20
"""Bytes of a catalogue's answer, unpacked; pages of items have a hundredth of it."""

keep_secrets_from_logs("urllib3.connectionpool", "urllib3.util.retry", "pystac_client.stac_api_io")


class NotNow(OSError):
    """A server's answer that it cannot answer now, and after how many seconds it wants to be asked again."""

    def __init__(self, status: int, pause: float) -> None:
        super().__init__(f"HTTP {status}")
        self.status_code, self.pause = status, pause


def patiently(href: str, *errors: type[BaseException]) -> Callable[..., Any]:
    """Return what calls a function, again where it raises one of ``errors`` (OSError) and ``href`` is remote."""
    from aiohttp import ClientError

    return Retrying(
        stop=stop_after_attempt(ATTEMPTS if is_remote(href) else 1),
        wait=_pause,
        retry=retry_if_exception_type(errors or (OSError, ClientError)),
        reraise=True,
    )


def _pause(state: RetryCallState) -> float:
    """Return how long to wait: as asked, or growing, and never the same for two who ask at once."""
    error = state.outcome.exception() if state.outcome else None
    growing = wait_exponential(multiplier=FIRST_PAUSE) + wait_random(0, FIRST_PAUSE / 2)
    return max(growing(state), getattr(error, "pause", 0.0))


def open_catalog(url: str) -> Client:
    """Return a STAC API that is asked again after errors that pass, and never without limits.

    Raises
    ------
    ValueError
        If the address is no URL, or what answers there is no STAC API.
    pystac_client.exceptions.APIError
        If nothing answers there, or with an error.
    """
    from pystac_client import Client
    from pystac_client.exceptions import APIError

    if not _is_http(url):
        raise ValueError(
            f"{public_url(url)} is not the URL of a STAC API, https://…; for items in files, pass a list of them"
        )
    try:
        return Client.open(url, stac_io=_limited_io(url), timeout=STAC_TIMEOUT)
    except (APIError, _Refused):
        raise
    except Exception as error:  # what pystac raises of JSON that is not a catalogue: KeyError, TypeError, its own
        problem = failure(error, url)
    raise ValueError(f"{public_url(url)} answers, but not as a STAC API does ({problem}). Is the URL right?")


class _Refused(ValueError):
    """An answer that is not used, with the reason in words."""


def _limited_io(url: str) -> Any:
    """Return what pystac-client reads a catalogue through: over http alone, within limits, with secrets kept."""
    from pystac_client.exceptions import APIError
    from pystac_client.stac_api_io import StacApiIO
    from requests import Request, RequestException

    class LimitedIO(StacApiIO):
        def read_text(self, source: Any, *arguments: Any, **options: Any) -> str:
            href = source.get_href() if hasattr(source, "get_href") else str(source)
            _check_http(href or "", "link")
            return super().read_text(source, *arguments, **options)

        def read_json(self, source: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
            href = source.get_href() if hasattr(source, "get_href") else str(source)
            return with_safe_links(as_json(self.read_text(source, *arguments, **options), href), href)

        def request(
            self,
            href: str,
            method: str | None = None,
            headers: dict[str, str] | None = None,
            parameters: dict[str, Any] | None = None,
        ) -> str:
            method = str(method or "GET").upper()
            body: dict[str, Any] = {"json" if method == "POST" else "params": parameters or {}}
            prepared = self.session.prepare_request(Request(method, href, headers, **body))
            options = self.session.merge_environment_settings(href, {}, True, None, None)

            def ask() -> str:
                return _within(ANSWER_SECONDS, lambda: _answer(self.session, prepared, options))

            try:
                return patiently(href, RequestException, OSError)(ask)
            except (RequestException, OSError, APIError) as error:
                problem, status = failure(error, url, href), getattr(error, "status_code", None)
            raise _api_error(f"{public_url(href)}: {problem}", status)

    return LimitedIO(max_retries=None)  # which requests would make unseen, beside ours


def _answer(session: Any, prepared: Any, options: dict[str, Any]) -> str:
    """Return the text of an answer; raise NotNow where it is one of those that pass."""
    with session.send(prepared, timeout=STAC_TIMEOUT, **(options | {"stream": True})) as response:
        status = response.status_code
        if status in RETRIED_STATUS:
            pause = _asked_pause(response.headers.get("Retry-After", ""))
            if pause <= LONGEST_PAUSE:
                raise NotNow(status, pause)
            raise _api_error(f"HTTP {status}, and it asks to be left alone for {pause:.0f} s. Try again then", status)
        pieces, size = [], 0
        for piece in response.iter_content(2**16):
            pieces.append(piece)
            size += len(piece)
            if size > LARGEST_ANSWER:
                raise _Refused(
                    f"{public_url(prepared.url)} answers with more than {LARGEST_ANSWER >> 20} MiB: not read. Search "
                    "a smaller area or time"
                )
    content = b"".join(pieces)
    if not 200 <= status < 300:
        raise _api_error(f"HTTP {status}: {content[:200].decode('utf-8', 'replace')}", status)
    return content.decode("utf-8", "replace")


def _api_error(said: str, status: int | None) -> Exception:
    from pystac_client.exceptions import APIError

    error = APIError(said)
    error.status_code = status
    return error


def _asked_pause(text: str) -> float:
    """Return the seconds that ``Retry-After`` asks for, which may be a date."""
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _within(seconds: float, function: Callable[[], str]) -> str:
    """Return what a function returns; raise TimeoutError where it takes longer, as with bytes that come one by one."""
    done: list[Any] = []

    def call() -> None:
        try:
            done.append((function(), None))
        except BaseException as error:  # raised where it was asked for
            done.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not done:
        raise TimeoutError(f"no whole answer within {seconds:g} s")
    text, error = done[0]
    if error is not None:
        raise error
    return text


def as_json(text: str, href: str) -> dict[str, Any]:
    """Return the JSON object that a catalogue answers with.

    Raises
    ------
    ValueError
        If it is something else.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise _Refused(f"{public_url(href)} answers with {text[:60]!r}, which is no JSON. Is it a STAC API?") from None
    if not isinstance(content, dict):
        raise _Refused(f"{public_url(href)} answers with {text[:60]!r}, and not with a JSON object. Is it a STAC API?")
    return content


def with_safe_links(content: dict[str, Any], href: str) -> dict[str, Any]:
    """Return what a catalogue says, its links as absolute URLs; pystac would open a path as a file of this machine.

    The root is where the catalogue was opened: another one is not asked for.
    """
    links = content.get("links")
    if not isinstance(links, list):
        return content
    safe = []
    for link in links:
        if not isinstance(link, dict) or not isinstance(link.get("href"), str):
            raise _Refused(f"{public_url(href)} has the link {str(link)[:60]}, which leads nowhere")
        try:
            target = href if link.get("rel") == "root" else urljoin(href, link["href"])
        except ValueError:
            target = link["href"]
        if _is_http(target):
            safe.append(link | {"href": target})
        elif link.get("rel") in ("self", "search", "next", "data", "parent", "child"):
            _check_http(target, f"link {link['rel']!r} of {public_url(href)}")
    return content | {"links": safe}


def _is_http(target: str) -> bool:
    try:
        parts = urlsplit(target)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc)


def _check_http(target: str, what: str) -> None:
    if not _is_http(target):
        raise _Refused(
            f"the {what} leads to {public_url(target)}, and a catalogue must not choose which files of this machine "
            "are read: only http:// and https:// are followed"
        )
