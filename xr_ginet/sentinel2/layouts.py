"""Cubes that users already have, as the two-grid Dataset.

The two-grid Dataset holds one variable per band under its ESA name: 10 m bands with dims ``([time,] y, x)``, 20 m
bands with ``([time,] y_20m, x_20m)``, float reflectance, coordinates at pixel centres, one ``spatial_ref``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

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
from .provenance import of_dates
from .radiometry import (
    DARKEST,
    ESA,
    IMPOSSIBLE,
    Encoding,
    check_reflectance,
    decode_if_numbers,
    decode_numbers,
    source_attrs,
    without_missing,
)

RADIOMETRIC_ATTRS = frozenset(
    "scale_factor add_offset _FillValue fill_value missing_value scale offset nodata nodatavals scales offsets "
    "units dtype valid_min valid_max valid_range actual_range _eopf_attrs".split()
)
"""Attributes that tell how a band's numbers were stored: of its reflectance they no longer hold."""
FILL_ATTRS = ("_FillValue", "missing_value", "nodata")
GRID_ATTRS = frozenset(
    "spec crs transform resolution res gsd is_tiled grid_mapping proj:bbox proj:code proj:epsg proj:shape "
    "proj:transform proj:wkt2".split()
)
"""Attributes that place a cube, which its coordinates do; `stackstac`'s, rioxarray's and EOPF's."""
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
    fine, coarse = _without_conflicts(fine, coarse)
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
    return of_dates(describe(cube, crs=crs_fine or crs_coarse), [attrs] * cube.sizes.get("time", 1) if attrs else [])


def unstack(cube: xr.Dataset | xr.DataArray, argument: str) -> xr.Dataset:
    """Return stacked bands as one variable each, under its ESA name where it has one; Datasets as they are.

    A band is known by its label or by any other coordinate along the bands (stackstac's ``common_name``), or by what
    rioxarray makes of the descriptions in a GeoTIFF. Coordinates along the bands, such that place the cube, and such
    of objects other than text are left out.

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
    alike = cube.drop_vars([name for name, coord in cube.coords.items() if not _is_of_all_bands(coord, dim)])
    ds = xr.Dataset({name: alike.isel({dim: i}, drop=True) for i, name in enumerate(names)})
    for name in names:
        ds[name].attrs = {key: value for key, value in cube.attrs.items() if key in RADIOMETRIC_ATTRS}
    ds.attrs = {key: v for key, v in lasting_attrs(cube.attrs).items() if key != "long_name"}  # rioxarray's, of bands
    crs = read_crs(cube)
    return ds.rio.write_crs(crs) if crs else ds


def _is_of_all_bands(coord: xr.DataArray, dim: str) -> bool:
    """Return whether a coordinate of stacked bands is one of the cube without them."""
    if dim in coord.dims or coord.name in GRID_ATTRS:
        return coord.name == dim
    return coord.dtype != object or all(isinstance(value, str) for value in coord.values.ravel())


def warn_of_offset(cube: xr.Dataset | xr.DataArray) -> None:
    """Warn where stackstac has probably subtracted an offset that the catalogue's pixels no longer had.

    Earth Search states both: that the offset was taken from the pixels, and the offset. stackstac applies the latter.
    """
    bands = [cube] if isinstance(cube, xr.DataArray) else list(cube.data_vars.values())
    said = [coord.values.ravel() for name, coord in cube.coords.items() if str(name).endswith("boa_offset_applied")]
    if not any(np.issubdtype(band.dtype, np.floating) for band in bands):
        return
    if not said and "spec" in cube.attrs and not _tells_properties(cube):
        warnings.warn(
            "stackstac made this cube of items whose properties are gone, as after a median: whether the offset of 0.1 "
            "was taken from their pixels already, and by stackstac again (rescale=True, its default), cannot be told. "
            "If they are Earth Search's 'sentinel-2-l2a', load digital numbers, with rescale=False, and type scale="
            "1e-4 here, or load with xr_ginet.open_stac",
            stacklevel=3,
        )
    if any(value == 1 for values in said for value in values):  # NaN where an item says nothing
        warnings.warn(
            "the items say that the offset of 0.1 was taken from their pixels already (boa_offset_applied); if they "
            "state it too, stackstac took it again (rescale=True, its default) and this cube is 0.1 too dark. Load "
            "digital numbers, with rescale=False, and type scale=1e-4 here, or load with xr_ginet.open_stac",
            stacklevel=3,
        )


def _tells_properties(cube: xr.Dataset | xr.DataArray) -> bool:
    """Return whether the properties of the items that stackstac has read are coordinates of a cube, of each time."""
    of_assets = ("raster:", "eo:", "proj:", "file:")
    return "time" in cube.coords and any(":" in str(c) and not str(c).startswith(of_assets) for c in cube.coords)


def to_reflectance(
    band: xr.DataArray, *, scale: float | None = None, offset: float = 0.0, nodata: float | None = 0
) -> xr.DataArray:
    """Return a band as float reflectance, lazily where it is lazy.

    Digital numbers are scaled by ``scale`` and ``offset``, or by the attributes ``scale_factor`` and ``add_offset``. A
    band that xarray has decoded, which its encoding tells, is not scaled again, nor are floats that state a scale and
    whose pixels are reflectance already.
    """
    stored = stored_as(band, scale=scale, offset=offset, nodata=nodata)
    name = str(band.name)
    fills = {band.attrs[key] for key in FILL_ATTRS if np.isscalar(band.attrs.get(key))}
    if stored is None:
        # A fill value that could be reflectance is that of the digital numbers, since scaled.
        fills = {fill for fill in {*fills, nodata or 0} if not DARKEST < float(fill) < IMPOSSIBLE}
        result = _apply(band, partial(without_missing, encoding=ESA)) if _is_of_eopf(band) else band
    elif _was_decoded(band):
        fills = set()
        # EOPF products in Zarr 3 call nodata ``fill_value``, which xarray does not read: 0 is decoded to -0.1.
        result = _apply(band, partial(without_missing, encoding=stored))
    elif not np.issubdtype(band.dtype, np.floating):
        result = _apply(band, stored.decode)
    else:
        decode = decode_if_numbers if scale is None else decode_numbers
        result = _apply(band, partial(decode, encoding=stored, band=name))
    for fill in fills - {stored.nodata if stored else None}:
        result = result.where(band != fill)
    if result.dtype == np.float16:
        result = result.astype("float32")
    if isinstance(result.data, np.ndarray):
        check_reflectance(result.data, name)
    result = result.copy(deep=False)
    result.attrs = {key: value for key, value in band.attrs.items() if key not in RADIOMETRIC_ATTRS}
    return result


def _apply(band: xr.DataArray, function: Callable[[NDArray], NDArray]) -> xr.DataArray:
    """Return a function of a band's blocks; float64 of float64, else float32."""
    dtype = band.dtype if band.dtype == np.float64 else np.dtype("float32")
    result = xr.apply_ufunc(function, band, dask="parallelized", output_dtypes=[dtype])
    return result if result.dtype == dtype else result.astype(dtype)


def stored_as(
    band: xr.DataArray, *, scale: float | None = None, offset: float = 0.0, nodata: float | None = 0
) -> Encoding | None:
    """Return how a band's digital numbers are stored, or were before xarray decoded them; None of reflectance.

    Raises
    ------
    ValueError
        If a decoded band is given a scale, or integers have none.
    """
    said: Mapping[str, Any] = {}
    if _was_decoded(band):
        if scale is not None:
            raise ValueError(
                f"{band.name} was scaled already, by {band.encoding['scale_factor']:g} when xarray opened it; scale="
                f"{scale:g} would do it twice. Leave scale and offset out, or open with mask_and_scale=False"
            )
        said = {"dtype": "uint16"} | band.encoding
    elif scale is not None:
        return Encoding(band.dtype.name, scale, offset, nodata)
    else:
        # GDAL says of any raster that its scale is 1: of digital numbers that tells nothing.
        of_eopf = band.attrs.get("_eopf_attrs")
        places = (band.attrs, of_eopf if isinstance(of_eopf, Mapping) else {})
        said = next((place for place in places if place.get("scale_factor", 1) != 1), {})
    if said:
        fill = next((said[key] for key in ("_FillValue", "fill_value") if key in said), nodata)
        fill = band.attrs.get("fill_value", fill) if "_FillValue" not in said else fill
        dtype = said["dtype"] if _was_decoded(band) else band.dtype
        return Encoding(np.dtype(dtype).name, said["scale_factor"], said.get("add_offset", 0.0), fill)
    if np.issubdtype(band.dtype, np.floating):
        return None
    raise ValueError(
        f"{band.name} is {band.dtype}: digital numbers, and no attribute scale_factor says what they mean. Type "
        "scale=1e-4 (and offset=-0.1 where the product of baseline 04.00 or later kept its offset), or load it "
        "with xr_ginet.open_stac, which reads both from the catalogue"
    )


def _was_decoded(band: xr.DataArray) -> bool:
    return bool(np.issubdtype(band.dtype, np.floating)) and band.encoding.get("scale_factor", 1) != 1


def _is_of_eopf(band: xr.DataArray) -> bool:
    """Return whether floats that state no scale are of an EOPF product: xarray decoded them, and a cast lost how."""
    return band.attrs.get("units") == "digital_counts"


def scaled(ds: xr.Dataset, *, scale: float | None, offset: float, nodata: float | None) -> xr.Dataset:
    """Return a cube whose bands, on any grid, are reflectance by `to_reflectance`; without a scale as it is."""
    if scale is None and not nodata:
        return ds
    bands = [ds[name] for name in BANDS if name in ds]
    attrs = source_attrs(stored_as(band, scale=scale, offset=offset, nodata=nodata) for band in bands)
    to = partial(to_reflectance, scale=scale, offset=offset, nodata=nodata)
    return ds.assign({band.name: to(band) for band in bands}).assign_attrs(attrs)


def lasting_attrs(attrs: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return attributes without those of stored numbers and of grids, which no longer hold of new pixels."""
    gone = RADIOMETRIC_ATTRS | GRID_ATTRS
    return {key: v for key, v in attrs.items() if key not in gone and not str(key).startswith("STATISTICS_")}


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


def _without_conflicts(fine: xr.Dataset, coarse: xr.Dataset) -> tuple[xr.Dataset, xr.Dataset]:
    """Return both parts without the coordinates, such as stackstac's ``gsd``, that differ between them."""
    both = [
        c for c in fine.coords if c in coarse.coords and not set(FINE_DIMS) & set(fine[c].dims) and c != "spatial_ref"
    ]
    differ = [c for c in both if fine[c].chunks is None and not fine[c].variable.equals(coarse[c].variable)]
    return fine.drop_vars(differ), coarse.drop_vars(differ)


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
