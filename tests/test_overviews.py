"""Pyramids: means of what is stored, grown with their cube, found by what maps read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import xarray as xr
import zarr
import zarr_cm
from conftest import no_compute, single_grid
from typer.testing import CliRunner

import xr_ginet
from xr_ginet.cli import app
from xr_ginet.growing import CHECKSUM
from xr_ginet.overviews import SOURCE, halved
from xr_ginet.sentinel2.grids import Grid, read_crs

BANDS = ("B02", "B8A")


def cube_of(height: int = 46, width: int = 35, *, n_times: int | None = 3, chunk: int = 16) -> xr.Dataset:
    """Return a random cube at 10 m with gaps, lazy."""
    cube = single_grid(BANDS, (height, width), 10, n_times=n_times)
    gaps = np.random.default_rng(1).random(cube["B02"].shape) < 0.3
    cube["B02"] = cube["B02"].where(~gaps)
    return cube.chunk(y=chunk, x=chunk, **({"time": 1} if n_times else {}))


def mean_of_windows(image: np.ndarray) -> np.ndarray:
    """Return the mean of the valid pixels of each 2 × 2 window, one by one."""
    height, width = image.shape
    out = np.full((-(-height // 2), -(-width // 2)), np.nan)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            valid = [v for v in image[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].ravel() if np.isfinite(v)]
            if valid:
                out[i, j] = sum(float(v) for v in valid) / len(valid)
    return out


def level(store: Path, name: str) -> xr.Dataset:
    return xr.open_zarr(store / name, decode_coords="all").load()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return a group that holds a complete cube and its overviews."""
    cube_of().ginet.to_zarr(tmp_path / "cube.zarr" / "10m", resume=True)
    assert xr_ginet.build_overviews(tmp_path / "cube.zarr" / "10m", levels=2) == ["20m", "40m"]
    return tmp_path / "cube.zarr"


def test_overviews_are_means_of_windows_and_cover_the_same_ground(store: Path) -> None:
    before = level(store, "10m")
    for name, pixel in (("20m", 20), ("40m", 40)):
        coarse = level(store, name)
        for band in BANDS:
            expected = np.stack([mean_of_windows(image) for image in before[band].values])
            np.testing.assert_allclose(coarse[band].values, expected, rtol=1e-6)
        grid, finer = Grid.from_coords(coarse), Grid.from_coords(before)
        assert (grid.dx, grid.dy, grid.x0, grid.y0) == (pixel, -pixel, finer.x0, finer.y0)
        assert grid.shape == tuple(-(-n // 2) for n in finer.shape)
        assert read_crs(coarse) == read_crs(before)
        assert coarse["B02"].encoding["chunks"] == (1, *(min(16, n) for n in grid.shape))
        before = coarse


def test_an_overview_is_lazy_until_it_is_written() -> None:
    with no_compute():
        assert halved(cube_of())["B02"].chunks is not None


def test_the_group_keeps_to_the_conventions(store: Path) -> None:
    group = zarr.open_group(store, mode="r")
    attrs = group.attrs.asdict()
    assert zarr_cm.detect_revisions(attrs).keys() == {"multiscales", "proj", "spatial"}
    zarr_cm.validate_all(attrs)
    assert [entry["asset"] for entry in attrs["multiscales"]["layout"]] == ["10m", "20m", "40m"]
    assert attrs["proj:code"] == "EPSG:32630"
    assert {"10m/B02", "20m/B8A", "40m/B8A"} <= group.metadata.consolidated_metadata.flattened_metadata.keys()


@pytest.mark.filterwarnings("ignore:This module is experimental")
def test_what_maps_are_made_with_reads_the_level_that_it_needs(store: Path) -> None:
    from rio_tiler.experimental.zarr import GroupReader

    with GroupReader(zarr.open_group(store, mode="r")) as reader:
        assert reader.crs == read_crs(level(store, "10m"))
        assert reader.bounds == Grid.from_coords(level(store, "10m")).bounds
        for size, name in ((46, "10m"), (23, "20m"), (12, "40m")):
            image = reader.preview(variables="B8A", max_size=size, indexes=2)
            np.testing.assert_array_equal(image.data[0], level(store, name)["B8A"].values[1])


def test_appended_and_overwritten_dates_are_made_and_the_others_left_alone(tmp_path: Path) -> None:
    cube = cube_of(n_times=4)
    store = tmp_path / "cube.zarr"
    cube.isel(time=slice(0, 3)).ginet.to_zarr(store / "10m", resume=True)
    xr_ginet.build_overviews(store / "10m", levels=2)
    kept = sorted((store / "20m" / "B8A" / "c" / "0").rglob("*"))
    stamps = [path.stat().st_mtime_ns for path in kept]
    changed = cube.copy()
    changed["B8A"] = cube["B8A"] + xr.DataArray([0.0, 0.25, 0, 0], dims="time").astype("float32")
    changed.isel(time=slice(1, 4)).ginet.to_zarr(store / "10m", mode="a")
    xr_ginet.build_overviews(store / "10m", levels=2)

    assert len(kept) > 3
    assert [path.stat().st_mtime_ns for path in kept] == stamps
    changed.ginet.to_zarr(tmp_path / "whole.zarr" / "10m", resume=True)
    xr_ginet.build_overviews(tmp_path / "whole.zarr" / "10m", levels=2)
    for name in ("10m", "20m", "40m"):
        xr.testing.assert_equal(level(store, name), level(tmp_path / "whole.zarr", name))
        assert xr_ginet.status(store / name, verify=True).values.tolist() == [True] * 4
    assert (level(store, "20m")[SOURCE].values == level(store, "10m")[CHECKSUM].values).all()


@pytest.mark.parametrize("n_times", [None, 2])
def test_cubes_written_at_once_have_overviews_too_as_they_are_stored(n_times: int | None, tmp_path: Path) -> None:
    cube = cube_of(48, 32, n_times=n_times)
    for mode in ("w-", "w"):
        cube.ginet.to_zarr(tmp_path / "c.zarr" / "10m", mode=mode, dtype="uint16", inner_chunks=8)
        xr_ginet.build_overviews(tmp_path / "c.zarr" / "10m", levels=1)
        cube = cube + 0.1
    coarse, fine = level(tmp_path / "c.zarr", "20m"), level(tmp_path / "c.zarr", "10m")
    assert coarse["B02"].encoding["dtype"] == "uint16"
    assert coarse["B02"].encoding["chunks"][-2:] == (8, 8)
    assert coarse["B02"].encoding["shards"][-2:] == (16, 16)
    images = fine["B02"].values.reshape(-1, 48, 32)
    expected = np.stack([mean_of_windows(image) for image in images]).reshape(coarse["B02"].shape)
    np.testing.assert_allclose(coarse["B02"].values, expected, atol=0.51e-4)


@pytest.mark.parametrize(("options", "offset"), [({"dtype": "uint16"}, -0.1), ({"like": "input"}, 0.0)])
def test_overviews_are_encoded_as_their_cube_whatever_it_was_made_from(
    options: dict[str, Any], offset: float, tmp_path: Path
) -> None:
    source = {"source_dtype": "uint16", "source_scale_factor": 1e-4, "source_add_offset": 0.0, "source_nodata": 0}
    cube_of(n_times=None).assign_attrs(source).ginet.to_zarr(tmp_path / "c.zarr" / "10m", **options)
    xr_ginet.build_overviews(tmp_path / "c.zarr" / "10m", levels=1)
    encodings = [level(tmp_path / "c.zarr", name)["B02"].encoding for name in ("10m", "20m")]
    assert [encoding["add_offset"] for encoding in encodings] == [offset] * 2
    assert [encoding["dtype"] for encoding in encodings] == ["uint16"] * 2


def test_overviews_in_degrees_are_named_so(tmp_path: Path) -> None:
    cube = cube_of(n_times=None).rio.write_crs("EPSG:4326")
    cube = cube.assign_coords(y=cube["y"] * 1e-5, x=cube["x"] * 1e-5)
    cube.ginet.to_zarr(tmp_path / "c.zarr" / "full")
    assert xr_ginet.build_overviews(tmp_path / "c.zarr" / "full", levels=1) == ["0.0002deg"]


def test_the_default_number_of_levels_ends_at_512_pixels(tmp_path: Path) -> None:
    cube = single_grid(("B02",), (40, 1100), 10).chunk()
    cube.ginet.to_zarr(tmp_path / "c.zarr" / "10m")
    result = CliRunner().invoke(app, ["overviews", str(tmp_path / "c.zarr" / "10m")])
    assert result.exit_code == 0, result.output
    assert "20m, 40m" in result.output
    assert level(tmp_path / "c.zarr", "40m").sizes == {"y": 10, "x": 275}


def test_classes_are_taken_from_a_pixel(tmp_path: Path) -> None:
    cube = cube_of(n_times=None)
    cube["SCL"] = (("y", "x"), np.arange(46 * 35, dtype="uint8").reshape(46, 35))
    cube.ginet.to_zarr(tmp_path / "c.zarr" / "10m")
    xr_ginet.build_overviews(tmp_path / "c.zarr" / "10m", levels=1)
    np.testing.assert_array_equal(level(tmp_path / "c.zarr", "20m")["SCL"], cube["SCL"].values[::2, ::2])


def test_what_no_pyramid_can_be_made_of_is_refused(tmp_path: Path) -> None:
    cube = cube_of()
    cube.ginet.to_zarr(tmp_path / "20m")
    with pytest.raises(ValueError, match="is named as one of its overviews would be: 20m"):
        xr_ginet.build_overviews(tmp_path / "20m", levels=1)
    with pytest.raises(ValueError, match=r"no member of a group: overviews lie beside it\. Write it to cube.zarr/10m"):
        xr_ginet.build_overviews("cube.zarr")
    cube.ginet.to_zarr(tmp_path / "d" / "10m")
    xr_ginet.build_overviews(tmp_path / "d" / "10m", levels=0)
    cube.ginet.to_zarr(tmp_path / "d" / "other")
    with pytest.raises(ValueError, match=r"holds the overviews of 10m already\. Write other to a group of its own"):
        xr_ginet.build_overviews(tmp_path / "d" / "other")
    with pytest.raises(ValueError, match="levels=-1: must be 0 or more"):
        xr_ginet.build_overviews(tmp_path / "d" / "10m", levels=-1)
    cube.drop_vars("spatial_ref").ginet.to_zarr(tmp_path / "a" / "10m")
    with pytest.raises(ValueError, match="no CRS"):
        xr_ginet.build_overviews(tmp_path / "a" / "10m")
    cube.ginet.to_zarr(tmp_path / "b" / "10m", zarr_format=2)
    with pytest.raises(ValueError, match="version 2 of Zarr"):
        xr_ginet.build_overviews(tmp_path / "b" / "10m")
    with pytest.raises(FileNotFoundError):
        xr_ginet.build_overviews(tmp_path / "none" / "10m")
    cube.ginet.to_zarr(tmp_path / "c" / "10m", resume=True)
    zarr.open_array(tmp_path / "c" / "10m", path=CHECKSUM, mode="r+")[1] = 0
    with pytest.raises(ValueError, match=r"is not complete .*20\d\d.* go on with its job first"):
        xr_ginet.build_overviews(tmp_path / "c" / "10m")
    assert not (tmp_path / "c" / "20m").exists()


def test_a_date_of_an_overview_without_a_record_is_made_again(store: Path) -> None:
    before = level(store, "20m")
    zarr.open_array(store / "20m", path="B8A", mode="r+")[1] = 7
    zarr.open_array(store / "20m", path=CHECKSUM, mode="r+")[1] = 0
    xr_ginet.build_overviews(store / "10m", levels=2)
    xr.testing.assert_equal(level(store, "20m"), before)


def test_a_cube_whose_job_was_interrupted_has_no_overviews_yet(tmp_path: Path) -> None:
    def stop(outcome: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cube_of().ginet.to_zarr(tmp_path / "c" / "10m", resume=True, tell=stop)
    with pytest.raises(ValueError, match=r"10m is not complete \(2024-05-06T10:50:31, 2024-05-11T10:50:31 not\)"):
        xr_ginet.build_overviews(tmp_path / "c" / "10m")


def test_what_is_no_level_is_no_member_of_the_pyramid(store: Path) -> None:
    left = [store / f"20m.{'0' * 32}", store / f"20m.{'1' * 32}.old", store / "80m"]
    for folder in left:  # what jobs left that were killed: folders put aside, and a level that was begun
        shutil.copytree(store / "40m", folder)
    cube_of(n_times=None).ginet.to_zarr(store / "mine")
    xr_ginet.build_overviews(store / "10m", levels=2)
    assert set(xr.open_datatree(store, engine="zarr").children) == {"10m", "20m", "40m", "mine"}
    xr.testing.assert_equal(xr.open_datatree(store, engine="zarr")["20m"].to_dataset().load(), level(store, "20m"))


def test_overviews_of_an_object_store_and_of_dates_with_text(tmp_path: Path) -> None:
    url, items = f"memory://{uuid4().hex}", np.array(["a", "bc", "d"], object)
    cube = cube_of().assign_coords(item=("time", items))
    cube.isel(time=slice(2)).ginet.to_zarr(f"{url}/10m", mode="a")
    xr_ginet.build_overviews(f"{url}/10m", levels=1)
    cube.ginet.to_zarr(f"{url}/10m", mode="a", resume=True)
    xr_ginet.build_overviews(f"{url}/10m", levels=1)
    coarse = xr.open_datatree(url, engine="zarr")["20m"].to_dataset().load()
    assert coarse["item"].values.tolist() == items.tolist()
    xr.testing.assert_allclose(coarse["B8A"], halved(cube)["B8A"].compute())
