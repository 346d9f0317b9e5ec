"""Where files and catalogues are: what is remote, and what of an address may be shown.

Signed URLs carry secrets in their query, others a user and a password: neither belongs into attributes, logs or errors.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit

_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"<>]+", re.IGNORECASE)


def is_remote(href: str) -> bool:
    """Return whether something is read over a network."""
    return ("://" in href and not href.startswith("file://")) or href.startswith("/vsi")


def public_url(url: str) -> str:
    """Return a URL without what may be secret in it: user, password, query.

    Examples
    --------
    >>> public_url("https://me:secret@stac.example:8080/v1?sig=abc#x")
    'https://stac.example:8080/v1'
    """
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def without_secrets(text: str) -> str:
    """Return a text with each URL in it as `public_url` shows it.

    Examples
    --------
    >>> without_secrets("Error opening 'https://blobs.example/B05.tif?sig=abc': HTTP 403")
    "Error opening 'https://blobs.example/B05.tif': HTTP 403"
    """
    return _URL.sub(_shown, text)


def _shown(found: re.Match[str]) -> str:
    try:
        return public_url(found[0])
    except ValueError:  # not a URL after all
        return found[0].partition("?")[0]
