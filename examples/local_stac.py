"""A real STAC API on localhost: search and files from one process, for demos and tests without the network.

stac-fastapi answers, an in-memory client of ours finds, Starlette serves the files of a folder with HTTP ranges. Every
condition of a search (box, geometry, time, ids, ``query``, ``filter``) becomes one CQL2 expression, which the ``cql2``
package evaluates item by item: right for hundreds of items. This is not a server for anyone but yourself: no database,
no writing, no authentication.

    python examples/local_stac.py FOLDER    # serves the items in FOLDER/**/*.json and the files they point to

References
----------
STAC API 1.0.0 with its Sort, Query and Filter extensions; OGC CQL2 1.0.
"""

from __future__ import annotations

import copy
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import attr
import cql2
import uvicorn
from starlette.requests import Request
from starlette.staticfiles import StaticFiles

# stac-fastapi warns about its own default title on import, and logs a traceback for each item it does not find.
logging.getLogger("stac_fastapi").setLevel(logging.CRITICAL)

from stac_fastapi.api.app import StacApi  # noqa: E402
from stac_fastapi.api.models import (  # noqa: E402
    ItemCollectionUri,
    create_get_request_model,
    create_post_request_model,
    create_request_model,
)
from stac_fastapi.extensions.filter import SearchFilterExtension  # noqa: E402
from stac_fastapi.extensions.pagination import TokenPaginationExtension  # noqa: E402
from stac_fastapi.extensions.query import QueryExtension  # noqa: E402
from stac_fastapi.extensions.sort import SearchSortExtension  # noqa: E402
from stac_fastapi.types.config import ApiSettings  # noqa: E402
from stac_fastapi.types.core import BaseCoreClient  # noqa: E402
from stac_fastapi.types.errors import InvalidQueryParameter, NotFoundError  # noqa: E402
from stac_fastapi.types.links import CollectionLinks, ItemLinks  # noqa: E402
from stac_fastapi.types.requests import get_base_url  # noqa: E402
from stac_fastapi.types.rfc3339 import str_to_interval  # noqa: E402

Json = dict[str, Any]
COMPARISONS = {"eq": "=", "neq": "<>", "lt": "<", "lte": "<=", "gt": ">", "gte": ">=", "in": "in"}
PATTERNS = {"startsWith": "{}%", "endsWith": "%{}", "contains": "%{}%"}
# stac-fastapi 7 announces version 1.1 of the extension only, and pystac-client 0.9 looks for 1.0: it would warn.
SORT_1_0 = "https://api.stacspec.org/v1.0.0/item-search#sort"


@attr.s(auto_attribs=True)
class MemoryClient(BaseCoreClient):
    """Answers from a list of items; their collections are made up from them."""

    items: list[Json] = attr.field(factory=list)

    def all_collections(self, **kwargs: Any) -> Json:
        """GET /collections."""
        names = dict.fromkeys(item["collection"] for item in self.items)
        collections = [self.get_collection(name, **kwargs) for name in names]
        return {"collections": collections, "links": [], "numberMatched": len(names), "numberReturned": len(names)}

    def get_collection(self, collection_id: str, *, request: Request, **kwargs: Any) -> Json:
        """GET /collections/C."""
        items = [item for item in self.items if item["collection"] == collection_id]
        if not items:
            raise NotFoundError(f"collection {collection_id!r}: no item belongs to it")
        west, south, east, north = zip(*(item["bbox"] for item in items), strict=True)
        times = sorted(item["properties"]["datetime"] for item in items)
        return {
            "type": "Collection",
            "stac_version": self.stac_version,
            "id": collection_id,
            "description": f"{len(items)} items on this machine",
            "license": "other",
            "extent": {
                "spatial": {"bbox": [[min(west), min(south), max(east), max(north)]]},
                "temporal": {"interval": [[times[0], times[-1]]]},
            },
            "links": CollectionLinks(collection_id=collection_id, base_url=get_base_url(request)).create_links(),
        }

    def get_item(self, item_id: str, collection_id: str, *, request: Request, **kwargs: Any) -> Json:
        """GET /collections/C/items/I."""
        for item in self.items:
            if (item["id"], item["collection"]) == (item_id, collection_id):
                return _linked(item, request)
        raise NotFoundError(f"item {item_id!r}: not in collection {collection_id!r}")

    def item_collection(self, collection_id: str, *, request: Request, **kwargs: Any) -> Json:
        """GET /collections/C/items."""
        self.get_collection(collection_id, request=request)
        return self._search(request, collections=[collection_id], **kwargs)

    def get_search(self, *, request: Request, **kwargs: Any) -> Json:
        """GET /search: stac-fastapi leaves two parameters as JSON text."""
        try:
            parsed = {name: json.loads(kwargs[name]) for name in ("intersects", "query") if kwargs.get(name)}
        except json.JSONDecodeError as error:
            raise InvalidQueryParameter(f"intersects and query must be JSON: {error}") from error
        return self._search(request, **(kwargs | parsed))

    def post_search(self, search_request: Any, *, request: Request, **kwargs: Any) -> Json:
        """POST /search."""
        body = search_request.model_dump(mode="json", by_alias=True, exclude_none=True)
        return self._search(request, body=body, filter_expr=body.get("filter"), **body)

    def _search(self, request: Request, *, body: Json | None = None, **wanted: Any) -> Json:
        conditions = _conditions(**wanted)
        found = [item for item in self.items if all(_holds(condition, item) for condition in conditions)]
        for key in reversed(wanted.get("sortby") or ["-properties.datetime", "id"]):
            field, descending = (key["field"], key["direction"] == "desc") if isinstance(key, dict) else _sort_key(key)
            known = [item for item in found if _value(item, field) is not None]
            unknown = [item for item in found if _value(item, field) is None]
            found = sorted(known, key=lambda item: _value(item, field), reverse=descending) + unknown
        token = wanted.get("token") or "0"
        if not token.isdecimal():
            raise InvalidQueryParameter(f"token={token!r}: must be one that a next link gave")
        start, limit = int(token), wanted.get("limit") or 10
        page, stop = found[start : start + limit], start + limit
        links = [{"rel": "self", "type": "application/geo+json", "href": str(request.url)}]
        if stop < len(found):
            link: Json = {"rel": "next", "type": "application/geo+json", "method": request.method}
            if body is None:
                link["href"] = str(request.url.include_query_params(token=stop))
            else:
                link |= {"href": str(request.url), "body": body | {"token": str(stop)}}
            links.append(link)
        return {
            "type": "FeatureCollection",
            "features": [_linked(item, request) for item in page],
            "links": links,
            "numberMatched": len(found),
            "numberReturned": len(page),
        }


def _conditions(
    *,
    collections: list[str] | None = None,
    ids: list[str] | None = None,
    bbox: list[float] | None = None,
    intersects: Json | None = None,
    datetime: str | None = None,
    query: Json | None = None,
    filter_expr: Json | str | None = None,
    **other: Any,
) -> list[cql2.Expr]:
    """Return what a search asks for as CQL2 expressions, all of which must hold."""
    asked: list[Json | str] = []

    def ask(op: str, name: str, value: Any) -> None:
        asked.append({"op": op, "args": [{"property": name}, value]})

    if collections:
        ask("in", "collection", collections)
    if ids:
        ask("in", "id", ids)
    if bbox:
        half = len(bbox) // 2
        ask("s_intersects", "geometry", {"bbox": [*bbox[:2], *bbox[half : half + 2]]})
    if intersects:
        ask("s_intersects", "geometry", intersects)
    if datetime:
        interval = str_to_interval(datetime)
        ends = interval if isinstance(interval, tuple) else (interval, interval)
        ask("t_intersects", "datetime", {"interval": [end.isoformat() if end else ".." for end in ends]})
    for name, tests in (query or {}).items():
        for test, value in tests.items():
            if test in PATTERNS:
                ask("like", name, PATTERNS[test].format(value))
            elif test in COMPARISONS:
                ask(COMPARISONS[test], name, value)
            else:
                raise InvalidQueryParameter(f"query operator {test!r}: must be one of {[*COMPARISONS, *PATTERNS]}")
    if filter_expr:
        asked.append(filter_expr)
    try:
        return [cql2.Expr(expression) for expression in asked]
    except Exception as error:  # the package raises the base class itself
        raise InvalidQueryParameter(f"not a CQL2 expression: {error}") from error


def _holds(condition: cql2.Expr, item: Json) -> bool:
    try:
        return condition.matches(item)
    except Exception:  # so cql2 answers where an item lacks the property: neither true nor false, hence not found
        return False


def _sort_key(text: str) -> tuple[str, bool]:
    return text.lstrip("+- "), text.startswith("-")  # a "+" in an URL arrives as a blank


def _value(item: Json, field: str) -> Any:
    field = field.removeprefix("properties.")
    return item["properties"].get(field, item.get(field))


def _linked(item: Json, request: Request) -> Json:
    links = ItemLinks(collection_id=item["collection"], item_id=item["id"], base_url=get_base_url(request))
    return item | {"links": links.create_links()}


def application(items: list[Json], folder: Path) -> Any:
    """Return the ASGI application: the STAC API at ``/``, the files of ``folder`` at ``/data``."""
    paging = TokenPaginationExtension()
    sorting = SearchSortExtension()
    sorting.conformance_classes = [*sorting.conformance_classes, SORT_1_0]
    extensions = [QueryExtension(), sorting, SearchFilterExtension(), paging]
    api = StacApi(
        settings=ApiSettings(stac_fastapi_title="local", stac_fastapi_description="Items on this machine"),
        client=MemoryClient(items=items),
        extensions=extensions,
        search_get_request_model=create_get_request_model(extensions),
        search_post_request_model=create_post_request_model(extensions),
        items_get_request_model=create_request_model("Items", ItemCollectionUri, [paging], request_type="GET"),
        middlewares=[],  # the default ones compress, which must not happen to the ranges of a file
    )
    api.app.mount("/data", StaticFiles(directory=folder))
    return api.app


@contextmanager
def serve(items: list[Json], folder: Path, *, port: int = 0) -> Iterator[str]:
    """Serve items and the files below ``folder`` on 127.0.0.1 while the context lasts; yield the URL of the API.

    Parameters
    ----------
    items : list of dict
        STAC items with ``collection``, ``bbox``, ``geometry`` and ``datetime``. They are copied; hrefs that are paths
        below ``folder`` become URLs in the copies, all others stay.
    folder : Path
        What may be read over HTTP.
    port : int
        0 takes a free one.
    """
    folder = Path(folder).resolve()
    listener = socket.create_server(("127.0.0.1", port))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    items = copy.deepcopy(items)
    for item in items:
        for asset in item["assets"].values():
            asset["href"] = _served(asset["href"], folder, url)
    config = uvicorn.Config(application(items, folder), log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError(f"the server for {url} ended while starting; run uvicorn by hand to see why")
            time.sleep(0.01)
        yield url
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def _served(href: str, folder: Path, url: str) -> str:
    path = (folder / href).resolve()
    if "://" in href or not path.is_relative_to(folder):
        return href
    return f"{url}/data/{quote(path.relative_to(folder).as_posix())}"


def main(folder: Path) -> None:
    documents = (json.loads(path.read_text()) for path in sorted(folder.rglob("*.json")))
    items = [document for document in documents if document.get("type") == "Feature"]
    with serve(items, folder, port=8000) as url:
        print(f"{len(items)} items at {url}; stop with Ctrl-C")
        threading.Event().wait()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
