"""Cubes that users hold, in every layout: the result equals that of the two-grid cube, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import stackstac
import xarray as xr
from affine import Affine
from conftest import needs_shared, no_compute, random_checkpoint, real_scene, scene_item, single_grid, two_grids
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import xr_ginet
from xr_ginet.network import Checkpoint
from xr_ginet.sentinel2.bands import BANDS, BANDS_10M, BANDS_20M
from xr_ginet.sentinel2.grids import Grid, stated_anchor
from xr_ginet.sentinel2.layouts import to_reflectance
from xr_ginet.simulation import simulate

ALL_BANDS = (*BANDS_10M, *BANDS_20M)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return random_checkpoint(tmp_path_factory.mktemp("small") / "s.safetensors", n_features=4, n_stages=1)


def repeated(cube: xr.Dataset) -> xr.Dataset:
    """Return a two-grid cube with its 20 m bands repeated to 10 m, as nearest neighbour does."""
    coarse = cube.drop_dims(["y", "x"]).rename({"y_20m": "y", "x_20m": "x"})
    rows, columns = (np.arange(cube.sizes[d]) // 2 for d in ("y", "x"))
    return cube.drop_dims(["y_20m", "x_20m"]).assign(
        coarse.isel(y=rows, x=columns).assign_coords(y=cube["y"], x=cube["x"])
    )


def stacked(ds: xr.Dataset, labels: list[str] | None = None) -> xr.DataArray:
    array = ds.drop_vars("spatial_ref").to_dataarray("band").transpose(..., "band", "y", "x")
    array = array.assign_coords(band=labels or [str(v) for v in ds.data_vars])
    return array.rio.write_crs("EPSG:32630")


def assert_same_bands(found: xr.Dataset, expected: xr.Dataset) -> None:
    """Assert equal bits, dims and coordinates of all bands."""
    assert set(found.data_vars) == set(expected.data_vars)
    for band in expected.data_vars:
        assert found[band].dims == expected[band].dims
        assert found[band].dtype == expected[band].dtype
        assert_array_equal(found[band].values, expected[band].values)
        for dim in found[band].dims:
            assert_array_equal(found[dim].values, expected[dim].values)


# -- pair --------------------------------------------------------------------------------------------------------------


VOCABULARIES = {
    "esa": lambda name: name,
    "lower": str.lower,
    "earth search": lambda name: BANDS[name].aliases[0],
    "copernicus": lambda name: f"{name}_{BANDS[name].resolution}m",
    "eo v2": lambda name: BANDS[name].aliases[-1],
}


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("mixture", ["stacked, stacked", "stacked, dataset", "dataset, stacked"])
def test_pair_takes_stacks_in_any_vocabulary_and_mixture(vocabulary: str, mixture: str) -> None:
    fine, coarse = single_grid(BANDS_10M, (8, 12), 10, n_times=2), single_grid(BANDS_20M, (4, 6), 20, n_times=2)
    expected = xr_ginet.pair(fine, coarse)
    rename = VOCABULARIES[vocabulary]
    parts = []
    for part, kind in zip((fine, coarse), mixture.split(", "), strict=True):
        named = part.rename({v: rename(str(v)) for v in part.data_vars})
        parts.append(stacked(named).chunk({"y": 3, "band": 2}) if kind == "stacked" else named.chunk({"x": 5}))
    with no_compute():
        cube = xr_ginet.pair(*parts)
    assert_same_bands(cube, expected)
    assert cube.rio.crs.to_epsg() == 32630


def test_a_stack_knows_its_bands_by_other_coordinates_and_by_descriptions() -> None:
    fine, coarse = single_grid(BANDS_10M, (4, 4), 10), single_grid(BANDS_20M, (2, 2), 20)
    expected = xr_ginet.pair(fine, coarse)
    by_common_name = stacked(fine, ["a", "b", "c", "d"]).assign_coords(
        common_name=("band", ["blue", "green", "red", "nir"]), platform="sentinel-2a"
    )
    described = stacked(coarse).drop_vars("band").assign_attrs(long_name=BANDS_20M)
    cube = xr_ginet.pair(by_common_name, described)
    assert_same_bands(cube, expected)
    assert cube["platform"] == "sentinel-2a"


def test_pair_reads_stackstac_whose_coordinates_are_corners_by_default() -> None:
    fine, coarse = single_grid(BANDS_10M, (8, 12), 10), single_grid(BANDS_20M, (4, 6), 20)
    corners = [
        stacked(ds)
        .drop_vars("spatial_ref")
        .assign_coords(y=ds["y"] + size / 2, x=ds["x"] - size / 2, epsg=32630)
        .assign_attrs(crs="epsg:32630")
        for ds, size in ((fine, 10), (coarse, 20))
    ]
    cube = xr_ginet.pair(*corners)
    assert_same_bands(cube, xr_ginet.pair(fine, coarse))
    assert cube.rio.crs.to_epsg() == 32630
    for part in corners:
        part.attrs = {}
    assert xr_ginet.pair(*corners).rio.crs.to_epsg() == 32630
    with pytest.raises(ValueError, match="the coarse grid starts at x=742930, expected 742915"):
        xr_ginet.pair(corners[0], coarse.assign_coords(x=coarse["x"] + 10))


def test_pair_scales_a_stack_by_its_own_attributes() -> None:
    fine, coarse = single_grid(BANDS_10M, (4, 4), 10), single_grid(BANDS_20M, (2, 2), 20)
    numbers = [(ds * 10_000 + 1000).astype("uint16") for ds in (fine, coarse)]
    attrs = {"scale_factor": 1e-4, "add_offset": -0.1, "source_items": ["S2A"], "spec": object()}
    cube = xr_ginet.pair(*(stacked(ds).assign_attrs(attrs) for ds in numbers))
    assert_same_bands(cube, xr_ginet.pair(*numbers, scale=1e-4, offset=-0.1))
    stored = {"dtype": "uint16", "scale_factor": 1e-4, "add_offset": -0.1, "nodata": 0}
    assert cube.attrs == {"source_items": ["S2A"]} | {f"source_{key}": value for key, value in stored.items()}
    gdal_default = [stacked(ds).assign_attrs(scale_factor=1.0, add_offset=0.0) for ds in numbers]
    with pytest.raises(ValueError, match="B02 is uint16: digital numbers, and no attribute scale_factor"):
        xr_ginet.pair(*gdal_default)


def test_stacks_that_cannot_be_told_apart_are_refused() -> None:
    fine, coarse = single_grid(BANDS_10M, (4, 4), 10), single_grid(BANDS_20M, (2, 2), 20)
    with pytest.raises(ValueError, match=r"ds_10m is a DataArray with the dims \('y', 'x'\): none of band, bands"):
        xr_ginet.pair(fine["B02"], coarse)
    with pytest.raises(ValueError, match="no coordinate along 'band' names the bands"):
        xr_ginet.pair(fine, stacked(coarse).drop_vars("band"))
    with pytest.raises(ValueError, match="ds_10m holds B02 more than once along 'band', whose labels are blue, B02"):
        xr_ginet.pair(stacked(fine, ["blue", "B02", "B04", "B08"]), coarse)
    with pytest.raises(ValueError, match="ds_10m holds B02 more than once, as B02, blue: drop all but one"):
        xr_ginet.pair(fine.assign(blue=fine["B02"]), coarse)
    with pytest.raises(ValueError, match="ds_20m holds no 20 m band"):  # three bands are called so
        xr_ginet.pair(fine, stacked(coarse[["B05"]], ["rededge"]))


def telling(ds: xr.Dataset, anchor: str, how: str) -> xr.Dataset | xr.DataArray:
    """Return a cube whose coordinates, be they centres or corners, are told to be one of these by its transform."""
    grid = Grid.from_coords(ds)
    half = 0.5 * (anchor == "corner")  # the first coordinate is the edge itself
    x0, y0 = grid.x0 + half * grid.dx, grid.y0 + half * grid.dy
    if how == "GeoTransform":
        ds = ds.copy()
        text = f"{x0 + 7 * grid.dx} {grid.dx} 0 {y0 - 3 * grid.dy} 0 {grid.dy}"  # of before a selection
        ds["spatial_ref"] = ds["spatial_ref"].assign_attrs(GeoTransform=text)
        return ds
    if how == "band":
        return ds.assign({v: ds[v].assign_attrs(transform=[grid.dx, 0, x0, 0, grid.dy, y0]) for v in ds.data_vars})
    return stacked(ds).assign_attrs(transform=Affine(grid.dx, 0, x0, 0, grid.dy, y0))


@pytest.mark.parametrize("how", ["GeoTransform", "band", "stack"])
def test_what_coordinates_are_is_told_by_transforms(how: str) -> None:
    fine, coarse = single_grid(BANDS_10M, (8, 12), 10), single_grid(BANDS_20M, (4, 6), 20)
    expected = xr_ginet.pair(fine, coarse)
    corners = [ds.assign_coords(y=ds["y"] + size / 2, x=ds["x"] - size / 2) for ds, size in ((fine, 10), (coarse, 20))]
    assert_same_bands(xr_ginet.pair(*(telling(ds, "corner", how) for ds in corners)), expected)
    assert_same_bands(xr_ginet.pair(*(telling(ds, "centre", how) for ds in (fine, coarse))), expected)
    assert_same_bands(xr_ginet.pair(telling(fine, "centre", how), corners[1].assign_coords(coarse.coords)), expected)
    for told in (
        [telling(ds, "centre", how) for ds in corners],  # they start alike, and are centres
        [telling(corners[0], "centre", how), corners[1]],
        [corners[0], telling(corners[1], "centre", how)],
    ):
        with pytest.raises(ValueError, match="grids do not nest"):
            xr_ginet.pair(*told)


@pytest.mark.parametrize("how", ["GeoTransform", "band", "stack"])
def test_a_10_m_cube_whose_transform_says_centres_is_not_taken_for_corners(how: str) -> None:
    native = two_grids((6, 7))
    cube = repeated(native)
    assert_same_bands(xr_ginet.to_native(telling(cube, "centre", how)), native)
    moved = cube.assign_coords(y=cube["y"] + 5, x=cube["x"] - 5)
    assert_same_bands(xr_ginet.to_native(moved), native)  # as stackstac has them
    assert_same_bands(xr_ginet.to_native(telling(moved, "corner", how)), native)
    with pytest.raises(ValueError, match=r"its transform tells that coordinates are centres.*anchor='center'"):
        xr_ginet.to_native(telling(moved, "centre", how))


def test_transforms_of_other_pixels_and_such_that_disagree_tell_nothing() -> None:
    cube = single_grid(BANDS_10M, (8, 12), 10)
    assert stated_anchor(cube) is None
    assert stated_anchor(telling(cube, "centre", "band")) == "centre"
    assert stated_anchor(telling(telling(cube, "centre", "band"), "corner", "GeoTransform")) is None
    for text in ("0 60 0 0 0 -60", "", "1 2 3", "a b c d e f", "nan 10 0 0 0 -10", "742921 10 0 4848600 0 -10"):
        ds = cube.copy()
        ds["spatial_ref"] = ds["spatial_ref"].assign_attrs(GeoTransform=text)
        assert stated_anchor(ds) is None


# -- scale and offset, once --------------------------------------------------------------------------------------------


def test_what_xarray_decoded_is_not_scaled_again_and_its_missing_pixels_are_missing() -> None:
    numbers = np.array([[0, 1], [1000, 3000], [65534, 65535]], "uint16")
    raw = xr.DataArray(numbers, dims=("y", "x"), name="B02", attrs={"scale_factor": 1e-4, "add_offset": -0.1})
    raw.attrs["fill_value"] = 0
    decoded = xr.decode_cf(xr.Dataset({"B02": raw}))["B02"]
    assert decoded.values[0, 0] == -0.1  # the negative control: xarray does not know fill_value
    expected = np.array([[np.nan, -0.0999], [0, 0.2], [6.4534, np.nan]])  # 65535 is ESA's for saturated
    for band in (raw, decoded, decoded.astype("float32", keep_attrs=True)):
        if band.dtype == np.float32:
            band.encoding = decoded.encoding
        np.testing.assert_allclose(to_reflectance(band), expected, rtol=1e-6, atol=2e-8)
    with_fill_value = xr.decode_cf(xr.Dataset({"B02": raw.assign_attrs(_FillValue=np.uint16(0))}))["B02"]
    np.testing.assert_allclose(to_reflectance(with_fill_value), expected, rtol=1e-6, atol=2e-8)
    with pytest.raises(ValueError, match=r"B02 was scaled already, by 0.0001 when xarray opened it; scale=0.001 would"):
        to_reflectance(decoded, scale=1e-3)


# -- one 10 m cube with repeated 20 m bands ----------------------------------------------------------------------------


def test_native_pixels_by_hand() -> None:
    native = np.array([[1.0, 2, 3], [4, np.nan, 6], [7, 8, 9]])
    cube = single_grid(BANDS_10M, (6, 6), 10).assign(rededge1=(("y", "x"), native.repeat(2, 0).repeat(2, 1)))
    found = xr_ginet.to_native(cube)
    assert_array_equal(found["B05"], native)
    assert_array_equal(found["x_20m"], [742_930, 742_950, 742_970])
    assert_array_equal(found["y_20m"], [4_848_590, 4_848_570, 4_848_550])
    with pytest.warns(UserWarning, match=r"1 row\(s\) and 1 column\(s\) .* now rows 0 to 3 and columns 1 to 4"):
        cut = xr_ginet.to_native(cube.isel(y=slice(5), x=slice(1, None)))
    assert_array_equal(cut["B05"], native[:2, 1:])
    assert_array_equal(cut["B08"], cube["B08"][:4, 2:])


@settings(max_examples=30, deadline=None)
@given(
    start=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    end=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    chunks=st.tuples(st.integers(1, 13), st.integers(2, 15)),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 99),
)
def test_native_pixels_come_back_for_any_phase_shape_and_chunks(
    start: tuple[int, int], end: tuple[int, int], chunks: tuple[int, int], dtype: str, seed: int
) -> None:
    native = two_grids((6, 7), seed=seed)[["B02", "B05", "B12"]].astype(dtype)
    native = native.where(native > 0.1)  # gaps, of whole pixels in each grid
    window = {d: slice(s, native.sizes[d] - e) for d, s, e in zip(("y", "x"), start, end, strict=True)}
    cube = repeated(native).isel(window).chunk(dict(zip(("y", "x"), chunks, strict=True)))
    expected = native.isel({d: slice(-(-w.start // 2) * 2, w.stop // 2 * 2) for d, w in window.items()}).isel(
        {f"{d}_20m": slice(-(-w.start // 2), w.stop // 2) for d, w in window.items()}
    )
    with no_compute():
        if any(s % 2 for s in (*start, *end)):
            with pytest.warns(UserWarning, match="cuts 20 m pixels in half at its edge"):
                found = xr_ginet.to_native(cube)
        else:
            found = xr_ginet.to_native(cube)
    assert_same_bands(found.compute(scheduler="synchronous"), expected)


@pytest.mark.parametrize("form", ["dataset", "stacked", "corners", "lower"])
@pytest.mark.parametrize("start", [0, 1])
def test_superresolve_of_a_repeated_cube_equals_that_of_the_two_grids(small: Checkpoint, form: str, start: int) -> None:
    two = two_grids((8, 9), n_times=2).astype("float32")
    cut = two.isel(y=slice(2 * start, None), y_20m=slice(start, None))
    cube = repeated(two).isel(y=slice(start, None))
    if form == "lower":
        cube = cube.rename({band: band.lower() for band in ALL_BANDS})
    if form in ("stacked", "corners"):
        cube = stacked(cube).chunk({"band": 1, "time": 1, "y": 7})
    if form == "corners":
        cube = cube.assign_coords(y=cube["y"] + 5, x=cube["x"] - 5)
    expected = cut.chunk().ginet.superresolve(weights=small)
    with no_compute():
        if start:
            with pytest.warns(UserWarning, match=r"1 row\(s\) and 0 column\(s\)"):
                found = cube.chunk().ginet.superresolve(weights=small)
        else:
            found = cube.chunk().ginet.superresolve(weights=small)
    for band in ALL_BANDS:
        assert_array_equal(found[band].values, expected[band].values)
    assert_array_equal(found["y"], expected["y"])
    assert_array_equal(found["x"], expected["x"])
    assert found.rio.crs == expected.rio.crs


def test_what_stackstac_loads_at_10m_by_default_is_taken_apart(small: Checkpoint, tmp_path: Path) -> None:
    scene = simulate((48, 64), seed=1)
    item = scene_item(scene, tmp_path)
    expected = xr_ginet.open_stac([item])
    cube = stackstac.stack([item], resolution=10, epsg=32630)  # corners as coordinates, float64, scaled
    with no_compute():
        found = xr_ginet.to_native(cube)
    assert_array_equal(found["x_20m"], expected["x_20m"])
    for band in ALL_BANDS:
        np.testing.assert_allclose(found[band].values, expected[band].values, rtol=0, atol=1e-7)
    raw = stackstac.stack(
        [item],
        resolution=10,
        epsg=32630,
        bounds=(600_010, 4_899_600, 600_510, 4_900_010),  # within a 20 m pixel, west and north
        rescale=False,
        dtype=np.dtype("uint16"),
        fill_value=np.uint16(0),
    )
    with no_compute(), pytest.warns(UserWarning, match=r"1 row\(s\) and 2 column\(s\)"):
        cut = xr_ginet.to_native(raw, scale=1e-4)
    same = expected.sel({dim: cut[dim] for dim in ("y", "x", "y_20m", "x_20m")})
    assert_same_bands(cut, same)
    result = cube.astype("float32").ginet.superresolve(weights=small)
    assert set(result.data_vars) == set(ALL_BANDS)
    item["properties"]["earthsearch:boa_offset_applied"] = True
    with pytest.warns(UserWarning, match=r"stackstac took it again \(rescale=True, its default\) .* 0.1 too dark"):
        xr_ginet.to_native(stackstac.stack([item], resolution=10, epsg=32630))


CUTS = {
    "one date": lambda cube: cube.isel(time=-1),
    "median": lambda cube: cube.median("time"),
    "mean without attributes": lambda cube: cube.mean("time", keep_attrs=False),
    "least of a month": lambda cube: cube.resample(time="MS").min(),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("properties", [True, False])
@pytest.mark.parametrize("flags", [(True, True, True), (False, True, True)])
def test_an_offset_taken_twice_is_told_whatever_was_computed_of_the_dates(
    cut: str, properties: bool, flags: tuple[bool, ...], small: Checkpoint, tmp_path: Path
) -> None:
    items = []
    for day, flag in zip((11, 21, 26), flags, strict=True):
        item = scene_item(simulate((64, 64), seed=1), tmp_path / str(day))
        item["id"] = f"S2_{day}"
        item["properties"] |= {"datetime": f"2024-06-{day}T10:56:21Z", "earthsearch:boa_offset_applied": flag}
        for asset in item["assets"].values():
            asset["raster:bands"][0]["offset"] = -0.1 if flag else 0
        items.append(item)
    cube = CUTS[cut](stackstac.stack(items, resolution=10, epsg=32630, properties=properties))
    with pytest.warns(UserWarning, match="stackstac took it again|cannot be told|darker than water"):
        cube.ginet.superresolve(weights=small)["B05"].compute(scheduler="synchronous")


@needs_shared
@pytest.mark.filterwarnings("ignore:the cube cuts 20 m pixels")
def test_a_real_scene_repeated_to_10m_comes_back_from_any_phase() -> None:
    fine, coarse = real_scene("rastertools_T30TYP")
    fine, coarse = fine.isel(y=slice(400), x=slice(400)), coarse.isel(y=slice(200), x=slice(200))
    expected = xr_ginet.pair(fine, coarse, scale=1e-4)
    repeats = np.arange(400) // 2
    cube = fine.assign(coarse.isel(y=repeats, x=repeats).assign_coords(y=fine["y"], x=fine["x"])).chunk({"y": 150})
    assert_same_bands(xr_ginet.to_native(cube, scale=1e-4), expected)
    cut = xr_ginet.to_native(cube.isel(y=slice(1, None), x=slice(None, -3)), scale=1e-4)
    inside = expected.isel(y=slice(2, None), y_20m=slice(1, None), x=slice(396), x_20m=slice(198))
    assert_same_bands(cut, inside)


def test_a_stack_of_10m_bands_has_a_guide(small: Checkpoint) -> None:
    cube = two_grids((4, 5))[list(BANDS_10M)].chunk()
    assert_array_equal(stacked(cube).ginet.guide(weights=small), cube.ginet.guide(weights=small))
    with pytest.raises(ValueError, match=r"cube is a DataArray with the dims \('y', 'x'\): none of band"):
        cube["B02"].ginet.guide(weights=small)


def test_interpolated_bands_raise_at_once_in_memory_and_when_computed_if_lazy() -> None:
    native = two_grids((6, 7))
    cube = repeated(native)
    coarse = native[list(BANDS_20M)].rename({"y_20m": "y", "x_20m": "x"})
    smooth = coarse.interp(y=cube["y"], x=cube["x"], kwargs={"fill_value": "extrapolate"})
    interpolated = cube[list(BANDS_10M)].assign(smooth)
    with pytest.raises(ValueError, match=r"B05 holds .* within one 20 m pixel: it was interpolated .* xr_ginet.pair"):
        xr_ginet.to_native(interpolated)
    with no_compute():
        lazy = xr_ginet.to_native(interpolated.chunk({"y": 4}))
    with pytest.raises(ValueError, match=r"B12 holds .* interpolated to 10 m, or masked there"):
        lazy["B12"].compute()
    for row, column in ((-2, -1), (-1, -2), (-1, -1)):  # each pixel beside the one that is kept
        one_off = cube.copy(deep=True)
        one_off["B11"][row, column] += 1e-12
        with pytest.raises(ValueError, match="B11 holds"):
            xr_ginet.to_native(one_off)
    one_off["B11"][-1, -1] = np.nan
    with pytest.raises(ValueError, match=r"B11 holds .* and nan within one 20 m pixel"):
        xr_ginet.to_native(one_off)
    moved = cube.assign_coords(x=cube["x"] + 10)  # the wrong phase: coordinates that are not the pixels'
    with pytest.warns(UserWarning, match="cuts"), pytest.raises(ValueError, match="B05 holds"):
        xr_ginet.to_native(moved)


def test_the_least_digital_number_of_a_repeated_cube_is_no_missing_pixel() -> None:
    numbers = repeated(two_grids((4, 4))).map(lambda band: xr.ones_like(band, dtype="uint16"))
    numbers["B05"][:2, :2] = 0
    native = xr_ginet.to_native(numbers.rio.write_crs(32630).chunk(y=3), scale=1e-4)
    assert np.isnan(native["B05"].values).sum() == 1
    assert float(native["B05"].max()) == float(native["B02"].min()) == np.float32(1e-4)


def test_digital_numbers_of_a_repeated_cube_are_scaled_once() -> None:
    numbers = (two_grids((4, 5)) * 10_000).astype("uint16")
    cube = repeated(numbers)
    found = xr_ginet.to_native(cube, scale=1e-4, offset=-0.1)
    np.testing.assert_allclose(found["B8A"], numbers["B8A"] * 1e-4 - 0.1, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="B02 is uint16: digital numbers"):
        xr_ginet.superresolve(cube)


def test_cubes_without_native_pixels_are_refused_when_the_graph_is_built(small: Checkpoint) -> None:
    cube = repeated(two_grids((4, 5))).chunk()
    with no_compute():
        result = two_grids((4, 5)).chunk().ginet.superresolve(weights=small)
        with pytest.raises(ValueError, match="20 m bands were super-resolved to 10 m already"):
            result.ginet.superresolve(weights=small)
        with pytest.raises(ValueError, match="the cube is in ETRS89-extended / LAEA Europe, not in UTM"):
            xr_ginet.to_native(cube.rio.write_crs("EPSG:3035"))
        with pytest.raises(ValueError, match="starts at x=742923, y=4848600; Sentinel-2's pixels start at multiples"):
            xr_ginet.to_native(cube.assign_coords(x=cube["x"] + 3))
        with pytest.raises(ValueError, match="the cube's pixels are 20 by -10; 10 by -10, north-up"):
            xr_ginet.to_native(cube.isel(x=slice(None, None, 2)))
        with pytest.raises(ValueError, match=r"pixels are 10 by 10; .* type ds.sortby\('y', ascending=False\)"):
            xr_ginet.to_native(cube.isel(y=slice(None, None, -1)))
        with pytest.raises(ValueError, match="the cube has 8 by 3 pixels; whole 20 m pixels, two each way"):
            xr_ginet.to_native(cube.isel(x=slice(3)))
        with pytest.raises(ValueError, match="cube holds no 20 m band"):
            xr_ginet.to_native(cube[list(BANDS_10M)])


# -- EOPF --------------------------------------------------------------------------------------------------------------


def eopf_tree(numbers: dict[str, np.ndarray], form: int) -> xr.DataTree:
    """Return a product as EOPF has it in 2025 (Zarr v2) or 2026 (Zarr v3), holding digital numbers."""
    groups = {
        "/conditions/mask/l2a_classification/r20m": xr.Dataset({"scl": (("y", "x"), np.full((6, 7), 4, "uint8"))})
    }
    for size in (10, 20, 60):
        bands = [name for name in (*ALL_BANDS, "B01") if BANDS[name].resolution == size]
        height, width = (12, 14) if size == 10 else (6, 7) if size == 20 else (2, 3)
        coordinate = "int64" if form == 2025 else "float32"
        coords = {
            "y": (4_900_020 - size * (np.arange(height) + 0.5)).astype(coordinate),
            "x": (600_000 + size * (np.arange(width) + 0.5)).astype(coordinate),
        }
        attrs: dict[str, object] = {
            "scale_factor": 0.0001,
            "add_offset": -0.1,
            "fill_value": 0,
            "units": "digital_counts",
            "valid_min": 1,
            "valid_max": 65535,
        }
        if form == 2025:
            attrs["_eopf_attrs"] = dict(attrs)
            attrs["_FillValue"] = 0  # Zarr v2 keeps it as the array's fill_value
            attrs |= {"proj:epsg": 32630, "proj:transform": [size, 0, 600_000, 0, -size, 4_900_020, 0, 0, 1]}
        variables = {name.lower(): (("y", "x"), numbers[name], attrs) for name in bands}
        groups[f"/measurements/reflectance/r{size}m"] = xr.Dataset(variables, coords)
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = {
        "other_metadata": {"horizontal_CRS_code": "EPSG:32630"},
        "stac_discovery": {"properties": {"platform": "sentinel-2a"}},
    }
    return tree


@pytest.fixture(scope="module")
def numbers() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    values = {name: rng.integers(1001, 4000, (12, 14) if name in BANDS_10M else (6, 7)) for name in ALL_BANDS}
    values["B01"] = rng.integers(1001, 4000, (2, 3))
    values["B05"][2, 3] = values["B02"][0, 0] = 0  # missing
    values["B11"][0, 0] = 1000  # reflectance 0
    values["B12"][5, 6] = 1  # the darkest that is not missing
    return {name: image.astype("uint16") for name, image in values.items()}


def eopf_two_grids(numbers: dict[str, np.ndarray]) -> xr.Dataset:
    fine, coarse = (
        xr.Dataset(
            {name: (("y", "x"), numbers[name]) for name in bands},
            {"y": 4_900_020 - size * (np.arange(n) + 0.5), "x": 600_000 + size * (np.arange(m) + 0.5)},
        )
        for bands, size, n, m in ((BANDS_10M, 10, 12, 14), (BANDS_20M, 20, 6, 7))
    )
    return xr_ginet.pair(fine, coarse, scale=1e-4, offset=-0.1)


@pytest.mark.parametrize("form", [2025, 2026])
@pytest.mark.parametrize("decode", [False, True])
def test_an_eopf_product_gains_its_20m_bands_at_10m_and_nothing_else_changes(
    form: int, decode: bool, numbers: dict[str, np.ndarray], small: Checkpoint, tmp_path: Path
) -> None:
    version = 2 if form == 2025 else 3
    eopf_tree(numbers, form).to_zarr(tmp_path / "product.zarr", zarr_format=version, consolidated=version == 2)
    tree = xr.open_datatree(
        tmp_path / "product.zarr", engine="zarr", chunks={}, mask_and_scale=decode, consolidated=version == 2
    )
    if decode and form == 2026:  # the negative control: missing pixels look like reflectance
        assert float(tree["measurements/reflectance/r10m/b02"][0, 0]) == pytest.approx(-0.1)
    with no_compute():
        result = tree.ginet.superresolve(weights=small)
    expected = eopf_two_grids(numbers).chunk().ginet.superresolve(weights=small)
    r10m = result["measurements/reflectance/r10m"]
    assert set(r10m.data_vars) == {name.lower() for name in ALL_BANDS}
    for name in BANDS_20M:
        band = r10m[name.lower()]
        tolerance = 1e-6 if decode else 0  # xarray decodes in another order of roundings
        np.testing.assert_allclose(band.values, expected[name].values, rtol=0, atol=tolerance)
        assert band.attrs["ginet_weights_sha256"] == small.sha256
        assert band.attrs.get("proj:epsg") == (32630 if form == 2025 else None)
        assert "scale_factor" not in band.attrs
    assert np.isnan(r10m["b05"].values[4:6, 6:8]).all()
    assert np.isfinite(r10m["b12"].values[-1, -1])
    without = result.copy()
    without["measurements/reflectance/r10m"].dataset = r10m.to_dataset().drop_vars([b.lower() for b in BANDS_20M])
    assert without.identical(tree)
    assert "b05" not in tree["measurements/reflectance/r10m"]


CHANGES = {
    "astype": lambda ds: ds.astype("float32"),
    "where": lambda ds: ds.where(ds != 9.5),
    "arithmetic": lambda ds: ds * 1.0,
    "without attributes": lambda ds: ds.astype("float32").drop_attrs(deep=True),
}


@pytest.mark.parametrize("form", [2025, 2026])
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_an_eopf_product_that_was_changed_has_its_missing_pixels_still(
    form: int, decode: bool, change: str, numbers: dict[str, np.ndarray], tmp_path: Path
) -> None:
    version = 2 if form == 2025 else 3
    with_saturated = numbers | {"B03": np.where(numbers["B03"] == numbers["B03"][5, 5], 65535, numbers["B03"])}
    eopf_tree(with_saturated, form).to_zarr(tmp_path / "p.zarr", zarr_format=version, consolidated=version == 2)
    tree = xr.open_datatree(
        tmp_path / "p.zarr", engine="zarr", chunks={}, mask_and_scale=decode, consolidated=version == 2
    )
    changed = tree.map_over_datasets(lambda ds: CHANGES[change](ds) if ds.data_vars else ds)
    cube = xr_ginet.sentinel2.eopf.to_cube(changed)
    expected = eopf_two_grids(with_saturated)
    if change == "without attributes" and not decode:  # nothing tells that these are digital numbers, but they
        with pytest.raises(ValueError, match="these are digital numbers"):
            cube.ginet.superresolve(weights=None).compute()
        return
    for name in ALL_BANDS:
        np.testing.assert_allclose(cube[name].values, expected[name].values, rtol=2e-6, atol=2e-7)


def test_an_early_eopf_product_states_its_scale_in_eopf_attrs_only(numbers: dict, small: Checkpoint) -> None:
    tree = eopf_tree(numbers, 2025)
    for path in ("r10m", "r20m"):
        for band in tree[f"measurements/reflectance/{path}"].data_vars.values():
            band.attrs = {"_eopf_attrs": band.attrs["_eopf_attrs"]}
    from xr_ginet.sentinel2 import eopf

    cube = eopf.to_cube(tree)
    assert_same_bands(cube, eopf_two_grids(numbers))
    assert cube.rio.crs.to_epsg() == 32630
    for path in ("r10m", "r20m"):
        for band in tree[f"measurements/reflectance/{path}"].data_vars.values():
            band.attrs = {}
    with pytest.raises(ValueError, match="B02 is uint16: digital numbers"):
        tree.ginet.superresolve(weights=small)


def test_a_part_of_an_eopf_product_is_refused(numbers: dict[str, np.ndarray]) -> None:
    tree = eopf_tree(numbers, 2026)
    with pytest.raises(ValueError, match="no group measurements/reflectance/r10m in the tree, which holds reflectance"):
        tree["measurements"].ginet.superresolve()
    del tree["measurements/reflectance"]["r20m"]
    with pytest.raises(ValueError, match=r"no group measurements/reflectance/r20m .* Pass the whole product"):
        tree.ginet.superresolve()
