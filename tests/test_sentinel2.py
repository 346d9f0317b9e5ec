"""Bands, grids and pairs: what nests is joined, what does not is refused with what to type."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from conftest import needs_shared, no_compute, real_scene, single_grid
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import xr_ginet
from xr_ginet.sentinel2.bands import BANDS, BANDS_10M, BANDS_20M, band_name
from xr_ginet.sentinel2.grids import Grid, check_nesting


def test_every_name_of_a_band_finds_it_and_no_other() -> None:
    for name, band in BANDS.items():
        for alias in (name, name.lower(), f"{name}_{band.resolution}m", *band.aliases, f"{band.aliases[0]}-jp2"):
            assert band_name(alias) == name
    for strange in ("rededge", "visual", "B10", "", "SCL", "nir_2"):
        assert band_name(strange) is None


def test_bands_by_resolution() -> None:
    assert BANDS_10M == ("B02", "B03", "B04", "B08")
    assert BANDS_20M == ("B05", "B06", "B07", "B8A", "B11", "B12")


@given(
    x0=st.integers(-100_000, 900_000),
    y0=st.integers(-1_000_000, 10_000_000),
    shape=st.tuples(st.integers(2, 300), st.integers(2, 300)),
    pixel=st.sampled_from([10.0, 20.0, 1 / 3, 1e-4]),
)
def test_grid_of_its_own_coordinates_is_itself(x0: int, y0: int, shape: tuple[int, int], pixel: float) -> None:
    grid = Grid(x0, y0, pixel, -pixel, shape)
    y, x = grid.coords()
    found = Grid.from_coords(xr.Dataset(coords={"y": y, "x": x}))
    assert found.shape == shape
    assert_allclose(found.transform, grid.transform, atol=pixel * 1e-2)


def test_grid_by_hand() -> None:
    grid = Grid.from_coords(xr.Dataset(coords={"y": [95.0, 85, 75, 65], "x": [5.0, 15]}))
    assert grid == Grid(0, 100, 10, -10, (4, 2))
    assert grid.bounds == (0, 60, 20, 100)
    assert grid.coarsen(2) == Grid(0, 100, 20, -20, (2, 1))
    check_nesting(grid, grid.coarsen(2))


@pytest.mark.parametrize(
    ("coords", "match"),
    [
        ({"y": [1.0, 2]}, "no coordinate 'x'"),
        ({"y": [1.0, 2], "x": [5.0]}, "x has 1 pixel; at least two"),
        ({"y": [1.0, 2, 4], "x": [5.0, 6]}, "y is not evenly spaced: from 1.0 to 4.0 a step of 1.5"),
        ({"y": [1.0, 1], "x": [5.0, 6]}, "y is not evenly spaced"),
    ],
)
def test_grid_refuses_coordinates_without_a_regular_grid(coords: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Grid.from_coords(xr.Dataset(coords=coords))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x0": 10.0}, r"starts at x=10, expected 0 \(the fine grid's origin\)"),
        ({"y0": 100.5}, r"starts at y=100.5, expected 100"),
        ({"dx": 10.0}, r"pixel width is 10, expected 20 .* native resolution"),
        ({"dy": -20.1}, r"pixel height is -20.1, expected -20"),
        ({"dy": 20.0}, r"coarse grid's pixels are 20 by 20: it is not north-up. Sort both grids"),
        ({"shape": (20, 31)}, r"40 by 60 pixels and the coarse one 20 by 31"),
    ],
)
def test_grids_that_do_not_nest_are_refused(change: dict, match: str) -> None:
    fine = Grid(0, 100, 10, -10, (40, 60))
    coarse = {"x0": 0.0, "y0": 100.0, "dx": 20.0, "dy": -20.0, "shape": (20, 30)} | change
    with pytest.raises(ValueError, match=match):
        check_nesting(fine, Grid(**coarse))


def test_pair_keeps_values_and_places_both_grids() -> None:
    fine, coarse = single_grid(BANDS_10M, (8, 12), 10, n_times=2), single_grid(BANDS_20M, (4, 6), 20, n_times=2)
    with no_compute():
        cube = xr_ginet.pair(fine.chunk({"y": 3}), coarse.chunk({"x": 2}))
    assert cube["B02"].dims == ("time", "y", "x")
    assert cube["B05"].dims == ("time", "y_20m", "x_20m")
    assert cube["x_20m"].attrs["transform"] == [20, 0, 742_920, 0, -20, 4_848_600]
    assert cube["y"].attrs["transform"] == [10, 0, 742_920, 0, -10, 4_848_600]
    assert cube.rio.crs.to_epsg() == 32630
    for band in BANDS_10M:
        assert_array_equal(cube[band].values, fine[band].values)
    for band in BANDS_20M:
        assert_array_equal(cube[band].values, coarse[band].values)


def test_pair_scales_digital_numbers_and_keeps_nodata_missing() -> None:
    fine, coarse = single_grid(BANDS_10M, (4, 4), 10), single_grid(BANDS_20M, (2, 2), 20)
    fine, coarse = (xr.full_like(ds, 1234).astype("uint16") for ds in (fine, coarse))
    fine["B02"][0, 1] = 0
    cube = xr_ginet.pair(fine, coarse, scale=1e-4, offset=-0.1)
    expected = np.full((4, 4), 0.0234)
    expected[0, 1] = np.nan
    assert cube["B02"].dtype == np.float32
    assert_allclose(cube["B02"], expected, rtol=0, atol=1e-8)
    assert_allclose(cube["B12"], np.full((2, 2), 0.0234), rtol=0, atol=1e-8)
    floats = xr_ginet.pair(fine.astype("float32"), coarse.astype("float32"), scale=1e-4, offset=-0.1)
    xr.testing.assert_allclose(floats, cube)
    coarse["B12"].attrs = {"scale_factor": 1e-3, "add_offset": 1.0, "long_name": "mine"}
    fine.update({band: fine[band].assign_attrs(scale_factor=1e-4) for band in BANDS_10M})
    for band in BANDS_20M[:-1]:
        coarse[band].attrs = {"scale_factor": 1e-4}
    assert_allclose(xr_ginet.pair(fine, coarse)["B12"], np.full((2, 2), 2.234), rtol=1e-6)


def test_pair_takes_catalogue_names_and_leaves_out_what_is_no_band() -> None:
    fine, coarse = single_grid(BANDS_10M, (4, 4), 10), single_grid((*BANDS_20M, "SCL", "AOT"), (2, 2), 20)
    names = {name: BANDS[name].aliases[0] for name in (*BANDS_10M, *BANDS_20M)}
    cube = xr_ginet.pair(fine.rename({b: names[b] for b in BANDS_10M}), coarse.rename({b: names[b] for b in BANDS_20M}))
    assert set(cube.data_vars) == {*BANDS_10M, *BANDS_20M, "SCL"}
    assert_array_equal(cube["B8A"].values, coarse["B8A"].values)
    assert_array_equal(cube["SCL"].values, coarse["SCL"].values)


def test_crs_is_found_where_a_cube_was_opened_without_decoding_it() -> None:
    fine, coarse = single_grid(BANDS_10M, (8, 12), 10), single_grid(BANDS_20M, (4, 6), 20)
    cube = xr_ginet.pair(fine.reset_coords("spatial_ref"), coarse.reset_coords("spatial_ref"))
    assert cube.rio.crs.to_epsg() == 32630


def test_pair_refuses() -> None:
    fine, coarse = single_grid(BANDS_10M, (8, 12), 10, n_times=2), single_grid(BANDS_20M, (4, 6), 20, n_times=2)
    with pytest.raises(ValueError, match="B02 is uint16: digital numbers, and no attribute scale_factor"):
        xr_ginet.pair(fine.astype("uint16"), coarse)
    with pytest.raises(ValueError, match="ds_20m holds no 20 m band of Sentinel-2; its variables are B02"):
        xr_ginet.pair(fine, fine)
    with pytest.raises(ValueError, match=r"pixel width is 10, expected 20 .* resampled to 10 m"):
        xr_ginet.pair(fine, single_grid(BANDS_20M, (8, 12), 10, n_times=2))
    with pytest.raises(ValueError, match="only ds_10m has a time dimension"):
        xr_ginet.pair(fine, coarse.isel(time=0))
    with pytest.raises(ValueError, match=r"times differ: only in ds_10m \['2024-05-01T10:50:31'\]"):
        xr_ginet.pair(fine, coarse.assign_coords(time=coarse["time"] + np.timedelta64(5, "D")))
    with pytest.raises(ValueError, match="ds_10m is in EPSG:32630 and ds_20m in EPSG:32631"):
        xr_ginet.pair(fine, coarse.rio.write_crs("EPSG:32631"))
    upside_down = fine.isel(y=slice(None, None, -1))
    with pytest.raises(ValueError, match=r"the fine grid's pixels are 10 by 10: it is not north-up"):
        xr_ginet.pair(upside_down, coarse.isel(y=slice(None, None, -1)))
    with pytest.raises(ValueError, match=r"\['B05'\] has the dims"):
        xr_ginet.pair(fine, coarse.assign(B05=coarse["B05"].expand_dims("orbit")))


@needs_shared
def test_pair_joins_a_real_scene() -> None:
    fine, coarse = real_scene("rastertools_T30TYP")
    cube = xr_ginet.pair(fine, coarse, scale=1e-4)
    assert dict(cube.sizes) == {"y": 1168, "x": 1196, "y_20m": 584, "x_20m": 598}
    assert_allclose(cube["B11"].values, coarse["B11"].values / 10_000, rtol=1e-6)
    cut = xr_ginet.pair(fine, coarse.isel(x=slice(1, None)), scale=1e-4)
    assert dict(cut.sizes) == {"y": 1168, "x": 1194, "y_20m": 584, "x_20m": 597}
    xr.testing.assert_equal(cut.drop_vars("spatial_ref"), cube.ginet.isel(x=slice(2, None)).drop_vars("spatial_ref"))
    with pytest.raises(ValueError, match=r"starts at x=742960, expected 742920"):
        xr_ginet.pair(fine, coarse.isel(x=slice(2, None)), scale=1e-4)
