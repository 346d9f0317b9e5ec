"""What is told of each date: it stays with it, and a job that goes on knows by it what has changed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from conftest import no_compute, scene_item, two_grids

import xr_ginet
from xr_ginet.growing import Outcome, PartialFailure
from xr_ginet.mapping.likeness import Choice, like_the_store
from xr_ginet.network import Checkpoint, available_weights, load_checkpoint
from xr_ginet.sentinel2.provenance import (
    ENCODING,
    ITEMS,
    MASK,
    OF_A_DATE,
    REASONS,
    VERSIONS,
    known,
    of_all,
    of_dates,
    version_of,
)
from xr_ginet.simulation import simulate

STORED = {"source_dtype": "uint16", "source_scale_factor": 1e-4, "source_add_offset": -0.1, "source_nodata": 0}
OTHER = STORED | {"source_add_offset": 0.0}


def said(*items: str, version: str = "1", mask: str = "none", stored: dict[str, Any] = STORED) -> dict[str, Any]:
    return stored | {ITEMS: list(items), VERSIONS: [version] * len(items), REASONS: "as stated", MASK: mask}


def cube(days: Sequence[str], dates: Sequence[dict[str, Any]], *, value: float = 0.0) -> xr.Dataset:
    """Return a cube whose pixels tell the day and the number of items, so that what was not written anew is seen."""
    times = np.array([f"2024-06-{day}" for day in days], "datetime64[ns]")
    numbers = times.astype("datetime64[D]").astype(int) % 100 / 100 + [len(one[ITEMS]) / 1000 + value for one in dates]
    coords = {"time": times, "y": -10.0 * np.arange(4), "x": 10.0 * np.arange(6)}
    pixels = np.broadcast_to(numbers[:, None, None], (len(days), 4, 6)).astype("float32")
    return of_dates(xr.Dataset({"B02": (("time", "y", "x"), pixels)}, coords), dates)


def run(store: Path, ds: xr.Dataset, **options: Any) -> list[tuple[str, str]]:
    told: list[Outcome] = []
    ds.ginet.to_zarr(store, tell=told.append, **({"mode": "a", "resume": True} | options))
    return [(outcome.date[8:], outcome.state) for outcome in told]


def test_what_is_said_of_dates_stays_with_them_through_concat_and_selection() -> None:
    one, other = cube(["01T10:00"], [said("a", "b")]), cube(["06T10:00"], [said("c", stored=OTHER, mask="SCL 9")])
    joined = xr.concat([one, other], "time")
    assert not set(joined.attrs) & {*OF_A_DATE, *STORED}
    assert joined[ITEMS].values.tolist() == ["a, b", "c"]
    assert joined.isel(time=[1, 0])[ITEMS].values.tolist() == ["c", "a, b"]
    assert known(joined) == [said("a", "b"), said("c", stored=OTHER, mask="SCL 9")]
    everything = of_all(joined)
    assert everything[ITEMS] == ["a", "b", "c"]
    assert everything[MASK] == "none; SCL 9"
    assert not set(STORED) & everything.keys()  # dates differ in it
    assert of_all(one) == {ITEMS: ["a", "b"], VERSIONS: ["1"], REASONS: "as stated", MASK: "none"} | STORED
    assert of_all(joined.isel(time=1)) == of_all(other)
    with pytest.raises(ValueError, match=r"like='input'.*does not tell of one kind of digital numbers"):
        joined.ginet.to_zarr("never.zarr", like="input")


def test_a_cube_without_dates_has_attributes() -> None:
    without = cube(["01"], [said("a")]).isel(time=0, drop=True)
    told = of_dates(without, [said("a")])
    assert set(told.coords) == {"y", "x"}
    assert of_all(told) == told.attrs == said("a")
    assert known(told) == [said("a")]


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_store_keeps_what_is_said_of_dates(zarr_format: int, tmp_path: Path) -> None:
    dates = [said("a"), said("b", "a much longer id than that of the first", stored=OTHER)]
    ds = cube(["01", "06"], dates)
    for stop in (1, 2):
        run(tmp_path / "cube.zarr", ds.isel(time=slice(stop)), zarr_format=zarr_format)
    stored = xr.open_zarr(tmp_path / "cube.zarr", chunks={})
    assert known(stored) == dates
    again = stored.drop_vars("ginet_checksum").chunk(time=2, x=4)  # chunked with the cube, written as a copy
    again.ginet.to_zarr(tmp_path / "copy.zarr", zarr_format=zarr_format)
    assert known(xr.open_zarr(tmp_path / "copy.zarr")) == dates


def test_a_tile_that_comes_later_has_its_date_written_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, after = tmp_path / "cube.zarr", said("a16")
    first = cube(["11T10:56:21", "16T10:56:21"], [said("west"), after])
    assert run(store, first) == [("11T10:56:21", "written"), ("16T10:56:21", "written")]
    later = cube(["11T10:56:21", "16T10:56:21"], [said("west", "east"), after])
    with caplog.at_level(logging.INFO, "xr_ginet"):
        assert run(store, later) == [("11T10:56:21", "written"), ("16T10:56:21", "kept")]
    assert "its items were west, now west, east" in caplog.text
    sooner = cube(["11T10:56:07", "16T10:56:21"], [said("north", "west", "east"), after])
    assert run(store, sooner) == [("11T10:56:21", "written"), ("16T10:56:21", "kept")]
    assert run(store, sooner) == [("11T10:56:21", "kept"), ("16T10:56:21", "kept")]
    stored = xr.open_zarr(store)
    assert stored[ITEMS].values.tolist() == ["north, west, east", "a16"]
    np.testing.assert_array_equal(stored["B02"].values, sooner["B02"].values)
    assert xr_ginet.status(store, verify=True).values.tolist() == [True, True]


def test_another_version_of_an_item_has_its_date_written_anew_and_the_outcome_says_why(tmp_path: Path) -> None:
    store, told = tmp_path / "cube.zarr", []
    run(store, cube(["11", "16"], [said("a"), said("b")]))
    new = cube(["11", "16"], [said("a", version="2"), said("b")], value=0.5)
    new.ginet.to_zarr(store, mode="a", resume=True, tell=told.append)
    assert [(outcome.state, outcome.reason) for outcome in told] == [("written", "another version of a"), ("kept", "")]
    np.testing.assert_array_equal(xr.open_zarr(store)["B02"][0].values, new["B02"][0].values)


def test_an_older_date_is_reported_and_the_others_are_written(tmp_path: Path) -> None:
    store = tmp_path / "cube.zarr"
    run(store, cube(["11", "21"], [said("a"), said("b")]))
    told: list[Outcome] = []
    with pytest.raises(PartialFailure, match=r"1 of 4 dates .*2024-06-16T00:00:00: ValueError: it lies before 2024-06"):
        cube(["11", "16", "21", "26"], [said(i) for i in "axbc"]).ginet.to_zarr(
            store, mode="a", resume=True, tell=told.append
        )
    states = {outcome.date[8:10]: outcome.state for outcome in told}
    assert states == {"11": "kept", "16": "failed", "21": "kept", "26": "written"}
    assert "Make the cube anew with mode='w'" in told[0].error
    assert xr.open_zarr(store)[ITEMS].values.tolist() == ["a", "b", "c"]
    assert xr_ginet.status(store, verify=True).values.tolist() == [True] * 3


@pytest.mark.parametrize(
    ("now", "match"),
    [
        (said("a", mask="SCL 3, buffer 1"), "ginet_mask 'SCL 9, buffer 2', now 'SCL 3, buffer 1', of 2024-06-11"),
        (said("a"), "ginet_mask 'SCL 9, buffer 2', now 'none'"),
    ],
)
def test_dates_masked_otherwise_are_neither_resumed_nor_appended(now: dict, match: str, tmp_path: Path) -> None:
    store = tmp_path / "cube.zarr"
    run(store, cube(["11"], [said("a", mask="SCL 9, buffer 2")]))
    for options in ({"mode": None}, {"mode": "a"}, {"mode": "a", "resume": False}):
        with pytest.raises(ValueError, match=match):
            run(store, cube(["11"], [now]), **options)
    with pytest.raises(ValueError, match=match.replace("2024-06-11", "2024-06-16")):
        run(store, cube(["16"], [now]))
    run(store, cube(["16"], [said("b", mask="SCL 9, buffer 2")]))


def test_resume_says_how_to_append_what_is_new_or_has_changed(tmp_path: Path) -> None:
    store = tmp_path / "cube.zarr"
    run(store, cube(["11"], [said("a")]), mode=None)
    for other in (cube(["11", "16"], [said("a"), said("b")]), cube(["11"], [said("a", "b")])):
        with pytest.raises(ValueError, match="Type mode='a', resume=True to append dates that are new"):
            run(store, other, mode=None)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"properties": {"s2:processing_baseline": "05.11"}}, False),
        ({"properties": {"updated": "2024-07-01T00:00:00Z"}}, False),
        ({"properties": {"s2:generation_time": "2024-07-01T00:00:00Z"}}, False),
        ({"properties": {"s2:product_uri": "S2A_N0511.SAFE"}}, False),
        ({"properties": {"eo:cloud_cover": 3}}, True),
        ({"assets": {"blue": {"href": "https://mirror.example/elsewhere/B02.tif?sig=secret"}}}, True),
        ({"assets": {"blue": {"href": "https://a.example/v2_B02.tif"}}}, False),
        ({"assets": {"blue": {"href": "https://a.example/B02.tif", "file:checksum": "1220ab"}}}, False),
    ],
)
def test_a_later_version_of_an_item_is_told_from_a_copy(change: dict[str, Any], same: bool) -> None:
    item = {"id": "a", "properties": {}, "assets": {"blue": {"href": "https://a.example/B02.tif"}}}
    assert (version_of(item) == version_of(item | change)) is same
    assert "secret" not in version_of(item | change)


def test_options_of_open_stac_are_told_and_functions_by_name_alone(tmp_path: Path) -> None:
    item = scene_item(simulate((64, 64), seed=3), tmp_path)
    with no_compute():
        plain = xr_ginet.open_stac([item])
        told = xr_ginet.open_stac(
            [item], offset=-1000, sign=copy.deepcopy, groupby=None, crs=item["properties"]["proj:epsg"]
        )
    assert not plain.attrs.keys() & {"source_offset", "source_sign", "source_groupby", "source_resampling"}
    assert told.attrs.items() >= {
        "source_offset": -1000.0, "source_sign": "copy.deepcopy", "source_groupby": "none",
        "source_resampling": "nearest",
    }.items()  # fmt: skip
    assert plain[ITEMS].values.tolist() == ["simulated"]
    assert ENCODING in plain.coords


def test_what_nobody_chose_is_taken_over_from_the_store(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    native, store = two_grids((16, 16), n_times=2).chunk(time=1), tmp_path / "cube.zarr"
    assert like_the_store(store, Choice("default", None, "auto", "auto")) == ("default", None, "auto", "auto")
    first = native.isel(time=[0]).ginet.superresolve(weights="ginet-xs", depth=10, precision="bfloat16")
    first.ginet.to_zarr(store, mode="a")
    for shown in (store, str(store)):
        with caplog.at_level(logging.INFO, "xr_ginet"):
            taken = like_the_store(shown, Choice("default", None, "auto", "auto"))
        assert taken == ("ginet-xs", 10, "cpu", "bfloat16")
        assert "weights='ginet-xs', depth=10, precision='bfloat16', device='cpu', as in the store" in caplog.text
    result = native.ginet.superresolve(like_store=store)
    assert result.attrs["ginet_depth"] == 10
    result.ginet.to_zarr(store, mode="a", resume=True)
    chosen = native.ginet.superresolve(like_store=store, precision="float32")
    with pytest.raises(
        ValueError, match=r"ginet_precision 'bfloat16', now 'float32'.*Type superresolve\(precision='bf"
    ):
        chosen.ginet.to_zarr(store, mode="a")
    assert like_the_store(store, Choice(checkpoint, "exact", "cpu", "auto")) == (checkpoint, "exact", "cpu", "bfloat16")
    with pytest.raises(ValueError, match=r"made with precision='bfloat16', and device='cuda' .*type device='cpu'"):
        like_the_store(store, Choice("default", None, "cuda", "auto"))


def test_weights_are_taken_over_by_their_hash_or_asked_for(checkpoint: Checkpoint, tmp_path: Path) -> None:
    native = two_grids((16, 16), n_times=1)
    native.ginet.superresolve(weights=checkpoint, precision="float32").ginet.to_zarr(tmp_path / "mine.zarr", mode="a")
    with pytest.raises(
        ValueError, match=r"weights 'random' \(sha256 .*not among .*ginet-s.*Type weights='…/random.saf"
    ):
        native.ginet.superresolve(like_store=tmp_path / "mine.zarr")
    native.ginet.superresolve(weights=None).ginet.to_zarr(tmp_path / "none.zarr", mode="a")
    taken = like_the_store(tmp_path / "none.zarr", Choice("default", None, "auto", "auto"))
    assert taken == (None, None, "auto", "float32")
    hashes = {load_checkpoint(name).sha256 for name in available_weights()}
    assert len(hashes) == len(available_weights())


def test_a_store_made_in_mixed_precision_is_not_gone_on_with_on_a_processor(tmp_path: Path) -> None:
    store = tmp_path / "cube.zarr"
    made = {"ginet_precision": "mixed", "ginet_weights": "ginet", "ginet_depth": 10}
    xr.Dataset(attrs=made | {"ginet_weights_sha256": load_checkpoint("ginet").sha256}).to_zarr(
        store, consolidated=False
    )
    with pytest.raises(ValueError, match=r"made with precision='mixed', and device='cpu' .*CUDA devices: go on where"):
        like_the_store(store, Choice("default", None, "cpu", "auto"))
    assert like_the_store(store, Choice("default", None, "cuda", "auto")).precision == "mixed"
