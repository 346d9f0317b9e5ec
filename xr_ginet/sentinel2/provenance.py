"""Where the pixels of each date come from: text along ``time``, so that it stays with its date.

Attributes belong to a whole cube, and `xarray.concat` keeps those of the first one. What may differ between dates is a
coordinate along ``time``; a cube without dates has attributes of the same names. What was chosen for a whole cube, such
as the weights, is an attribute in either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import xarray as xr
from numpy.typing import NDArray

ITEMS = "source_items"
"""Ids of a date's STAC items or products, the one on top first, joined by ", "."""
VERSIONS = "source_versions"
"""What tells an item from a later version of it, likewise."""
REASONS = "radiometry"
"""What its digital numbers were taken to mean, and why."""
ENCODING = "source_encoding"
"""How its digital numbers are stored, as JSON; empty where its items or bands differ."""
MASK = "ginet_mask"
"""Classes of the scene classification that were made missing."""

OF_A_DATE = (ITEMS, VERSIONS, REASONS, ENCODING, MASK)
EMPTY = {MASK: "none"}
"""What a date that tells nothing is taken to say; of others, nothing."""
STORED = ("source_dtype", "source_scale_factor", "source_add_offset", "source_nodata")
"""Attributes in place of `ENCODING`."""
BETWEEN = ", "

MADE = ("s2:generation_time", "processing:datetime", "created", "updated")
"""Properties of an item that tell when it, or what it describes, was made."""
_PRODUCT = re.compile(r"baseline|product_(uri|id)|granule_id|^(processing:)?version$")


def of_dates(ds: xr.Dataset, said: Sequence[Mapping[str, Any]]) -> xr.Dataset:
    """Return a cube with what is said of each of its dates; of one without dates, that of the only one.

    Each mapping may have `ITEMS` and `VERSIONS`, lists of text; `REASONS` and `MASK`, text; and the attributes of
    `STORED`. What is not said stays as it was.
    """
    dated = "time" in ds.dims
    texts = [_texts(one) for one in said]
    named = [name for name in OF_A_DATE if any(name in text for text in texts) and (dated or name in ds.coords)]
    columns = {name: np.array([text.get(name, "") for text in texts], object) for name in named}
    if dated:
        return ds.assign_coords({name: ("time", column) for name, column in columns.items()})
    attrs = {key: value for one in said for key, value in one.items() if key not in named}
    return ds.assign_coords({name: ((), column[0]) for name, column in columns.items()}).assign_attrs(attrs)


def known(ds: xr.Dataset) -> list[dict[str, Any]]:
    """Return for `of_dates` what a cube says of each of its dates, or of itself where it has none."""
    columns = _columns(ds)
    if "time" in ds.dims:
        return [_said({name: texts[i] for name, texts in columns.items()}) for i in range(ds.sizes["time"])]
    attrs = {key: ds.attrs[key] for key in (ITEMS, VERSIONS, REASONS, MASK, *STORED) if key in ds.attrs}
    return [attrs | _said({name: text for name, [text] in columns.items()})]


def of_all(ds: xr.Dataset) -> dict[str, Any]:
    """Return a cube's attributes with what its dates say, as a cube without dates has it: `STORED` where they agree.

    Reads a cube's coordinates, never its pixels.
    """
    attrs = dict(ds.attrs)
    for name, column in _columns(ds).items():
        said = [_said({name: text}) for text in dict.fromkeys(column)]
        if name in (ITEMS, VERSIONS):
            attrs[name] = list(dict.fromkeys(part for one in said for part in one[name]))
        elif name != ENCODING:
            attrs[name] = "; ".join(one[name] for one in said if one[name])
        else:
            attrs = {key: value for key, value in attrs.items() if key not in STORED}
            attrs |= said[0] if len(said) == 1 else {}
    return attrs


def _columns(ds: xr.Dataset) -> dict[str, list[str]]:
    """Return what a cube says of each of its dates, or of the one that was selected, by name."""
    found = {name: ds[name].values for name in OF_A_DATE if name in ds.coords and ds[name].dims in ((), ("time",))}
    return {name: [str(text) for text in values.ravel()] for name, values in found.items()}


def _texts(said: Mapping[str, Any]) -> dict[str, str]:
    """Return what is said of a date as texts."""
    stored = {key.removeprefix("source_"): said[key] for key in STORED if key in said}
    named = {key: value for key, value in said.items() if key in OF_A_DATE}
    texts = {key: value if isinstance(value, str) else BETWEEN.join(value) for key, value in named.items()}
    if stored or ITEMS in said:
        texts[ENCODING] = json.dumps(stored, default=_plain) if stored else ""
    return texts


def _said(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return what texts say of a date; the inverse of `_texts`."""
    said: dict[str, Any] = {key: text for key, text in texts.items() if key != ENCODING}
    said |= {key: [part for part in said[key].split(BETWEEN) if part] for key in (ITEMS, VERSIONS) if key in said}
    stored = json.loads(texts.get(ENCODING) or "{}")
    return said | {f"source_{key}": value for key, value in stored.items()}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


def _by_date(ds: xr.Dataset) -> dict[str, list[str]]:
    """Return what a cube with dates says of each of them, `EMPTY` where it says nothing."""
    said = _columns(ds)
    return {name: said.get(name, [EMPTY.get(name, "")] * ds.sizes["time"]) for name in OF_A_DATE}


def places(stored: xr.Dataset, cube: xr.Dataset) -> NDArray:
    """Return where a store has each date of a cube, -1 for none.

    A date has the time of its first tile: it is the same one as before where an earlier one has come since.
    """
    there, times = stored["time"].values, cube["time"].values.astype(stored["time"].dtype)
    known = {time: i for i, time in enumerate(there)}
    found = np.array([known.get(time, -1) for time in times])
    free = set(range(len(there))) - set(found.tolist())
    before, now = (_by_date(ds)[ITEMS] for ds in (stored, cube))
    made_of = {item: i for i in free for item in before[i].split(BETWEEN) if item}
    for i in np.flatnonzero(found < 0):
        index = next((made_of[item] for item in now[i].split(BETWEEN) if made_of.get(item) in free), None)
        if index is not None:
            found[i] = index
            free.discard(index)
    return found


def changes(stored: xr.Dataset, cube: xr.Dataset, places: NDArray) -> dict[int, str]:
    """Return those dates of a cube that were made from something else in a store, and what has changed."""
    before, now = _by_date(stored), _by_date(cube)
    found = {}
    for i, place in enumerate(places.tolist()):
        had, has = ([by[name][j] for name in (ITEMS, VERSIONS)] for by, j in ((before, place), (now, i)))
        if place < 0 or not had[0] or not has[0] or had == has:
            continue
        what = f"its items were {had[0]}, now {has[0]}" if had[0] != has[0] else f"another version of {has[0]}"
        found[i] = what
    return found


def differences(stored: xr.Dataset, cube: xr.Dataset, *, whole: bool) -> Iterator[str]:
    """Yield in which of what they say of their dates a store and a cube are at odds.

    With ``whole`` they must say the same. Without, items may differ or be new, and masks must be those of the store.
    """
    if "time" not in cube.dims or not (_columns(stored) or _columns(cube)) or not stored.sizes["time"]:
        return
    before, now, where = _by_date(stored), _by_date(cube), places(stored, cube).tolist()
    for name in OF_A_DATE if whole else (MASK,):
        for i, place in enumerate(where):
            allowed = [before[name][place]] if place >= 0 else list(dict.fromkeys(before[name]))
            if now[name][i] not in allowed:
                yield f"{name} {allowed[-1]!r}, now {now[name][i]!r}, of {str(cube['time'].values[i])[:19]}"
                break


def loaded(ds: xr.Dataset) -> xr.Dataset:
    """Return a cube with what is said of its dates in memory, as Python's text: chunking a cube chunks that too."""
    said = {name: ds[name].variable for name in OF_A_DATE if name in ds.coords}
    return ds.assign_coords({n: (v.dims, np.asarray(v.values, object), v.attrs) for n, v in said.items()})


def version_of(item: Mapping[str, Any]) -> str:
    """Return what tells a STAC item from a later version of the same id, in 8 hexadecimal digits.

    That is its product and processing baseline, and when it was made or updated; of an item that tells no time, the
    names of its files. Where these lie does not matter: a mirror has the same items.

    Examples
    --------
    >>> item = {"id": "a", "properties": {}, "assets": {"blue": {"href": "https://a.example/B02.tif?sig=1"}}}
    >>> version_of(item) == version_of(item | {"assets": {"blue": {"href": "https://b.example/B02.tif?sig=2"}}})
    True
    >>> version_of(item) == version_of(item | {"properties": {"updated": "2024-07-01T00:00:00Z"}})
    False
    """
    properties = item["properties"]
    product = [f"{key}={properties[key]}" for key in sorted(properties) if _PRODUCT.search(key)]
    made = [f"{key}={properties[key]}" for key in MADE if properties.get(key)]
    assets = sorted(item["assets"].items())
    made += [f"{key}={asset['file:checksum']}" for key, asset in assets if asset.get("file:checksum")]
    files = [urlsplit(str(asset.get("href", ""))).path.rstrip("/").rpartition("/")[2] for _, asset in assets]
    told = product + (made or files)
    return blake2b("\n".join(told).encode(), digest_size=4).hexdigest()
