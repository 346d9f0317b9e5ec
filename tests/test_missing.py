"""Gaps and absurd values: filled to the same bits wherever an array starts. Numbers that are none are never silent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import random_checkpoint, two_grids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from safetensors import safe_open
from safetensors.torch import save_file
from test_mapping import cuts, stack
from test_network import SMALL, literal_ginet

from xr_ginet.mapping import classical, overlap, predictor
from xr_ginet.mapping.classical import ClusterModel
from xr_ginet.mapping.missing import LARGEST, fill_missing, is_missing
from xr_ginet.mapping.predictor import Predictor, _network
from xr_ginet.network import Checkpoint, GINet, from_authors, load_checkpoint
from xr_ginet.sentinel2.bands import BANDS_10M, BANDS_20M

ABSURD = (np.nan, np.inf, -np.inf, 9.96921e36, 1e30, -1e30, 1e20, -9999.0, 65535.0, LARGEST * 1.001)


def with_absurd_values(cube: xr.Dataset, rng: np.random.Generator, share: float) -> xr.Dataset:
    """Return a cube some of whose pixels are missing, some absurd, and a block of each band is missing."""
    for name in cube.data_vars:
        values = cube[name].values.astype("float32")
        values[rng.random(values.shape) < share] = np.nan
        for value in ABSURD:
            values[tuple(rng.integers(0, values.shape))] = value
        top, left = rng.integers(0, values.shape)
        values[top : top + 23, left : left + 9] = rng.choice([np.nan, np.inf])
        cube[name] = cube[name].copy(data=values)
    return cube


def by_hand(image: np.ndarray, radius: int) -> np.ndarray:
    """Return the fill pixel by pixel."""
    filled = image.copy()
    missing = ~np.isfinite(image) | (np.abs(image) > 100)
    for y, x in np.argwhere(missing):
        window = slice(max(0, y - radius), y + radius + 1), slice(max(0, x - radius), x + radius + 1)
        near = image[window][~missing[window]]
        filled[y, x] = near.mean() if near.size else 0.15
    return filled


@given(
    seed=st.integers(0, 1000),
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    radius=st.sampled_from([1, 4, 8, 24]),
)
@settings(deadline=None, max_examples=40)
def test_gaps_are_filled_with_the_mean_of_the_square_around_them(
    seed: int, height: int, width: int, radius: int
) -> None:
    rng = np.random.default_rng(seed)
    image = rng.random((2, height, width))
    image[rng.random(image.shape) < rng.choice([0.05, 0.5, 0.95])] = rng.choice(ABSURD)
    expected = np.stack([by_hand(plane, radius) for plane in image])
    assert_allclose(fill_missing(image, radius), expected, rtol=1e-12)


@given(seed=st.integers(0, 1000), top=st.integers(0, 30), left=st.integers(0, 30), radius=st.sampled_from([4, 8, 24]))
@settings(deadline=None, max_examples=25)
def test_a_fill_does_not_depend_on_where_an_array_starts_or_on_what_lies_beyond(
    seed: int, top: int, left: int, radius: int
) -> None:
    rng = np.random.default_rng(seed)
    image = rng.random((130, 140)).astype("float32")
    image[rng.random(image.shape) < 0.1] = np.nan
    whole = fill_missing(image, radius)
    window = slice(top, top + 70), slice(left, left + 80)
    inner = tuple(slice(radius, -radius) for _ in range(2))
    assert_array_equal(fill_missing(image[window], radius)[inner], whole[window][inner])
    outside = np.ones(image.shape, bool)
    outside[window] = False
    image[outside & (rng.random(image.shape) < 0.3)] = 9.96921e36
    assert_array_equal(fill_missing(image, radius)[window][inner], whole[window][inner])


def test_what_is_missing_has_a_bound_of_either_sign() -> None:
    values = np.array([0, -0.1, 6.5, LARGEST, -LARGEST, *ABSURD])
    assert_array_equal(is_missing(values), [False] * 5 + [True] * len(ABSURD))


@given(data=st.data(), seed=st.integers(0, 1000), share=st.sampled_from([0.0, 0.02, 0.4]))
@settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_chunks_change_no_bit_where_there_are_gaps(
    checkpoint: Checkpoint, precision: str, data: st.DataObject, seed: int, share: float
) -> None:
    cube = with_absurd_values(two_grids((60, 55), seed=seed), np.random.default_rng(seed), share)
    chunks = {}
    for dim, most in (("y", 2), ("x", 1), ("y_20m", 5)):  # at multiples of 9, which are odd and even
        ends = np.cumsum(data.draw(cuts(cube.sizes[dim] // 9, most=most))) * 9
        chunks[dim] = tuple(np.diff([0, *ends[:-1], cube.sizes[dim]]).tolist())
    options = {"weights": checkpoint.path, "precision": precision, "device": "cpu"}
    whole, part = (stack(cube.chunk(c).ginet.superresolve(**options)) for c in ({}, chunks))
    assert_array_equal(part, whole)
    fine = np.stack([is_missing(cube[b].values) for b in BANDS_10M]).any(0)
    for i, name in enumerate(BANDS_20M):
        assert_array_equal(np.isnan(whole[0, i]), fine | is_missing(cube[name].values).repeat(2, 0).repeat(2, 1))


def test_an_absurd_value_is_a_gap_and_reaches_no_further(checkpoint: Checkpoint) -> None:
    cube = two_grids((60, 50)).astype("float32")
    gap, absurd = cube.copy(deep=True), cube.copy(deep=True)
    gap["B04"][70, 3] = gap["B11"][20, 40] = np.nan
    absurd["B04"][70, 3] = absurd["B11"][20, 40] = 9.96921e36
    for run in (
        lambda ds: ds.ginet.superresolve(weights=checkpoint.path, precision="float32"),
        lambda ds: ds.ginet.superresolve(weights=None),
        lambda ds: classical(ds, "glp_hpm"),
        lambda ds: ds.ginet.guide(weights=checkpoint.path).to_dataset("band"),
        lambda ds: ds.ginet.guide(method="kmeans").to_dataset("band"),
    ):
        found, expected = (run(ds.chunk())[list(BANDS_20M)].compute() for ds in (absurd, gap))
        xr.testing.assert_equal(found, expected)


# -- in parts ----------------------------------------------------------------------------------------------------------


def small_parts(patch: pytest.MonkeyPatch, size: int) -> list[tuple[int, int]]:
    """Work on parts of at most ``size`` pixels; return where the sizes that networks see are put down."""
    for module in (overlap, predictor):
        patch.setattr(module, "PART", size)
    patch.setattr(overlap.part_side, "__defaults__", (size,))
    seen: list[tuple[int, int]] = []
    forward = GINet.forward

    def spy(self: GINet, ms: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        seen.append((ms.shape[-2], ms.shape[-1]))
        return forward(self, ms, *others)

    patch.setattr(GINet, "forward", spy)
    return seen


@pytest.mark.parametrize("depth", [None, 30, 8])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test_parts_of_a_large_block_do_not_show(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, precision: str, depth: int | None
) -> None:
    rng = np.random.default_rng(1)
    fine, coarse = rng.random((1, 4, 246, 180)), rng.random((1, 6, 123, 90))
    fine[:, :, 50:90, 30:60] = coarse[rng.random(coarse.shape) < 0.05] = np.nan
    run = Predictor.of(checkpoint, precision=precision, depth=depth, consistency="exact", device="cpu")
    asked = None if depth is None else (slice(31, 243), slice(5, 180))
    whole = run(fine, coarse, part=asked)
    size = 2 * 160 if precision == "float64" else 160  # whose parts are half as long
    seen = small_parts(monkeypatch, size)
    parts = run(fine, coarse, part=asked)
    assert len(seen) > 4
    assert max(map(max, seen)) <= 162
    if precision == "float64":
        assert_allclose(parts, whole, rtol=0, atol=1e-12)
    else:
        assert_array_equal(parts, whole)


def test_parts_that_overlap_less_would_show(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    fine, coarse = rng.random((4, 200, 180)), rng.random((6, 100, 90))
    run = Predictor.of(checkpoint, precision="float32", device="cpu")
    whole = run(fine, coarse)
    small_parts(monkeypatch, 100)
    object.__setattr__(run, "radius", 6)
    assert np.abs(run(fine, coarse) - whole).max() > 1e-6


def test_parts_without_a_valid_pixel_skip_the_network(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    fine, coarse = rng.random((4, 400, 80)), rng.random((6, 200, 40))
    fine[:, :320] = np.nan
    seen = small_parts(monkeypatch, 160)
    result = Predictor.of(checkpoint, precision="float32", device="cpu")(fine, coarse)
    assert len(seen) == 1
    assert_array_equal(np.isnan(result[0]).all(1), np.arange(400) < 320)


@pytest.mark.parametrize("method", ["bicubic", "glp_hpm", "regression", "kmeans", "learned"])
def test_parts_do_not_show_in_methods_without_training_and_guides(
    method: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    cube = two_grids((90, 70), n_times=2, seed=3)
    cube["B03"][0, 20:60, 33] = cube["B12"][1, 40, :20] = np.nan
    sizes = []
    guide = ClusterModel.guide

    def spy(self: ClusterModel, fine: np.ndarray) -> np.ndarray:
        sizes.append(max(fine.shape[-2:]))
        return guide(self, fine)

    def run() -> np.ndarray:
        if method in ("learned", "kmeans"):
            options = {"weights": checkpoint.path} if method == "learned" else {}
            return cube.chunk().ginet.guide(method=method, **options).values
        return stack(classical(cube.chunk(), method, precision="float64"))

    monkeypatch.setattr(ClusterModel, "guide", spy)
    whole = run()
    assert method in ("bicubic", "learned") or max(sizes) == 180
    sizes.clear()
    small_parts(monkeypatch, 160)
    parts = run()
    assert method in ("bicubic", "learned") or max(sizes) < 180
    assert_allclose(parts, whole, rtol=0, atol=1e-6 if method in ("learned", "kmeans") else 1e-9)


# -- numbers that are none ---------------------------------------------------------------------------------------------


def rewritten(path: Path, source: Checkpoint, change: dict[str, torch.Tensor]) -> Path:
    """Write a checkpoint's file anew with other tensors in it."""
    with safe_open(source.path, framework="pt") as file:
        save_file({k: file.get_tensor(k) for k in file.keys()} | change, path, metadata=file.metadata())
    return path


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda t: torch.full_like(t, torch.nan), "are NaN or infinite"),
        (lambda t: t.index_fill(0, torch.tensor([0]), torch.inf), "are NaN or infinite"),
        (lambda t: torch.full_like(t, 1e300, dtype=torch.float64), "are NaN or infinite in float32"),
        (lambda t: t.to(torch.int32), r"is torch.int32; floating point weights are needed"),
        (lambda t: t > 0, r"is torch.bool; floating point"),
        (lambda t: t.to(torch.complex64), r"is torch.complex64; floating point"),
    ],
)
def test_weights_that_are_not_finite_numbers_are_refused_by_name(checkpoint, tmp_path: Path, make, match: str) -> None:
    name = "stages.1.correction.reconstruct.weight"
    tensor = checkpoint.network().state_dict()[name]
    path = rewritten(tmp_path / "w.safetensors", checkpoint, {name: make(tensor)})
    with pytest.raises(ValueError, match=f"w.safetensors: .*{name}.*"):
        load_checkpoint(path).network()
    with pytest.raises(ValueError, match=match):  # when the graph is built
        two_grids((8, 8)).ginet.superresolve(weights=path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_floating_point_types_serve(checkpoint: Checkpoint, tmp_path: Path, dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in checkpoint.network().state_dict().items()}
    path = rewritten(tmp_path / "w.safetensors", checkpoint, state)
    network = load_checkpoint(path).network()
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in network.state_dict().items())


def test_an_output_that_is_not_finite_is_an_error_in_the_block(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "w.safetensors", n_stages=1)
    name = "stages.0.correction.reconstruct.weight"
    path = rewritten(tmp_path / "o.safetensors", checkpoint, {name: torch.full((6, 16, 3, 3), 3e38)})
    cube = two_grids((8, 8)).chunk()
    result = cube.ginet.superresolve(weights=path, precision="float32")
    with pytest.raises(ValueError, match=r"of \d+ pixels came out as NaN or infinite where all .* precision='float32'"):
        result["B05"].compute()
    _network.cache_clear()


def test_the_authors_weights_are_looked_at_too() -> None:
    state = literal_ginet(torch.rand(1, 4, 8, 8), **SMALL).state_dict()
    assert from_authors(state)
    name = "BPKernel.1.res_recon.weight"
    state[name] = torch.full_like(state[name], torch.nan)
    with pytest.raises(ValueError, match=f"the checkpoint: .* numbers of {name} are NaN or infinite"):
        from_authors(state)
