"""Stored numbers: what is written is what was meant, for any dtype, scale, offset and nodata; bands are reflectance."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import rasterio
import xarray as xr
import zarr
from conftest import no_compute, single_grid, two_grids
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import xr_ginet
from xr_ginet.network import Checkpoint
from xr_ginet.paths import expanded
from xr_ginet.sentinel2.bands import BANDS, BANDS_10M, BANDS_20M
from xr_ginet.sentinel2.radiometry import (
    ESA,
    SATURATED,
    Encoding,
    check_bands_of_block,
    check_reflectance,
    decode_if_numbers,
    decode_numbers,
    source_attrs,
)

# -- encode and decode -------------------------------------------------------------------------------------------------


def test_numbers_by_hand() -> None:
    values = np.array([[-0.5, -0.09, 0.0], [6.4534, 8.0, np.nan], [np.inf, 0.12344, 0.12346]], "float32")
    expected = [[1, 100, 1000], [65534, 65534, 0], [0, 2234, 2235]]
    assert_array_equal(ESA.encode(values), np.array(expected, "uint16"))
    assert ESA.limits == pytest.approx((-0.0999, 6.4534))
    decoded = ESA.decode(np.array([0, 1, 1000, 3000, 65534, 65535], "uint16"))
    assert_allclose(decoded, [np.nan, -0.0999, 0, 0.2, 6.4534, np.nan], atol=1e-7)
    assert decoded.dtype == np.float32


@pytest.mark.parametrize(
    ("dtype", "nodata", "numbers"),
    [
        ("uint16", 0, (1, 65534)),
        ("uint16", 65535, (0, 65534)),
        ("uint16", 65534, (0, 65533)),
        ("uint16", 9999, (0, 65534)),
        ("uint16", None, (0, 65534)),
        ("uint16", -9999, (0, 65534)),  # which no uint16 is
        ("uint16", np.nan, (0, 65534)),
        ("int16", 32767, (-32768, 32766)),
        ("int16", -32768, (-32767, 32767)),
        ("int16", -9999, (-32768, 32767)),
        ("uint8", 255, (0, 254)),
        ("int32", 65534, (-(2**31), 2**31 - 1)),
    ],
)
def test_limits_exclude_nodata_wherever_it_lies(dtype: str, nodata: float | None, numbers: tuple[int, int]) -> None:
    assert Encoding(dtype, 1e-4, -0.1, nodata).numbers == numbers


def test_a_value_beside_nodata_amidst_the_numbers_becomes_the_next_number() -> None:
    encoding = Encoding("uint16", 1e-4, 0, 9999)
    assert_array_equal(encoding.encode(np.array([0.9998, 0.99988, 0.99992, 1.0])), [9998, 9998, 10000, 10000])
    crowded = Encoding("int32", 1, 0, SATURATED - 1)  # beside saturated, which is none either
    assert_array_equal(crowded.encode(np.array([65533.8, 65534.2, 65535.4])), [65533, 65536, 65536])


DTYPES = st.sampled_from(["uint8", "int8", "uint16", "int16", "uint32", "int32"])
SCALES = st.sampled_from([1e-4, 1e-3, 0.01, 0.004, 1 / 3, 1.0, 2e-5, -1e-4])
OFFSETS = st.sampled_from([0.0, -0.1, -0.2, 0.05, 1.0, -1000.0])


@st.composite
def encodings(draw: st.DrawFn) -> Encoding:
    dtype = draw(DTYPES)
    info = np.iinfo(dtype)
    known = [n for n in (0, 1, 255, 9999, 32767, 65534, 65535, -1, -9999) if info.min <= n <= info.max]
    nodata = draw(st.one_of(st.sampled_from([*known, int(info.min), int(info.max)]), st.integers(info.min, info.max)))
    return Encoding(dtype, draw(SCALES), draw(OFFSETS), nodata)


@settings(max_examples=150, deadline=None)
@given(encoding=encodings(), seed=st.integers(0, 99), dtype=st.sampled_from(["float32", "float64"]))
def test_encode_and_decode_are_inverse(encoding: Encoding, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    low, high = encoding.numbers
    around = np.array([n + d for n in (low, high, 0, encoding.nodata, SATURATED) for d in (-2, -1, 0, 1, 2)])
    numbers = np.concatenate([around, rng.integers(low, high, 200, endpoint=True)])
    numbers = numbers[(numbers >= low) & (numbers <= high) & ~np.isin(numbers, list(encoding.reserved))]
    held = encoding.hold(numbers * encoding.scale_factor + encoding.add_offset)
    assert_array_equal(encoding.encode(held), numbers)
    if encoding.held_dtype == np.float32:
        assert_array_equal(encoding.encode(encoding.decode(numbers.astype(encoding.dtype))), numbers)
    # Any value becomes the nearest number, beside a reserved one the next; none becomes missing.
    first, last = encoding.limits
    values = rng.uniform(first - (last - first) / 9, last + (last - first) / 9, 300).astype(dtype)
    values[::7] = np.nan
    back = encoding.hold(values)
    assert_array_equal(np.isnan(back), np.isnan(values))
    steps = np.abs(back - values.clip(first, last).astype("float64")) / abs(encoding.scale_factor)
    tolerance = 0.55 + 3 * np.finfo(dtype).eps * np.nanmax(np.abs(values)) / abs(encoding.scale_factor)
    beside = np.isin(np.rint((values - encoding.add_offset) / encoding.scale_factor), list(encoding.reserved))
    assert (steps[~(beside | np.isnan(values))] <= tolerance).all()
    assert (steps[beside] <= tolerance + 1.5).all()


def test_without_nodata_nothing_can_be_missing() -> None:
    encoding = Encoding("uint16", 1e-4)
    assert_array_equal(encoding.encode(np.array([0.0, 0.5])), [0, 5000])
    with pytest.raises(ValueError, match="a value is missing, and no number of uint16 stands for that"):
        encoding.encode(np.array([0.0, np.nan]))


@pytest.mark.parametrize(
    ("dtype", "scale", "offset", "match"),
    [
        ("uint16", 0, 0, "scale 0 and offset 0: must be finite"),
        ("uint16", np.nan, 0, "scale nan"),
        ("uint16", 1e-4, np.inf, "offset inf"),
        ("complex64", 1e-4, 0, "dtype complex64: numbers are stored as integers or floating point"),
    ],
)
def test_what_is_no_encoding_is_refused(dtype: str, scale: float, offset: float, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Encoding(dtype, scale, offset)


@pytest.mark.parametrize("encoding", [ESA, Encoding("int16", 1e-3, 0.5, -99), Encoding("float32")])
def test_attributes_give_an_encoding_back(encoding: Encoding) -> None:
    assert Encoding.from_attrs(encoding.to_attrs()) == encoding


# -- through stores ----------------------------------------------------------------------------------------------------


def cube_like(encoding: Encoding, *, n: int = 8) -> tuple[xr.Dataset, np.ndarray]:
    """Return a cube of one band that was made from some numbers, and these; some are missing."""
    rng = np.random.default_rng(3)
    low, high = encoding.numbers
    if encoding.dtype in ("int32", "uint32"):  # or clouds of 200,000 would be refused
        low, high = max(low, 0), 65534
    numbers = rng.integers(low, high, (n, n), endpoint=True)
    numbers[np.isin(numbers, list(encoding.reserved))] = low
    numbers[0, :3] = low, high, encoding.nodata
    values = np.where(numbers == encoding.nodata, np.nan, numbers * encoding.scale_factor + encoding.add_offset)
    cube = single_grid(("B05",), (n, n), 10)
    cube["B05"] = cube["B05"].copy(data=values).chunk(y=n // 2)
    return cube.assign_attrs(source_attrs([encoding])), numbers.astype(encoding.dtype)


STORED = [
    ESA,
    *(Encoding("uint16", 1e-4, 0, nodata) for nodata in (65535, 9999, 1)),
    *(Encoding("int16", 1e-4, 0, nodata) for nodata in (32767, -9999, 0)),
    Encoding("uint8", 0.004, 0, 255),
    Encoding("int32", 1e-4, -0.1, -9999),
]


@pytest.mark.parametrize("encoding", STORED, ids=lambda e: f"{e.dtype} {e.nodata}")
@pytest.mark.parametrize("store", ["zarr 3", "zarr 2", "cog"])
def test_like_input_gives_all_numbers_back_through_every_store(encoding: Encoding, store: str, tmp_path: Path) -> None:
    cube, numbers = cube_like(encoding)
    if store == "cog":
        [path] = cube.ginet.to_cog(tmp_path, like="input")
        with rasterio.open(path) as file:
            stored, nodata = file.read(1), file.nodata
            assert (file.scales, file.offsets) == ((encoding.scale_factor,), (encoding.add_offset,))
    else:
        cube.ginet.to_zarr(tmp_path / "c.zarr", like="input", zarr_format=int(store[-1]))
        raw = xr.open_zarr(tmp_path / "c.zarr", mask_and_scale=False)["B05"]
        stored, nodata = raw.values, raw.attrs["_FillValue"]
        read = xr.open_zarr(tmp_path / "c.zarr")["B05"]
        assert_array_equal(read.isnull(), cube["B05"].isnull())
        assert_allclose(read, cube["B05"], atol=abs(encoding.scale_factor) / 100)
    assert stored.dtype == encoding.dtype
    assert nodata == encoding.nodata
    assert_array_equal(stored, numbers)


def test_numbers_without_nodata_are_not_taken_for_a_model(tmp_path: Path) -> None:
    cube = single_grid(("B05",), (8, 8), 10).assign_attrs(source_attrs([Encoding("uint16", 1e-4)]))
    for write in (cube.ginet.to_zarr, cube.ginet.to_cog):
        with pytest.raises(ValueError, match="no uint16 stood for missing pixels in what the cube was made from"):
            write(tmp_path / "new", like="input")
    assert not list(tmp_path.iterdir())


OTHERS: dict[str, Any] = {
    "NDVI": ("float32", -1, 1),
    "NBR": ("float64", -1, 1),
    "day": ("float64", 2_460_000, 2_460_001),
    "half": ("float16", -3, 3),
    "count": ("int32", -(2**31), 2**31 - 1),
    "id": ("int64", -(2**50), 2**50),
    "SCL": ("uint8", 0, 11),
    "steep": ("int8", -128, 127),
    "saturated": ("uint16", 65000, 65535),
    "snow": ("bool", 0, 1),
}


@pytest.mark.parametrize("options", [{"dtype": "uint16"}, {"dtype": "float32"}, {"like": "input"}], ids=str)
@pytest.mark.parametrize("store", ["zarr 3", "zarr 2", "cog"])
def test_what_is_no_band_is_stored_as_it_is(options: dict, store: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    cube, _ = cube_like(ESA)
    for name, (dtype, low, high) in OTHERS.items():
        kind = np.dtype(dtype).kind
        data = rng.uniform(low, high, (8, 8)) if kind == "f" else rng.integers(low, high, (8, 8), endpoint=True)
        cube[name] = (("y", "x"), data.astype(dtype))
    cube["NDVI"][0, 0] = np.nan
    cube["NDVI"].attrs = {"scale_factor": 1e-4, "_FillValue": 0}  # of the bands that it was made from
    if store == "cog":
        cube.ginet.to_cog(tmp_path, **options)
    else:
        cube.ginet.to_zarr(tmp_path / "c.zarr", zarr_format=int(store[-1]), **options)
    for name, (dtype, *_) in OTHERS.items():
        if store == "cog":
            with rasterio.open(tmp_path / f"{name}.tif") as file:
                read = file.read(1) * file.scales[0] + file.offsets[0] if file.scales != (1,) else file.read(1)
        else:
            read = xr.open_zarr(tmp_path / "c.zarr")[name].values
            assert read.dtype == dtype
        assert_array_equal(read, cube[name].values)


def test_a_stacked_file_holds_an_index_beside_the_bands(tmp_path: Path) -> None:
    cube, _ = cube_like(ESA)
    cube = cube.assign(NDWI=cube["B05"] * 0 - 0.77, classes=(("y", "x"), np.full((8, 8), 7, "uint8")))
    [path] = cube.astype("float32").assign(classes=cube["classes"]).ginet.to_cog(tmp_path, stacked=True)
    with rasterio.open(path) as file:
        assert file.dtypes == ("float32",) * 3
        assert_allclose(file.read(1), cube["B05"], rtol=1e-6)
        assert_allclose(np.nanmin(file.read(2)), -0.77, rtol=1e-6)
        assert (file.read(3) == 7).all()
    for name, dtype, match in (("id", "int64", "id has integers of 64 bits"), ("when", "M8[s]", "when holds datetime")):
        odd = cube.assign({name: (("y", "x"), np.ones((8, 8), dtype))})
        with pytest.raises(ValueError, match=match):
            odd.ginet.to_cog(tmp_path / "odd", stacked=True)
    assert not (tmp_path / "odd").exists()


def test_overviews_of_a_cog_are_means_of_bands_and_pixels_of_classes(tmp_path: Path) -> None:
    cube = single_grid(("B05",), (640, 640), 10)
    cube["classes"] = (("y", "x"), np.random.default_rng(0).choice([0, 200], (640, 640)).astype("uint8"))
    cube.ginet.to_cog(tmp_path, dtype="float32")
    with rasterio.open(tmp_path / "B05.tif", overview_level=0) as file:
        assert_allclose(file.read(1), cube["B05"].values.reshape(320, 2, 320, 2).mean((1, 3)), rtol=1e-5)
    with rasterio.open(tmp_path / "classes.tif", overview_level=0) as file:
        assert set(np.unique(file.read(1))) == {0, 200}


# -- floats that are no reflectance ------------------------------------------------------------------------------------


def scene(n: int = 32, factor: float = 1.0, shift: float = 0.0, dtype: str = "float32") -> np.ndarray:
    """Return reflectance from 0.03 to 0.4, a quarter of it missing, scaled."""
    values = np.random.default_rng(5).uniform(0.03, 0.4, (n, n)) * factor + shift
    values[: n // 2, : n // 2] = np.nan
    return values.astype(dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    ("factor", "shift", "match"),
    [
        (1e4, 0, "these are digital numbers, and reflectance is needed.* Type scale=1e-4"),
        (1e4, 1000, "digital numbers"),
        (100, 0, "percent or digital numbers.*scale=0.01 for percent"),
        (255, 0, "percent or digital numbers|these are digital numbers"),
        (0, -9999, "is -9999|is -10000"),
    ],
)
def test_floats_far_from_reflectance_are_refused(dtype: str, factor: float, shift: float, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        check_reflectance(scene(factor=factor, shift=shift, dtype=dtype), "B02")


def test_snow_clouds_glint_and_few_pixels_are_reflectance() -> None:
    few = np.full((100, 100), np.nan)
    few[0, :20] = 6.4  # glint on a roof, the rest of the block is missing
    spots = scene()
    spots[20:22] = 9.97e36  # a fill value that nobody declared, of some pixels
    for block in (scene(), scene(factor=5), scene() + 1.5, few, spots, np.full((8, 8), np.nan), np.zeros((0, 4))):
        check_reflectance(block, "B02")
    with pytest.raises(ValueError, match="the median of a block of B02 is 3000"):
        check_reflectance(few / 6.4 * 3000, "B02")
    with pytest.raises(ValueError, match=r"the median of a block of B02 is 1e\+30"):
        check_reflectance(np.full((8, 8), 1e30), "B02")


def test_what_was_shifted_or_scaled_twice_is_told() -> None:
    blocks = [scene(), scene(shift=-0.3)]
    with pytest.warns(
        UserWarning, match=r"the medians of a block \(B04 -0.\d+\) are darker than water. Probably an off"
    ):
        check_bands_of_block(blocks, ("B02", "B04"))
    with pytest.warns(UserWarning, match="below 0.0005 in B02, B04: probably reflectance was scaled again"):
        check_bands_of_block([block * 1e-4 for block in (scene(), scene())], ("B02", "B04"))
    check_bands_of_block([scene(), scene() * 1e-4], ("B04", "B12"))  # water absorbs


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("face", ["pair", "two grids", "one grid"])
def test_digital_numbers_as_floats_need_a_scale(checkpoint: Checkpoint, face: str, lazy: bool) -> None:
    right = two_grids((8, 8)).astype("float32")
    numbers = (right * 10_000).chunk() if lazy else right * 10_000
    fine, coarse = (
        numbers[list(bands)].rename(dict(zip(numbers[bands[0]].dims, ("y", "x"), strict=True)))
        for bands in (BANDS_10M, BANDS_20M)
    )
    coarse = coarse.drop_vars([c for c in ("y_20m", "x_20m") if c in coarse.coords])
    repeats = np.arange(16) // 2
    one = fine.assign({name: (("y", "x"), coarse[name].data[repeats][:, repeats]) for name in BANDS_20M})
    entered = {"two grids": numbers, "one grid": one, "pair": numbers}[face]

    def run(**numbers_are: float) -> xr.Dataset:
        cube = entered
        if face == "pair":
            at_20m = coarse.assign_coords(y=numbers["y_20m"].values, x=numbers["x_20m"].values)
            cube, numbers_are = xr_ginet.pair(fine, at_20m, **numbers_are), {}
        return cube.ginet.superresolve(weights=checkpoint, precision="float32", **numbers_are).compute()

    with pytest.raises(ValueError, match=r"the median of a block of B\w\w is \d+.*scale=1e-4"):
        run()
    expected = right.ginet.superresolve(weights=checkpoint, precision="float32")
    assert_allclose(run(scale=1e-4)["B11"], expected["B11"], atol=1e-5)


SAID = {"scale_factor": 1e-4, "add_offset": -0.1, "_FillValue": 0}


@pytest.mark.parametrize("lazy", [False, True])
def test_floats_that_state_a_scale_are_told_by_their_pixels(lazy: bool) -> None:
    numbers = np.rint(scene(factor=1e4, shift=1000).astype("float64"))
    numbers[0, 0] = 0
    reflectance = numbers * 1e-4 - 0.1  # the missing one is -0.1
    expected = np.where(numbers == 0, np.nan, reflectance)
    means = (numbers + np.roll(numbers, 1)) / 2  # as of two dates, no integers
    for block, right in ((numbers, expected), (reflectance, expected), (means, means * 1e-4 - 0.1)):
        band = xr.DataArray(block, dims=("y", "x"), name="B02", attrs=SAID)
        found = xr_ginet.sentinel2.layouts.to_reflectance(band.chunk(y=16) if lazy else band)
        if block is not means:
            assert_allclose(found, right, atol=1e-7)
        assert_allclose(found[20:, 20:], right[20:, 20:], atol=1e-7)
        assert not found.attrs
    with pytest.raises(
        ValueError, match=r"states scale_factor=0.0001, and the median of a block is 7\.\d+: digital num"
    ):
        decode_if_numbers(scene(shift=7), Encoding("float32", 1e-4, -0.1, 0), "B02")
    with pytest.raises(ValueError, match=r"that is reflectance already, and scale=0.0001 would scale it again"):
        decode_numbers(scene(), Encoding("float32", 1e-4, 0, 0), "B02")


def test_a_fill_value_that_floats_name_is_missing() -> None:
    values = scene()
    values[20, 20] = -9999
    for key in ("_FillValue", "missing_value", "nodata"):
        band = xr.DataArray(values, dims=("y", "x"), name="B02", attrs={key: -9999.0})
        assert np.isnan(xr_ginet.sentinel2.layouts.to_reflectance(band)[20, 20])
    integers = xr.DataArray(np.full((8, 8), 3000, "int16"), dims=("y", "x"), name="B02", attrs={"nodata": -9999})
    integers[0, 0], integers[0, 1], integers[1, 1] = -9999, 0, -200
    found = xr_ginet.sentinel2.layouts.to_reflectance(integers, scale=1e-4)
    assert_allclose(found[:2, :2], [[np.nan, np.nan], [0.3, -0.02]], atol=1e-7)


# -- what superresolve keeps -------------------------------------------------------------------------------------------


def rich_cube() -> xr.Dataset:
    """Return a cube with all that users have beside bands."""
    cube = two_grids((8, 8), n_times=2).chunk(time=1)
    cube = cube.assign(
        SCL=(("time", "y_20m", "x_20m"), da.full((2, 8, 8), 4, dtype="uint8", chunks=(1, 8, 8))),
        slope=(("y", "x"), np.full((16, 16), 3.5)),
        sun=("time", [30.0, 31.0], {"units": "degree"}),
        note=((), 7),
    )
    cube = cube.assign_coords(item=("time", ["a", "b"]), cloud=("time", [1.5, 2.5]), platform="sentinel-2a")
    cube["B05"].attrs |= {"scale_factor": 1e-4, "_FillValue": 0, "common_name": "rededge1", "gsd": 20}
    cube["B02"].attrs |= {"scales": (1.0,), "offsets": (0.0,), "add_offset": 0.0, "common_name": "blue"}
    return cube.assign_attrs(title="mine", history=["cut", "masked"], transform=(1, 2), scale_factor=1.0)


@pytest.mark.parametrize("bands", [{}, {"weights": None}])
def test_superresolve_keeps_what_it_was_given(checkpoint: Checkpoint, bands: dict) -> None:
    cube = rich_cube()
    before = cube.copy(deep=True)
    with no_compute():
        result = cube.ginet.superresolve(**({"weights": checkpoint} | bands))
    xr.testing.assert_identical(cube, before)
    assert list(result.data_vars) == [*(b for b in BANDS if b in cube), "SCL", "slope", "sun", "note"]
    for name in ("SCL", "slope", "sun", "note", "item", "cloud", "platform", "y_20m", "time"):
        assert result[name].dims == cube[name].dims
        assert_array_equal(result[name].values, cube[name].values)
    assert result["sun"].attrs == {"units": "degree"}
    assert result["B05"].attrs["common_name"] == "rededge1"
    assert result["B05"].attrs["units"] == "1"
    assert not result["B05"].attrs.keys() & {"scale_factor", "_FillValue", "gsd"}
    assert not result["B02"].attrs.keys() & {"scales", "offsets", "add_offset"}
    assert (result.attrs["title"], result.attrs["history"]) == ("mine", ["cut", "masked"])
    assert not result.attrs.keys() & {"transform", "scale_factor"}
    bare = cube[[*BANDS_10M, *BANDS_20M]].ginet.superresolve(**({"weights": checkpoint} | bands))
    assert not {"y_20m", "x_20m", "SCL"} & set(bare.variables)


def test_a_repeated_cube_keeps_what_lies_beside_its_bands(checkpoint: Checkpoint) -> None:
    fine = single_grid(BANDS_10M, (8, 12), 10, n_times=2)
    native = single_grid(BANDS_20M, (4, 6), 20, n_times=2)
    rows, columns = np.arange(8) // 2, np.arange(12) // 2
    repeated = {name: (("time", "y", "x"), native[name].values[:, rows][:, :, columns]) for name in BANDS_20M}
    cube = fine.assign(repeated).assign(
        clear=(("time", "y", "x"), np.arange(192).reshape(2, 8, 12)), sun=("time", [1.0, 2])
    )
    cube = cube.assign_coords(item=("time", ["a", "b"])).assign_attrs(mine=1)
    with pytest.warns(UserWarning, match="cuts 20 m pixels"):
        result = cube.isel(y=slice(1, None)).ginet.superresolve(weights=checkpoint)
    assert_array_equal(result["clear"], cube["clear"][:, 2:])
    assert_array_equal(result["sun"], [1, 2])
    assert_array_equal(result["item"], ["a", "b"])
    assert result.attrs["mine"] == 1
    stack = cube[[*BANDS_10M, *BANDS_20M]].drop_vars("spatial_ref").to_dataarray("band").assign_attrs(spec=object())
    stack = stack.assign_coords(gsd=("band", [10] * 4 + [20] * 6), odd=("time", np.array([{}, None], object)))
    stack = stack.assign_coords({"s2:mgrs_tile": "30TYP"})
    result = stack.ginet.superresolve(weights=checkpoint)
    assert_array_equal(result["item"], ["a", "b"])
    assert not {"gsd", "odd"} & set(result.coords)
    assert "spec" not in result.attrs
    assert result.attrs["mine"] == 1


def test_a_result_and_all_beside_it_survive_every_store(checkpoint: Checkpoint, tmp_path: Path) -> None:
    result = rich_cube().ginet.superresolve(weights=checkpoint)
    for version in (2, 3):
        for options in ({}, {"resume": True}):
            path = tmp_path / f"{version}{len(options)}.zarr"
            result.ginet.to_zarr(path, zarr_format=version, dtype="uint16", **options)
            stored = xr.open_zarr(path, decode_coords="all")
            for name in ("SCL", "slope", "sun", "note", "item", "cloud", "platform"):
                assert_array_equal(stored[name].values, result[name].values)
            assert stored.attrs["history"] == ["cut", "masked"]
    assert len(result.ginet.to_cog(tmp_path / "cogs")) == 2 * 11  # SCL lies on another grid
    result = result.assign_attrs(history="cut")  # netCDF 3 has no lists of text
    result.drop_encoding().to_netcdf(tmp_path / "c.nc", engine="scipy")  # no other engine in a default install
    with xr.open_dataset(tmp_path / "c.nc", engine="scipy") as stored:
        assert_array_equal(stored["SCL"], result["SCL"])
        assert_array_equal(stored["B05"], result["B05"].astype("float32"))


def test_overviews_hold_bands_and_not_what_lies_on_other_grids(checkpoint: Checkpoint, tmp_path: Path) -> None:
    result = rich_cube().ginet.superresolve(weights=checkpoint)
    result = result[["slope", "B02", "SCL", "sun"]]  # the first variable is no band
    result.ginet.to_zarr(tmp_path / "10m", resume=True, dtype="uint16")
    xr_ginet.build_overviews(tmp_path / "10m", levels=1)
    level = xr.open_zarr(tmp_path / "20m")
    assert {"slope", "B02", "sun"} < set(level.data_vars)
    assert not {"SCL", "y_20m"} & set(level.variables)
    assert level["B02"].encoding["dtype"] == np.uint16
    assert_allclose(level["B02"], result["B02"].coarsen(y=2, x=2).mean(), atol=1e-4)


# -- attributes, and refusals that leave nothing behind ----------------------------------------------------------------


@dataclass
class Spec:
    epsg: int
    bounds: tuple[float, ...]


KEPT: dict[str, tuple[Any, Any]] = {
    "none": (None, None),
    "scalar": (np.float32(0.5), 0.5),
    "array": (np.arange(3), [0, 1, 2]),
    "nan": (float("nan"), "nan"),
    "times": ([datetime.date(2024, 6, 1), np.datetime64("2024-06-01T10:00")], ["2024-06-01", "2024-06-01T10:00"]),
    "nested": ([{"a": (1, None)}, {"b": {"c": np.int64(2)}}], [{"a": [1, None]}, {"b": {"c": 2}}]),
    "spec": (Spec(32630, (1.0, 2.0)), {"epsg": 32630, "bounds": [1.0, 2.0]}),
    "path": (Path("a/b"), "a/b"),
    "set": ({2, 1}, [1, 2]),
    "affine": (rasterio.Affine(1, 0, 2, 0, 3, 4), [1.0, 0.0, 2.0, 0.0, 3.0, 4.0, 0.0, 0.0, 1.0]),
    "AREA_OR_POINT": ("Area", "Area"),
    "scale_factor": (1.0, None),
    "add_offset": (0.0, None),
    "_FillValue": (np.nan, None),
    "scales": ((1.0,), None),
    "missing_value": (0, None),
    "dtype": ("uint16", None),
    "grid_mapping": ("elsewhere", None),
}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_attributes_of_any_kind_are_stored(dtype: str, version: int, tmp_path: Path) -> None:
    cube, _ = cube_like(ESA)
    given = {key: value for key, (value, _) in KEPT.items()}
    cube["B05"].attrs = given
    cube["NDVI"] = cube["B05"] * 0
    cube["NDVI"].attrs = given
    cube = cube.assign_coords(time=np.datetime64("2024-06-01", "ns"), tags=((), np.array({"a": None}, object)[()]))
    cube["time"].attrs = {"units": "days", "calendar": "mine"}
    cube["x"].attrs |= {"_FillValue": np.nan}
    cube.ginet.to_zarr(tmp_path / "c.zarr", dtype=dtype, zarr_format=version)
    cube.assign_attrs(given | {"ns": 1}).ginet.to_cog(tmp_path / "cogs", dtype=dtype)
    stored = xr.open_zarr(tmp_path / "c.zarr")
    assert json.loads(str(stored["tags"].values)) == {"a": None}
    for name in ("B05", "NDVI"):
        assert_allclose(stored[name], cube[name], atol=1e-4)
        for key, (_, expected) in KEPT.items():
            found = stored[name].attrs.get(key)
            assert found == (expected if key != "grid_mapping" else found)
            if expected is None and key != "none":
                assert key == "grid_mapping" or key not in stored[name].attrs


def refusals() -> dict[str, Any]:
    """Return cubes and options that are refused, by kind."""
    cube, _ = cube_like(ESA)
    times = cube.expand_dims(time=np.array(["2024-06-01", "2024-06-02"], "M8[ns]"))
    strange = cube.copy()
    strange["B05"].attrs = {"lock": object()}
    return {
        "attribute of a band": (strange, {}, "the attribute 'lock' of B05 is a object"),
        "attribute of the cube": (cube.assign_attrs(a={"b": [object()]}), {}, "the attribute 'a' of the cube is a obj"),
        "bytes": (cube.assign_attrs(a=b"x"), {}, "the attribute 'a' of the cube is a bytes"),
        "coordinate": (cube.assign_coords(c=((), object())), {}, "c is a object"),
        "complex": (cube.assign(c=cube["B05"] * 1j), {}, "c holds complex128, and a GeoTIFF numbers"),
        "dtype": (cube, {"dtype": "int8"}, "dtype='int8'"),
        "like": (cube.drop_attrs(), {"like": "input"}, "like='input'"),
        "resume": (times.assign_attrs(a=object()), {"resume": True}, "the attribute 'a'"),
        "shards": (times, {"inner_chunks": 3, "resume": True}, "inner_chunks=3"),
        "mode": (cube, {"mode": "a"}, "no dimension 'time'"),
        "home": (cube, {"target": "~nobody-of-that-name/c.zarr"}, "no home folder of ~nobody"),
    }


@pytest.mark.parametrize("kind", refusals())
@pytest.mark.parametrize("write", ["zarr", "cog"])
def test_a_refused_call_leaves_nothing_behind(
    kind: str, write: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cube, options, match = refusals()[kind]
    target = options.pop("target", tmp_path / "new")
    of_zarr = options.keys() & {"resume", "mode"} or kind in ("attribute of a band", "coordinate")
    if (write == "cog" and of_zarr) or (write == "zarr" and kind == "complex"):
        pytest.skip("is no fault there")
    method = cube.ginet.to_zarr if write == "zarr" else cube.ginet.to_cog
    with no_compute(), pytest.raises(ValueError, match=match):
        method(target, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", ["zarr", "cog"])
def test_digital_numbers_are_refused_when_they_are_packed(write: str, tmp_path: Path) -> None:
    cube, _ = cube_like(ESA, n=16)
    numbers = (cube * 10_000).assign_attrs(cube.attrs)
    target = zarr.storage.MemoryStore() if write == "zarr" else tmp_path / "new"
    method = numbers.ginet.to_zarr if write == "zarr" else numbers.ginet.to_cog
    with pytest.raises(ValueError, match="the median of a block of B05 is"):
        method(target, dtype="uint16")
    assert not list(tmp_path.iterdir())


# -- paths -------------------------------------------------------------------------------------------------------------


def test_a_home_folder_is_expanded_wherever_a_path_is_taken(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (home / "w.safetensors").write_bytes(checkpoint.path.read_bytes())
    result = two_grids((8, 8), n_times=1).chunk().ginet.superresolve(weights="~/w.safetensors")
    result.ginet.to_zarr("~/a.zarr")
    result.ginet.to_zarr(Path("~/a.zarr"), mode="w")
    result.ginet.to_zarr(zarr.storage.LocalStore("~/a.zarr"), mode="w")
    result.ginet.to_zarr("~/b.zarr/10m", resume=True)
    result.ginet.to_zarr("~/b.zarr/10m", resume=True)
    assert bool(xr_ginet.status("~/b.zarr/10m").all())
    xr_ginet.build_overviews("~/b.zarr/10m", levels=1)
    assert len(result.ginet.to_cog("~/cogs")) == 10
    xr_ginet.save_checkpoint("~/x.safetensors", checkpoint.network())
    with pytest.raises(FileNotFoundError, match=f"no product at {home}"):
        xr_ginet.open_safe("~/none.SAFE")
    assert {"a.zarr", "b.zarr", "cogs", "x.safetensors"} <= {path.name for path in home.iterdir()}
    assert not list(here.iterdir())
    assert expanded("./~x") == "./~x"
    with pytest.raises(
        ValueError, match=r"no home folder of ~nobody-at-all is known. Type the whole path, or ./~nobody"
    ):
        expanded("~nobody-at-all/x")
