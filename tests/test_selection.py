"""Parts of a cube: whatever is cut, all grids still hold the same ground, pixel for pixel."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from conftest import no_compute, single_grid, three_grids, two_grids
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from pyproj import Transformer

import xr_ginet
from xr_ginet.sentinel2.bands import BANDS_10M, BANDS_20M, BANDS_60M
from xr_ginet.sentinel2.grids import DIMS, Grid, check_nesting, overlap_of

TO_DEGREES = Transformer.from_crs(32630, 4326, always_xy=True)


def with_classes(cube: xr.Dataset) -> xr.Dataset:
    """Return a cube with a scene classification, all of it vegetation."""
    return cube.assign(SCL=xr.full_like(cube["B05"], 4, dtype="uint8"))


def assert_is_part(part: xr.Dataset, cube: xr.Dataset) -> None:
    """Assert that a part's grids nest, are told by its transforms, and hold what the cube has there."""
    fine = Grid.from_coords(part)
    for dims in [dims for dims in DIMS.values() if set(dims) <= set(cube.dims)]:
        grid = Grid.from_coords(part, dims)
        assert grid.bounds == fine.bounds
        assert part[dims[1]].attrs["transform"] == list(grid.transform)
        check_nesting(fine, grid, round(grid.dx / fine.dx))
    assert part.rio.crs == cube.rio.crs
    assert set(part.data_vars) == set(cube.data_vars)
    for name in cube.data_vars:
        there = cube[name].sel({dim: part[dim] for dim in part[name].dims})
        assert_array_equal(part[name].values, there.values)


@given(data=st.data(), sixty=st.booleans(), chunked=st.booleans())
@settings(max_examples=30, deadline=None)
def test_any_window_is_snapped_outwards_on_all_grids(data: st.DataObject, sixty: bool, chunked: bool) -> None:
    cube = with_classes(three_grids((4, 5)) if sixty else two_grids((12, 15)))
    cube = cube.chunk({"y": 7, "x_20m": 4}) if chunked else cube
    factor = 6 if sixty else 2
    window = {}
    for dim in ("y", "x"):
        start = data.draw(st.integers(0, cube.sizes[dim] - factor - 1))
        window[dim] = slice(start, data.draw(st.integers(start + factor + 1, cube.sizes[dim])))
    with no_compute():
        part = cube.ginet.isel(**window)
    for dim, asked in window.items():
        first = int(np.flatnonzero(cube[dim] == part[dim][0])[0])
        assert (first, first + part.sizes[dim]) == (asked.start // factor * factor, -(-asked.stop // factor) * factor)
    assert_is_part(part, cube)
    labels = {dim: slice(*cube[dim].values[[asked.start, asked.stop - 1]]) for dim, asked in window.items()}
    xr.testing.assert_identical(cube.ginet.sel(**labels), part)
    backwards = {dim: slice(label.stop, label.start) for dim, label in labels.items()}
    xr.testing.assert_identical(cube.ginet.sel(**backwards), part)
    west, east = sorted((labels["x"].start, labels["x"].stop))
    south, north = sorted((labels["y"].start, labels["y"].stop))
    xr.testing.assert_identical(cube.ginet.clip((west - 5, south - 5, east + 5, north + 5), crs=32630), part)


def test_times_are_selected_beside_places_and_open_ends_are_the_cubes() -> None:
    cube = two_grids((8, 9), n_times=3)
    part = cube.ginet.sel(time=slice("2024-05-04", None), x=slice(743_000, None), y=slice(None, 4_848_500))
    assert dict(part.sizes) == {"time": 2, "y": 10, "x": 10, "y_20m": 5, "x_20m": 5}
    assert_is_part(part, cube)
    assert_is_part(cube.ginet.isel(time=[0, 2], x=slice(-7, None)), cube)
    assert "time" not in cube.ginet.isel(time=1).dims
    assert "time" not in cube.ginet.sel(time="2024-05-06T10:50:31").dims


def test_a_geometry_cuts_and_masks_all_grids_alike() -> None:
    cube = with_classes(three_grids((6, 8), n_times=2))
    corners = ((743_000, 4_848_300), (743_200, 4_848_300), (743_200, 4_848_500), (743_000, 4_848_300))
    triangle = {"type": "Polygon", "coordinates": [[TO_DEGREES.transform(*corner) for corner in corners]]}
    with no_compute():
        part = cube.chunk({"y": 10}).ginet.clip(triangle)
    assert part["SCL"].dtype == np.uint8
    kept = part["B01"].isel(time=0).notnull().values
    assert 0 < kept.mean() < 1
    seen = {10: part["B08"].notnull(), 20: part["SCL"] > 0, 60: part["B09"].notnull()}
    for size, found in seen.items():
        assert_array_equal(found.isel(time=1).values, kept.repeat(60 // size, 0).repeat(60 // size, 1))
    box = cube.ginet.clip((743_000, 4_848_300, 743_200, 4_848_500), crs="EPSG:32630")
    xr.testing.assert_equal(part["B11"], box["B11"].where(part["B11"].notnull()))

    class Shape:
        __geo_interface__ = triangle

    class Frame:
        crs = "EPSG:32630"

        @property
        def __geo_interface__(self) -> dict:
            feature = {"type": "Feature", "geometry": triangle | {"coordinates": [corners]}}
            return {"type": "FeatureCollection", "features": [feature]}

    for area in (Shape(), Frame()):
        xr.testing.assert_equal(cube.ginet.clip(area), part)


def test_a_point_gets_the_pixel_of_each_grid_that_holds_it() -> None:
    cube = with_classes(three_grids((4, 6), n_times=2)).chunk({"x": 5})
    x, y = 742_920 + 10 * 13 + 1, 4_848_600 - 10 * 7 - 9
    with no_compute():
        values = cube.ginet.point(x, y)
    assert set(values.data_vars) == {*BANDS_10M, *BANDS_20M, *BANDS_60M, "SCL"}
    assert_array_equal(values["B04"], cube["B04"][:, 7, 13])
    assert_array_equal(values["B12"], cube["B12"][:, 3, 6])
    assert_array_equal(values["B09"], cube["B09"][:, 1, 2])
    lon, lat = TO_DEGREES.transform(x, y)
    xr.testing.assert_identical(cube.ginet.point(lon=lon, lat=lat), values)


def test_a_cube_of_one_grid_is_cut_too() -> None:
    cube = single_grid(BANDS_10M, (9, 7), 10)
    assert dict(cube.ginet.isel(x=slice(3, 6), y=slice(0, 5)).sizes) == {"y": 5, "x": 3}


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda g: g.isel(x=3), r"x=3: a slice without a step is needed.*ds.ginet.point\(x, y\)"),
        (lambda g: g.isel(y=slice(0, 8, 2)), "y=slice.0, 8, 2.: a slice without a step"),
        (lambda g: g.isel(x=slice(5, 5)), "x=slice.5, 5, None. holds none of the 18 pixels"),
        (lambda g: g.isel(x=slice(0, 2)), "less than two pixels each way would be left at 20 m"),
        (lambda g: g.isel(x_20m=slice(0, 2)), "x_20m: name x and y, in 10 m pixels"),
        (lambda g: g.sel(y_20m=slice(0, 2)), "y_20m: name x and y; the other grids follow"),
        (lambda g: g.sel(x=743_005.0), r"x=743005.0: slice\(from, to\) is needed"),
        (lambda g: g.sel(x=slice(0, 100)), "holds no centre of a pixel; they lie from 742925"),
        (lambda g: g.clip((0, 0, 1, 1)), "does not touch the cube.*in degrees where no crs= is given"),
        (lambda g: g.clip((743_000, 4_848_300, 743_200, 4_848_500)), "bbox=.*in degrees"),
        (lambda g: g.point(743_005.0), "type both x and y, or both lon and lat"),
        (lambda g: g.point(1.0, 2.0, lon=3.0, lat=4.0), "type both x and y, or both lon and lat"),
        (lambda g: g.point(0.0, 0.0), "x=0, y=0 lies outside the cube"),
    ],
)
def test_what_would_not_nest_or_is_not_there_is_refused(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call(two_grids((8, 9)).ginet)


def test_parts_of_what_has_no_grid_or_no_crs_are_refused() -> None:
    cube = two_grids((8, 9))
    with pytest.raises(ValueError, match=r"the 10 m grid, .* is needed"):
        cube[["B05"]].ginet.isel(x=slice(0, 4))
    with pytest.raises(ValueError, match="grids do not nest"):
        cube.assign_coords(x_20m=cube["x_20m"] + 10).ginet.isel(x=slice(0, 8))
    for call in (lambda g: g.clip((0, 0, 1, 1)), lambda g: g.point(lon=0, lat=0)):
        with pytest.raises(ValueError, match="the cube has no CRS"):
            call(cube.drop_vars("spatial_ref").ginet)
    for area in ("POINT (1 2)", 7, (1, 2, 3)):
        with pytest.raises(TypeError, match=r"a box .* or an object with __geo_interface__"):
            cube.ginet.clip(area)


# -- two grids of one area ---------------------------------------------------------------------------------------------


@given(
    before=st.tuples(st.integers(-2, 2), st.integers(-2, 2)),
    after=st.tuples(st.integers(-2, 2), st.integers(-2, 2)),
    parity=st.tuples(st.integers(0, 1), st.integers(0, 1)),
)
@settings(max_examples=60, deadline=None)
def test_pair_keeps_the_whole_nested_pixels_of_grids_that_differ_by_a_pixel(
    before: tuple[int, int], after: tuple[int, int], parity: tuple[int, int]
) -> None:
    """The fine grid starts ``before`` and ends ``after`` the coarse one, in 10 m pixels, on a common lattice."""
    coarse = single_grid(BANDS_20M, (7, 8), 20)
    everything = single_grid(BANDS_10M, (22, 24), 10)
    everything = everything.assign_coords(x=everything["x"] - 40, y=everything["y"] + 40)
    rows, columns = (slice(4 + b, 4 + 2 * n + a) for b, a, n in zip(before, after, (7, 8), strict=True))
    fine = everything.isel(y=rows, x=columns)
    cube = xr_ginet.pair(fine, coarse.assign(SCL=xr.full_like(coarse["B05"], 4, dtype="uint8")))
    check_nesting(Grid.from_coords(cube), Grid.from_coords(cube, DIMS[20]))
    for names, source in ((BANDS_10M, everything), (BANDS_20M, coarse)):
        for name in names:
            there = source[name].sel({d: cube[e].values for d, e in zip(("y", "x"), cube[name].dims, strict=True)})
            assert_array_equal(cube[name].values, there.values)
    for dim, b, a, n in zip(("y_20m", "x_20m"), before, after, (7, 8), strict=True):
        assert cube.sizes[dim] == n - max(0, -(-b // 2)) - max(0, -(a // 2))  # coarse pixels cut at either end


@pytest.mark.parametrize("shift", [(5, 0), (0, 3), (0.2, 0)])
def test_grids_without_a_common_lattice_are_not_intersected(shift: tuple[float, float]) -> None:
    fine, coarse = single_grid(BANDS_10M, (8, 12), 10), single_grid(BANDS_20M, (4, 6), 20)
    moved = coarse.assign_coords(x=coarse["x"] + shift[0], y=coarse["y"] + shift[1])
    with pytest.raises(ValueError, match="grids do not nest"):
        xr_ginet.pair(fine, moved)
    assert overlap_of(Grid.from_coords(fine), Grid.from_coords(moved)) == ({}, {})
