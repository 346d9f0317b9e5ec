"""Who is asked for items: a STAC API, or the caller who has them already. What an item says is read in `items`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .patience import open_catalog

if TYPE_CHECKING:
    import pystac
    from pystac_client import Client

    Catalog = str | Client | pystac.ItemCollection | Sequence[pystac.Item | Mapping[str, Any]]

DEFAULT_COLLECTION = "sentinel-2-l2a"


def find_items(
    catalog: Catalog,
    *,
    collection: str = DEFAULT_COLLECTION,
    bbox: tuple[float, float, float, float] | None = None,
    intersects: dict[str, Any] | None = None,
    datetime: str | None = None,
    query: dict[str, Any] | None = None,
    max_items: int | None = None,
    sign: Callable[[Any], Any] | None = None,
) -> list[dict[str, Any]]:
    """Return the JSON of the items of a search, or of those given, signed.

    Raises
    ------
    ValueError
        If nothing was found, or items are given together with ``datetime`` or ``query``.
    """
    from pystac_client import Client

    if isinstance(catalog, str):
        catalog = open_catalog(catalog)
    if isinstance(catalog, Client):
        search = catalog.search(
            collections=[collection],
            bbox=bbox if intersects is None else None,
            intersects=intersects,
            datetime=datetime,
            query=query,
            max_items=max_items,
        )
        items: list[Any] = list(_items_of_pages(search))[:max_items]
        if not items:
            raise ValueError(
                f"no item of {collection!r} for bbox={bbox}, intersects={'given' if intersects else None}, "
                f"datetime={datetime}, query={query}. Widen the search; bbox is (west, south, east, north) in degrees"
            )
    else:
        if datetime is not None or query is not None:
            raise ValueError(
                "datetime and query belong to a search, but items were given: select among them beforehand"
            )
        given: Any = catalog
        if isinstance(given, Mapping):  # the JSON of one item, or of a collection of them
            given = given.get("features", [given])
        try:
            items = list(given)[:max_items]
        except TypeError:  # one pystac Item
            items = [given]
        strange = {
            type(item).__name__ for item in items if not isinstance(item, Mapping) and not hasattr(item, "assets")
        }
        if strange:
            raise TypeError(
                f"catalog holds {', '.join(sorted(strange))}; it must be the URL of a STAC API, a Client, an "
                "ItemCollection or a list of items"
            )
        if not items:
            raise ValueError("the list of items is empty")
    if sign is not None:
        items = [sign(_as_item(item)) for item in items]
    return [dict(item) if isinstance(item, Mapping) else item.to_dict(transform_hrefs=False) for item in items]


def _items_of_pages(search: Any) -> Iterator[dict[str, Any]]:
    """Yield the items of a search; raise where a server's pages never end."""
    seen: set[tuple[Any, Any]] = set()
    for page in search.pages_as_dicts():
        new = {(item.get("collection"), item["id"]): item for item in page["features"]}
        if new and not new.keys() - seen:
            raise ValueError(
                f"the catalogue's pages repeat: after {len(seen)} items one brought {len(new)} that were there "
                "already. Type max_items=, or search a smaller area or time"
            )
        yield from (item for key, item in new.items() if key not in seen)
        seen |= new.keys()


def is_searched(catalog: Catalog) -> bool:
    """Return whether items come from whoever answers a search, and not from the caller."""
    return isinstance(catalog, str) or hasattr(catalog, "search")


def _as_item(item: Any) -> Any:
    import pystac

    return pystac.Item.from_dict(dict(item)) if isinstance(item, Mapping) else item
