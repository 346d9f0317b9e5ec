"""Super-resolution without weights, as picklable functions of numpy blocks, and the fit that two of them need.

`Bicubic` knows no 10 m detail. The others take it from a `ClusterModel`, a guide regressed from the 10 m bands: one
linear map per cluster of spectra, learned where both are known (at 20 m, from 10 m bands blurred to 20 m) and applied
at 10 m. The fit reads the cube once, as tasks of the same graph (`fit_clusters`), and knows nothing of chunks: clusters
come from a regular lattice of pixels, regressions from sums over all pixels.

References
----------
Aiazzi et al. (2006), "MTF-tailored multiscale fusion of high-resolution MS and Pan imagery" (GLP, HPM).
Irani, Peleg (1991), "Improving resolution by image registration" (back-projection).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import dask
import dask.array as da
import numpy as np
from dask.delayed import Delayed
from numpy.typing import NDArray

from ..training.degradation import TAPS_PER_FACTOR, box_mean, mtf_mean
from .missing import FILL_RADIUS, fill_missing, is_missing, mask, output_mask
from .overlap import PART, in_parts, map_windows
from .predictor import Consistency, Precision

N_CLUSTERS = 8
"""On the training scenes 16 is 1 to 3 % better where land is varied and 6 % worse on the smallest."""
N_ITERATIONS = 4
"""Twice as many lower the RMSE by another 2 %, and sharpen whatever the assumed blur has wrong."""
LATTICE_PIXELS = 20_000
"""At most so many 20 m pixels are clustered."""
RIDGE = 1e-5
"""Penalty per pixel on standardised bands: only there to keep flat scenes and tiny clusters solvable."""
NOT_FINITE = "Type precision='float64', or weights= for a network"
_BATCH = 4096


def upsample(image: NDArray, factor: int) -> NDArray:
    """Return the bicubic interpolation of an image (a = -0.75, half-pixel centres, borders repeated), as torch's.

    Parameters
    ----------
    image : (..., y, x)
        Float.

    Returns
    -------
    (..., factor · y, factor · x)
        In the dtype of ``image``.
    """
    rows = _upsample_rows(image, factor)
    return _upsample_rows(rows.swapaxes(-1, -2), factor).swapaxes(-1, -2)


def _upsample_rows(image: NDArray, factor: int) -> NDArray:
    n = image.shape[-2]
    padded = np.pad(image, [(0, 0)] * (image.ndim - 2) + [(2, 2), (0, 0)], mode="edge")
    out = np.empty((*image.shape[:-2], factor * n, image.shape[-1]), image.dtype)
    for phase in range(factor):
        position = (phase + 0.5) / factor - 0.5
        first = int(np.floor(position)) - 1
        out[..., phase::factor, :] = sum(
            np.asarray(_cubic(position - source), image.dtype) * padded[..., 2 + source : 2 + source + n, :]
            for source in range(first, first + 4)
        )
    return out


def _cubic(distance: float, a: float = -0.75) -> float:
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


@dataclass(frozen=True, eq=False)
class ClusterModel:
    """One linear map from the fine bands to the coarse ones per cluster of spectra.

    Attributes are arrays of float64: ``mean``, ``scale`` (fine band), ``centers`` (cluster, fine band) in standardised
    units, ``coefficients`` (cluster, fine band + 1, band), the last row being the constant.
    """

    mean: NDArray
    scale: NDArray
    centers: NDArray
    coefficients: NDArray

    def guide(self, fine: NDArray) -> NDArray:
        """Return the regressed bands: ``(..., fine band, h, w) -> (..., band, h, w)``, in the dtype of ``fine``."""
        spectra = np.moveaxis(fine, -3, -1)
        shape = spectra.shape[:-1]
        features = _features(spectra.reshape(-1, spectra.shape[-1]), self.mean, self.scale)
        label = nearest(features, self.centers)
        out = np.empty((len(features), self.coefficients.shape[-1]), fine.dtype)
        for cluster, coefficients in enumerate(self.coefficients):
            out[label == cluster] = features[label == cluster] @ coefficients
        return np.moveaxis(out.reshape(*shape, -1), -1, -3)


def _features(spectra: NDArray, mean: NDArray, scale: NDArray) -> NDArray:
    """Return standardised spectra with a column of ones: ``(pixel, fine band) -> (pixel, fine band + 1)``, float64."""
    standard = (spectra.astype("float64") - mean) / scale
    return np.concatenate([standard, np.ones((len(spectra), 1))], axis=1)


def nearest(features: NDArray, centers: NDArray) -> NDArray:
    """Return the index of the nearest center of each pixel; the constant in ``features`` is left out."""
    return np.argmin((centers**2).sum(axis=1) - 2 * features[:, :-1] @ centers.T, axis=1)


@dataclass(frozen=True)
class Bicubic:
    """Bicubic interpolation of the coarse bands: the base of the other methods, which override `estimate`."""

    factor: int
    gains: tuple[float, ...]
    """Modulation of each coarse band at its Nyquist frequency."""
    precision: Precision = "float32"
    """Of the arithmetic and of the output."""
    consistency: Consistency = "none"
    """``exact``: the mean of each block of the output is then made to equal its coarse pixel."""

    @property
    def dtype(self) -> np.dtype:
        """Return the dtype of the output."""
        return np.dtype(self.precision)

    @property
    def steps(self) -> int:
        """Return how often an estimate is degraded and upsampled again."""
        return 0

    @property
    def depth(self) -> int:
        """Return the overlap in fine pixels that makes chunks invisible where nothing is missing."""
        step = TAPS_PER_FACTOR * self.factor // 2 + 2 * self.factor
        reach = max(2 * self.factor, self.steps * step)
        return -(-reach // self.factor) * self.factor

    def __call__(self, fine: NDArray, coarse: NDArray, *model: ClusterModel) -> NDArray:
        """Return the coarse bands of one block at the fine resolution, as `Predictor` does: large ones in parts."""
        depth = self.depth + FILL_RADIUS * self.factor
        return in_parts(lambda *part: self._part(*part, *model), fine, coarse, factors=(1, self.factor), depth=depth)

    def _part(self, fine: NDArray, coarse: NDArray, *model: ClusterModel) -> NDArray:
        missing = output_mask(fine, coarse, self.factor)
        fine = fill_missing(fine, FILL_RADIUS * self.factor).astype(self.dtype)
        coarse = fill_missing(coarse, FILL_RADIUS).astype(self.dtype)
        result = self.estimate(fine, coarse, *model)
        if self.consistency == "exact":
            lacking = coarse - box_mean(result, self.factor)
            result = result + lacking.repeat(self.factor, -2).repeat(self.factor, -1)
        return mask(result, missing, NOT_FINITE)

    def estimate(self, fine: NDArray, coarse: NDArray, *model: ClusterModel) -> NDArray:
        """Return the bands at the fine resolution, of blocks without gaps."""
        return upsample(coarse, self.factor)

    def degrade(self, image: NDArray) -> NDArray:
        """Return bands at the fine resolution as the instrument sees them at the coarse one."""
        return mtf_mean(image, self.factor, self.gains)


@dataclass(frozen=True)
class HighPassModulation(Bicubic):
    """Bicubic times guide over blurred guide (GLP-HPM); the guide is an intensity synthesised for each band."""

    @property
    def steps(self) -> int:
        """Return 1: the guide's."""
        return 1

    def estimate(self, fine: NDArray, coarse: NDArray, *model: ClusterModel) -> NDArray:
        """Return the modulated bands; they stay as they are where the blurred guide is not positive."""
        guide = model[0].guide(fine)
        low = upsample(self.degrade(guide), self.factor)
        ratio = np.divide(guide, low, out=np.ones_like(guide), where=low > 1e-4)
        return upsample(coarse, self.factor) * ratio


@dataclass(frozen=True)
class ClusterRegression(Bicubic):
    """Bicubic plus the guide's detail, then back-projection of what the instrument would see of it."""

    iterations: int = N_ITERATIONS

    @property
    def steps(self) -> int:
        """Return the iterations and one for the guide."""
        return self.iterations + 1

    def estimate(self, fine: NDArray, coarse: NDArray, *model: ClusterModel) -> NDArray:
        """Return the bands at the fine resolution; the guide is the start, and bicubic corrects what it lacks."""
        result = model[0].guide(fine)
        for _ in range(self.steps):
            result = result + upsample(coarse - self.degrade(result), self.factor)
        return result


@dataclass(frozen=True)
class ClusterGuide:
    """The guide of a model as a function of blocks of the fine bands; missing where any of them is."""

    precision: Precision = "float32"

    def __call__(self, fine: NDArray, model: ClusterModel) -> NDArray:
        """Return ``(..., band, h, w)``."""
        return in_parts(lambda part: self._part(part, model), fine, factors=(1,), depth=0)

    def _part(self, fine: NDArray, model: ClusterModel) -> NDArray:
        missing = is_missing(fine).any(axis=-3, keepdims=True)
        guide = model.guide(np.where(missing, 0, fine).astype(self.precision))
        return mask(guide, np.asarray(missing), NOT_FINITE)


@dataclass(frozen=True)
class _Samples:
    """Blurred fine bands and coarse bands, stacked, each coarse pixel repeated: what a regression is fitted to."""

    factor: int
    gain: float

    def __call__(self, fine: NDArray, coarse: NDArray) -> NDArray:
        # A missing pixel spreads over the blur's taps, and all that it reaches is left out of the fit.
        fine, coarse = (np.where(is_missing(image), np.nan, image.astype("float64")) for image in (fine, coarse))
        blurred = mtf_mean(fine, self.factor, [self.gain] * fine.shape[-3])
        both = np.concatenate([blurred, coarse], axis=-3)
        return both.repeat(self.factor, -2).repeat(self.factor, -1)


def fit_clusters(
    fine: da.Array, coarse: da.Array, *, factor: int, gains: tuple[float, ...], n_clusters: int, seed: int = 0
) -> Delayed:
    """Return the `ClusterModel` of a cube, lazily: its tasks read each chunk of the cube and keep sums.

    Parameters
    ----------
    fine : (..., fine band, y, x)
        Reflectance; NaN is missing. All leading axes (time) share one fit.
    coarse : (..., band, y / factor, x / factor)
        Likewise.
    gains : tuple of float
        Of the coarse bands; the fine ones are blurred by their mean.
    """
    depth = -(-TAPS_PER_FACTOR // 2) * factor
    fine = _with_chunks_of_at_most(PART, fine)
    n_fine, n_bands = fine.shape[-3], coarse.shape[-3]
    samples = map_windows(
        _Samples(factor, float(np.mean(gains))),
        fine,
        coarse,
        factors=(1, factor),
        depth=depth,
        n_bands=n_fine + n_bands,
        dtype="float64",
    )[..., ::factor, ::factor]
    stride = int(np.ceil(np.sqrt(samples.size / (n_fine + n_bands) / LATTICE_PIXELS)))
    lattice = samples[..., ::stride, ::stride].rechunk(-1).to_delayed().item()
    clusters = dask.delayed(_cluster, nout=3)(lattice, n_fine, n_clusters, seed)
    sums = [dask.delayed(normal_equations)(block, *clusters) for block in samples.to_delayed().ravel()]
    while len(sums) > 1:
        sums = [dask.delayed(_add)(sums[i : i + 16]) for i in range(0, len(sums), 16)]
    return dask.delayed(_solve)(clusters, sums[0])


def _with_chunks_of_at_most(size: int, array: da.Array) -> da.Array:
    """Return an array whose chunks of single images are cut further in y and x where they are larger."""
    lead = tuple((1,) * n for n in array.shape[:-3])
    cut = (
        tuple(n // k + (i < n % k) for n in chunks for k in (-(-n // size),) for i in range(k))
        for chunks in array.chunks[-2:]
    )
    return array.rechunk((*lead, array.chunks[-3], *cut))


def _pixels(samples: NDArray) -> NDArray:
    """Return the pixels where nothing is missing: ``(..., band, y, x) -> (pixel, band)``, in the order of rows."""
    rows = np.moveaxis(samples, -3, -1).reshape(-1, samples.shape[-3])
    return rows[np.isfinite(rows).all(axis=1)]


def _cluster(lattice: NDArray, n_fine: int, n_clusters: int, seed: int) -> tuple[NDArray, NDArray, NDArray]:
    """Return mean, scale and centers of the lattice's spectra; k-means is fed batch by batch in an order by seed."""
    from sklearn.cluster import MiniBatchKMeans

    spectra = _pixels(lattice)[:, :n_fine]
    if not len(spectra):
        return np.zeros(n_fine), np.ones(n_fine), np.zeros((1, n_fine))
    mean, scale = spectra.mean(axis=0), spectra.std(axis=0)
    scale = np.where(scale > 1e-6, scale, 1.0)  # a flat band says nothing
    features = np.random.default_rng(seed).permutation((spectra - mean) / scale)
    n_clusters = min(n_clusters, len(np.unique(features[:_BATCH].round(6), axis=0)))
    kmeans = MiniBatchKMeans(n_clusters, random_state=seed)
    for _ in range(5):
        for start in range(0, len(features), _BATCH):
            batch = features[start : start + _BATCH]
            if start == 0 or len(batch) >= n_clusters:
                kmeans.partial_fit(batch)
    return mean, scale, kmeans.cluster_centers_


def normal_equations(samples: NDArray, mean: NDArray, scale: NDArray, centers: NDArray) -> tuple[NDArray, NDArray]:
    """Return the sums of XᵀX and of XᵀY per cluster over one block."""
    pixels = _pixels(samples)
    features, target = _features(pixels[:, : len(mean)], mean, scale), pixels[:, len(mean) :]
    label = nearest(features, centers)
    masks = [label == cluster for cluster in range(len(centers))]
    return (
        np.stack([features[mask].T @ features[mask] for mask in masks]),
        np.stack([features[mask].T @ target[mask] for mask in masks]),
    )


def _add(sums: list[tuple[NDArray, NDArray]]) -> tuple[NDArray, NDArray]:
    return reduce(lambda a, b: (a[0] + b[0], a[1] + b[1]), sums)


def _solve(clusters: tuple[NDArray, NDArray, NDArray], sums: tuple[NDArray, NDArray]) -> ClusterModel:
    """Return the model: one ridge over all pixels, then one per cluster that is drawn towards it.

    The penalty is the same for all clusters, so that small ones stay near the common map; the constant has none.
    """
    xx, xy = sums
    n_pixels = xx[:, -1, -1].sum()
    penalty = RIDGE * n_pixels * np.eye(xx.shape[-1])
    penalty[-1, -1] = 0
    if not n_pixels:  # a guide without detail: the estimate is bicubic
        return ClusterModel(*clusters, np.zeros(xy.shape))
    common = np.linalg.solve(xx.sum(axis=0) + penalty, xy.sum(axis=0))
    coefficients = [
        common + np.linalg.solve(a + penalty, b - a @ common) if a[-1, -1] else common
        for a, b in zip(xx, xy, strict=True)
    ]
    return ClusterModel(*clusters, np.stack(coefficients))
