"""Chunking does not exist, lazy stays lazy, missing stays where it is."""

from __future__ import annotations

import dataclasses
import itertools
import pickle

import dask
import dask.array as da
import numpy as np
import pytest
import torch
import xarray as xr
from conftest import (
    SHARED,
    needs_cuda,
    needs_shared,
    no_compute,
    packaged_weights,
    random_checkpoint,
    real_scene,
    two_grids,
)
from dask.utils import key_split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import xr_ginet
from xr_ginet.mapping import predictor
from xr_ginet.mapping.missing import FAR_FILL, fill_missing
from xr_ginet.mapping.overlap import Window, map_windows, windows
from xr_ginet.mapping.pipeline import resolve_depth
from xr_ginet.mapping.predictor import Predictor, _network
from xr_ginet.network import Checkpoint, GINet, GINetConfig, bfloat16, load_checkpoint
from xr_ginet.sentinel2.bands import BANDS_10M, BANDS_20M

# -- overlap ---------------------------------------------------------------------------------------------------------


def test_windows_of_ragged_chunks_at_odd_positions() -> None:
    assert windows((3, 5, 2), factor=2, depth=2) == [
        Window(0, 6, slice(0, 3)),
        Window(0, 10, slice(3, 8)),
        Window(6, 10, slice(2, 4)),
    ]


@given(
    size=st.integers(1, 150),
    ends=st.tuples(st.integers(0, 149), st.integers(0, 149)),
    depth=st.sampled_from([0, 4, 24]),
)
def test_windows_of_small_parts_are_those_of_larger_ones(size: int, ends: tuple[int, int], depth: int) -> None:
    size *= 2
    start, stop = sorted(min(end, size) for end in ends)
    part = slice(min(start, size - 1), max(stop, min(start, size - 1) + 1))
    plain, window = (Window.around(part, size, factor=2, depth=depth, least=least) for least in (0, 64))
    assert 0 <= window.start <= plain.start < plain.stop <= window.stop <= size
    assert window.start % 2 == 0
    sides = (window.start > 0) + (window.stop < size)
    assert window.stop - window.start >= min(size, 64 + sides * depth)
    assert (window.start + window.trim.start, window.start + window.trim.stop) == (part.start, part.stop)
    if part.stop - part.start >= 64:
        assert window == plain


def box_sum(fine: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """Return a toy operator of radius 3 at 10 m: asymmetric box sums with zero padding, one plane per fine band."""
    up = coarse.repeat(2, -2).repeat(2, -1)[..., :1, :, :]
    image = fine + up
    padded = np.pad(image, [(0, 0)] * (image.ndim - 2) + [(3, 3), (3, 3)])
    height, width = image.shape[-2:]
    return sum(
        (1.0 + 7 * dy - 2 * dx) * padded[..., dy : dy + height, dx : dx + width] for dy in range(7) for dx in range(7)
    )


def test_map_windows_by_hand() -> None:
    def up_minus(fine: np.ndarray, coarse: np.ndarray) -> np.ndarray:
        return fine - coarse.repeat(2, -2).repeat(2, -1)

    fine = np.arange(8.0).reshape(1, 2, 4)
    coarse = np.array([[[1.0, 10.0]]])
    result = map_windows(
        up_minus,
        da.from_array(fine, chunks=(1, 1, (3, 1))),
        da.from_array(coarse, chunks=1),
        factors=(1, 2),
        depth=0,
        n_bands=1,
        dtype=float,
    )
    assert result.chunks == ((1,), (1, 1), (3, 1))
    assert_array_equal(result.compute(scheduler="sync"), [[[-1.0, 0, -8, -7], [3, 4, -4, -3]]])


@st.composite
def cuts(draw: st.DrawFn, size: int, most: int = 5) -> tuple[int, ...]:
    """Return any chunks of an axis, with at most so many cuts."""
    inner = draw(st.sets(st.integers(1, size - 1), max_size=most)) if size > 1 else set()
    edges = [0, *sorted(inner), size]
    return tuple(b - a for a, b in itertools.pairwise(edges))


@given(data=st.data(), height=st.integers(1, 15), width=st.integers(1, 15))
@settings(deadline=None, max_examples=100)
def test_chunked_equals_whole_for_any_chunks_of_either_grid(data: st.DataObject, height: int, width: int) -> None:
    rng = np.random.default_rng(height * 100 + width)
    fine, coarse = rng.random((2, 3, 2 * height, 2 * width)), rng.random((2, 2, height, width))
    chunks_fine = ((1, 1), (3,), data.draw(cuts(2 * height)), data.draw(cuts(2 * width)))
    chunks_coarse = ((2,), (2,), data.draw(cuts(height)), data.draw(cuts(width)))
    with no_compute():
        result = map_windows(
            box_sum,
            da.from_array(fine, chunks=chunks_fine),
            da.from_array(coarse, chunks=chunks_coarse),
            factors=(1, 2),
            depth=4,
            n_bands=3,
            dtype=float,
        )
    assert result.chunks == chunks_fine
    assert_allclose(result.compute(scheduler="sync"), box_sum(fine, coarse), rtol=0, atol=1e-10)


def test_a_depth_below_the_radius_shows_seams() -> None:
    rng = np.random.default_rng(0)
    fine, coarse = rng.random((3, 20, 20)), rng.random((2, 10, 10))
    arrays = (da.from_array(fine, chunks=(3, 8, 8)), da.from_array(coarse, chunks=(2, 4, 4)))
    result = map_windows(box_sum, *arrays, factors=(1, 2), depth=2, n_bands=3, dtype=float).compute(scheduler="sync")
    assert np.abs(result - box_sum(fine, coarse)).max() > 1


@pytest.mark.parametrize(
    ("fine", "coarse", "depth", "match"),
    [
        (da.zeros((4, 8, 8), chunks=4), da.zeros((6, 4, 4), chunks=(3, 4, 4)), 2, r"band axis .* is chunked \(3, 3\)"),
        (da.zeros((4, 8, 8), chunks=4), da.zeros((6, 4, 5), chunks=-1), 2, r"do not nest with the ratio 2"),
        (da.zeros((2, 4, 8, 8), chunks=-1), da.zeros((3, 6, 4, 4), chunks=-1), 2, r"all axes before band must agree"),
        (da.zeros((4, 8, 8), chunks=4), da.zeros((6, 4, 4), chunks=-1), 3, r"depth=3: must be a multiple"),
        (da.zeros((4, 8, 8), chunks=4), da.zeros((6, 4, 4), chunks=-1), -2, r"depth=-2: .* not negative"),
    ],
)
def test_map_windows_refuses(fine: da.Array, coarse: da.Array, depth: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        map_windows(box_sum, fine, coarse, factors=(1, 2), depth=depth, n_bands=4, dtype=float)


def test_schedulers_tell_the_windows_from_what_takes_no_time() -> None:
    """They take the mean duration of tasks whose names begin with the same words for how long the next will take."""
    fine, coarse = da.zeros((4, 64, 64), chunks=(4, 16, 16)), da.zeros((6, 32, 32), chunks=(6, 8, 8))
    graph = map_windows(box_sum, fine, coarse, factors=(1, 2), depth=4, n_bands=4, dtype=float).dask
    alike = [key for key in graph if key_split(key) == "ginet-windows"]
    assert len(alike) == 16
    assert {key_split(key) for key in graph if key not in alike} > {"ginet-cuts"}


def test_graph_grows_linearly() -> None:
    def tasks(n: int) -> int:
        fine = da.zeros((4, 64 * n, 64 * n), chunks=(4, 64, 64))
        coarse = da.zeros((6, 32 * n, 32 * n), chunks=(6, 32, 32))
        sources = len(fine.dask) + len(coarse.dask)
        result = map_windows(box_sum, fine, coarse, factors=(1, 2), depth=8, n_bands=4, dtype=float)
        return len(result.dask) - sources

    assert tasks(1) == 1
    assert tasks(20) / 400 <= 17  # one call, and eight halo cuts of each grid


# -- superresolve ------------------------------------------------------------------------------------------------------


def whole_image(cube: xr.Dataset, checkpoint: Checkpoint) -> np.ndarray:
    """Return the oracle: the network run once on the whole image, in float64."""
    fine, coarse = (np.stack([cube[b].values for b in bands], -3) for bands in (BANDS_10M, BANDS_20M))
    network = checkpoint.network().double()
    with torch.inference_mode():
        return network(*(torch.from_numpy(a.reshape(-1, *a.shape[-3:])) for a in (fine, coarse))).numpy()


def stack(result: xr.Dataset) -> np.ndarray:
    array = np.stack([result[b].compute(scheduler="sync").values for b in BANDS_20M], -3)
    return array.reshape(-1, *array.shape[-3:])


@pytest.mark.parametrize(
    "chunks",
    [
        {"y": 40, "x": 36, "y_20m": 20, "x_20m": 18},
        {"y": (31, 1, 64), "x": (7, 65), "y_20m": 48, "x_20m": (1, 35)},  # ragged, odd, smaller than the depth
        {"y": -1, "x": 10, "y_20m": 7, "x_20m": -1},
    ],
)
@pytest.mark.parametrize("n_times", [None, 2])
def test_result_does_not_depend_on_chunks(checkpoint: Checkpoint, chunks: dict, n_times: int | None) -> None:
    cube = two_grids(n_times=n_times)
    chunked = cube.chunk(chunks | ({"time": 1} if n_times else {}))
    with no_compute():
        result = chunked.ginet.superresolve(weights=checkpoint.path, precision="float64", device="cpu")
    assert result["B05"].chunksizes["y"] == chunked["B02"].chunksizes["y"]
    assert result["B05"].chunksizes["x"] == chunked["B02"].chunksizes["x"]
    assert_allclose(stack(result), whole_image(cube, checkpoint), rtol=0, atol=1e-12)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_chunks_change_no_bit_in_single_precision(checkpoint: Checkpoint, precision: str, threads: int) -> None:
    cube = two_grids((80, 75))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    whole, *parts = (
        stack(cube.chunk(chunks).ginet.superresolve(weights=checkpoint.path, precision=precision, device="cpu"))
        for chunks in ({}, {"y": 64, "x": 98}, {"y": (75, 85), "x": (81, 69)})
    )
    torch.set_num_threads(before)
    for part in parts:
        assert_array_equal(part, whole)
    assert len(np.unique(whole)) > 50_000


def test_a_depth_below_the_receptive_radius_differs(checkpoint: Checkpoint) -> None:
    cube = two_grids().chunk({"y": 32, "x": 32})
    expected = whole_image(cube, checkpoint)
    by_depth = {
        depth: np.abs(
            stack(cube.ginet.superresolve(weights=checkpoint.path, depth=depth, precision="float64")) - expected
        ).max()
        for depth in (0, 4, checkpoint.config.receptive_radius)
    }
    assert by_depth[0] > by_depth[4] > 1e-6
    assert by_depth[checkpoint.config.receptive_radius] < 1e-12


def test_exact_depth_is_the_receptive_radius(checkpoint: Checkpoint) -> None:
    assert checkpoint.config.receptive_radius == 30
    assert resolve_depth("exact", checkpoint) == 30
    assert resolve_depth(16, checkpoint) == 16
    assert resolve_depth("auto", checkpoint) == 30  # its card tells no depth
    assert resolve_depth("auto", dataclasses.replace(checkpoint, card={"depth": 11})) == 12


@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.001, 0.05, 0.6]), side=st.integers(1, 20))
@settings(
    deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_missing_pixels_stay_where_they_are_for_any_chunks(
    checkpoint: Checkpoint, seed: int, share: float, side: int
) -> None:
    rng = np.random.default_rng(seed)
    cube = two_grids((24, 20), seed=seed)
    for name in cube.data_vars:
        cube[name] = cube[name].where(rng.random(cube[name].shape) > share)
    cube["B06"][3, 5] = np.inf
    top, left = rng.integers(0, 20, 2)
    cube["B04"][2 * top : 2 * top + side, 2 * left : 2 * left + side] = np.nan
    missing_fine = np.isnan(np.stack([cube[b].values for b in BANDS_10M])).any(0)
    chunked = cube.chunk({"y": 17, "x": 26, "y_20m": 9, "x_20m": 20})
    parts = stack(chunked.ginet.superresolve(weights=checkpoint.path, precision="float64"))[0]
    whole = stack(cube.chunk().ginet.superresolve(weights=checkpoint.path, precision="float64"))[0]
    assert_allclose(parts, whole, rtol=0, atol=1e-12)
    for i, name in enumerate(BANDS_20M):
        missing = missing_fine | (~np.isfinite(cube[name].values)).repeat(2, 0).repeat(2, 1)
        assert_array_equal(np.isnan(parts[i]), missing)


def test_a_gap_changes_nothing_beyond_the_receptive_radius(checkpoint: Checkpoint) -> None:
    cube = two_grids((60, 50))
    expected = whole_image(cube, checkpoint)[0]
    cube["B11"][30, 21] = np.nan
    result = stack(cube.chunk().ginet.superresolve(weights=checkpoint.path, precision="float64"))[0]
    radius = checkpoint.config.receptive_radius
    changed = np.argwhere(np.abs(np.nan_to_num(result - expected, nan=1)) > 1e-12)
    assert changed[:, 1].min() >= 60 - radius
    assert changed[:, 1].max() <= 61 + radius
    assert changed[:, 2].min() >= 42 - radius
    assert changed[:, 2].max() <= 43 + radius
    assert np.isnan(result).sum() == 4


def test_missing_pixels_are_filled_with_the_mean_around_them() -> None:
    image = np.array([[1.0, 2.0, 3.0, np.nan, np.nan, np.nan], [4.0, np.nan, 6.0, np.nan, np.nan, np.nan]])
    filled = fill_missing(image, 1)
    assert_allclose(filled[1, 1], (1 + 2 + 3 + 4 + 6) / 5)
    assert_allclose(filled[0, 3], (3 + 6) / 2)
    assert filled[0, 5] == FAR_FILL
    complete = np.ones((3, 3))
    assert fill_missing(complete, 1) is complete


def test_a_part_of_a_block_is_what_the_whole_block_has_there(checkpoint: Checkpoint) -> None:
    rng = np.random.default_rng(3)
    fine, coarse = rng.random((2, 4, 110, 96)), rng.random((2, 6, 55, 48))
    coarse[1, 2, 20, 7] = np.nan
    rows, columns = slice(37, 48), slice(3, 20)
    radius = checkpoint.config.receptive_radius
    whole = Predictor.of(checkpoint, precision="float64")(fine, coarse)
    sees_all = Predictor.of(checkpoint, precision="float64", depth=radius)
    part = sees_all(fine, coarse, part=(rows, columns))
    assert_allclose(part, whole[..., rows, columns], rtol=0, atol=1e-12)
    assert np.isnan(part[1, 2]).sum() == 4
    sees_less = dataclasses.replace(sees_all, depth=4)
    part = sees_less(fine, coarse, part=(rows, columns))
    assert np.nanmax(np.abs(part - whole[..., rows, columns])) > 1e-6
    fine[:, :, : 36 - 4] = 0.9
    assert_array_equal(sees_less(fine, coarse, part=(rows, columns)), part)


def test_networks_have_the_threads_of_who_calls_them(checkpoint: Checkpoint) -> None:
    seen = []

    def spy(network: object, image: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return image

    before = torch.get_num_threads()
    for threads in (2, 1):
        torch.set_num_threads(threads)
        Predictor.of(checkpoint)._run(spy, np.ones((4, 8, 8), "float32"))
    torch.set_num_threads(before)
    assert seen == [2, 1]


def test_blocks_without_a_valid_pixel_skip_the_network() -> None:
    predictor = Predictor("nowhere.safetensors", "0", 2)
    result = predictor(np.full((4, 8, 8), np.nan, "float32"), np.ones((6, 4, 4), "float32"))
    assert result.shape == (6, 8, 8)
    assert result.dtype == np.float32
    assert np.isnan(result).all()


def test_result_keeps_coordinates_crs_and_provenance(checkpoint: Checkpoint) -> None:
    cube = two_grids(n_times=2).chunk({"time": 1, "y": 40}).assign_attrs(source_items=["a", "b"])
    result = cube.ginet.superresolve(weights=checkpoint.path)
    assert list(result.data_vars) == ["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"]
    for coord in ("time", "y", "x"):
        xr.testing.assert_identical(result[coord].drop_vars("spatial_ref"), cube[coord].drop_vars("spatial_ref"))
    assert result.rio.crs.to_epsg() == 32630
    assert tuple(result.rio.transform())[:6] == (10, 0, 742_920, 0, -10, 4_848_600)
    assert result["B11"].rio.crs.to_epsg() == 32630
    assert result["B11"].attrs["wavelength"] == 1613.7
    assert result["B11"].dtype == np.float32
    assert result.attrs["source_items"] == ["a", "b"]
    assert result.attrs["ginet_weights_sha256"] == checkpoint.sha256
    assert result.attrs["ginet_depth"] == 30
    xr.testing.assert_equal(result["B08"].compute(), cube["B08"].compute())


def test_input_is_left_as_it_was(checkpoint: Checkpoint) -> None:
    cube = two_grids().chunk({"y": 40})
    before = cube.copy(deep=True)
    cube.ginet.superresolve(weights=checkpoint.path)
    xr.testing.assert_identical(cube, before)
    assert cube["B02"].chunksizes == before["B02"].chunksizes


@needs_shared
@pytest.mark.parametrize("name", packaged_weights())
def test_auto_depth_shows_no_seam_above_a_tenth_of_a_digital_number(name: str) -> None:
    with np.load(SHARED / "scenes" / "ucnn_usa.npz") as file:
        images = [file[key][:, :n, :n].astype("float32") * np.float32(1e-4) for key, n in (("b10", 208), ("b20", 104))]
    cube = two_grids((104, 104))
    for bands, image in zip((BANDS_10M, BANDS_20M), images, strict=True):
        for band, values in zip(bands, image, strict=True):
            cube[band] = cube[band].copy(data=values)
    options = {"weights": name, "depth": "auto", "precision": "float32"}
    whole = stack(cube.chunk().ginet.superresolve(**options))
    parts = cube.chunk({"y": 88, "x": 104}).ginet.superresolve(**options)
    assert parts.attrs["ginet_depth"] < resolve_depth("exact", load_checkpoint(name))
    assert np.abs(stack(parts) - whole).max() < 1e-5


def test_guide_is_lazy_and_equals_the_networks(checkpoint: Checkpoint) -> None:
    cube = two_grids(n_times=2)
    with no_compute():
        guide = cube.chunk({"time": 1, "y": 13, "x": 29}).ginet.guide(weights=checkpoint.path)
    assert guide.dims == ("time", "band", "y", "x")
    fine = np.stack([cube[b].values for b in BANDS_10M], 1).astype("float32")
    with torch.inference_mode():
        expected = checkpoint.network().guide(torch.from_numpy(fine)).numpy()
    assert_allclose(guide.compute(scheduler="sync").values, expected, rtol=0, atol=1e-6)
    assert expected.max() > 0


def test_hard_assignment_is_chunk_invariant_too(tmp_path) -> None:
    hard = random_checkpoint(tmp_path / "hard.safetensors", assignment="hard")
    cube = two_grids()
    result = cube.chunk({"y": 26, "x": 31}).ginet.superresolve(weights=hard.path, precision="float64")
    assert_allclose(stack(result), whole_image(cube, hard), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"consistency": "exact"}, {"self_ensemble": True, "consistency": "exact"}])
def test_consistency_is_exact_and_chunks_still_do_not_show(checkpoint: Checkpoint, options: dict) -> None:
    cube = two_grids((24, 20))
    options |= {"weights": checkpoint.path, "precision": "float64"}
    result = cube.chunk({"y": 27, "x": 40, "y_20m": 11}).ginet.superresolve(**options)
    means = stack(result)[0].reshape(6, 24, 2, 20, 2).mean((2, 4))
    assert_allclose(means, np.stack([cube[b].values for b in BANDS_20M]), rtol=0, atol=1e-12)
    assert_allclose(stack(result), stack(cube.chunk().ginet.superresolve(**options)), rtol=0, atol=1e-12)
    plain = stack(cube.chunk().ginet.superresolve(weights=checkpoint.path, precision="float64"))[0]
    assert np.abs(plain.reshape(6, 24, 2, 20, 2).mean((2, 4)) - means).max() > 1e-3
    assert result.attrs["ginet_consistency"] == "exact"


def test_self_ensemble_is_the_mean_over_eight_symmetries(checkpoint: Checkpoint) -> None:
    cube = two_grids((16, 16))

    def run(turns: int, mirror: bool) -> np.ndarray:
        """Turn the cube, super-resolve it, turn the result back."""
        turned = cube.copy(deep=True)
        for name in cube.data_vars:
            image = cube[name].values[:, ::-1] if mirror else cube[name].values
            turned[name].values = np.rot90(image, turns)
        result = stack(turned.chunk().ginet.superresolve(weights=checkpoint.path, precision="float64"))[0]
        back = np.rot90(result, -turns, (1, 2))
        return back[..., ::-1] if mirror else back

    expected = np.mean([run(turns, mirror) for turns in range(4) for mirror in (False, True)], axis=0)
    result = cube.chunk().ginet.superresolve(weights=checkpoint.path, precision="float64", self_ensemble=True)
    assert_allclose(stack(result)[0], expected, rtol=0, atol=1e-12)
    assert np.abs(run(1, False) - run(0, False)).max() > 1e-3


def test_device_auto_picks_cuda_where_there_is_one(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Predictor.of(checkpoint).device == ("cuda" if torch.cuda.is_available() else "cpu")
    ones = torch.ones
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    assert Predictor.of(checkpoint).device == "cuda"


def test_default_weights_and_precision_are_those_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "is_faster", lambda: False)
    cube = two_grids((8, 8))
    here = cube.ginet.superresolve(device="cpu").attrs
    there = cube.ginet.superresolve(device="cuda", resources={"GPU": 1}).attrs
    assert (here["ginet_weights"], here["ginet_precision"]) == ("ginet-s", "float32")
    assert (there["ginet_weights"], there["ginet_precision"]) == ("ginet", "mixed")
    assert cube.ginet.superresolve(device="cuda", resources={"GPU": 1})["B11"].dtype == np.float32


def test_tasks_carry_no_weights_and_the_network_is_built_once(checkpoint: Checkpoint) -> None:
    predictor = Predictor.of(checkpoint)
    assert len(pickle.dumps(predictor)) < 500
    assert checkpoint.path.stat().st_size > 20_000
    _network.cache_clear()
    two_grids().chunk({"y": 24, "x": 24}).ginet.superresolve(weights=checkpoint.path)["B05"].compute()
    assert _network.cache_info().misses == 1
    assert _network.cache_info().hits > 3


def test_weights_changed_after_the_graph_was_built_are_refused(tmp_path) -> None:
    path = random_checkpoint(tmp_path / "w.safetensors").path
    result = two_grids((8, 8)).chunk().ginet.superresolve(weights=path)
    random_checkpoint(path, n_stages=1)
    with pytest.raises(RuntimeError, match="changed since the graph was built"):
        result["B05"].compute()


@needs_shared
def test_real_scene_float32_is_within_rounding_of_float64() -> None:
    cube = xr_ginet.pair(*real_scene("ben_T33UUP_20170613_87_48"), scale=1e-4).chunk({"y": 50})
    single, double = (stack(cube.ginet.superresolve(precision=p)) for p in ("float32", "float64"))
    assert np.abs(single - double).max() < 1e-5


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors_when_the_graph_is_built(checkpoint: Checkpoint, tmp_path) -> None:
    cube = two_grids((8, 8)).chunk()

    def run(ds: xr.Dataset = cube, **arguments: object) -> None:
        with no_compute():
            ds.ginet.superresolve(**{"weights": checkpoint.path} | arguments)

    with pytest.raises(ValueError, match="no B11 in the cube, which holds B02"):
        run(cube.drop_vars("B11"))
    on_fine_grid = cube.assign(B05=cube["B04"])
    with pytest.raises(ValueError, match=r"B05 lies on the 10 m grid.*native 20 m pixels"):
        run(on_fine_grid)
    with pytest.raises(ValueError, match="grids do not nest"):
        run(cube.assign_coords(x_20m=cube["x_20m"] + 10))
    with pytest.raises(ValueError, match="B02 is uint16: digital numbers"):
        run(cube.assign(B02=cube["B02"].astype("uint16")))
    with pytest.raises(ValueError, match=r"B03 has the dims \('z', 'y', 'x'\)"):
        run(cube.assign(B03=cube["B03"].expand_dims("z")))
    with pytest.raises(ValueError, match=r"some of .* have a time dimension"):
        run(cube.assign(B03=cube["B03"].expand_dims("time")))
    with pytest.raises(ValueError, match=r"some of .* have a time dimension"):
        run(cube.assign({b: cube[b].expand_dims("time") for b in BANDS_10M}))
    with pytest.raises(ValueError, match="depth=7: must be 'exact', 'auto' or"):
        run(depth=7)
    with pytest.raises(ValueError, match="depth='all'"):
        run(depth="all")
    with pytest.raises(ValueError, match="precision='float16': must be one of auto, float32, float64, mixed, bfloat16"):
        run(precision="float16")
    with pytest.raises(ValueError, match="precision='mixed' with device='cpu': its float16 pays on CUDA devices"):
        run(precision="mixed", device="cpu")
    with pytest.raises(ValueError, match="consistency='mean': must be 'none' or 'exact'"):
        run(consistency="mean")
    with pytest.raises(FileNotFoundError, match="no weights 'best'"):
        run(weights="best")
    with pytest.raises(TypeError, match="weights is a GINet; a name, a path or a Checkpoint"):
        run(weights=checkpoint.network())
    for device in ("banana", "cuda:99", "meta", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(ValueError, match=f"device='{device}', but torch cannot use it here"):
            run(device=device)
    external = random_checkpoint(tmp_path / "e.safetensors", guide="external")
    with pytest.raises(ValueError, match="guide='external'"):
        run(weights=external.path)
    with pytest.raises(ValueError, match="have no learned guide"):
        cube.ginet.guide(weights=external.path)


def test_config_of_other_bands_asks_for_them(tmp_path) -> None:
    sixty = random_checkpoint(tmp_path / "60.safetensors", bands=("B01", "B09"), factor=2)
    assert sixty.config == GINetConfig(bands=("B01", "B09"), n_features=6, n_stages=2, assignment="soft")
    with pytest.raises(ValueError, match="no B01, B09 in the cube"):
        two_grids((8, 8)).ginet.superresolve(weights=sixty.path)


# -- memory that is too small ----------------------------------------------------------------------------------------


def forget_what_was_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "_too_large", {})


@pytest.mark.parametrize("shape", [(600, 90), (90, 600), (420, 420)])
def test_a_block_that_does_not_fit_a_device_is_worked_on_in_parts(
    shape: tuple[int, int], checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_what_was_too_large(monkeypatch)
    run = Predictor.of(checkpoint, precision="float64", device="cpu", consistency="exact")
    run = dataclasses.replace(run, radius=None)  # as on CUDA devices, which get whole blocks
    rng = np.random.default_rng(0)
    fine, coarse = rng.random((2, 4, *shape)), rng.random((2, 6, shape[0] // 2, shape[1] // 2))
    whole = run(fine, coarse)
    forward, sizes = GINet.forward, []

    def small(self: GINet, ms: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        sizes.append(ms.shape[-2] * ms.shape[-1])
        if sizes[-1] > 40_000:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, ms, *others)

    monkeypatch.setattr(GINet, "forward", small)
    assert_allclose(run(fine, coarse), whole, rtol=0, atol=1e-12)
    tried = [size for size in sizes if size > 40_000]
    assert tried == sorted(set(tried), reverse=True)  # what did not fit once is not tried again
    assert len(sizes) > len(tried) >= 1


def test_a_device_without_memory_says_so(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_what_was_too_large(monkeypatch)

    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(GINet, "forward", full)
    run = Predictor.of(checkpoint, device="cpu")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"a block of \d+ × \d+ pixels does not fit the memory of 'cpu'"):
            run(np.zeros((4, 400, 20)), np.zeros((6, 200, 10)))


# -- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-10), ("float32", 2e-5), ("mixed", 1e-3)])
def test_cuda_equals_the_cpu(precision: str, tolerance: float, checkpoint: Checkpoint) -> None:
    cube = two_grids((120, 80), n_times=2).chunk({"y": 40, "time": 2})
    options = {"weights": checkpoint.path if precision != "mixed" else "ginet-s"}
    cpu = stack(cube.ginet.superresolve(precision="float64", device="cpu", **options))
    with dask.config.set(scheduler="threads", num_workers=4):
        cuda = stack(cube.ginet.superresolve(precision=precision, device="cuda", **options))
    assert cuda.dtype == (np.float64 if precision == "float64" else np.float32)
    assert_allclose(cuda, cpu, rtol=0, atol=tolerance)
    assert not np.array_equal(cuda, cpu.astype(cuda.dtype))


@pytest.mark.gpu
@needs_cuda
def test_a_block_larger_than_the_memory_of_a_device(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_what_was_too_large(monkeypatch)
    rng = np.random.default_rng(0)
    fine, coarse = rng.random((4, 3000, 1500)), rng.random((6, 1500, 750))
    run = Predictor.of(checkpoint, device="cuda")
    whole = run(fine, coarse)
    assert not predictor._too_large
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run(fine, coarse)
    share = 0.6 * torch.cuda.max_memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        parts = run(fine, coarse)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert predictor._too_large[run] <= 3000 * 1500
    assert_allclose(parts, whole, rtol=0, atol=2e-5)
