"""Cubes that users already have, as the two-grid Dataset.

The two-grid Dataset holds one variable per band under its ESA name: 10 m bands with dims ``([time,] y, x)``, 20 m
bands with ``([time,] y_20m, x_20m)``, float reflectance, coordinates at pixel centres, one ``spatial_ref``.
"""

from __future__ import annotations

import warnings

import numpy as np
import xarray as xr

from .bands import BANDS, SCL, band_name, bands_of, layer_name
from .grids import (
    COARSE_DIMS,
    DIMS,
    FINE_DIMS,
    TOLERANCE,
    Grid,
    check_nesting,
    overlap_of,
    read_crs,
    stated_anchor,
)
from .radiometry import SATURATED, Stored, source_attrs

RADIOMETRIC_ATTRS = ("scale_factor", "add_offset", "_FillValue", "fill_value", "scale", "offset", "nodata", "units")
BAND_DIMS = ("band", "bands", "variable")
"""What the dimension of stacked bands is called: by stackstac and rioxarray, by openEO, by `Dataset.to_dataarray`."""


def pair(
    ds_10m: xr.Dataset | xr.DataArray,
    ds_20m: xr.Dataset | xr.DataArray,
    *,
    scale: float | None = None,
    offset: float = 0.0,
    nodata: float | None = 0,
) -> xr.Dataset:
    """Return the two-grid Dataset of two cubes that hold one resolution each.

    Parameters
    ----------
    ds_10m, ds_20m : Dataset or DataArray
        One variable per band with dims ``y, x`` or ``time, y, x``, or bands stacked along ``band``; lazy or not,
        chunked in any way. Names are ESA's (B05, b05, B05_20m) or catalogues' (rededge1); what is no Sentinel-2 band
        of that resolution is left out. The scene classification ``SCL`` is kept as it is. Coordinates are centres, or
        upper left corners where a ``GeoTransform`` or a ``transform`` in the attributes says so, and, where none tells,
        where both grids start at the same coordinates, as stackstac's do unless it is told otherwise. Where the grids
        differ at an edge by no more than a 20 m pixel, as those of ``odc.stac.load(bbox=…)`` do, the pixels that are
        not whole in both are left out.
    scale, offset, nodata : float, optional
        For bands that hold digital numbers: reflectance is ``digital_number * scale + offset``, and missing where the
        digital number is ``nodata`` or 65535, which is ESA's for saturated. Integer bands need a
        ``scale``, here or as an attribute ``scale_factor``; float bands without one are reflectance already. Bands
        that xarray has decoded are not scaled again; where their store names no ``_FillValue``, what ``nodata`` was
        decoded to is missing.

    Returns
    -------
    Dataset
        Dims ``[time,] y, x`` and ``[time,] y_20m, x_20m``; reflectance float32 (float64 stays); as lazy as the input.

    Notes
    -----
    To xarray the two grids are four independent dimensions: ``cube.B08 - cube.B05`` becomes an array over all four, of
    gigabytes, without a word. Compute with bands of one grid, or with any after ``cube.ginet.superresolve()``. xarray's
    ``sel`` and ``isel``, and rioxarray's ``clip``, cut one grid alone; ``cube.ginet.sel``, ``isel``, ``clip`` and
    ``point`` cut all grids together.

    Warns
    -----
    UserWarning
        If coordinates that stackstac has taken from Earth Search say that an offset may have been applied twice.

    Raises
    ------
    ValueError
        If no band is found or one is found twice, integer bands have no scale, decoded bands are given one, the grids
        do not share a lattice or differ by more than a 20 m pixel at an edge, or times or CRS differ.

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
    if scale is None:
        warn_of_offset(ds_10m)
    anchors = stated_anchor(ds_10m), stated_anchor(ds_20m)
    ds_10m, ds_20m = unstack(ds_10m, "ds_10m"), unstack(ds_20m, "ds_20m")
    fine, coarse = _at_centres(bands_on(ds_10m, 10, "ds_10m"), bands_on(ds_20m, 20, "ds_20m"), anchors)
    whole_fine, whole_coarse = overlap_of(Grid.from_coords(fine), Grid.from_coords(coarse))
    fine, coarse = fine.isel(whole_fine), coarse.isel(whole_coarse)
    check_nesting(Grid.from_coords(fine), Grid.from_coords(coarse))
    _check_times(fine, coarse)
    crs_fine, crs_coarse = read_crs(ds_10m), read_crs(ds_20m)
    if crs_fine and crs_coarse and crs_fine != crs_coarse:
        raise ValueError(f"ds_10m is in {crs_fine} and ds_20m in {crs_coarse}: load both in the same CRS")
    bands = [*fine.data_vars.values(), *coarse.data_vars.values()]
    attrs = source_attrs(stored_as(band, scale=scale, offset=offset, nodata=nodata) for band in bands)
    fine, coarse = (
        ds.map(to_reflectance, scale=scale, offset=offset, nodata=nodata).drop_vars("spatial_ref", errors="ignore")
        for ds in (fine, coarse)
    )
    if (classes := classes_of(ds_20m)) is not None:
        coarse[SCL] = classes.variable.isel(whole_coarse)
    coarse = coarse.rename(dict(zip(FINE_DIMS, COARSE_DIMS, strict=True)))
    cube = xr.merge([fine, coarse], combine_attrs="drop_conflicts", compat="override", join="override")
    return describe(cube, crs=crs_fine or crs_coarse).assign_attrs(attrs)


def unstack(cube: xr.Dataset | xr.DataArray, argument: str) -> xr.Dataset:
    """Return stacked bands as one variable each, under its ESA name where it has one; Datasets as they are.

    A band is known by its label or by any other coordinate along the bands (stackstac's ``common_name``), or by what
    rioxarray makes of the descriptions in a GeoTIFF.

    Raises
    ------
    ValueError
        If there is no dimension of bands, nothing names them, or two have one name.
    """
    if isinstance(cube, xr.Dataset):
        return cube
    dim = next((d for d in BAND_DIMS if d in cube.dims), None)
    if dim is None:
        raise ValueError(
            f"{argument} is a DataArray with the dims {cube.dims}: none of {', '.join(BAND_DIMS)} tells its bands "
            "apart. Stack them along 'band', or pass a Dataset with one variable per band"
        )
    names = [next((n for label in labels if (n := band_name(label))), labels[0]) for labels in _labels(cube, dim)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"{argument} holds {', '.join(twice)} more than once along {dim!r}, whose labels are "
            f"{', '.join(map(str, cube[dim].values))}. Select one of each: {argument}.sel({dim}=[…])"
        )
    kept = {*cube.dims, "time", "spatial_ref"}
    bands = {name: cube.isel({dim: i}, drop=True) for i, name in enumerate(names)}
    ds = xr.Dataset({name: band.drop_vars([c for c in band.coords if c not in kept]) for name, band in bands.items()})
    for name in names:
        ds[name].attrs = {key: value for key, value in cube.attrs.items() if key in RADIOMETRIC_ATTRS}
    ds.attrs = {k: v for k, v in cube.attrs.items() if k == "radiometry" or str(k).startswith(("source_", "ginet_"))}
    crs = read_crs(cube)
    return ds.rio.write_crs(crs) if crs else ds


def warn_of_offset(cube: xr.Dataset | xr.DataArray) -> None:
    """Warn where stackstac has probably subtracted an offset that the catalogue's pixels no longer had.

    Earth Search states both: that the offset was taken from the pixels, and the offset. stackstac applies the latter.
    """
    bands = [cube] if isinstance(cube, xr.DataArray) else list(cube.data_vars.values())
    said = [coord.values.ravel() for name, coord in cube.coords.items() if str(name).endswith("boa_offset_applied")]
    applied = any(value == 1 for values in said for value in values)  # NaN where an item says nothing
    if applied and any(np.issubdtype(band.dtype, np.floating) for band in bands):
        warnings.warn(
            "the items say that the offset of 0.1 was taken from their pixels already (boa_offset_applied); if they "
            "state it too, stackstac took it again (rescale=True, its default) and this cube is 0.1 too dark. Load "
            "digital numbers, with rescale=False, and type scale=1e-4 here, or load with xr_ginet.open_stac",
            stacklevel=3,
        )


def to_reflectance(
    band: xr.DataArray, *, scale: float | None = None, offset: float = 0.0, nodata: float | None = 0
) -> xr.DataArray:
    """Return a band as float reflectance, lazily where it is lazy.

    Digital numbers are scaled by ``scale`` and ``offset``, or by the attributes ``scale_factor`` and ``add_offset``. A
    band that xarray has decoded, which its encoding tells, is not scaled again.
    """
    stored = stored_as(band, scale=scale, offset=offset, nodata=nodata)
    if stored is None:
        return band
    if _was_decoded(band):
        return _mask_decoded(band, stored)
    dtype = band.dtype if band.dtype == np.float64 else np.dtype("float32")
    result = band.astype(dtype) * dtype.type(stored.scale_factor) + dtype.type(stored.add_offset)
    valid = band != SATURATED
    if stored.nodata is not None:
        valid &= band != stored.nodata
    return result.where(valid).assign_attrs({k: v for k, v in band.attrs.items() if k not in RADIOMETRIC_ATTRS})


def stored_as(
    band: xr.DataArray, *, scale: float | None = None, offset: float = 0.0, nodata: float | None = 0
) -> Stored | None:
    """Return how a band's digital numbers are stored, or were before xarray decoded them; None of reflectance.

    Raises
    ------
    ValueError
        If a decoded band is given a scale, or integers have none.
    """
    if _was_decoded(band):
        if scale is not None:
            raise ValueError(
                f"{band.name} was scaled already, by {band.encoding['scale_factor']:g} when xarray opened it; scale="
                f"{scale:g} would do it twice. Leave scale and offset out, or open with mask_and_scale=False"
            )
        said = band.encoding
        dtype = str(np.dtype(said.get("dtype", "uint16")))
    else:
        # GDAL says of any raster that its scale is 1: of digital numbers that tells nothing.
        said = band.attrs if scale is None and band.attrs.get("scale_factor", 1) != 1 else {}
        dtype = str(band.dtype)
    if said:
        scale, offset = float(said["scale_factor"]), float(said.get("add_offset", 0.0))
        nodata = said.get("_FillValue", band.attrs.get("fill_value", nodata))
    if scale is None:
        if np.issubdtype(band.dtype, np.floating):
            return None
        raise ValueError(
            f"{band.name} is {band.dtype}: digital numbers, and no attribute scale_factor says what they mean. Type "
            "scale=1e-4 (and offset=-0.1 where the product of baseline 04.00 or later kept its offset), or load it "
            "with xr_ginet.open_stac, which reads both from the catalogue"
        )
    return Stored(dtype, scale, offset, None if nodata is None else float(nodata))


def _was_decoded(band: xr.DataArray) -> bool:
    return bool(np.issubdtype(band.dtype, np.floating)) and band.encoding.get("scale_factor", 1) != 1


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
    grids = {dims: Grid.from_coords(cube, dims) for dims in DIMS.values() if set(dims) <= set(cube.coords)}
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


def _mask_decoded(band: xr.DataArray, stored: Stored) -> xr.DataArray:
    """Return a decoded band without what saturated became, and nodata where its store did not tell xarray of it.

    EOPF products in Zarr 3 call it ``fill_value``, which xarray does not read: 0 is decoded to -0.1.
    """
    for number in (SATURATED, None if "_FillValue" in band.encoding else stored.nodata):
        if number is not None:
            decoded = number * stored.scale_factor + stored.add_offset
            band = band.where(abs(band - decoded) >= abs(stored.scale_factor) / 2)
    return band


def classes_of(ds: xr.Dataset) -> xr.DataArray | None:
    """Return the scene classification of a Dataset, by whatever name, or None."""
    return next((band for name, band in ds.data_vars.items() if layer_name(str(name)) == SCL), None)


def _labels(cube: xr.DataArray, dim: str) -> list[list[str]]:
    """Return, for each band, everything that may name it, its own label first."""
    coords = sorted((c for c in cube.coords.values() if c.dims == (dim,)), key=lambda c: c.name != dim)
    columns = [[str(value) for value in c.values] for c in coords]
    described = cube.attrs.get("long_name")
    if isinstance(described, tuple | list) and len(described) == cube.sizes[dim]:
        columns.append([str(value) for value in described])
    if not columns:
        raise ValueError(
            f"no coordinate along {dim!r} names the bands. Type .assign_coords({dim}=['B02', …]) in their order"
        )
    return [list(labels) for labels in zip(*columns, strict=True)]


def _at_centres(
    fine: xr.Dataset, coarse: xr.Dataset, anchors: tuple[str | None, str | None]
) -> tuple[xr.Dataset, xr.Dataset]:
    """Return both parts with centres as coordinates.

    Where nothing tells what coordinates are, those of corners show by grids that start alike, but for half pixels.
    """
    told = {anchor for anchor in anchors if anchor}
    if told:
        both = told.pop() if len(told) == 1 else None
        fine, coarse = (
            shift(ds, 0.5) if (anchor or both) == "corner" else ds
            for ds, anchor in zip((fine, coarse), anchors, strict=True)
        )
        return fine, coarse
    a, b = Grid.from_coords(fine), Grid.from_coords(coarse)
    found, expected = (b.x0 - a.x0, b.y0 - a.y0), ((a.dx - b.dx) / 2, (a.dy - b.dy) / 2)
    if b.dx != a.dx and np.allclose(found, expected, rtol=0, atol=TOLERANCE * abs(a.dx)):
        return shift(fine, 0.5), shift(coarse, 0.5)
    return fine, coarse


def shift(ds: xr.Dataset, pixels: float) -> xr.Dataset:
    """Return a Dataset whose coordinates are moved along its axes, by so many pixels."""
    grid = Grid.from_coords(ds)
    return ds.assign_coords(y=ds["y"] + pixels * grid.dy, x=ds["x"] + pixels * grid.dx)


def bands_on(ds: xr.Dataset, resolution: int, argument: str) -> xr.Dataset:
    """Return the bands of one resolution under their ESA names, dims in order."""
    names = {v: band_name(str(v)) for v in ds.data_vars}
    names = {v: n for v, n in names.items() if n and BANDS[n].resolution == resolution}
    if not names:
        raise ValueError(
            f"{argument} holds no {resolution} m band of Sentinel-2; its variables are "
            f"{', '.join(map(str, ds.data_vars)) or 'none'}, and the bands are {', '.join(bands_of(resolution))}"
        )
    found = list(names.values())
    if twice := {name: [str(v) for v in names if names[v] == name] for name in found if found.count(name) > 1}:
        name, variables = next(iter(twice.items()))
        raise ValueError(f"{argument} holds {name} more than once, as {', '.join(variables)}: drop all but one")
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
