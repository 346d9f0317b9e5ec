"""Cubes that users already have, as the two-grid Dataset.

The two-grid Dataset holds one variable per band under its ESA name: 10 m bands with dims ``([time,] y, x)``, 20 m
bands with ``([time,] y_20m, x_20m)``, float reflectance, coordinates at pixel centres, one ``spatial_ref``.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from .bands import BANDS, band_name, bands_of
from .grids import COARSE_DIMS, FINE_DIMS, Grid, check_nesting, read_crs

RADIOMETRIC_ATTRS = ("scale_factor", "add_offset", "_FillValue", "scale", "offset", "nodata", "units")


def pair(
    ds_10m: xr.Dataset,
    ds_20m: xr.Dataset,
    *,
    scale: float | None = None,
    offset: float = 0.0,
    nodata: float | None = 0,
) -> xr.Dataset:
    """Return the two-grid Dataset of two Datasets that hold one resolution each.

    Parameters
    ----------
    ds_10m, ds_20m : Dataset
        One variable per band with dims ``y, x`` or ``time, y, x``; lazy or not, chunked in any way. Names are ESA's
        (B05) or catalogues' (rededge1); variables that are no Sentinel-2 band of that resolution are left out.
    scale, offset, nodata : float, optional
        For bands that hold digital numbers: reflectance is ``digital_number * scale + offset``, and missing where the
        digital number is ``nodata``. Integer bands need a ``scale``, here or as an attribute ``scale_factor``; float
        bands without one are reflectance already.

    Returns
    -------
    Dataset
        Dims ``[time,] y, x`` and ``[time,] y_20m, x_20m``; reflectance float32 (float64 stays); as lazy as the input.

    Raises
    ------
    ValueError
        If no band is found, integer bands have no scale, the grids do not nest exactly, or times or CRS differ.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> def grid(names, n, size):
    ...     centres = size * (np.arange(n) + 0.5)
    ...     data = {name: (("y", "x"), np.full((n, n), 0.1, "float32")) for name in names}
    ...     return xr.Dataset(data, {"y": -centres, "x": centres})
    >>> cube = pair(grid(["B02", "B03", "B04", "B08"], 8, 10), grid(["rededge1", "swir16"], 4, 20))
    >>> dict(cube.sizes)
    {'y': 8, 'x': 8, 'y_20m': 4, 'x_20m': 4}
    """
    fine = _bands_of(ds_10m, 10, "ds_10m")
    coarse = _bands_of(ds_20m, 20, "ds_20m")
    check_nesting(Grid.from_coords(fine), Grid.from_coords(coarse))
    _check_times(fine, coarse)
    crs_fine, crs_coarse = read_crs(ds_10m), read_crs(ds_20m)
    if crs_fine and crs_coarse and crs_fine != crs_coarse:
        raise ValueError(f"ds_10m is in {crs_fine} and ds_20m in {crs_coarse}: load both in the same CRS")
    fine, coarse = (
        ds.map(to_reflectance, scale=scale, offset=offset, nodata=nodata).drop_vars("spatial_ref", errors="ignore")
        for ds in (fine, coarse)
    )
    coarse = coarse.rename(dict(zip(FINE_DIMS, COARSE_DIMS, strict=True)))
    cube = xr.merge([fine, coarse], combine_attrs="drop_conflicts", compat="override", join="override")
    return describe(cube, crs=crs_fine or crs_coarse)


def to_reflectance(
    band: xr.DataArray, *, scale: float | None = None, offset: float = 0.0, nodata: float | None = 0
) -> xr.DataArray:
    """Return a band as float reflectance, lazily where it is lazy.

    Digital numbers are scaled by ``scale`` and ``offset``, or by the attributes ``scale_factor`` and ``add_offset``.
    """
    if scale is None and "scale_factor" in band.attrs:
        scale, offset = float(band.attrs["scale_factor"]), float(band.attrs.get("add_offset", 0.0))
        nodata = band.attrs.get("_FillValue", nodata)
    if scale is None:
        if np.issubdtype(band.dtype, np.floating):
            return band
        raise ValueError(
            f"{band.name} is {band.dtype}: digital numbers, and no attribute scale_factor says what they mean. Type "
            "scale=1e-4 (and offset=-0.1 where the product of baseline 04.00 or later kept its offset), or load it "
            "with xr_ginet.open_stac, which reads both from the catalogue"
        )
    dtype = band.dtype if band.dtype == np.float64 else np.dtype("float32")
    result = band.astype(dtype) * dtype.type(scale) + dtype.type(offset)
    if nodata is not None:
        result = result.where(band != nodata)
    return result.assign_attrs({k: v for k, v in band.attrs.items() if k not in RADIOMETRIC_ATTRS})


def describe(cube: xr.Dataset, *, crs: object | None) -> xr.Dataset:
    """Return the cube with the attributes of its bands, the two transforms and its CRS."""
    for name in BANDS:
        if name in cube:
            cube[name] = cube[name].assign_attrs(band_attrs(name))
    return place(cube, crs=crs)


def place(cube: xr.Dataset, *, crs: object | None) -> xr.Dataset:
    """Return the cube with its CRS and transforms written anew from its coordinates, whatever it was cut from.

    Each grid's transform is an attribute of its coordinates. ``spatial_ref`` holds the CRS, and the transform too where
    there is one grid only; all variables point to it.
    """
    import rioxarray  # noqa: F401 - registers .rio
    from affine import Affine
    from pyproj import CRS

    named = (v.encoding.get("grid_mapping", v.attrs.get("grid_mapping")) for v in cube.data_vars.values())
    cube = cube.drop_vars([name for name in {"spatial_ref", *named} if name in cube.variables]).copy()
    grids = {dims: Grid.from_coords(cube, dims) for dims in (FINE_DIMS, COARSE_DIMS) if set(dims) <= set(cube.coords)}
    for dims, grid in grids.items():
        for dim, axis in zip(dims, ("Y", "X"), strict=True):
            cf = next((a for a in CRS.from_user_input(crs).cs_to_cf() if a["axis"] == axis), {}) if crs else {}
            cube[dim] = cube[dim].drop_attrs().assign_attrs(cf | {"axis": axis, "transform": list(grid.transform)})
    for name in cube.data_vars:
        cube[name].attrs.pop("grid_mapping", None)
        cube[name].encoding.pop("grid_mapping", None)
    if crs is None:
        return cube
    cube = cube.rio.write_crs(crs, grid_mapping_name="spatial_ref")
    if len(grids) == 1:
        [grid] = grids.values()
        cube = cube.rio.write_transform(Affine(*grid.transform), grid_mapping_name="spatial_ref")
    for name in cube.data_vars:
        cube[name].attrs.pop("grid_mapping", None)
        cube[name].encoding["grid_mapping"] = "spatial_ref"
    return cube


def band_attrs(name: str) -> dict[str, object]:
    """Return the attributes of a band's reflectance."""
    band = BANDS[name]
    return {
        "long_name": f"reflectance, {band.long_name}",
        "units": "1",
        "wavelength": band.wavelength,
        "wavelength_units": "nm",
        "native_resolution": band.resolution,
    }


def _bands_of(ds: xr.Dataset, resolution: int, argument: str) -> xr.Dataset:
    """Return the bands of one resolution under their ESA names, dims in order."""
    names = {v: band_name(str(v)) for v in ds.data_vars}
    names = {v: n for v, n in names.items() if n and BANDS[n].resolution == resolution}
    if not names:
        raise ValueError(
            f"{argument} holds no {resolution} m band of Sentinel-2; its variables are "
            f"{', '.join(map(str, ds.data_vars)) or 'none'}, and the bands are {', '.join(bands_of(resolution))}"
        )
    for variable in names:
        strange = [str(d) for d in ds[variable].dims if d not in ("time", *FINE_DIMS)]
        if strange or not set(FINE_DIMS) <= set(ds[variable].dims):
            raise ValueError(
                f"{argument}[{str(variable)!r}] has the dims {ds[variable].dims}; ('y', 'x') or ('time', 'y', 'x') are "
                f"needed. Rename or select"
            )
    return ds[list(names)].rename(names).transpose(..., *FINE_DIMS)


def _check_times(fine: xr.Dataset, coarse: xr.Dataset) -> None:
    has_time = ["time" in ds.dims for ds in (fine, coarse)]
    if has_time[0] != has_time[1]:
        raise ValueError(
            f"only {'ds_10m' if has_time[0] else 'ds_20m'} has a time dimension: select one time from it, or expand "
            "the other"
        )
    if has_time[0] and not np.array_equal(fine["time"].values, coarse["time"].values):
        only = [
            np.setdiff1d(a["time"].values, b["time"].values).astype("datetime64[s]").astype(str).tolist()
            for a, b in ((fine, coarse), (coarse, fine))
        ]
        raise ValueError(
            f"the times differ: only in ds_10m {only[0][:3]}, only in ds_20m {only[1][:3]}. Select the common times, "
            "in the same order, from both"
        )
