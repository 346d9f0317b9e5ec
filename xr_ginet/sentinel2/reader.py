"""Scenes to lazy reflectance on one grid: rasters through stackstac, Zarr arrays through zarr.

stackstac is handed plain items of our own making and told the exact grid; both readers give raw digital numbers, which
are scaled here, item by item, before any mosaic. No pixel is read until Dask asks for it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .addresses import Address
from .arrays import open_array, read_array
from .bands import SCL
from .grids import DIMS, FINE_DIMS, Grid
from .items import BandAsset, Scene
from .radiometry import Radiometry

if TYPE_CHECKING:
    import dask.array as da


def read_scenes(
    scenes: Sequence[Scene],
    names: Sequence[str],
    grid: Grid,
    epsg: int,
    chunk: int,
    steps: Sequence[Sequence[int]],
) -> xr.Dataset:
    """Return bands of one resolution as lazy reflectance on one grid, with the dims of that resolution.

    Of the scene classification, which is read by itself, the classes are returned, uint8. ``steps`` lists, for each
    time step, the scenes that make it up, by index; the first one's pixels are on top.
    """
    numbers = _digital_numbers(scenes, names, grid, epsg, chunk)
    meaning = tuple(tuple(scene.bands[name].radiometry for name in names) for scene in scenes)
    values = numbers.data.map_blocks(_reflectance, meaning, dtype="float32", meta=np.empty((0,) * 4, "float32"))
    reflectance = numbers.copy(data=values).drop_attrs()
    if all(len(members) == 1 for members in steps):
        reflectance = reflectance.isel(time=[index for (index,) in steps])
    else:
        reflectance = xr.concat([_mosaic(reflectance.isel(time=list(members))) for members in steps], "time")
    if names == [SCL]:
        reflectance = reflectance.fillna(0).astype("uint8")
    rename = dict(zip(FINE_DIMS, DIMS[round(abs(grid.dx))], strict=True))
    return reflectance.assign_coords(band=list(names)).to_dataset("band").rename(rename)


def _digital_numbers(scenes: Sequence[Scene], names: Sequence[str], grid: Grid, epsg: int, chunk: int) -> xr.DataArray:
    """Return what is stored of all scenes, ``time, band, y, x``; what no raster covers is not above its nodata."""
    members: dict[bool, list[int]] = {}
    for index, scene in enumerate(scenes):
        members.setdefault(scene.bands[names[0]].is_zarr, []).append(index)
    parts = [
        (_zarr_numbers if is_zarr else _raster_numbers)([scenes[i] for i in indices], names, grid, epsg, chunk)
        for is_zarr, indices in members.items()
    ]
    y, x = grid.coords()
    joined = xr.concat([part.assign_coords(y=y, x=x) for part in parts], "time", join="override")
    order = np.argsort([i for indices in members.values() for i in indices])
    return joined if len(parts) == 1 else joined.isel(time=order)


def _raster_numbers(scenes: Sequence[Scene], names: Sequence[str], grid: Grid, epsg: int, chunk: int) -> xr.DataArray:
    import stackstac

    from .rasters import Readers, gdal_env

    assets = {_place(i, scene.bands[name]): scene.bands[name] for i, scene in enumerate(scenes) for name in names}
    read = [scene.bands[name].radiometry for scene in scenes for name in names]
    dtype = np.result_type(*{radiometry.dtype for radiometry in read})
    numbers = stackstac.stack(
        # Plain items of our own making: stackstac 0.5.1 does not read what pystac 1.15 makes of proj:epsg.
        [_plain_item(index, scene, names) for index, scene in enumerate(scenes)],
        assets=list(names),
        epsg=epsg,
        resolution=abs(grid.dx),
        bounds=grid.bounds,
        snap_bounds=False,
        dtype=dtype,
        fill_value=dtype.type(min(radiometry.nodata for radiometry in read)),
        rescale=False,  # it would apply offsets that the pixels no longer have
        xy_coords="center",
        chunksize=chunk,
        properties=False,
        band_coords=False,
        sortby_date=False,
        gdal_env=gdal_env(),
        reader=Readers(assets),
        errors_as_nodata=(),  # by default a file that is not found would be nothing but missing pixels
    ).reset_coords(drop=True)
    return numbers.copy(data=_with_readers_at_hand(numbers.data))


def _with_readers_at_hand(numbers: da.Array) -> da.Array:
    """Return stackstac's array with its readers as data of the graph; they open files when they are asked for pixels.

    As tasks, each of which all blocks of a raster depend on, they made Dask read whole rasters before the first block
    was worked on.
    """
    import dask
    import dask.array as da
    from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

    layers, dependencies = dict(numbers.dask.layers), dict(numbers.dask.dependencies)
    for name in [name for name in layers if name.startswith("asset_table_to_reader_and_window")]:
        keys = list(layers[name].get_output_keys())
        layers[name] = MaterializedLayer(dict(zip(keys, dask.get(numbers.dask.cull(keys), keys), strict=True)))
        dependencies[name] = set()
    return da.Array(HighLevelGraph(layers, dependencies), numbers.name, numbers.chunks, meta=numbers._meta)


def _zarr_numbers(scenes: Sequence[Scene], names: Sequence[str], grid: Grid, epsg: int, chunk: int) -> xr.DataArray:
    import dask.array as da

    for scene in scenes:
        if not scene.is_native(epsg):
            raise ValueError(
                f"item {scene.id} is stored as Zarr in EPSG:{scene.bands[names[0]].epsg}, and only rasters that GDAL "
                f"opens are resampled to EPSG:{epsg}. Open the items of each UTM zone by themselves"
            )
    stored = _Stored(tuple(tuple(scene.bands[name] for name in names) for scene in scenes), grid)
    numbers = da.from_array(
        stored,
        chunks=(1, 1, chunk, chunk),
        getitem=operator.getitem,  # which Dask does not merge with later indexing: whole blocks are asked for
        meta=np.empty((0, 0, 0, 0), stored.dtype),
    )
    times = np.array([np.datetime64(scene.datetime, "ns") for scene in scenes])
    return xr.DataArray(numbers, {"time": times, "band": list(names)}, ("time", "band", *FINE_DIMS))


@dataclass(frozen=True)
class _Stored:
    """Zarr arrays, ``time, band``, seen through a grid of their lattice; opened where their pixels are asked for."""

    assets: tuple[tuple[BandAsset, ...], ...]
    grid: Grid
    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.assets), len(self.assets[0]), *self.grid.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.result_type(*{asset.radiometry.dtype for row in self.assets for asset in row})

    def __dask_tokenize__(self) -> Any:
        return self.grid, [(asset.href.token, asset.grid, asset.radiometry) for row in self.assets for asset in row]

    def __getitem__(self, block: tuple[slice, slice, slice, slice]) -> NDArray:
        time, band, rows, columns = block
        images = [[self._read(asset, rows, columns) for asset in row[band]] for row in self.assets[time]]
        return np.array(images, self.dtype)

    def _read(self, asset: BandAsset, rows: slice, columns: slice) -> NDArray:
        array = open_array(asset.href)
        if (array.shape, array.dtype) != (asset.grid.shape, asset.radiometry.dtype):
            raise ValueError(
                f"{asset.about}: {asset.href} holds {array.shape} pixels of {array.dtype}; its item says "
                f"{asset.grid.shape} of {asset.radiometry.dtype}. Correct the item, or leave it out"
            )
        shifts = (self.grid.y0 - asset.grid.y0) / self.grid.dy, (self.grid.x0 - asset.grid.x0) / self.grid.dx
        inside, outside = [], []
        for place, shift, size in zip((rows, columns), shifts, array.shape, strict=True):
            first, last = place.start + round(shift), place.stop + round(shift)
            low, high = (min(max(edge, 0), size) for edge in (first, last))
            inside.append(slice(low, high))
            outside.append((low - first, last - high) if low < high else (last - first, 0))
        missing = np.nan if array.dtype.kind == "f" else asset.radiometry.nodata
        pixels = read_array(asset.href, tuple(inside))
        return np.pad(pixels, outside, constant_values=missing)


def look(href: str) -> dict[str, Any]:
    """Return in the words of STAC what a Zarr array of an EOPF product says of itself; its pixels are not read.

    Parameters
    ----------
    href : str
        Path or URL of the array; its coordinates ``y`` and ``x``, of the centres, lie beside it.

    Returns
    -------
    dict
        ``proj:transform``, ``proj:shape``, ``data_type``, and ``raster:scale`` and ``raster:offset`` where attributes
        tell them.
    """
    array = open_array(Address(href))
    attrs = {**array.attrs.get("_eopf_attrs", {}), **array.attrs}
    grid = _grid_beside(href, array.shape)
    said: dict[str, Any] = {
        "proj:transform": list(grid.transform),
        "proj:shape": list(grid.shape),
        "data_type": str(array.dtype),
    }
    for field, attribute in (("raster:scale", "scale_factor"), ("raster:offset", "add_offset")):
        if attribute in attrs:
            said[field] = float(attrs[attribute])
    return said


def _grid_beside(href: str, shape: tuple[int, ...]) -> Grid:
    """Return the grid of an array by its coordinates, which must be as long as its sides before they are read."""
    path, mark, query = href.partition("?")
    coords = {}
    for dim, size in zip(FINE_DIMS, shape[-2:], strict=True):
        address = Address(f"{path.rstrip('/').rpartition('/')[0]}/{dim}{mark}{query}")
        if (found := open_array(address).shape) != (size,):
            raise ValueError(f"{address} has the shape {found}; the array beside it has {size} pixels along {dim}")
        coords[dim] = read_array(address, (slice(None),)).astype("float64")
    return Grid.from_coords(xr.Dataset(coords=coords))


def _reflectance(
    numbers: NDArray, meaning: tuple[tuple[Radiometry, ...], ...], *, block_id: tuple[int, ...]
) -> NDArray:
    """Return one block ``(1, 1, y, x)`` of stored numbers as reflectance, NaN where missing or saturated."""
    time, band, *_ = block_id
    return meaning[time][band].reflectance(numbers)


def _mosaic(reflectance: xr.DataArray) -> xr.DataArray:
    """Return one time step of several, the first valid pixel on top; its time is the first one's."""
    import stackstac

    first = reflectance.isel(time=0)
    if reflectance.sizes["time"] == 1:
        return first
    return stackstac.mosaic(reflectance, dim="time", reverse=True).assign_coords(time=first["time"])


def _place(index: int, asset: BandAsset) -> str:
    """Return what stands for a file's address in stackstac's graph, and tells it from all others."""
    return f"{index}/{asset.href}/{asset.href.token}"


def _plain_item(index: int, scene: Scene, names: Sequence[str]) -> dict[str, Any]:
    assets = {
        name: {
            "href": _place(index, asset),
            "type": "image/tiff",
            "proj:epsg": asset.epsg,
            "proj:transform": list(asset.grid.transform),
            "proj:shape": list(asset.grid.shape),
        }
        for name in names
        if (asset := scene.bands[name])
    }
    return {"id": scene.id, "properties": {"datetime": scene.datetime.isoformat()}, "assets": assets}
