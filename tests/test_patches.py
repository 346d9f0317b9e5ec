"""The loader: each chunk read once, reproducible, resumable, shared without duplicates, bounded."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import three_grids, two_grids
from numpy.testing import assert_allclose
from scipy.ndimage import gaussian_filter

from xr_ginet.sentinel2.bands import BANDS_10M, BANDS_20M, BANDS_60M
from xr_ginet.training import patches as module
from xr_ginet.training.degradation import degrade, mtf_mean
from xr_ginet.training.patches import Patches, PatchOptions

PLAIN = {"size": 8, "augment": False, "buffer": 5, "prefetch": 2}


def chunked(shape: tuple[int, int] = (48, 32), *, n_times: int | None = 2, seed: int = 0) -> xr.Dataset:
    """Return a random cube in chunks of 16 pixels at 20 m."""
    return two_grids(shape, n_times=n_times, seed=seed).chunk(
        {"y": 32, "x": 32, "y_20m": 16, "x_20m": 16, "time": 1}
        if n_times
        else {"y": 32, "x": 32, "y_20m": 16, "x_20m": 16}
    )


def identity(sample: module.Sample) -> bytes:
    return sample.truth.numpy().tobytes()


@pytest.mark.parametrize("degradation", ["mtf", "box"])
def test_a_patch_is_the_degraded_chunk_and_its_truth(degradation: str) -> None:
    cube = chunked((16, 16), n_times=None)
    fine, truth = (np.stack([cube[b].values for b in bands]).astype("float32") for bands in (BANDS_10M, BANDS_20M))
    [sample] = Patches([cube], PatchOptions(size=16, augment=False, degradation=degradation))
    assert_allclose(sample.ms, degrade(fine, BANDS_10M, degradation=degradation), atol=1e-6)
    assert_allclose(sample.hs, degrade(truth, BANDS_20M, degradation=degradation), atol=1e-6)
    assert_allclose(sample.truth, truth, atol=0)
    assert sample.ms.dtype == torch.float32


def test_bands_that_are_blurred_before_are_truth_and_input() -> None:
    cube = chunked((16, 16), n_times=None)
    plain, blurred = (
        next(iter(Patches([cube], PatchOptions(size=16, augment=False, degradation="box", blur=b)))) for b in (0, 0.6)
    )
    truth = np.stack([gaussian_filter(cube[b].values, 0.6) for b in BANDS_20M]).astype("float32")
    assert_allclose(blurred.truth, truth, atol=1e-6)
    assert_allclose(blurred.hs, degrade(truth, BANDS_20M, degradation="box"), atol=1e-6)
    assert_allclose(blurred.ms, plain.ms)
    assert 0.5 < blurred.truth.std() / plain.truth.std() < 0.9


def test_a_pass_covers_all_pixels_once_and_reads_each_chunk_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cubes = [chunked(), chunked((32, 32), n_times=None, seed=1)]
    dataset = Patches(cubes, PatchOptions(**PLAIN))
    reads: Counter = Counter()
    read = dataset._read
    monkeypatch.setattr(
        dataset, "_read", lambda patches, gains: (reads.update([patches[0].unit]), read(patches, gains))[1]
    )
    seen = Counter(identity(sample) for sample in dataset)
    assert sum(seen.values()) == 2 * 6 * 4 + 4 * 4
    assert set(seen.values()) == {1}
    assert len(reads) == 2 * 6 + 4
    assert set(reads.values()) == {1}
    total = sum(np.frombuffer(patch, "float32").astype("float64").sum() for patch in seen)
    assert_allclose(total, sum(float(cube[b].sum()) for cube in cubes for b in BANDS_20M), rtol=1e-6)


def test_a_pass_repeats_and_the_next_one_differs() -> None:
    dataset = Patches([chunked()], PatchOptions(**PLAIN | {"augment": True}))
    first, again = ([s.ms.sum().item() for s in dataset] for _ in range(2))
    assert first == again
    dataset.set_epoch(1)
    assert first != [s.ms.sum().item() for s in dataset]
    assert first != [s.ms.sum().item() for s in Patches([chunked()], PatchOptions(**PLAIN | {"seed": 1}))]


def test_patches_are_shuffled_across_chunks() -> None:
    dataset = Patches([chunked()], PatchOptions(**PLAIN | {"buffer": 100}))
    order, _ = dataset._plan(0, 1)
    units = [patch.unit for patch in order]
    assert len(set(units[:8])) > 3


@pytest.mark.parametrize("stop", [1, 7, 30, 47])
def test_a_pass_goes_on_where_it_was_left_and_reads_only_what_matters(stop: int) -> None:
    options = PatchOptions(**PLAIN | {"augment": True})
    whole = [identity(s) for s in Patches([chunked()], options)]
    first = Patches([chunked()], options)
    begun = iter(first)
    for expected in whole[:stop]:
        assert identity(next(begun)) == expected
    state = first.state_dict()
    begun.close()
    resumed = Patches([chunked()], options)
    resumed.load_state_dict(state)
    reads: list = []
    read = resumed._read
    resumed._read = lambda patches, gains: (reads.append(patches), read(patches, gains))[1]  # type: ignore[method-assign]
    assert [identity(s) for s in resumed] == whole[stop:]
    assert len(reads) <= 12 - (stop - 5 - 4) // 4  # what was wholly used up is not read again
    assert resumed.state_dict()["position"] == 0
    assert [identity(s) for s in resumed] == whole  # and the next pass is whole again


def test_ranks_and_workers_share_without_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = Counter(identity(s) for s in Patches([chunked()], PatchOptions(**PLAIN)))
    shared: Counter = Counter()
    for share in range(3):
        monkeypatch.setattr(module, "_share", lambda share=share: (share, 3))
        shared.update(identity(s) for s in Patches([chunked()], PatchOptions(**PLAIN)))
    assert shared == everything


def test_dataloader_workers_share_without_duplicates() -> None:
    dataset = Patches([chunked((32, 32))], PatchOptions(**PLAIN))
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    seen = Counter(identity(sample) for sample in loader)
    assert len(seen) == 2 * 16
    assert set(seen.values()) == {1}


def test_an_iteration_that_was_broken_off_costs_the_next_one_nothing() -> None:
    dataset = Patches([chunked()], PatchOptions(**PLAIN))
    for _, _ in zip(range(10), dataset, strict=False):
        pass
    assert len(list(dataset)) == 48


def test_workers_that_persist_see_the_next_epoch() -> None:
    dataset = Patches([chunked((16, 16))], PatchOptions(**PLAIN))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn", persistent_workers=True
    )
    passes = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        passes.append([identity(s) for s in loader])
    assert passes[0] == passes[2] != passes[1]
    dataset.load_state_dict({"epoch": 0, "position": 3})
    fresh = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    with pytest.raises(ValueError, match="a pass is taken up without dataloader workers"):
        list(fresh)


def test_missing_and_cloudy_patches_are_left_out() -> None:
    cube = chunked((32, 32), n_times=None).load()
    cube["B03"][0, 0] = np.nan  # in the first patch
    cube["B11"][31, 31] = np.inf  # in the last
    cube["SCL"] = (("y_20m", "x_20m"), np.full((32, 32), 4.0))
    cube["SCL"][0, 31] = 9  # in the second
    [sample] = Patches([cube], PatchOptions(**PLAIN | {"size": 16}))
    assert_allclose(sample.truth[0], cube["B05"][16:, :16], rtol=1e-6)
    assert all(torch.isfinite(image).all() for image in sample)


@pytest.mark.parametrize("blur", [0.0, 0.9])
def test_what_the_blur_mixes_with_a_gap_is_left_out_too(blur: float) -> None:
    cube = chunked((16, 48), n_times=None).load()
    options = PatchOptions(**PLAIN, blur=blur)
    whole = list(Patches([cube], options))
    cube["B05"][4, 4] = np.nan  # in the first of twelve patches, 4 pixels from its neighbours
    kept = list(Patches([cube], options))
    assert 0 < len(kept) < 11
    for k in kept:
        assert any(torch.equal(k.hs, w.hs) and torch.equal(k.truth, w.truth) for w in whole)


def test_the_eight_symmetries_turn_all_three_images_alike() -> None:
    cube = chunked((16, 16), n_times=None)
    plain = next(iter(Patches([cube], PatchOptions(size=16, augment=False, degradation="box"))))
    seen = set()
    dataset = Patches([cube], PatchOptions(size=16, degradation="box", gain_spread=0.0))
    for epoch in range(60):
        dataset.set_epoch(epoch)
        sample = next(iter(dataset))
        [symmetry] = [p.symmetry for p in dataset._plan(0, 1)[0]]
        seen.add(symmetry)
        for image, expected in zip(sample, plain, strict=True):
            assert_allclose(image, module._turn(expected.numpy(), symmetry))
        # Degrading the turned truth gives the turned coarse image: the three still belong together.
        assert_allclose(degrade(sample.truth.numpy(), BANDS_20M, degradation="box"), sample.hs, atol=1e-6)
    assert seen == set(range(8))


@pytest.mark.parametrize("shift", [False, True])
def test_60_m_bands_are_degraded_by_six_from_where_the_coarser_pixels_start(shift: bool) -> None:
    cube = three_grids((16, 20)).chunk()
    fine, truth = (np.stack([cube[b].values for b in bands]).astype("float32") for bands in (BANDS_10M, BANDS_60M))
    dataset = Patches([cube], PatchOptions(resolution=60, size=12, augment=False, shift=shift))
    seen = set()
    for epoch in range(40):
        dataset.set_epoch(epoch)
        [patch] = dataset._plan(0, 1)[0]
        seen.add((patch.y, patch.x))
        [sample] = dataset
        y, x = patch.y % 6, patch.x % 6
        height, width = (16 - y) // 6 * 6, (20 - x) // 6 * 6
        inner = truth[:, y : y + height, x : x + width]
        ms = degrade(fine[:, 6 * y : 6 * (y + height), 6 * x : 6 * (x + width)], BANDS_10M, factor=6)
        hs = degrade(inner, BANDS_60M, factor=6)
        top, left = patch.y // 6, patch.x // 6
        window = (..., slice(6 * top, 6 * top + 12), slice(6 * left, 6 * left + 12))
        assert_allclose(sample.ms, ms[window], atol=1e-6)
        assert_allclose(sample.hs, hs[..., top : top + 2, left : left + 2], atol=1e-6)
        assert_allclose(sample.truth, truth[:, patch.y : patch.y + 12, patch.x : patch.x + 12])
    assert len(seen) > 20 if shift else seen == {(0, 0), (0, 6)}


def test_a_60_m_pixel_is_cloudy_where_one_of_its_20_m_pixels_is() -> None:
    cube = three_grids((48, 48)).chunk()
    options = PatchOptions(resolution=60, size=6, augment=False)
    assert len(list(Patches([cube], options))) == 64
    cube["SCL"] = (("y_20m", "x_20m"), np.full((144, 144), 4.0))
    cube["SCL"][143, 0] = 9
    left = [identity(s) for s in Patches([cube], options)]
    assert 40 < len(left) < 64
    corner = np.stack([cube[b].values[-6:, :6] for b in BANDS_60M]).astype("float32")
    assert corner.tobytes() not in left


def test_memory_is_bounded_by_the_buffer() -> None:
    dataset = Patches([chunked((160, 160), n_times=None)], PatchOptions(**PLAIN))
    _, reads = dataset._plan(0, 1)
    order, _ = dataset._plan(0, 1)
    position = {patch: i for i, patch in enumerate(order)}
    entered, held_most = 0, 0
    for _, patches in reads:  # a chunk is read when one of its patches is due and not yet held
        entered += len(patches)
        due = min(position[p] for p in patches)
        held_most = max(held_most, entered - due)
    assert held_most <= 2 * (PLAIN["buffer"] + 4)


def test_each_band_has_a_gain_of_its_own_shared_by_its_input_and_truth() -> None:
    cube = chunked((16, 16), n_times=None)
    [plain] = Patches([cube], PatchOptions(size=16, augment=False))
    options = PatchOptions(size=16, gain_spread=0.0, band_gain_spread=0.08)
    dataset = Patches([cube], options)
    [patch] = dataset._plan(0, 1)[0]
    [sample] = dataset
    ratios = [(s.mean((1, 2)) / p.mean((1, 2))).numpy() for s, p in zip(sample, plain, strict=True)]
    assert_allclose(np.concatenate(ratios[:2]), patch.gains, rtol=1e-5)
    assert_allclose(ratios[1], ratios[2], rtol=1e-5)
    assert 0.02 < np.log(patch.gains).std() < 0.2
    [again] = Patches([cube], options)
    assert identity(sample) == identity(again)
    [common] = Patches([cube], PatchOptions(size=16))._plan(0, 1)[0]
    assert len(set(common.gains)) == 1


def test_the_blur_is_jittered_per_chunk_and_pass_and_repeats_with_the_seed() -> None:
    cube = chunked((32, 16), n_times=None)
    options = PatchOptions(size=16, augment=False, gain_jitter=0.02)
    dataset = Patches([cube], options)
    gains = dataset._mtf_gains(0, 0)
    assert len({*gains, *dataset._mtf_gains(0, 1), *dataset._mtf_gains(1, 0)}) == 30
    truth = np.stack([cube[b].values[:16] for b in BANDS_20M]).astype("float32")
    samples = {identity(s): s for s in dataset}
    sample = samples[truth.tobytes()]
    assert_allclose(sample.hs, mtf_mean(truth, 2, gains[4:]), atol=1e-6)
    assert np.abs(sample.hs.numpy() - degrade(truth, BANDS_20M)).max() > 1e-4
    assert all(torch.equal(samples[identity(s)].hs, s.hs) for s in Patches([cube], options))
    dataset.set_epoch(1)
    assert not any(torch.equal(samples[identity(s)].hs, s.hs) for s in dataset)


@pytest.mark.parametrize("samples", [5, 40])
def test_every_rank_yields_as_many_samples_as_asked(monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    options = PatchOptions(**PLAIN | {"samples": samples})
    seen = []
    for share in range(5):  # twelve chunks, so shares of two or three, of four patches each
        monkeypatch.setattr(module, "_share", lambda share=share: (share, 5))
        ours = [identity(s) for s in Patches([chunked()], options)]
        assert len(ours) == samples
        seen.append(Counter(ours))
    assert sum(len(ours) for ours in seen) == len(set().union(*seen))  # repeated within a rank, never between two
    for ours in seen:
        assert max(ours.values()) - min(ours.values()) <= 1


@pytest.mark.parametrize("stop", [3, 48, 70, 100])
def test_a_pass_of_several_rounds_goes_on_where_it_was_left(stop: int) -> None:
    options = PatchOptions(**PLAIN | {"augment": True, "samples": 100})
    whole = [identity(s) for s in Patches([chunked()], options)]
    assert len(set(whole[:48]) & set(whole[48:96])) == 0  # augmented differently
    first = Patches([chunked()], options)
    begun = iter(first)
    assert [identity(next(begun)) for _ in range(stop)] == whole[:stop]
    resumed = Patches([chunked()], options)
    resumed.load_state_dict(first.state_dict())
    assert [identity(s) for s in resumed] == whole[stop:]


def test_a_share_without_patches_cannot_keep_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_share", lambda: (12, 13))
    with pytest.raises(ValueError, match="samples=5, but share 12 of 13 has no patch of 8 pixels"):
        list(Patches([chunked()], PatchOptions(**PLAIN | {"samples": 5})))


def test_patches_refuse() -> None:
    with pytest.raises(ValueError, match="blur=-1: must be a number of pixels, not negative"):
        Patches([chunked()], PatchOptions(size=8, blur=-1))
    with pytest.raises(ValueError, match="samples=0: must be at least 1"):
        Patches([chunked()], PatchOptions(size=8, samples=0))
    for option in ({"gain_jitter": 0.02}, {"fine_gain": (0.2, 0.4)}):
        with pytest.raises(
            ValueError, match=rf"{next(iter(option))}=.* with degradation='box': only the blur of 'mtf'"
        ):
            Patches([chunked()], PatchOptions(size=8, degradation="box", **option))
    with pytest.raises(ValueError, match="size=7: must be a positive multiple of 2"):
        Patches([chunked()], PatchOptions(size=7))
    with pytest.raises(ValueError, match="resolution=10: must be 20 or 60, metres"):
        Patches([chunked()], PatchOptions(resolution=10))
    with pytest.raises(ValueError, match="size=8: must be a positive multiple of 6 pixels at 60 m"):
        Patches([chunked()], PatchOptions(resolution=60, size=8))
    with pytest.raises(ValueError, match="cube 0 lacks B01, B09; patches need the bands of 10 m and 60 m"):
        Patches([chunked()], PatchOptions(resolution=60))
    with pytest.raises(ValueError, match="cube 1 lacks B12"):
        Patches([chunked(), chunked().drop_vars("B12")])
    with pytest.raises(
        ValueError, match=r"chunks \(20, 20, 20\) in y and \(16, 16, 16\) in y_20m.*ds.chunk\(\{'y': 32"
    ):
        Patches([chunked().chunk({"y": 20})])
    with pytest.raises(ValueError, match="cube 0: B02 is uint16, digital numbers"):
        Patches([chunked().astype("uint16")])
    with pytest.raises(ValueError, match=r"cube 0: B02 has the chunks .*chunked alike, in time one by one"):
        Patches([chunked().chunk({"time": 2})])
    uneven = chunked()
    uneven["B11"] = uneven["B11"].chunk({"y_20m": -1})
    with pytest.raises(ValueError, match="cube 0: B11 has the chunks"):
        Patches([uneven])
    with pytest.raises(ValueError, match="no chunk is as large as a patch of 48"):
        Patches([chunked()])


def test_the_10_m_bands_are_blurred_by_one_gain_from_the_range() -> None:
    cube = chunked((16, 16), n_times=None)
    fine, truth = (np.stack([cube[b].values for b in bands]).astype("float32") for bands in (BANDS_10M, BANDS_20M))
    found = []
    for epoch in range(3):
        dataset = Patches([cube], PatchOptions(size=16, augment=False, fine_gain=(0.3, 0.5)))
        dataset.set_epoch(epoch)
        [sample] = dataset
        gains = dataset._mtf_gains(epoch, 0)[:4]
        assert_allclose(gains, gains[0])
        assert_allclose(sample.ms, mtf_mean(fine, 2, gains), atol=1e-6)
        assert_allclose(sample.hs, degrade(truth, BANDS_20M), atol=1e-6)
        found.append(gains[0])
    assert 0.3 <= min(found) < max(found) <= 0.5


@pytest.mark.parametrize("prefetch", [1, 3])
def test_no_more_chunks_are_read_ahead_than_asked_for(prefetch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that are read and not yet used lie in memory: a pass asks for at most ``prefetch`` of them."""
    dataset = Patches(
        [two_grids((64, 64)).chunk({"y": 32, "x": 32, "y_20m": 16, "x_20m": 16})],
        PatchOptions(size=8, augment=False, buffer=0, prefetch=prefetch),
    )
    asked: list[int] = []

    class Counting(ThreadPoolExecutor):
        def submit(self, function: Any, patches: list, gains: list) -> Any:
            asked.append(len(patches))
            return super().submit(function, patches, gains)

    monkeypatch.setattr(module, "ThreadPoolExecutor", Counting)
    used = 0
    for sample, _ in enumerate(dataset):
        begun = next(n for n in range(len(asked) + 1) if sum(asked[:n]) > sample)
        assert len(asked) <= begun + prefetch
        used = sample + 1
    assert len(asked) == 16
    assert used == sum(asked) == 64
