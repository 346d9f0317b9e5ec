"""Rasters are compared with their items when they are opened, and opened as what their items say, alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from faulty import faulty
from numpy.testing import assert_allclose
from rasterio import Affine

import xr_ginet
from xr_ginet.sentinel2 import patience

ORIGIN = (600_000.0, 4_900_000.0)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)


def numbers(dtype: str = "uint16", low: int = 1000, high: int = 5000) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, (64, 64)).astype(dtype)


def write(path: Path, array: np.ndarray, **changes: Any) -> Path:
    array = np.atleast_3d(array.T).T
    profile = {"driver": "GTiff", "crs": "EPSG:32630", "transform": Affine(10, 0, ORIGIN[0], 0, -10, ORIGIN[1])}
    profile |= {"count": array.shape[0], "height": array.shape[1], "width": array.shape[2], "dtype": array.dtype}
    with rasterio.open(path, "w", **(profile | changes)) as file:
        file.write(array)
    return path


def item_of(href: object, **asset: Any) -> dict[str, Any]:
    said = {"href": str(href), "type": "image/tiff", "eo:bands": [{"name": "blue"}], "proj:shape": [64, 64]}
    said |= {"proj:transform": [10, 0, ORIGIN[0], 0, -10, ORIGIN[1]]}
    return {
        "id": "S2_N0300_",
        "collection": "c",
        "bbox": [-1.8, 44.2, -1.7, 44.3],
        "links": [],
        "properties": {"datetime": "2024-06-21T10:56:21Z", "proj:epsg": 32630},
        "assets": {"blue": said | asset},
    }


def read(href: object, **asset: Any) -> np.ndarray:
    return xr_ginet.open_stac([item_of(href, **asset)], bands=["B02"])["B02"].values[0]


def test_a_raster_that_is_what_its_item_says_is_read(tmp_path: Path) -> None:
    assert_allclose(read(write(tmp_path / "a.tif", numbers())), numbers() / 1e4, rtol=1e-6)


@pytest.mark.parametrize(
    ("array", "profile", "asset", "found", "expected"),
    [
        (numbers(), {"crs": None}, {}, "has no CRS", "EPSG:32630"),
        (numbers(), {"crs": "EPSG:32631"}, {}, "is in EPSG:32631", "EPSG:32630"),
        (numbers(), {"crs": "EPSG:4326"}, {}, "is in EPSG:4326", "EPSG:32630"),
        (numbers(), {"crs": "+proj=laea +lat_0=1"}, {}, "is in .*LAEA|is in PROJCS", "EPSG:32630"),
        (numbers()[:, :60], {}, {}, "64 by 60 pixels of 10 by 10", "64 by 64 pixels of 10 by 10"),
        (numbers()[:32, :32], {"transform": Affine(20, 0, *ORIGIN[:1], 0, -20, ORIGIN[1])}, {}, "32 by 32 pixels of 20",
         "64 by 64 pixels of 10"),
        (numbers(), {"transform": Affine(20, 0, *ORIGIN[:1], 0, -20, ORIGIN[1])}, {}, "pixels of 20 by 20", "of 10 by"),
        (numbers(), {"transform": Affine(10, 0, ORIGIN[0] + 5, 0, -10, ORIGIN[1])}, {}, "starts at 600005", "600000"),
        (numbers(), {"transform": Affine(10, 1, *ORIGIN[:1], 1, -10, ORIGIN[1])}, {}, "is rotated", "north-up"),
        (numbers(), {"transform": Affine(10, 0, *ORIGIN[:1], 0, 10, ORIGIN[1])}, {}, "not north-up", "north-up"),
        (np.stack([numbers(), numbers()]), {}, {}, "holds 2 bands", "one band"),
        (numbers("float32"), {}, {}, "holds float32", "tells no type, so that uint16 is expected"),
        (numbers("float64"), {}, {"data_type": "float32"}, "holds float64", "says float32"),
        (numbers("int16"), {}, {}, "holds int16", "uint16 is expected"),
        (numbers("int32") + 64000, {}, {}, "holds int32", "uint16 is expected"),
        (numbers("uint8"), {}, {"data_type": "uint16"}, "holds uint8", "says uint16"),
        (numbers(), {}, {"raster:bands": [{"data_type": "int16"}]}, "holds uint16", "says int16"),
        (numbers(), {"nodata": 0}, {"nodata": 65535}, "missing pixels hold 0", "says 65535"),
        (numbers(), {"nodata": 65535}, {"raster:bands": [{"nodata": 0}]}, "missing pixels hold 65535", "says 0"),
        (numbers(), {}, {"nodata": 9999}, "does not say that missing pixels hold 9999", "as its item does"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_raster_that_contradicts_its_item_is_refused(
    array: np.ndarray, profile: dict, asset: dict, found: str, expected: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "B02.tif", array, **profile)
    cube = xr_ginet.open_stac([item_of(path, **asset)], bands=["B02"])  # nothing is opened yet
    with pytest.raises(ValueError, match=found) as error:
        cube.compute()
    for part in ("S2_N0300_", "'blue'", str(path), expected):
        assert part in str(error.value)


def test_types_that_items_state_are_read_as_they_are(tmp_path: Path) -> None:
    floats = (numbers() / 1e4).astype("float32")
    floats[0, :3] = np.nan
    assert_allclose(read(write(tmp_path / "f.tif", floats), data_type="float32"), floats)
    large = numbers("uint32", 60_000, 90_000)
    stated = {"data_type": "uint32", "raster:scale": 1e-5, "raster:offset": 0}
    assert_allclose(
        read(write(tmp_path / "l.tif", large), **stated)[large != 65535], large[large != 65535] * 1e-5, 1e-6
    )
    signed = numbers("int16", -50, 50)
    signed[0, :4] = -9999
    stated = {"data_type": "int16", "raster:scale": 1e-4, "raster:offset": 0, "nodata": -9999}
    expected = np.where(signed == -9999, np.nan, signed * 1e-4)
    for nodata in (None, -9999):
        assert_allclose(read(write(tmp_path / "s.tif", signed, nodata=nodata), **stated), expected, 1e-6, 1e-9)


def test_numbers_below_what_missing_pixels_hold_are_not_taken_for_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "B02.tif", numbers("int16", -50, 50))
    with pytest.raises(ValueError, match=r"asset 'blue': .*B02.tif holds -50, below 0, .*asset\['nodata'\] = -32768"):
        read(path, data_type="int16")


# -- what GDAL may open
# ------------------------------------------------------------------------------------------------


def vrt(path: Path) -> str:
    """Return a VRT of a raster of 64 pixels a side."""
    return (
        '<VRTDataset rasterXSize="64" rasterYSize="64"><SRS>EPSG:32630</SRS>'
        f"<GeoTransform>{ORIGIN[0]},10,0,{ORIGIN[1]},0,-10</GeoTransform><VRTRasterBand dataType='UInt16' band='1'>"
        f'<SimpleSource><SourceFilename relativeToVRT="0">{path}</SourceFilename><SourceBand>1</SourceBand>'
        "</SimpleSource></VRTRasterBand></VRTDataset>"
    )


@pytest.mark.parametrize("media", ["image/tiff; application=geotiff", "image/jp2", "image/vnd.stac.geotiff"])
@pytest.mark.parametrize("over_http", [True, False])
def test_a_file_that_names_others_is_not_opened(media: str, over_http: bool, tmp_path: Path) -> None:
    private = write(tmp_path / "private.tif", numbers())
    served = tmp_path / "served"
    served.mkdir()
    (served / "B02.tif").write_text(vrt(private))
    with rasterio.open(served / "B02.tif") as file:  # as GDAL does by itself
        assert (file.read(1) == numbers()).all()
    with faulty(served) as url, pytest.raises(RuntimeError, match=r"Error opening .*B02.tif, of item S2_N0300_"):
        read(f"{url}/B02.tif" if over_http else served / "B02.tif", type=media)


def test_a_raster_of_another_format_than_its_item_says_is_not_opened(tmp_path: Path) -> None:
    lossless = {"driver": "JP2OpenJPEG", "quality": 100, "reversible": True}
    path = write(tmp_path / "B02.jp2", numbers(), **lossless)
    assert_allclose(read(path, type="image/jp2"), numbers() / 1e4, rtol=1e-6)
    with pytest.raises(RuntimeError, match=r"Error opening .*B02.jp2.*Is it there, and GTiff as its item says\?"):
        read(path)


@pytest.mark.parametrize("suffix", [".msk", ".ovr", ".aux.xml"])
def test_what_lies_beside_a_raster_is_not_looked_at(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / "B02.tif", numbers())
    private = write(tmp_path / "private.tif", np.full((64, 64), 0, "uint16"))
    beside = f"<PAMDataset><SRS>EPSG:32631</SRS>{vrt(private)}</PAMDataset>" if suffix == ".aux.xml" else vrt(private)
    (tmp_path / f"B02.tif{suffix}").write_text(beside)
    assert_allclose(read(path), numbers() / 1e4, rtol=1e-6)


@pytest.mark.parametrize("scheme", ["gcs", "abfs", "az", "gs"])
def test_addresses_of_object_stores_never_become_paths_of_this_machine(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("GS_NO_SIGN_REQUEST", "AZURE_NO_SIGN_REQUEST"):
        monkeypatch.setenv(name, "YES")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "nobody")
    monkeypatch.setenv("GDAL_HTTP_PROXY", "127.0.0.1:1")  # nothing is asked for outside of this machine
    for folder in (f"{scheme}:/bucket", f"{scheme}:/"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        write(tmp_path / folder / "B02.tif", numbers())
    with pytest.raises(RuntimeError, match=rf"Error opening {scheme}://bucket/B02.tif"):
        read(f"{scheme}://bucket/B02.tif")


def test_a_raster_of_absurd_size_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "B02.tif"
    placed = {"crs": "EPSG:32630", "transform": Affine(10, 0, ORIGIN[0], 0, -10, ORIGIN[1])}
    sparse = placed | {"SPARSE_OK": True, "width": 2**18, "height": 64, "blockysize": 1, "compress": "deflate"}
    with rasterio.open(path, "w", "GTiff", count=1, dtype="uint16", **sparse):
        pass
    with pytest.raises(ValueError, match="has 64 by 262144 pixels; up to 131072 a side are read"):
        read(path)
    with pytest.raises(ValueError, match="an image of 262144 pixels a side; from 1 to 131072 are read"):
        read(path, **{"proj:shape": [64, 2**18]})
