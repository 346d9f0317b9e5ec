from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from pystac_client import Client
from rasterio.windows import Window

from xr_ginet.simulation import simulate, write_cogs

pytest.importorskip("stac_fastapi.api", reason="needs pip install xr-ginet[demo]")
pytest.importorskip("cql2", reason="needs pip install xr-ginet[demo]")
pytest.importorskip("uvicorn", reason="needs pip install xr-ginet[demo]")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from local_stac import serve

Json = dict[str, Any]
CLOUDS = {"A": 5.0, "B": 35.0, "C": 12.0}
TIMES = {"A": "2024-06-01T10:56:31Z", "B": "2024-06-11T10:56:31.500Z", "C": "2024-07-01T10:56:31Z"}
ORIGINS = {"A": (600000.0, 4900020.0), "B": (600000.0, 4900020.0), "C": (700000.0, 4900020.0)}  # C lies 100 km east


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cogs with blanks")


@pytest.fixture(scope="module")
def items(folder: Path) -> list[Json]:
    found = []
    for seed, name in enumerate("ABC"):
        scene = simulate((320, 320) if name == "A" else (16, 16), seed=seed, origin=ORIGINS[name])
        item = write_cogs(
            scene.fine,
            scene.coarse,
            folder,
            transform=scene.transform,
            crs=scene.crs,
            datetime=TIMES[name],
            item_id=name,
            collection="other" if name == "C" else "sentinel-2-l2a",
        )
        item["properties"]["eo:cloud_cover"] = CLOUDS[name]
        found.append(item)
    del found[2]["properties"]["platform"]
    found[1]["assets"]["elsewhere"] = {"href": "https://example.org/B.tif"}
    return found


@pytest.fixture(scope="module")
def url(items: list[Json], folder: Path) -> Iterator[str]:
    with serve(items, folder) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Client:
    return Client.open(url)


def ids(client: Client, **wanted: Any) -> list[str]:
    return [item.id for item in client.search(**wanted).items()]


def box_around(item: Json) -> list[float]:
    west, south, east, north = item["bbox"]
    middle = [(west + east) / 2, (south + north) / 2]
    return [middle[0] - 1e-4, middle[1] - 1e-4, middle[0] + 1e-4, middle[1] + 1e-4]


def post(url: str, body: Json) -> Json:
    request = urllib.request.Request(f"{url}/search", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def test_a_search_without_conditions_finds_all_newest_first(client: Client) -> None:
    assert ids(client) == ["C", "B", "A"]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_each_condition_finds_exactly_the_items_that_meet_it(client: Client, items: list[Json], method: str) -> None:
    expected = [
        ({"bbox": box_around(items[1])}, ["B", "A"]),
        ({"bbox": box_around(items[2])}, ["C"]),
        ({"bbox": [10, 10, 11, 11]}, []),
        ({"intersects": items[2]["geometry"]}, ["C"]),
        ({"intersects": {"type": "Point", "coordinates": box_around(items[1])[:2]}}, ["B", "A"]),
        ({"datetime": "2024-06"}, ["B", "A"]),
        ({"datetime": "2024-06-02/2024-06-30"}, ["B"]),
        ({"datetime": "2024-06-11T10:56:31.500Z/.."}, ["C", "B"]),
        ({"datetime": "../2024-06-11T10:56:31Z"}, ["A"]),
        ({"datetime": "2024-06-01T10:56:31Z"}, ["A"]),
        ({"query": {"eo:cloud_cover": {"lt": 20}}}, ["C", "A"]),
        ({"query": {"eo:cloud_cover": {"lte": 12, "gt": 5}}}, ["C"]),
        ({"query": {"eo:cloud_cover": {"eq": 35}}}, ["B"]),
        ({"query": {"platform": {"startsWith": "sentinel"}}}, ["B", "A"]),
        ({"query": {"platform": {"in": ["sentinel-2a", "sentinel-2b"]}}}, ["B", "A"]),
        ({"filter": "eo:cloud_cover < 20 and collection = 'other'"}, ["C"]),
        ({"filter": {"op": ">", "args": [{"property": "eo:cloud_cover"}, 20]}}, ["B"]),
        ({"ids": ["A", "C", "none"]}, ["C", "A"]),
        ({"collections": ["sentinel-2-l2a"]}, ["B", "A"]),
        ({"collections": ["none"]}, []),
        ({"bbox": box_around(items[1]), "datetime": "2024-06", "query": {"eo:cloud_cover": {"lt": 20}}}, ["A"]),
    ]
    found = [(wanted, ids(client, method=method, **wanted)) for wanted, _ in expected]
    assert found == expected


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    ("sortby", "expected"),
    [
        ("+properties.eo:cloud_cover", ["A", "C", "B"]),
        ("-properties.eo:cloud_cover", ["B", "C", "A"]),
        ("properties.datetime", ["A", "B", "C"]),
        (["-properties.platform", "+id"], ["A", "B", "C"]),  # C has no platform: unknown comes last
        (["+collection", "-id"], ["C", "B", "A"]),
    ],
)
def test_results_are_sorted_as_asked(client: Client, method: str, sortby: Any, expected: list[str]) -> None:
    assert ids(client, method=method, sortby=sortby) == expected


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_pages_of_one_hold_each_item_once(client: Client, method: str) -> None:
    search = client.search(method=method, limit=1, sortby="+id", query={"eo:cloud_cover": {"lt": 50}})
    pages = list(search.pages())
    assert [[item.id for item in page] for page in pages] == [["A"], ["B"], ["C"]]
    assert search.matched() == 3


def test_max_items_stops_between_pages(client: Client) -> None:
    assert ids(client, limit=1, max_items=2, sortby="+id") == ["A", "B"]


def test_matched_counts_beyond_the_page(client: Client) -> None:
    assert client.search(limit=1, collections=["sentinel-2-l2a"]).matched() == 2


def test_collections_span_their_items(client: Client, items: list[Json]) -> None:
    collections = {collection.id: collection for collection in client.get_collections()}
    assert set(collections) == {"sentinel-2-l2a", "other"}
    west, south, east, north = (np.array([item["bbox"] for item in items[:2]])).T
    assert collections["sentinel-2-l2a"].extent.spatial.bboxes == [[min(west), min(south), max(east), max(north)]]
    start, end = collections["sentinel-2-l2a"].extent.temporal.intervals[0]
    assert (start.day, end.day) == (1, 11)
    assert [item.id for item in collections["sentinel-2-l2a"].get_items()] == ["B", "A"]
    assert collections["other"].get_item("C").id == "C"
    assert client.get_collection("other").get_item("A") is None


def test_hrefs_below_the_folder_become_urls_and_others_stay(url: str, items: list[Json]) -> None:
    served = post(url, {"ids": ["B"]})["features"][0]
    assert served["assets"]["nir"]["href"] == f"{url}/data/B/B08.tif"
    assert served["assets"]["elsewhere"]["href"] == "https://example.org/B.tif"
    assert not items[1]["assets"]["nir"]["href"].startswith("http"), "the caller's items were changed"


def test_a_window_read_over_http_equals_the_file(url: str, client: Client, items: list[Json]) -> None:
    href = next(client.search(ids=["A"]).items()).assets["nir08"].href
    assert href.startswith(url)
    window = Window(41, 73, 90, 60)
    with rasterio.open(items[0]["assets"]["nir08"]["href"]) as file:
        expected = file.read(1, window=window)
    with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"), rasterio.open(f"/vsicurl/{href}") as file:
        np.testing.assert_array_equal(file.read(1, window=window), expected)
    assert len(np.unique(expected)) > 100


def test_a_range_request_gets_only_its_bytes(url: str, items: list[Json]) -> None:
    headers = {"Range": "bytes=100-227", "Accept-Encoding": "br, gzip"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/data/A/B08.tif", headers=headers), timeout=120) as reply:
        assert reply.status == 206
        assert reply.read() == Path(items[0]["assets"]["nir"]["href"]).read_bytes()[100:228]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"query": {"eo:cloud_cover": {"below": 20}}}, "query operator 'below': must be one of"),
        ({"filter": {"nonsense": 1}}, "not a CQL2 expression"),
        ({"token": "x"}, "token='x': must be one that a next link gave"),
        ({"datetime": "June"}, "datetime"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused_with_a_reason(url: str, body: Json, message: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="400") as refusal:
        post(url, body)
    assert message in refusal.value.read().decode()


def test_files_outside_the_folder_are_not_served(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{url}/data/%2e%2e/%2e%2e/etc/passwd", timeout=120)


def test_nothing_answers_after_the_context(items: list[Json], folder: Path) -> None:
    with serve(items, folder) as address:
        assert ids(Client.open(address)) == ["C", "B", "A"]
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(address, timeout=120)


def test_the_server_is_quiet(items: list[Json], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with serve(items, folder) as address, pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{address}/collections/none", timeout=120)
    assert capfd.readouterr() == ("", "")
