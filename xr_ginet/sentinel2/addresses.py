"""Where files and catalogues are: what is remote, how each library is told, and what of an address may be shown.

Signed URLs carry secrets in their query, others a user and a password. `Address` holds one so that it cannot be shown
by accident, and what libraries say in their errors and logs goes through `without_secrets`.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable
from urllib.parse import unquote, urlsplit, urlunsplit

REMOTE = ("http", "https", "s3", "gs", "gcs", "az", "abfs")
"""Schemes of addresses that are not on this machine."""

_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s<>]+", re.IGNORECASE)
_USER = re.compile(r"://[^\s/@:]*(:(?!\d+(?:/|$))[^\s@]*)?@")
_QUERY = re.compile(r"(?:[?#]|%3F)(?=[^\s<>]*(?:=|%3D))[^\s<>]*?(?=[\"'`)\]}>,;:.]*(?:\s|[<>]|$))", re.IGNORECASE)
_PAIR = re.compile(r"&[\w.~%\[\]-]+=[^\s<>]*?(?=[\"'`)\]}>,;:.]*(?:\s|[<>]|$))")
_NAMED = re.compile(
    r"\b((?:x-amz-)?(?:sig|signature|token|secret|passw(?:or)?d|credential|\w*[-_]token|\w*[-_]key|api_?key)=)"
    r"[^\s'\"&<>,;)\]}]+",
    re.IGNORECASE,
)


class Address(str):
    """Where a file is. As text it is without what may be secret in it; `reveal` gives all of it.

    Parameters
    ----------
    whole : str
    sign : callable, optional
        Returns the address to use now, where it has to be signed.

    Examples
    --------
    >>> address = Address("https://blobs.example/B05.tif?sig=abc")
    >>> print(address, address.reveal())
    https://blobs.example/B05.tif https://blobs.example/B05.tif?sig=abc
    """

    whole: str
    sign: Callable[[], str] | None

    def __new__(cls, whole: str, sign: Callable[[], str] | None = None) -> Address:
        self = super().__new__(cls, public_url(whole))
        self.whole, self.sign = whole, sign
        return self

    def __eq__(self, other: object) -> bool:
        return self.whole == other.whole if isinstance(other, Address) else str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return str.__hash__(self)

    @property
    def token(self) -> str:
        """Return what tells the whole address from all others, and nothing else of it."""
        return hashlib.sha256(self.whole.encode("utf-8", "surrogatepass")).hexdigest()

    def reveal(self) -> str:
        """Return the whole address, signed anew where it has to be."""
        return self.whole if self.sign is None else self.sign()


def is_remote(href: str) -> bool:
    """Return whether something is read over a network."""
    return ("://" in href and not href.startswith("file://")) or href.startswith("/vsi")


def gdal_path(href: str) -> str:
    """Return what GDAL calls an address.

    Raises
    ------
    ValueError
        If it has a scheme that GDAL would take for the name of a folder.

    Examples
    --------
    >>> gdal_path("gcs://bucket/B05.tif")
    '/vsigs/bucket/B05.tif'
    """
    scheme, there, rest = href.partition("://")
    if not there or not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9+.-]*", scheme):
        return href
    scheme = scheme.lower()
    if scheme in ("http", "https", "ftp"):
        return f"/vsicurl/{scheme}://{rest}"
    if scheme == "file":
        return unquote(rest.removeprefix("localhost"))
    if scheme in ("s3", "gs", "gcs", "az", "abfs", "oss"):
        container = rest.partition("/")[0]
        if "@" in container:  # of an account that GDAL would not look at
            container, _, host = container.partition("@")
            account = host.partition(".")[0]
            raise ValueError(
                f"{public_url(href)} names a storage account, which GDAL takes from the environment. Type "
                f"https://{account}.blob.core.windows.net/{container}/… in its place"
            )
        folder = {"gcs": "gs", "abfs": "az"}.get(scheme, scheme)
        return f"/vsi{folder}/{rest}"
    if {part for part in scheme.split("+")} <= {"zip", "tar", "gzip", "file", "http", "https", "s3", "gs", "az"}:
        return href  # an archive, whose name rasterio takes apart
    raise ValueError(
        f"{public_url(href)}: rasters are not read from {scheme}://, but from paths and from {', '.join(REMOTE)}"
    )


def public_url(url: str) -> str:
    """Return a URL without what may be secret in it: user, password, query.

    Examples
    --------
    >>> public_url("https://me:secret@stac.example:8080/v1?sig=abc#x")
    'https://stac.example:8080/v1'
    """
    if "://" not in url and "?" not in url:
        return url
    url = _USER.sub("://", url)
    try:
        parts = urlsplit(url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    except ValueError:  # not a URL after all
        return re.split(r"[?#]", url)[0]


def without_secrets(text: str, *known: str) -> str:
    """Return a text without what may be secret in the URLs in it, whole or in part.

    Parameters
    ----------
    text : str
    *known : str
        Addresses whose users, passwords and queries must not show, wherever in the text and however it is cut.

    Examples
    --------
    >>> without_secrets("Error opening 'https://blobs.example/B05.tif?sig=abc': HTTP 403")
    "Error opening 'https://blobs.example/B05.tif': HTTP 403"
    >>> without_secrets("Max retries exceeded with url: /v1?key=abc (Caused by …)")
    'Max retries exceeded with url: /v1 (Caused by …)'
    """
    for secret in sorted({secret for url in known for secret in _secrets(url)}, key=len, reverse=True):
        text = text.replace(secret, "")
    text = _USER.sub("://", text)
    text = _URL.sub(lambda found: _QUERY.sub("", found[0]), text)
    return _NAMED.sub(r"\1…", _PAIR.sub("", _QUERY.sub("", text)))


def _secrets(url: str) -> set[str]:
    """Return what of a URL must not be shown, as it is and as libraries decode it."""
    found = set()
    if user := _USER.search(url):
        name, _, password = user[0][3:-1].partition(":")
        found |= {f"{name}:{password}", password or name}
    _, query, rest = url.partition("?")
    if query:
        found.add(query + rest)
        found |= {pair.partition("=")[2] for pattern in ("[&#]", "[&;#]") for pair in re.split(pattern, rest)}
    return {text for secret in found for text in (secret, unquote(secret)) if len(text) >= 4}


class _WithoutSecrets(logging.Filter):
    """Let records of a log pass without what is secret in the URLs that they name."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_secrets(record.getMessage()), ()
        return True


_FILTER = _WithoutSecrets()


def keep_secrets_from_logs(*names: str) -> None:
    """Have what these loggers record go through `without_secrets`."""
    for name in names:
        logging.getLogger(name).addFilter(_FILTER)


def failure(error: BaseException, *known: str) -> str:
    """Return an error's kind and text, on one line and without secrets."""
    text = without_secrets(" ".join(str(error).split()), *known)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
