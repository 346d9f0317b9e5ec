"""What catalogues and servers do on bad days: what passes is waited for, what does not is told, nothing is invented."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import xarray as xr
from conftest import scene_item
from faulty import Plan, faulty
from pystac_client.exceptions import APIError

import xr_ginet
from xr_ginet.growing import PartialFailure
from xr_ginet.sentinel2 import patience, rasters
from xr_ginet.sentinel2.provenance import of_all
from xr_ginet.simulation import simulate

BANDS = ("B02", "B05")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)
    if "hang" in getattr(request.node, "callspec", SimpleNamespace(params={})).params.values():
        # Only servers that hang are given up soon: others may be slow, on a busy machine.
        monkeypatch.setattr(patience, "STAC_TIMEOUT", (10.0, 1.0))
        monkeypatch.setitem(rasters.LIMITS, "GDAL_HTTP_LOW_SPEED_TIME", 2)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Return an item and the folder of its COGs, which are too large to be read at once."""
    folder = tmp_path_factory.mktemp("scene")
    return scene_item(simulate((768, 768), seed=4), folder), folder


def served(scene: tuple[dict[str, Any], Path], url: str, **changes: str) -> dict[str, Any]:
    item, folder = copy.deepcopy(scene[0]), scene[1]
    for asset in item["assets"].values():
        asset["href"] = f"{url}/{Path(asset['href']).relative_to(folder)}"
    return item | changes


def opened(item: dict[str, Any]) -> xr.Dataset:
    return xr_ginet.open_stac([item], chunks=384, bands=BANDS)


@pytest.fixture(scope="module")
def truth(scene: tuple[dict[str, Any], Path]) -> xr.Dataset:
    return opened(scene[0]).compute()


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("fault", ["429", "500", "503", "404", "drop", "truncate", "corrupt", "hang"])
def test_a_raster_that_fails_for_a_while_is_read_all_the_same(
    scene: tuple, truth: xr.Dataset, fault: str, first: int
) -> None:
    plan = Plan(fault, "B02.tif", lambda number: first <= number < first + 2)
    with faulty(scene[1], plan) as url:
        got = opened(served(scene, url)).compute()
    assert plan.seen["faults"] == 2
    xr.testing.assert_equal(got, truth)


@pytest.mark.parametrize("fault", ["500", "404", "truncate", "corrupt"])
def test_a_raster_that_fails_for_good_is_an_error_and_never_missing_pixels(scene: tuple, fault: str) -> None:
    plan = Plan(fault, "B02.tif", lambda number: number > 2)
    with faulty(scene[1], plan) as url, pytest.raises(RuntimeError, match=r"Error (opening|reading).*B02.tif"):
        opened(served(scene, url)).compute(scheduler="synchronous")
    assert plan.seen["faults"] >= patience.ATTEMPTS


def test_a_raster_that_is_not_there_is_an_error_and_never_missing_pixels(scene: tuple) -> None:
    with faulty(scene[1], Plan("404", "B02.tif")) as url, pytest.raises(RuntimeError, match=r"Error opening.*B02.tif"):
        opened(served(scene, url)).compute()


def test_a_local_file_is_not_waited_for(scene: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: 1 / 0)
    item = copy.deepcopy(scene[0])
    item["assets"]["blue"]["href"] = str(tmp_path / "gone.tif")
    with pytest.raises(RuntimeError, match=r"Error opening.*gone.tif"):
        opened(item).compute()


def test_a_signed_url_leaves_no_secret_in_cubes_logs_and_errors(
    scene: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failing, path = [True], tmp_path / "cube.zarr"
    with faulty(scene[1], Plan("500", "B02.tif", lambda number: failing[0])) as url:
        item = served(scene, url)
        for asset in item["assets"].values():
            asset["href"] += "?sig=secret"
        cube = opened(item)[["B02"]]
        with caplog.at_level("INFO"), pytest.raises(PartialFailure) as error:
            cube.ginet.to_zarr(path, resume=True)
        failing.clear()
        failing.append(False)
        cube.ginet.to_zarr(path, resume=True)
    assert "B02.tif" in str(error.value)
    told = str(error.value) + caplog.text + str(cube.attrs)
    assert "secret" not in told
    assert not any(b"secret" in file.read_bytes() for file in path.rglob("*") if file.is_file())
    assert xr_ginet.status(path, verify=True).all()


class Api:
    """A STAC API of one search, whose pages are lists of items; the last may lead back to itself."""

    def __init__(self, pages: list[list[dict[str, Any]]], *, endless: bool = False) -> None:
        self.pages, self.endless, self.url = pages, endless, ""

    def __call__(self, path: str, posted: Any) -> bytes | None:
        if path == "/":
            links = [{"rel": r, "href": f"{self.url}{p}"} for r, p in (("self", "/"), ("root", "/"), ("data", "/c"))]
            links.append(
                {"rel": "search", "href": f"{self.url}/search", "type": "application/geo+json", "method": "POST"}
            )
            catalog = {"type": "Catalog", "id": "api", "description": "-", "stac_version": "1.0.0", "links": links}
            classes = [f"https://api.stacspec.org/v1.0.0/{name}" for name in ("core", "item-search")]
            return json.dumps(catalog | {"conformsTo": classes}).encode()
        if path != "/search":
            return None
        page = (posted or {}).get("page", 0)
        following = min(page + 1, len(self.pages) - 1)
        links = []
        if self.endless or following > page:
            links = [{"rel": "next", "href": f"{self.url}/search", "method": "POST", "body": {"page": following}}]
        return json.dumps({"type": "FeatureCollection", "features": self.pages[page], "links": links}).encode()


@pytest.fixture
def search(scene: tuple) -> Callable[..., Iterator[list[str]]]:
    """Return a function that opens a faulty API of three items and returns their ids."""

    def run(*plans: Plan, endless: bool = False) -> list[str]:
        items = [
            scene[0] | {"id": n, "properties": scene[0]["properties"] | {"datetime": f"2024-06-{day}T10:56:21Z"}}
            for n, day in zip("abc", (11, 16, 21), strict=True)
        ]
        api = Api([items[:2], items[2:]], endless=endless)
        with faulty(api, *plans) as api.url:
            cube = xr_ginet.open_stac(api.url, bands=BANDS, groupby=None, local_files=True)
        return of_all(cube)["source_items"]

    return run


@pytest.mark.parametrize("fault", ["429", "500", "502", "503", "hang", "drop"])
@pytest.mark.parametrize("path", ["/", "/search"])
def test_a_catalogue_that_fails_for_a_while_is_asked_again(search: Callable, fault: str, path: str) -> None:
    plan = Plan(fault, path, lambda number: number in (0, 2))
    assert search(plan) == list("abc")
    assert plan.seen["faults"] >= 1


@pytest.mark.parametrize("fault", ["500", "hang", "429", "404"])
def test_a_catalogue_that_fails_for_good_is_an_error(search: Callable, fault: str) -> None:
    with pytest.raises(APIError):
        search(Plan(fault, "/search"))


def test_pages_that_never_end_are_an_error(search: Callable) -> None:
    with pytest.raises(ValueError, match="the catalogue's pages repeat: after 3 items one brought 1 that were"):
        search(endless=True)


def test_a_page_that_is_cut_is_an_error(search: Callable) -> None:
    with pytest.raises((APIError, json.JSONDecodeError)):
        search(Plan("truncate", "/search"))
