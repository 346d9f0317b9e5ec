"""The scene classification: read from every catalogue, and pixels made missing by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from conftest import needs_shared, no_compute, scene_item, two_grids, with_classification
from numpy.testing import assert_array_equal
from test_catalogues import NAMES, REAL_ITEMS, full_tile, load_item

import xr_ginet
from xr_ginet.network import Checkpoint
from xr_ginet.sentinel2.bands import BANDS_10M, BANDS_20M, SCL
from xr_ginet.sentinel2.grids import Grid
from xr_ginet.sentinel2.items import read_item
from xr_ginet.sentinel2.provenance import of_all
from xr_ginet.sentinel2.scl import CLASSES, CLOUDY
from xr_ginet.simulation import simulate


def classified(classes: np.ndarray, *, times: int | None = None) -> xr.Dataset:
    """Return a random two-grid cube with a classification; with time, that of each date turned by a quarter more."""
    cube = two_grids(classes.shape, n_times=times)
    if times is None:
        return cube.assign({SCL: (("y_20m", "x_20m"), classes)})
    turned = np.stack([np.roll(classes, i, axis=1) for i in range(times)])
    return cube.assign({SCL: (("time", "y_20m", "x_20m"), turned)})


@needs_shared
@pytest.mark.parametrize(("name", "epsg", "origin"), [row[:3] for row in REAL_ITEMS], ids=NAMES)
def test_a_real_item_yields_its_classification_at_20_m(name: str, epsg: int, origin: tuple) -> None:
    item = load_item(name)
    if name.startswith("dea-ard3"):  # Geoscience Australia has a mask of its own
        with pytest.raises(ValueError, match="no asset with SCL at its native 20 m"):
            read_item(item, [SCL])
        return
    [asset] = read_item(item, [SCL], look=lambda href: full_tile(href, origin)).bands.values()
    assert "scl" in asset.href.lower()
    assert "60m" not in asset.href
    assert (asset.epsg, asset.grid) == (epsg, Grid(*origin, 20, -20, (5490, 5490)))
    assert (asset.radiometry.scale, asset.radiometry.offset, asset.radiometry.dtype) == (1, 0, "uint8")


def test_masked_by_hand() -> None:
    classes = np.array([[4, 9, 4], [4, 4, 4], [0, 11, 4]], "uint8")
    cube = classified(classes)
    masked = xr_ginet.mask_clouds(cube)
    expected = np.array([[0, 1, 0], [0, 0, 0], [1, 0, 0]], bool)
    assert_array_equal(np.isnan(masked["B05"]), expected)
    assert_array_equal(np.isnan(masked["B02"]), expected.repeat(2, 0).repeat(2, 1))
    assert_array_equal(masked["B02"].values[2:4], cube["B02"].values[2:4])
    assert_array_equal(masked[SCL], classes)
    snow = cube.ginet.mask_clouds(classes=[11], buffer=1)
    assert_array_equal(np.isnan(snow["B12"]), [[0, 0, 0], [1, 1, 1], [1, 1, 1]])


def test_a_60_m_pixel_is_masked_if_any_of_its_nine_is() -> None:
    classes = np.full((6, 9), 4, "uint8")
    classes[5, 3] = 8
    cube = classified(classes).assign(B01=(("y_60m", "x_60m"), np.ones((2, 3))))
    assert_array_equal(np.isnan(cube.ginet.mask_clouds()["B01"]), [[0, 0, 0], [0, 1, 0]])


@pytest.mark.parametrize("buffer", [0, 2])
def test_chunked_equals_whole_and_nothing_is_computed(buffer: int) -> None:
    classes = np.random.default_rng(0).choice(len(CLASSES), (12, 18)).astype("uint8")
    whole = classified(classes, times=3)
    with no_compute():
        chunks = {"time": 1, "y": 10, "x": 14, "y_20m": 5, "x_20m": 7}
        lazy = whole.chunk(chunks).ginet.mask_clouds(classes=(3, 9), buffer=buffer)
    assert lazy["B02"].chunks == whole.chunk(chunks)["B02"].chunks
    xr.testing.assert_identical(lazy.compute(), xr_ginet.mask_clouds(whole, (3, 9), buffer=buffer))


def test_clouds_do_not_reach_the_land_beside_them(checkpoint: Checkpoint) -> None:
    classes = np.full((24, 18), 4, "uint8")
    classes[8:14, 6:9] = 9
    cube = classified(classes)
    cloudy = cube.copy(deep=True)
    for names, mask in ((BANDS_20M, classes == 9), (BANDS_10M, (classes == 9).repeat(2, 0).repeat(2, 1))):
        for name in names:
            cloudy[name].values[mask] += 0.7
    results = [c.chunk().ginet.mask_clouds().ginet.superresolve(weights=checkpoint).compute() for c in (cube, cloudy)]
    xr.testing.assert_identical(*results)
    unmasked = cloudy.chunk().ginet.superresolve(weights=checkpoint)["B05"].values
    beside = np.isfinite(results[0]["B05"].values)
    assert np.abs(unmasked - results[0]["B05"].values)[beside].max() > 1e-3  # so that the test can fail


def test_what_cannot_be_masked_is_refused() -> None:
    cube = classified(np.full((4, 4), 4, "uint8"))
    with pytest.raises(ValueError, match=r"no SCL with the dims .* which holds B02, .*open_stac\(…, bands="):
        cube.drop_vars(SCL).ginet.mask_clouds()
    with pytest.raises(ValueError, match=r"classes=\(9, 12\): must be numbers from 0 to 11"):
        cube.ginet.mask_clouds(classes=(9, 12))
    with pytest.raises(ValueError, match="buffer=-1: must be a number of 20 m pixels"):
        cube.ginet.mask_clouds(buffer=-1)


def test_from_a_catalogue_to_masked_bands(tmp_path: Path) -> None:
    scene = simulate((64, 96), seed=2)
    classes = np.random.default_rng(1).choice([0, 4, 5, 9, 10], (32, 48)).astype("uint8")
    coarse = np.round(scene.coarse * 1e4).astype("uint16")
    coarse[1, 3, 5] = 65535
    fine = np.round(scene.fine * 1e4).astype("uint16")
    item = scene_item(replace(scene, fine=fine, coarse=coarse), tmp_path)
    item = with_classification(item, classes, tmp_path / "scl.tif")
    with no_compute():
        cube = xr_ginet.open_stac([item], bands=("B02", "B06", SCL), chunks=32)
        masked = cube.ginet.mask_clouds()
    assert cube[SCL].dtype == np.uint8
    assert_array_equal(cube[SCL].values[0], classes)
    assert np.isnan(cube["B06"].values[0, 3, 5])  # saturated
    assert np.isnan(cube["B06"].values).sum() == 1
    hidden = np.isin(classes, CLOUDY)
    assert_array_equal(np.isnan(masked["B02"].values[0]), hidden.repeat(2, 0).repeat(2, 1))
    assert ";" not in of_all(cube)["radiometry"]


def test_pixels_without_a_class_are_masked_whatever_the_classes() -> None:
    classes = np.full((6, 6), 4.0)  # stackstac's classification is floating point, NaN where no item has data
    classes[2, 3] = np.nan
    cube = classified(classes)
    for lazy in (cube, cube.chunk()):
        masked = lazy.ginet.mask_clouds([9])
        assert_array_equal(masked["B05"].isnull(), np.isnan(classes))
        assert_array_equal(masked["B02"].isnull(), np.isnan(classes).repeat(2, 0).repeat(2, 1))
