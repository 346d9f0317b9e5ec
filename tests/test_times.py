"""Times of any unit and type that xarray has: made, appended, gone on with and read back, or refused by name."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from conftest import no_compute, two_grids

import xr_ginet
from xr_ginet.growing import Outcome
from xr_ginet.sentinel2.times import in_microseconds, times_of

MOMENTS = ["2024-05-01T10:50:31", "2024-05-06T10:50:29", "2024-05-31T23:59:59"]
PLAIN = np.array(MOMENTS, "datetime64[us]")
DATETIMES = [datetime.fromisoformat(moment) for moment in MOMENTS]
PARIS = timezone(timedelta(hours=2))


def objects(values: Any) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


TIMES = {unit: PLAIN.astype(f"datetime64[{unit}]") for unit in ("s", "ms", "us", "ns")} | {
    "datetime": objects(DATETIMES),
    "datetime with a zone": objects([moment.replace(tzinfo=UTC).astimezone(PARIS) for moment in DATETIMES]),
    "pandas with a zone": pd.DatetimeIndex(DATETIMES, tz="UTC").tz_convert("Europe/Paris"),
    "pandas with a zone in seconds": pd.DatetimeIndex(DATETIMES, tz="UTC").as_unit("s"),
}


def cube_at(times: Any) -> xr.Dataset:
    values = np.random.default_rng(0).random((len(times), 4, 6), "float32")
    coords = {"time": ("time", times), "y": -10.0 * np.arange(4), "x": 10.0 * np.arange(6)}
    cube = xr.Dataset({"B02": (("time", "y", "x"), values)}, coords)
    # What another store has left: by it, later times would not fit.
    cube["time"].encoding = {"units": "days since 2024-05-01", "dtype": "int8", "calendar": "noleap"}
    return cube.assign_coords(since=("time", np.array([1, 20, 300]).astype("m8[s]")), made=("time", times))


@pytest.mark.parametrize(("kind", "zarr_format"), [*((kind, 3) for kind in TIMES), ("s", 2), ("datetime", 2)])
def test_times_are_stored_as_they_are_at_once_appended_and_gone_on_with(
    kind: str, zarr_format: int, tmp_path: Path
) -> None:
    cube = cube_at(TIMES[kind])
    told: list[Outcome] = []
    cube.ginet.to_zarr(tmp_path / "at_once.zarr", zarr_format=zarr_format)
    cube.ginet.to_zarr(tmp_path / "by_date.zarr", zarr_format=zarr_format, resume=True)
    for stop in (1, 3):
        cube.isel(time=slice(stop)).ginet.to_zarr(tmp_path / "appended.zarr", mode="a", zarr_format=zarr_format)
    for name in ("by_date.zarr", "appended.zarr"):
        options = {"resume": True} if name == "by_date.zarr" else {"resume": True, "mode": "a"}
        cube.ginet.to_zarr(tmp_path / name, zarr_format=zarr_format, tell=told.append, **options)
    assert [outcome.state for outcome in told] == ["kept"] * 6
    assert told[1].date == MOMENTS[1]
    for name in ("at_once.zarr", "by_date.zarr", "appended.zarr"):
        with xr.open_zarr(tmp_path / name) as stored:
            np.testing.assert_array_equal(stored["time"].values, PLAIN)
            np.testing.assert_array_equal(stored["made"].values, PLAIN)
            np.testing.assert_array_equal(stored["since"].values, np.array([1, 20, 300], "m8[s]"))
            np.testing.assert_array_equal(stored["B02"].values, cube["B02"].values)
    for name in ("by_date.zarr", "appended.zarr"):
        assert xr_ginet.status(tmp_path / name, verify=True).values.tolist() == [True] * 3


@pytest.mark.parametrize("kind", TIMES)
def test_a_single_time_is_stored_as_it_is(kind: str, tmp_path: Path) -> None:
    one = cube_at(TIMES[kind]).isel(time=1)
    one.ginet.to_zarr(tmp_path / "one.zarr", resume=True)
    with xr.open_zarr(tmp_path / "one.zarr") as stored:
        assert stored["time"].values == PLAIN[1]


def test_appended_times_may_have_another_unit_and_finer_ones_lose_no_microsecond(tmp_path: Path) -> None:
    moments = np.array(["2024-05-01", "2024-05-06T10:50:31.024", "2024-05-11T10:50:31.123456"], "datetime64[us]")
    for moment, unit in zip(moments, ("s", "ms", "us"), strict=True):
        times = moment[np.newaxis].astype(f"datetime64[{unit}]")
        cube_at(np.resize(times, 3)).isel(time=[0]).ginet.to_zarr(tmp_path / "cube.zarr", mode="a")
    with xr.open_zarr(tmp_path / "cube.zarr") as stored:
        np.testing.assert_array_equal(stored["time"].values, moments)
        assert stored["time"].encoding["units"] == "microseconds since 1970-01-01"


def test_attributes_and_laziness_stay(tmp_path: Path) -> None:
    cube = cube_at(TIMES["ns"]).chunk(time=1)
    cube["time"].attrs["long_name"] = "of the first line"
    with no_compute():
        same = in_microseconds(cube)
    assert same["time"].attrs == {"long_name": "of the first line"}
    assert same["B02"].chunks == cube["B02"].chunks
    assert same["made"].chunks is not None
    assert (same["time"].dtype, same["made"].dtype, same["since"].dtype) == ("M8[us]", "M8[us]", "m8[us]")
    np.testing.assert_array_equal(times_of(cube.isel(time=2)), PLAIN[2:])


class Foreign:
    """A time of another calendar."""


Foreign.__module__ = "cftime._cftime"


@pytest.mark.parametrize(
    ("times", "match"),
    [
        (np.array(["2024-05-01", "NaT", "NaT"], "datetime64[ns]"), r"2 of 3 times are missing \(NaT\).*dropna"),
        (objects([DATETIMES[0], None, pd.NaT]), r"2 of 3 times are missing \(NaT\)"),
        (objects([Foreign()] * 3), r"'time' holds cftime.Foreign; .*ds.convert_calendar\('standard', use_cftime=False"),
        (np.array(MOMENTS), r"'time' holds <U19; .*pd.to_datetime\(ds\['time'\].values\)"),
        (objects(MOMENTS), r"'time' holds builtins.str; .*pd.to_datetime"),
        (np.arange(3), r"'time' holds int64; times are needed, as datetime64. Type ds.assign_coords\(time=\[np.date"),
        (pd.PeriodIndex(["2024-05", "2024-06", "2024-07"], freq="M"), r"holds period\[M\]; .*to_timestamp\(\)"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"resume": True}, {"mode": "a"}])
def test_what_is_no_time_is_refused_before_anything_is_written(
    times: Any, match: str, options: dict[str, Any], tmp_path: Path
) -> None:
    with no_compute(), pytest.raises(ValueError, match=match):
        cube_at(PLAIN).drop_vars("made").assign_coords(time=("time", times)).chunk().ginet.to_zarr(
            tmp_path / "cube.zarr", **options
        )
    assert not list(tmp_path.iterdir())


def test_times_of_a_real_calendar_are_refused_by_name(tmp_path: Path) -> None:
    cftime: ModuleType = pytest.importorskip("cftime")
    times = objects([cftime.DatetimeNoLeap(2024, 2, day) for day in (1, 2, 3)])
    with pytest.raises(ValueError, match=r"holds cftime\.DatetimeNoLeap"):
        cube_at(PLAIN).drop_vars("made").assign_coords(time=("time", times)).ginet.to_zarr(tmp_path / "cube.zarr")


def test_a_10_m_cube_may_have_times_of_any_unit_to_find_its_20_m_bands_by() -> None:
    cube = two_grids((8, 8), n_times=2)
    with pytest.raises(ValueError, match="times are missing"):
        xr_ginet.superresolve(
            cube[["B02", "B03", "B04", "B08"]].assign_coords(time=np.array(["NaT", "2024-05-01"], "M8[s]")), catalog=[]
        )
