"""Catalogues and stores that mean harm, or answer what none should: a named error, within bounds, and nothing lost."""

from __future__ import annotations

import json
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from conftest import scene_item, single_grid
from faulty import Plan, faulty
from pystac_client.exceptions import APIError

import xr_ginet
from xr_ginet.jobs import Job, run
from xr_ginet.sentinel2 import arrays, patience, search
from xr_ginet.sentinel2.addresses import Address
from xr_ginet.sentinel2.items import read_item
from xr_ginet.sentinel2.provenance import of_all
from xr_ginet.sentinel2.reader import look
from xr_ginet.simulation import simulate

SECRET = "TOPSECRET"
HOST = "127.0.0.1:1"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(patience, "STAC_TIMEOUT", (1.0, 1.0))


@pytest.fixture(scope="module")
def item(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return scene_item(simulate((32, 32), seed=4), tmp_path_factory.mktemp("scene"))


Answer = Callable[[str, str, int], tuple[int, dict[str, str], bytes]]


@contextmanager
def api(answer: Answer, **landing: Any) -> Iterator[tuple[str, list[str]]]:
    """Serve a catalogue whose searches are answered by a function of URL, path and number; yield URL and paths."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            self.reply()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.reply()

        def reply(self) -> None:
            asked.append(self.path)
            status, headers, body = (200, {}, self.landing())
            if self.path.startswith("/search"):
                status, headers, body = answer(url, self.path, sum(p.startswith("/search") for p in asked) - 1)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            for start in range(0, len(body), 1000) if "X-Drip" in headers else [0]:
                time.sleep(0.2 if "X-Drip" in headers else 0)
                self.wfile.write(body[start : start + 1000] if "X-Drip" in headers else body)

        def landing(self) -> bytes:
            links = [{"rel": "search", "href": f"{url}/search", "method": "POST", "type": "application/geo+json"}]
            classes = [f"https://api.stacspec.org/v1.0.0/{name}" for name in ("core", "item-search")]
            catalog = {"type": "Catalog", "id": "api", "description": "-", "stac_version": "1.0.0", "links": links}
            return json.dumps(catalog | {"conformsTo": classes} | landing).encode()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield url, asked
    finally:
        server.shutdown()
        server.server_close()


def page(items: list, following: str | None = None, **more: Any) -> tuple[int, dict[str, str], bytes]:
    links = [{"rel": "next", "href": following}] if following else []
    return 200, {}, json.dumps({"type": "FeatureCollection", "features": items, "links": links} | more).encode()


def of(item: dict[str, Any], day: int) -> dict[str, Any]:
    return item | {"id": str(day), "properties": item["properties"] | {"datetime": f"2024-06-{day:02}T10:56:21Z"}}


def opened(url: str, **options: Any) -> list[str]:
    return of_all(xr_ginet.open_stac(url, bands=["B02"], local_files=True, **options))["source_items"]


def test_items_behind_empty_pages_are_found(item: dict) -> None:
    pages = [[of(item, 11)], [], [], [of(item, 12)], []]

    def answer(url: str, path: str, number: int) -> Any:
        following = f"{url}/search?page={number + 1}" if number + 1 < len(pages) else None
        return page(pages[number], following, numberMatched=2)

    with api(answer) as (url, asked):
        assert opened(url) == ["11", "12"]
        assert len([path for path in asked if path.startswith("/search")]) == len(pages)


def test_empty_pages_that_never_end_are_an_error(item: dict) -> None:
    same: Answer = lambda url, path, number: page([], f"{url}/search?page=1")  # noqa: E731
    other: Answer = lambda url, path, number: page([], f"{url}/search?page={number}")  # noqa: E731
    for answer in (same, other):
        with (
            api(answer) as (url, _),
            pytest.raises(ValueError, match=rf"pages of {url}/search repeat: .*Type max_items="),
        ):
            opened(url)


def test_new_items_that_never_end_are_an_error(item: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(url: str, path: str, number: int) -> Any:
        return page([item | {"id": str(number)}], f"{url}/search?page={number}")

    monkeypatch.setattr(search, "MOST_ITEMS", 20)
    with api(answer) as (url, _), pytest.raises(ValueError, match=r"has found more than 20 items. Search a smaller"):
        opened(url)
    monkeypatch.setattr(search, "SEARCH_SECONDS", 0.0)
    with api(answer) as (url, _), pytest.raises(ValueError, match=r"do not end within 0 s. Search a smaller"):
        opened(url)


@pytest.mark.parametrize("said", [{"numberMatched": 3}, {"context": {"matched": 3}}])
def test_fewer_items_than_match_are_an_error(item: dict, said: dict) -> None:
    with api(lambda url, path, number: page([of(item, 11), of(item, 12)], **said)) as (url, _):
        with pytest.raises(
            ValueError, match=r"says that 3 items match, and its pages brought 2.*type max_items=2 to go on"
        ):
            opened(url)
        assert opened(url, max_items=2) == ["11", "12"]


@pytest.mark.parametrize("asks", ["7200", "Wed, 21 Oct 2099 07:28:00 GMT"])
def test_a_server_does_not_decide_for_how_long_we_wait(item: dict, asks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"slept {seconds}") if seconds > 60 else None)
    with api(lambda url, path, number: (429, {"Retry-After": asks}, b"later")) as (url, asked):
        with pytest.raises(APIError, match=r"search: APIError: HTTP 429, and it asks to be left alone for \d+ s"):
            opened(url)
        assert asked.count("/search") == 1


def test_a_short_pause_that_a_server_asks_for_is_kept(item: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)

    def answer(url: str, path: str, number: int) -> Any:
        return page([of(item, 11)]) if number else (503, {"Retry-After": "50"}, b"later")

    with api(answer) as (url, _):
        assert opened(url) == ["11"]
    assert 50 in slept


def test_an_answer_that_comes_byte_by_byte_ends(item: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(patience, "ATTEMPTS", 1)
    status, _, body = page([of(item, day) for day in range(10, 20)])
    with api(lambda url, path, number: (status, {"X-Drip": "1"}, body * 5)) as (url, _):
        with pytest.raises(APIError, match=r"search: TimeoutError: no whole answer within 0.5 s"):
            opened(url)


def test_a_large_answer_is_not_read(item: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "LARGEST_ANSWER", 2**20)
    with api(lambda url, path, number: page([of(item, 11) | {"x": "x" * 2**21}])) as (url, _):
        with pytest.raises(ValueError, match=r"/search answers with more than 1 MiB: not read. Search a smaller"):
            opened(url)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"<html>login</html>", r"/search answers with '<html>login</html>', which is no JSON. Is it a STAC API\?"),
        (b"[]", r"/search answers with '\[\]', and not with a JSON object"),
        (b"null", "answers with 'null', and not with a JSON object"),
        (b"", "answers with '', which is no JSON"),
        (b"\xff\xfe", "which is no JSON"),
        (b"[" * 100_000, "which is no JSON"),
        (b"{}", "answers with nothing, and not with a STAC FeatureCollection"),
        (b'{"features": null}', "answers with features, and not with a STAC FeatureCollection"),
        (b'{"features": {}}', "and not with a STAC FeatureCollection"),
        (b'{"features": [7]}', "answers with '7' among the items, which is none"),
        (b'{"features": [{"type": "Feature"}]}', "among the items, which is none"),
        (b'{"features": [], "links": {"a": 1}}', "and not with a STAC FeatureCollection"),
        (b'{"features": [], "links": [7]}', "has the link 7, which leads nowhere"),
        (
            b'{"features": [], "links": [{"rel": "next", "href": "file:///etc/passwd"}]}',
            "only http:// and https:// are",
        ),
        (b'{"features": [], "links": []}', "no item of 'sentinel-2-l2a'"),
    ],
)
def test_an_answer_that_is_no_page_of_items_is_named(body: bytes, match: str) -> None:
    with api(lambda url, path, number: (200, {}, body)) as (url, _), pytest.raises(ValueError, match=match):
        opened(url)


@pytest.mark.parametrize("content", [b"<html>", b"[]", b"null", b"{}", b'{"type": "Catalog"}', b'{"links": [1]}'])
def test_a_url_that_is_no_catalogue_is_named(content: bytes) -> None:
    with faulty(lambda path, posted: content) as url, pytest.raises(ValueError, match=f"{url}"):
        opened(url)


@pytest.mark.parametrize("rel", ["root", "self", "search", "data", "parent"])
@pytest.mark.parametrize("href", ["{path}", "file://{path}"])
def test_a_catalogue_does_not_choose_which_files_of_this_machine_are_opened(
    rel: str, href: str, item: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = tmp_path / "private.json"
    private.write_text(json.dumps({"type": "Catalog", "id": "mine", "description": "-", "links": []}))
    touched: list[str] = []
    real = open
    monkeypatch.setattr("builtins.open", lambda file, *a, **k: touched.append(str(file)) or real(file, *a, **k))
    links = [{"rel": rel, "href": href.format(path=private)}]
    with api(lambda url, path, number: page([of(item, 11)]), links=links) as (url, _):
        with suppress(ValueError, APIError):  # whether it is refused or passed over
            opened(url)
    assert not [file for file in touched if "private" in file]


def test_no_face_of_an_unreachable_catalogue_tells_its_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for url in (f"http://{HOST}/v1?key={SECRET}", f"http://me:{SECRET}@{HOST}/v1"):
        with caplog.at_level("DEBUG"), pytest.raises(APIError, match=f"http://{HOST}/v1: ConnectionError") as error:
            opened(url)
        assert SECRET not in "".join(traceback.format_exception(error.value))
    assert SECRET not in caplog.text


def chain(error: BaseException | None) -> str:
    """Return the texts of an error and of all that led to it."""
    return "" if error is None else f"{error!r} {chain(error.__cause__)} {chain(error.__context__)}"


@pytest.mark.parametrize("kind", ["image/tiff", "application/vnd+zarr"])
@pytest.mark.parametrize("stated", [True, False])
def test_no_error_of_a_signed_file_tells_its_signature(item: dict, kind: str, stated: bool) -> None:
    asset = item["assets"]["blue"] | {"href": f"http://{HOST}/b02?sig={SECRET}", "type": kind, "data_type": "uint16"}
    if not stated:
        asset = {k: v for k, v in asset.items() if not k.startswith(("proj:", "data_type", "raster:"))}
    with pytest.raises((ValueError, RuntimeError)) as error:
        xr_ginet.open_stac([item | {"assets": {"blue": asset}}], bands=["B02"]).compute(scheduler="synchronous")
    assert SECRET not in chain(error.value)
    assert f"http://{HOST}/b02" in str(error.value) or "no proj:transform" in str(error.value)


# -- signing
# ------------------------------------------------------------------------------------------------------------


def test_files_are_signed_when_they_are_opened_and_again_when_a_signature_ends(item: dict, tmp_path: Path) -> None:
    folder, valid, signed = Path(item["assets"]["blue"]["href"]).parents[1], {"0"}, []

    class Guarded(Plan):
        def meets(self, path: str) -> bool:
            return path.rpartition("=")[2] not in valid

    def sign(pystac_item: Any) -> Any:
        number = str(len(signed))
        signed.append(pystac_item.id)
        valid.clear()  # one token at a time
        valid.add(number)
        for asset in pystac_item.assets.values():
            asset.href += f"?token={number}"
        return pystac_item

    with faulty(folder, Guarded("403")) as url:
        served = json.loads(json.dumps(item).replace(str(folder), url))
        cube = xr_ginet.open_stac([served], bands=["B02", "B05"], sign=sign, chunks=16)
        valid.clear()
        found = cube.compute(scheduler="synchronous")
    xr.testing.assert_equal(found, xr_ginet.open_stac([item], bands=["B02", "B05"], chunks=16).compute())
    assert len(signed) >= 3
    assert "token" not in str(found.attrs) + str(served["assets"]["blue"]["href"])


def test_a_sign_that_returns_nothing_is_named(item: dict) -> None:
    with pytest.raises(ValueError, match=r"sign= returned None for item simulated: it must return the signed item"):
        xr_ginet.open_stac([item], sign=lambda one: None)


# -- Zarr
# ---------------------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def write_v2(folder: Path, values: np.ndarray, data: bytes | None = None, **changes: Any) -> None:
    folder.mkdir(parents=True)
    shape = list(values.shape)
    meta = {"zarr_format": 2, "shape": shape, "chunks": shape, "dtype": values.dtype.str, "compressor": None}
    (folder / ".zarray").write_text(json.dumps(meta | {"fill_value": 0, "order": "C", "filters": None} | changes))
    (folder / ".zattrs").write_text(json.dumps({"_ARRAY_DIMENSIONS": ["y", "x"][: len(shape)]}))
    (folder / ".".join("0" * len(shape))).write_bytes(values.tobytes() if data is None else data)


def write_group(group: Path, replaced: str = "", **changes: Any) -> Path:
    """Write a group of a band and its coordinates, one of which is another."""
    for name, values in (
        ("b05", np.full((8, 8), 1000, "<u2")),
        ("y", -10 - 20.0 * np.arange(8)),
        ("x", 10.0 + 20 * np.arange(8)),
    ):
        write_v2(group / name, values, **(changes if name == replaced else {}))
    (group / ".zgroup").write_text('{"zarr_format": 2}')
    return group / "b05"


@pytest.mark.parametrize("name", ["b05", "y", "x"])
@pytest.mark.parametrize(
    "codecs",
    [
        {"compressor": {"id": "pickle", "protocol": 5}},
        {"filters": [{"id": "vlen-utf8"}], "compressor": {"id": "pickle"}, "dtype": "|O"},
        {"filters": [{"id": "pickle"}], "dtype": "|O"},
        {"filters": [{"id": "msgpack2"}], "dtype": "|O"},
        {"filters": [{"id": "categorize", "labels": ["a"], "dtype": "|O"}], "dtype": "|O"},
    ],
)
def test_a_codec_that_is_not_known_decodes_nothing(name: str, codecs: dict, tmp_path: Path) -> None:
    array = write_group(tmp_path / "r20m", name, data=pickle.dumps(Evil(tmp_path / "owned")), **codecs)
    with pytest.raises((ValueError, RuntimeError), match=rf"r20m/{name}(: its codecs are| cannot be read)"):
        look(str(array))
    with pytest.raises(ValueError, match=r"its codecs are|cannot be opened as a cube"):
        arrays.open_cube(str(tmp_path / "r20m"))
    assert not (tmp_path / "owned").exists()


def test_codecs_within_shards_are_looked_at_too() -> None:
    inner = [{"name": "bytes"}, {"name": "numcodecs.pickle", "configuration": {}}]
    shards = {"name": "sharding_indexed", "configuration": {"codecs": inner, "index_codecs": [{"name": "evil"}]}}
    assert set(arrays.codecs_of({"zarr_format": 3, "codecs": [shards]})) - arrays.CODECS == {"pickle", "evil"}
    known = {"zarr_format": 2, "filters": [{"id": "delta"}], "compressor": {"id": "blosc"}}
    assert set(arrays.codecs_of(known)) <= arrays.CODECS


def test_what_the_library_writes_may_be_read(tmp_path: Path) -> None:
    cube = xr.Dataset({"B02": (("y", "x"), np.ones((8, 8), "f4"))}, {"y": np.arange(8.0), "x": np.arange(8.0)})
    for version in (2, 3):
        cube.assign_coords(name=("y", [*"abcdefgh"])).to_zarr(
            tmp_path / str(version), zarr_format=version, consolidated=False
        )
        xr.testing.assert_equal(arrays.open_cube(str(tmp_path / str(version))).drop_vars("name").load(), cube)


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("y", {"shape": [10**12], "chunks": [100]}, r"y has the shape \(1000000000000,\); the array beside it has 8"),
        ("y", {"chunks": [10**12]}, r"r20m/y: its chunks are \(1000000000000,\) of float64, 7450.6 GiB"),
        ("b05", {"chunks": [10**6, 10**6]}, r"r20m/b05: its chunks are \(1000000, 1000000\) of uint16, 1862.6 GiB"),
        ("b05", {"dtype": "|b1", "fill_value": False}, "r20m/b05: holds bool, and no numbers"),
    ],
)
def test_sizes_in_metadata_are_looked_at_before_memory_is_taken(
    name: str, changes: dict, match: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=match):
        look(str(write_group(tmp_path / "r20m", name, **changes)))


def test_an_answer_of_a_store_that_unpacks_to_gigabytes_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_group(tmp_path / "r20m")
    monkeypatch.setattr(arrays, "LARGEST_CHUNK", 2**16)
    (tmp_path / "r20m" / "b05" / ".zattrs").write_text(json.dumps({"x": "x" * 2**17}))
    with faulty(tmp_path) as url, pytest.raises(ValueError, match="r20m/b05: answers with more than 0 MiB"):
        look(f"{url}/r20m/b05")


@pytest.mark.parametrize("fault", ["503", "drop"])
@pytest.mark.parametrize("path", ["/b05/.zarray", "/b05/0.0"])
def test_a_zarr_array_is_asked_for_again(fault: str, path: str, item: dict, tmp_path: Path) -> None:
    write_group(tmp_path / "r20m")
    asset = item["assets"]["rededge1"] | {"type": "application/vnd+zarr", "data_type": "uint16", "proj:shape": [8, 8]}
    asset["proj:transform"] = [20, 0, 600_000, 0, -20, 4_900_000]
    plan = Plan(fault, path, lambda number: number < 2)
    with faulty(tmp_path, plan) as url:
        one = item | {"assets": {"rededge1": asset | {"href": f"{url}/r20m/b05"}}}
        np.testing.assert_allclose(xr_ginet.open_stac([one], bands=["B05"])["B05"].values, 0.1, 1e-6)
        assert plan.seen["faults"] == 2
    for_good = Plan(fault, path)
    with faulty(tmp_path, for_good) as url:
        one = item | {"assets": {"rededge1": asset | {"href": f"{url}/r20m/b05"}}}
        with pytest.raises(RuntimeError, match="r20m/b05 cannot be read"):
            xr_ginet.open_stac([one], bands=["B05"]).compute(scheduler="synchronous")
    assert for_good.seen["faults"] >= patience.ATTEMPTS  # aiohttp asks a second time by itself


def test_two_zarr_arrays_that_differ_by_their_query_alone_are_two(item: dict) -> None:
    asset = item["assets"]["rededge1"] | {"type": "application/vnd+zarr", "data_type": "uint16"}
    items = [item | {"assets": {"rededge1": asset | {"href": f"https://a.example/b05?day={day}"}}} for day in (1, 2)]
    names = [xr_ginet.open_stac([one], bands=["B05"])["B05"].data.name for one in items]
    assert names[0] != names[1]
    scene = read_item(items[0], ["B05"])
    assert scene.bands["B05"].href == Address("https://a.example/b05?day=1")


def test_a_zarr_store_that_is_damaged_is_named(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "c.zarr").create_array("B02", shape=(4, 4), dtype="f4")
    (tmp_path / "c.zarr" / "B02" / "zarr.json").write_text("{")
    with pytest.raises(ValueError, match=r"c.zarr cannot be opened as a cube in Zarr \(.*\). Is it whole\?"):
        arrays.open_cube(str(tmp_path / "c.zarr"))


# -- what users type
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("datetime", ["06/2024", "June", "2024-13", "2024-06-01/2024-06-30/2024-07-01", "../..", ""])
def test_a_date_that_is_none_is_named(item: dict, datetime: str) -> None:
    with api(lambda url, path, number: (400, {}, b"bad datetime")) as (url, _):
        with pytest.raises(
            (ValueError, APIError), match=r"datetime is a date or a range, such as 2024-06|bad datetime"
        ):
            opened(url, datetime=datetime)


def test_an_area_may_be_text_or_a_feature(item: dict) -> None:
    west, south, east, north = item["bbox"]
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    expected = xr_ginet.open_stac([item], bands=["B02"], intersects=geometry)
    for area in (json.dumps(geometry), {"type": "Feature", "geometry": geometry, "properties": {}}):
        xr.testing.assert_identical(xr_ginet.open_stac([item], bands=["B02"], intersects=area), expected)


@pytest.mark.parametrize(
    ("area", "match"),
    [
        (
            {"type": "Point", "coordinates": [2.0, 44.0]},
            r"a Point without an extent.*bbox=\(1.9900, 43.9900, 2.0100, 44.01",
        ),
        ({"type": "LineString", "coordinates": [[2.0, 44.0], [2.0, 45.0]]}, "a LineString without an extent"),
        ("here", "intersects='here' is no GeoJSON geometry"),
        ("[1, 2]", "is no GeoJSON geometry"),
        ({}, "is no GeoJSON geometry"),
        ({"type": "Feature", "geometry": None}, "is no GeoJSON geometry"),
        ({"type": "Polygon", "coordinates": "x"}, "whose coordinates cannot be read"),
        ({"type": "Polygon", "coordinates": []}, "holds no coordinates; a GeoJSON geometry is needed"),
        (
            {"type": "Polygon", "coordinates": [[[6e5, 4.9e6], [7e5, 4.9e6], [7e5, 5e6]]]},
            "reaches from 600000 to 700000",
        ),
        ({"type": "Polygon", "coordinates": [[[1, 4.9e6], [2, 4.9e6], [2, 5e6]]]}, "coordinates must be degrees"),
    ],
)
def test_an_area_that_is_none_is_named(item: dict, area: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        xr_ginet.open_stac([item], bands=["B02"], intersects=area)


@pytest.mark.parametrize("name", ["../escaped", "/escaped", "a/b", "a\\b", "..", ".", "", "C:x", "a\0b"])
def test_the_name_of_a_variable_does_not_leave_the_folder_of_cogs(name: str, tmp_path: Path) -> None:
    cube = single_grid(("B02", "B05"), (16, 16), 10).rename(B05=name).astype("float32")
    with pytest.raises(ValueError, match=r"cannot be the name of a file. Type ds.rename\("):
        cube.ginet.to_cog(tmp_path / "cogs")
    assert not list(tmp_path.rglob("*.tif"))


def test_months_are_no_files(tmp_path: Path) -> None:
    months = single_grid(("B02",), (16, 16), 10, n_times=2).groupby("time.month").mean()
    with pytest.raises(ValueError, match=r"B02 has the dimension 'month' besides time, y, x.*ds\.isel\(month=0\)"):
        months.ginet.to_cog(tmp_path)


def job_file(folder: Path, more: str = "", name: str = "job.toml") -> Path:
    text = f'catalog = "http://{HOST}"\nstore = "{{area}}.zarr"\n{more}\n[[area]]\nname = "a"\nbbox = [0, 1, 2, 3]\n'
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(
    "kind", ["distributed.utils.import_file", "distributed.Client", "distributed.deploy.Cluster", "distributed.config"]
)
def test_a_job_has_its_cluster_from_classes_of_clusters_alone(kind: str, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\n")
    options = f'[cluster]\nclass = "{kind}"\noptions = {{ path = "{tmp_path}/evil.py" }}'
    with pytest.raises(ValueError, match=rf"class='{kind}' is no class of Dask clusters, such as distributed.Local"):
        run(Job.from_toml(job_file(tmp_path, options)))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(("name", "report"), [("j.toml", "j.toml"), ("j.toml", "./x/../j.toml")])
def test_a_report_does_not_take_the_place_of_its_job(name: str, report: str, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(ValueError, match=r"would overwrite the job.s file\. Name another, such as report.json"):
        Job.from_toml(job_file(tmp_path, f'report = "{report}"', name))
    (tmp_path / "link.toml").symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match="would overwrite the job's file"):
        Job.from_toml(job_file(tmp_path, 'report = "link.toml"', name))


@pytest.mark.parametrize("field", ["{area!r}", "{area:>9}", "{area.x}", "{}"])
def test_a_store_is_named_by_its_area_alone(field: str, tmp_path: Path) -> None:
    path = job_file(tmp_path)
    path.write_text(path.read_text().replace("{area}", field))
    with pytest.raises(ValueError, match=r"the only name to fill in is \{area\}, as it stands"):
        Job.from_toml(path)
