"""How good results are on a cube: against its own 20 m bands at reduced scale, or without reference at full scale.

The measures are those of `training.metrics`, as maps of pixels and windows that Dask adds up chunk by chunk: no image
is ever whole in memory, and the figures do not depend on the chunks.

References
----------
Wald, Ranchin, Mangolini 1997 (reduced scale). Alparone et al. 2008, "Multispectral and panchromatic data fusion
assessment without reference" (spectral and spatial distortion, QNR).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import dask
import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .mapping import classical, superresolve
from .mapping.arrays import stack_bands
from .mapping.overlap import map_windows
from .mapping.pipeline import METHODS
from .sentinel2.bands import BANDS_10M, BANDS_20M
from .sentinel2.grids import COARSE_DIMS, FINE_DIMS, read_crs
from .sentinel2.layouts import place
from .training.degradation import TAPS_PER_FACTOR, Degradation, degrade
from .training.metrics import SSIM_RADIUS, UIQ_SIDE, spectral_angle, ssim_map, uiq_map

if TYPE_CHECKING:
    from .network import Checkpoint

FACTOR = 2
DIGITAL_NUMBERS = 10_000
"""Per unit of reflectance."""


def degrade_cube(ds: xr.Dataset, *, degradation: Degradation = "mtf") -> xr.Dataset:
    """Return a two-grid cube at half its resolutions, 20 m and 40 m, lazily: the input of Wald's protocol.

    Parameters
    ----------
    ds : Dataset
        Two-grid cube, chunked in any way; an odd last row or column at 20 m is left out. A missing pixel makes the
        coarser ones missing whose blur reaches it.
    degradation : {"mtf", "box"}
        The instrument's blur, or block means.

    Returns
    -------
    Dataset
        Named and chunked as ``ds``: its 10 m bands in ``y, x`` at 20 m, its 20 m bands in ``y_20m, x_20m`` at 40 m.
    """
    ds = even(ds)
    parts = {}
    for bands, dims in ((BANDS_10M, FINE_DIMS), (BANDS_20M, COARSE_DIMS)):
        image = stack_bands(ds, bands, dims)
        lead = ds[bands[0]].transpose(..., *dims).dims[:-2]
        for i, band in enumerate(bands):
            parts[band] = ((*lead, *dims), _degraded(image, bands, degradation)[..., i, :, :])
    coords: dict[str, Any] = {}
    for fine, coarse in zip(FINE_DIMS, COARSE_DIMS, strict=True):
        coords[fine] = ds[coarse].values
        coords[coarse] = ds[coarse].values.reshape(-1, FACTOR).mean(1)
    if "time" in ds.coords:
        coords["time"] = ds["time"]
    return place(xr.Dataset(parts, coords, attrs=ds.attrs), crs=read_crs(ds))


def even(ds: xr.Dataset) -> xr.Dataset:
    """Return a two-grid cube without an odd last row or column at 20 m."""
    sizes = {dim: ds.sizes[dim] // FACTOR * FACTOR for dim in COARSE_DIMS}
    fine = {f: slice(FACTOR * sizes[c]) for f, c in zip(FINE_DIMS, COARSE_DIMS, strict=True)}
    return ds.isel({dim: slice(size) for dim, size in sizes.items()} | fine)


def _degraded(image: da.Array, bands: tuple[str, ...], degradation: Degradation) -> da.Array:
    """Return ``(..., band, y, x)`` at half its resolution."""
    blurred = map_windows(
        _Degrade(bands, degradation),
        image,
        image[..., ::FACTOR, ::FACTOR],  # says that windows start at even pixels
        factors=(1, FACTOR),
        depth=TAPS_PER_FACTOR * FACTOR // 2,
        n_bands=len(bands),
        dtype=image.dtype,
    )
    return blurred[..., ::FACTOR, ::FACTOR]


@dataclass(frozen=True)
class _Degrade:
    """Degradation of a block, each coarse pixel repeated, as `map_windows` has its output on the fine grid."""

    bands: tuple[str, ...]
    degradation: Degradation

    def __call__(self, image: NDArray, _: NDArray) -> NDArray:
        coarse = degrade(image, self.bands, factor=FACTOR, degradation=self.degradation)
        return coarse.repeat(FACTOR, -2).repeat(FACTOR, -1)


def evaluate(
    ds: xr.Dataset,
    models: Sequence[str | Path | Checkpoint] = ("bicubic", "default"),
    *,
    scale: Literal["reduced", "full"] = "reduced",
    degradation: Degradation = "mtf",
    border: int = 8,
    **options: Any,
) -> xr.Dataset:
    """Return how good models are on a cube; computes, in one pass over the cube.

    Parameters
    ----------
    ds : Dataset
        Two-grid cube, chunked in any way; times are pooled. Missing pixels are left out.
    models : sequence of str, Path or Checkpoint
        ``"bicubic"``, ``"glp_hpm"`` and ``"regression"`` need no training, see `xr_ginet.mapping.classical`; all else
        is weights.
    scale : {"reduced", "full"}
        ``"reduced"``: both grids are degraded by 2, and results compared with the 20 m bands (Wald's protocol).
        ``"full"``: results are compared with the cube itself, without reference.
    degradation : {"mtf", "box"}
        At reduced scale, of the input; at full scale, by which consistency is measured.
    border : int
        20 m pixels left out on each side.
    **options
        Of `xr_ginet.superresolve`, for the weights.

    Returns
    -------
    Dataset
        Dims ``model`` and ``band``. Reduced: ``rmse`` (digital numbers), ``sre``, ``psnr`` (data range 1) and
        ``psnr_maximum`` (of the band's own) in dB, ``ssim``, ``uiq`` per band; ``rmse_all``, ``ergas`` (ratio 2, mean
        of the reference) and ``sam`` (degrees). Full: ``consistency``, the RMSE (digital numbers) between the 20 m
        bands and the result degraded to 20 m; ``d_lambda``, the mean over pairs of bands of the change of their UIQ
        from 20 m to 10 m; ``d_s``, the mean over bands of the change of their UIQ with the mean of the 10 m bands;
        ``qnr``, ``(1 - d_lambda) · (1 - d_s)``.

    Raises
    ------
    ValueError
        If the scale is unknown, nothing is left within the border, or as `xr_ginet.superresolve` does.
    """
    if scale not in ("reduced", "full"):
        raise ValueError(f"scale={scale!r}: must be 'reduced' or 'full'")
    if lacking := [dim for dim in COARSE_DIMS if dim not in ds.sizes]:
        raise ValueError(
            f"the cube has the dims {tuple(ds.sizes)}, and no {lacking[0]}: its 20 m bands must lie on a grid of their "
            "own, by which results are judged. Of a super-resolved cube, evaluate the cube that it was made from"
        )
    ds = even(ds)
    if min(ds.sizes[dim] for dim in COARSE_DIMS) <= 2 * border + 2 * SSIM_RADIUS:
        raise ValueError(
            f"{dict(ds.sizes)}: with border={border} at 20 m no {2 * SSIM_RADIUS + 1} pixels are left. Type a smaller "
            "border="
        )
    source = degrade_cube(ds, degradation=degradation) if scale == "reduced" else ds
    results = {_name(model): _apply(source, model, options) for model in models}
    measures = [
        _reduced_measures(ds, result, border) if scale == "reduced" else _full_measures(ds, result, degradation, border)
        for result in results.values()
    ]
    scores = [_summarise(m) if scale == "reduced" else m for m in dask.compute(*measures)]
    table = xr.concat([xr.Dataset(s) for s in scores], xr.DataArray(list(results), dims="model", name="model"))
    return table.assign_coords(band=list(BANDS_20M)).assign_attrs(scale=scale, degradation=degradation, border=border)


def _name(model: str | Path | Checkpoint) -> str:
    return Path(model).stem if isinstance(model, str | Path) else model.name


def _apply(source: xr.Dataset, model: str | Path | Checkpoint, options: dict[str, Any]) -> xr.Dataset:
    if isinstance(model, str) and model in METHODS:
        return classical(source, model)
    return superresolve(source, weights=model, **options)


def _inner(image: da.Array, border: int) -> da.Array:
    return image[..., border : image.shape[-2] - border, border : image.shape[-1] - border]


def _reduced_measures(ds: xr.Dataset, result: xr.Dataset, border: int) -> dict[str, da.Array]:
    """Return the means that the measures are made of, per band, lazily."""
    truth = stack_bands(ds, BANDS_20M, COARSE_DIMS).astype("float64")
    estimate = stack_bands(result, BANDS_20M, FINE_DIMS).astype("float64")
    maps = map_windows(
        compare,
        truth,
        estimate,
        factors=(1, 1),
        depth=SSIM_RADIUS,
        n_bands=4 * len(BANDS_20M) + 1,
        dtype="float64",
    )
    square, reference, ssim, uiq, angle = (
        maps[..., i * len(BANDS_20M) : (i + 1) * len(BANDS_20M), :, :] for i in range(5)
    )
    edge = border + UIQ_SIDE // 2  # a window lies around its fifth pixel
    windows = uiq[..., edge : uiq.shape[-2] - edge + 1, edge : uiq.shape[-1] - edge + 1]
    return {
        "mse": _mean(_inner(square, border)),
        "mean": _mean(_inner(reference, border)),
        "maximum": da.nanmax(_inner(reference, border), axis=_pixels(reference)),
        "ssim": _mean(_inner(ssim, border + SSIM_RADIUS)),
        "uiq": _mean(windows),
        "sam": _mean(_inner(angle, border)),
    }


def _pixels(image: da.Array) -> tuple[int, ...]:
    return tuple(axis for axis in range(image.ndim) if axis != image.ndim - 3)


def _mean(image: da.Array) -> da.Array:
    """Return the mean over all axes but the bands, without missing pixels."""
    return da.nanmean(image, axis=_pixels(image))


def compare(truth: NDArray, estimate: NDArray) -> NDArray:
    """Return maps of one block, stacked along the bands: squared error, reference, SSIM, UIQ, spectral angle."""
    missing = np.isnan(truth) | np.isnan(estimate)
    truth, estimate = np.where(missing, np.nan, truth), np.where(missing, np.nan, estimate)
    angle = spectral_angle(estimate, truth)[..., None, :, :]
    square = (estimate - truth) ** 2
    return np.concatenate([square, truth, ssim_map(estimate, truth), uiq_map(estimate, truth), angle], axis=-3)


def _summarise(means: dict[str, NDArray]) -> dict[str, Any]:
    """Return the measures at reduced scale from the means over all pixels."""
    root = np.sqrt(means["mse"])
    return {
        "rmse": ("band", DIGITAL_NUMBERS * root),
        "sre": ("band", 20 * np.log10(means["mean"] / root)),
        "psnr": ("band", -20 * np.log10(root)),
        "psnr_maximum": ("band", 20 * np.log10(means["maximum"] / root)),
        "ssim": ("band", means["ssim"]),
        "uiq": ("band", means["uiq"]),
        "rmse_all": DIGITAL_NUMBERS * np.sqrt(means["mse"].mean()),
        "ergas": 100 / FACTOR * np.sqrt(((root / means["mean"]) ** 2).mean()),
        "sam": float(means["sam"][0]),
    }


def _full_measures(ds: xr.Dataset, result: xr.Dataset, degradation: Degradation, border: int) -> Any:
    """Return the measures without reference, lazily."""
    coarse = stack_bands(ds, BANDS_20M, COARSE_DIMS).astype("float64")
    fine = stack_bands(result, BANDS_20M, FINE_DIMS).astype("float64")
    intensity = stack_bands(ds, BANDS_10M, FINE_DIMS).astype("float64").mean(axis=-3, keepdims=True)
    seen = _degraded(fine, BANDS_20M, degradation).rechunk(dict(enumerate(coarse.chunks)))
    error = _mean(_inner((seen - coarse) ** 2, border))
    blurred = _degraded(intensity, ("B08",), degradation).rechunk({-2: coarse.chunks[-2], -1: coarse.chunks[-1]})
    low = _qualities(da.concatenate([coarse, blurred], axis=-3), border)
    high = _qualities(da.concatenate([fine, intensity], axis=-3), FACTOR * border)
    return dask.delayed(_without_reference)(error, low, high)


def _qualities(image: da.Array, border: int) -> da.Array:
    """Return the mean UIQ of each pair of bands."""
    image = image.rechunk({-3: -1})
    maps = map_windows(
        pair_quality,
        image,
        factors=(1,),
        depth=UIQ_SIDE,
        n_bands=image.shape[-3] * (image.shape[-3] - 1) // 2,
        dtype="float64",
    )
    edge = border + UIQ_SIDE // 2
    return _mean(maps[..., edge : maps.shape[-2] - edge + 1, edge : maps.shape[-1] - edge + 1])


def pair_quality(image: NDArray) -> NDArray:
    """Return the UIQ map of each pair of bands of one block: ``(..., band, y, x) -> (..., pair, y, x)``."""
    pairs = list(itertools.combinations(range(image.shape[-3]), 2))
    left, right = (image[..., [pair[side] for pair in pairs], :, :] for side in (0, 1))
    return uiq_map(left, right)


def _without_reference(square_error: NDArray, low: NDArray, high: NDArray) -> dict[str, Any]:
    pairs = list(itertools.combinations(range(len(BANDS_20M) + 1), 2))
    with_intensity = np.array([pair[1] == len(BANDS_20M) for pair in pairs])
    change = np.abs(high - low)
    d_lambda, d_s = float(change[~with_intensity].mean()), float(change[with_intensity].mean())
    return {
        "consistency": ("band", DIGITAL_NUMBERS * np.sqrt(square_error)),
        "d_lambda": d_lambda,
        "d_s": d_s,
        "qnr": (1 - d_lambda) * (1 - d_s),
    }


def to_markdown(table: xr.Dataset) -> str:
    """Return a table of `evaluate` as Markdown: one row per model and measure, per band and over all."""
    lines = [
        "| model | measure | " + " | ".join(table["band"].values) + " | all |",
        "|---" * (len(BANDS_20M) + 3) + "|",
    ]
    for model in table["model"].values:
        for name, measure in table.sel(model=model).data_vars.items():
            cells = [f"{value:.4g}" for value in measure.values] if measure.ndim else ["-"] * len(BANDS_20M)
            total = "-" if measure.ndim else f"{float(measure):.4g}"
            lines.append(f"| {model} | {name} | " + " | ".join(cells) + f" | {total} |")
    return "\n".join(lines)


def to_json(table: xr.Dataset) -> str:
    """Return a table of `evaluate` as JSON: measure, then model, then a number or one per band."""
    content = {
        str(name): {str(m): measure.sel(model=m).values.tolist() for m in table["model"].values}
        for name, measure in table.data_vars.items()
    }
    return json.dumps({"band": list(BANDS_20M)} | content | dict(table.attrs), indent=2)


def to_csv(table: xr.Dataset) -> str:
    """Return a table of `evaluate` as CSV: a row per model and band; what has no band is repeated."""
    return str(table.to_dataframe().to_csv()).rstrip()


WRITERS: dict[str, Callable[[xr.Dataset], str]] = {".json": to_json, ".csv": to_csv, ".md": to_markdown}
