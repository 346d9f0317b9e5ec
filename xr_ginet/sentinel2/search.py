"""Who is asked for items: a STAC API, or the caller who has them already. What an item says is read in `items`."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .addresses import failure, public_url
from .patience import as_json, open_catalog, with_safe_links

if TYPE_CHECKING:
    import pystac
    from pystac_client import Client

    Catalog = str | Client | pystac.ItemCollection | Sequence[pystac.Item | Mapping[str, Any]]

DEFAULT_COLLECTION = "sentinel-2-l2a"
SEARCH_SECONDS = 1800.0
"""For all pages of a search."""
EMPTY_PAGES = 100
"""One after the other, after which a search is given up."""
MOST_ITEMS = 100_000


def find_items(
    catalog: Catalog,
    *,
    collection: str = DEFAULT_COLLECTION,
    bbox: tuple[float, float, float, float] | None = None,
    intersects: Mapping[str, Any] | None = None,
    datetime: str | None = None,
    query: dict[str, Any] | None = None,
    max_items: int | None = None,
) -> list[dict[str, Any]]:
    """Return the JSON of the items of a search, or of those given, as they are: not signed.

    Raises
    ------
    ValueError
        If nothing was found, a catalogue's answer is none or not whole, or items are given together with ``datetime``
        or ``query``.
    pystac_client.exceptions.APIError
        If a catalogue does not answer, or with an error.
    """
    if max_items is not None and (not isinstance(max_items, int) or max_items < 1):
        raise ValueError(f"max_items={max_items!r}: must be a whole number above 0, or None for all")
    if not is_searched(catalog):
        if datetime is not None or query is not None:
            raise ValueError(
                "datetime and query belong to a search, but items were given: select among them beforehand"
            )
        return [_as_json(item) for item in _given(catalog, max_items)]
    client = open_catalog(catalog) if isinstance(catalog, str) else catalog
    search = _search(
        client,
        collections=[collection],
        bbox=bbox if intersects is None else None,
        intersects=intersects,
        datetime=datetime,
        query=query,
        max_items=max_items,
    )
    items = _found(search, max_items)
    if not items:
        raise ValueError(
            f"no item of {collection!r} for bbox={bbox}, intersects={'given' if intersects else None}, "
            f"datetime={datetime}, query={query}. Widen the search; bbox is (west, south, east, north) in degrees"
        )
    return items


def signer(catalog: Catalog, sign: Callable[[Any], Any] | None) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """Return what signs the JSON of an item: ``sign``, or a Client's own modifier, or None."""
    if sign is not None:
        return _Signer(sign)
    modify = getattr(catalog, "modifier", None) if is_searched(catalog) else None
    return None if modify is None else _Modifier(modify)


class _Signer:
    """Sign with a function of a pystac Item, such as ``planetary_computer.sign``."""

    def __init__(self, sign: Callable[[Any], Any]) -> None:
        self.sign = sign

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        import pystac

        signed = self.sign(pystac.Item.from_dict(copy.deepcopy(item)))
        if signed is None:
            raise TypeError(
                f"sign= returned None for item {item.get('id')}: it must return the signed item, as "
                "planetary_computer.sign does (sign_inplace does not)"
            )
        return _as_json(signed)


class _Modifier:
    """Sign as pystac-client does, with a function that changes the JSON of an item in place."""

    def __init__(self, modify: Callable[[Any], None]) -> None:
        self.modify = modify

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        signed = copy.deepcopy(item)
        self.modify(signed)
        return signed


def _given(catalog: Any, max_items: int | None) -> list[Any]:
    """Return the items of a list, a collection, or one."""
    if isinstance(catalog, Mapping):  # the JSON of one item, or of a collection of them
        catalog = catalog.get("features", [catalog])
    try:
        items = list(catalog)[:max_items]
    except TypeError:  # one pystac Item
        items = [catalog]
    strange = {type(item).__name__ for item in items if not isinstance(item, Mapping) and not hasattr(item, "assets")}
    if strange:
        raise TypeError(
            f"catalog holds {', '.join(sorted(strange))}; it must be the URL of a STAC API, a Client, an "
            "ItemCollection or a list of items"
        )
    if not items:
        raise ValueError("the list of items is empty")
    return items


def _search(client: Any, **wanted: Any) -> Any:
    """Return a search, of which nothing was asked yet."""
    try:
        return client.search(**wanted)
    except Exception as error:  # pystac-client raises Exception itself, and what its parsing of dates meets
        problem = failure(error)
    told = ", ".join(f"{name}={value!r}" for name, value in wanted.items() if value is not None)
    raise ValueError(
        f"cannot search for {told}: {problem}. datetime is a date or a range, such as 2024-06, 2024-06-01/2024-06-30 "
        "or 2024-06-01/.."
    )


def _found(search: Any, max_items: int | None) -> list[dict[str, Any]]:
    """Return the items of all pages of a search, each once.

    Raises
    ------
    ValueError
        If the pages never end, or end before as many items came as the catalogue says that there are.
    """
    items: dict[tuple[Any, Any], dict[str, Any]] = {}
    matched = None
    for page in _pages(search):
        new = {(item.get("collection"), item["id"]): item for item in page["features"]}
        if new and not new.keys() - items.keys():
            raise ValueError(
                f"the catalogue's pages repeat: after {len(items)} items one brought {len(new)} that were there "
                "already. Type max_items=, or search a smaller area or time"
            )
        for key, item in new.items():
            items.setdefault(key, item)
        context = page.get("context")
        matched = page.get("numberMatched", context.get("matched") if isinstance(context, dict) else None)
        if max_items is not None and len(items) >= max_items:
            return list(items.values())[:max_items]
        if len(items) > MOST_ITEMS:
            raise ValueError(f"the catalogue has found more than {MOST_ITEMS} items. Search a smaller area or time")
    if isinstance(matched, int) and len(items) < matched:
        raise ValueError(
            f"the catalogue says that {matched} items match, and its pages brought {len(items)}. Search again, or a "
            f"smaller area or time; type max_items={len(items)} to go on with these"
        )
    return list(items.values())


def _pages(search: Any) -> Iterator[dict[str, Any]]:
    """Yield the pages of a search; an empty one is not the last where it leads on."""
    from pystac import Link

    began, empty = time.monotonic(), 0
    source: Any = search.url
    options = {"method": search.method, "parameters": search.get_parameters()}
    asked: set[str] = set()
    while True:
        href = source.get_href() if hasattr(source, "get_href") else source
        page = with_safe_links(as_json(_text(search, source, options), href), href)
        _check_page(page, href)
        yield page
        following = next((link for link in page.get("links") or [] if link.get("rel") == "next"), None)
        if following is None:
            return
        empty = 0 if page["features"] else empty + 1
        request = json.dumps(following, sort_keys=True, default=str)
        if empty and (request in asked or empty > EMPTY_PAGES):  # that items repeat is seen by themselves
            raise ValueError(
                f"the pages of {public_url(search.url)} repeat: one leads back to a page that was there already, or "
                f"{EMPTY_PAGES} in a row were empty. Type max_items=, or search a smaller area or time"
            )
        if time.monotonic() - began > SEARCH_SECONDS:
            raise ValueError(
                f"the pages of {public_url(search.url)} do not end within {SEARCH_SECONDS:g} s. Search a smaller area "
                "or time"
            )
        asked.add(request)
        source, options = Link.from_dict(following), {"parameters": search.get_parameters()}


def _text(search: Any, source: Any, options: dict[str, Any]) -> str:
    try:
        return search._stac_io.read_text(source, **options)
    except (AttributeError, LookupError, TypeError) as error:  # a link with a method or a body of another kind
        problem = failure(error, search.url)
    raise ValueError(f"a page of {public_url(search.url)} leads on by a link that cannot be followed: {problem}")


def _check_page(page: dict[str, Any], href: str) -> None:
    """Raise where an answer is no page of items."""
    features = page.get("features")
    if not isinstance(features, list) or not isinstance(page.get("links") or [], list):
        raise ValueError(
            f"{public_url(href)} answers with {', '.join(map(str, list(page)[:5])) or 'nothing'}, and not with a STAC "
            "FeatureCollection, whose features are items"
        )
    for item in features:
        if not isinstance(item, dict) or not isinstance(item.get("id"), str):
            raise ValueError(f"{public_url(href)} answers with {str(item)[:60]!r} among the items, which is none")


def is_searched(catalog: Catalog) -> bool:
    """Return whether items come from whoever answers a search, and not from the caller."""
    return isinstance(catalog, str) or hasattr(catalog, "search")


def _as_json(item: Any) -> dict[str, Any]:
    return dict(item) if isinstance(item, Mapping) else item.to_dict(transform_hrefs=False)
