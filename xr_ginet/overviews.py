"""Overviews: coarser cubes beside a cube, and the attributes by which web maps find them.

A pyramid is a Zarr group whose members are cubes: ``cube.zarr/10m`` as `to_zarr` writes it, and ``20m``, ``40m``, … of
its means, which grow date by date as it does. The group tells of them by the GeoZarr conventions.

References
----------
https://github.com/zarr-conventions/multiscales, spatial and proj.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from zarr.storage import StorePath

from .documents import Documents, at, get, members, put, whole
from .encoding import ESA, Encoding
from .folders import is_temporary
from .growing import CHECKSUM, status
from .guards import sole_writer
from .paths import expanded
from .sentinel2.arrays import open_cube
from .sentinel2.bands import BANDS
from .sentinel2.grids import DIMS, FINE_DIMS, Grid, read_crs
from .store import to_zarr

SOURCE = "ginet_source_checksum"
"""Variable of an overview: for each date the record of the level that it was made from."""

SMALLEST = 512
"""Pixels of the longer side at which no further overview is needed."""


def build_overviews(target: str | Path, *, levels: int | None = None) -> list[str]:
    """Write overviews of a cube beside it: means of 2 × 2 pixels, level by level, and the group's attributes.

    Parameters
    ----------
    target : str or Path
        A cube in a Zarr store of version 3, a member of the group that becomes the pyramid, as in
        ``ds.ginet.to_zarr("cube.zarr/10m")`` and ``build_overviews("cube.zarr/10m")``. Local or an fsspec URL.
    levels : int, optional
        How many; by default as many as it takes until the longer side has at most 512 pixels.

    Returns
    -------
    list of str
        The names of the overviews, finest first: the sizes of their pixels, as ``20m`` (``0.0002deg``).

    Raises
    ------
    ValueError
        If the target has no name within a group, or one that an overview would have; if the group holds another cube's
        overviews; if the cube is of another version of Zarr, holds dates that are not complete, or has no CRS.
    FileNotFoundError
        If there is no cube.

    Notes
    -----
    A pixel of an overview is the mean of those of its four that are not missing; other variables than reflectance are
    taken from the first of them. Chunks and encoding are those of the cube. Of a cube that was written with
    ``resume=True`` or ``mode="a"`` only those dates are made whose overviews are not there, or not of these pixels:
    after dates were appended, call it again. Until then readers that go by the group see the cube as it was.
    """
    import zarr

    target = expanded(target)
    parent, _, name = str(target).rstrip("/").rpartition("/")
    if not parent or parent.endswith(":/") or not name:
        raise ValueError(
            f"{target} is no member of a group: overviews lie beside it. Write it to {str(target).rstrip('/')}/10m"
        )
    if levels is not None and levels < 0:
        raise ValueError(f"levels={levels}: must be 0 or more")
    source, names = f"{parent}/{name}", [name]
    with _open(source) as cube:
        crs, grid = read_crs(cube), Grid.from_coords(cube)
        if crs is None:
            raise ValueError(f"{source} has no CRS, without which no map can place it")
        if (version := zarr.open_group(source, mode="r").metadata.zarr_format) != 3:
            raise ValueError(f"{source} is of version {version} of Zarr: the conventions are of version 3")
        if levels is None:
            levels = max(0, int(np.ceil(np.log2(max(grid.shape) / SMALLEST))))
        if CHECKSUM in cube and not (complete := status(source)).all():
            times = complete["time"].values[~complete.values] if complete.ndim else []
            lacking = ", ".join(str(time)[:19] for time in times[:3]) or "it is"
            raise ValueError(
                f"{source} is not complete ({lacking} not): go on with its job first, by the same to_zarr(resume=True)"
            )
    grids, unit = [grid], "m" if crs.is_projected else "deg"
    for _ in range(levels):
        grids.append(_coarser(grids[-1]))
        names.append(f"{abs(grids[-1].dx):g}{unit}")
    if name in names[1:]:
        raise ValueError(f"{source} is named as one of its overviews would be: {name}. Name it for its pixels")
    place = at(parent)
    before: dict[str, Any] = json.loads(get(place, "zarr.json") or b"{}")
    known: Any = before.get("attributes", {}).get("multiscales")
    if known and (other := known["layout"][0]["asset"]) != name:
        raise ValueError(f"{parent} holds the overviews of {other} already. Write {name} to a group of its own")
    with sole_writer(parent):
        for finer, coarser in pairwise(names):
            _build(f"{parent}/{finer}", f"{parent}/{coarser}")
        _show(place, before, names, _attributes(names, grids, crs))
    return names[1:]


def _open(store: str) -> xr.Dataset:
    return open_cube(store, chunks={})


def _coarser(grid: Grid) -> Grid:
    """Return the grid of twice the pixels' size that covers all of a grid."""
    height, width = (-(-n // 2) for n in grid.shape)
    return Grid(grid.x0, grid.y0, grid.dx * 2, grid.dy * 2, (height, width))


def _build(finer: str, coarser: str) -> None:
    """Write one level from the one before it: all of it, or those dates that it lacks."""
    with _open(finer) as cube:
        images = {name: v for name, v in cube.data_vars.items() if set(FINE_DIMS) <= set(v.dims)}
        first = next((v for name, v in images.items() if name in BANDS), next(iter(images.values())))
        stored = first.encoding
        options = _options_of(stored)
        outer = stored.get("shards") or stored["chunks"]
        if stored.get("shards"):
            options["inner_chunks"] = stored["chunks"][-1]
        chunks = dict(zip(first.dims, outer, strict=True))
        level = halved(cube).chunk({dim: n for dim, n in chunks.items() if dim in cube.dims})
        if CHECKSUM not in cube:
            to_zarr(level, coarser, mode="w", **options)
            return
        level = level.drop_vars([CHECKSUM, SOURCE], errors="ignore").assign(
            {SOURCE: cube[CHECKSUM].load().drop_attrs()}
        )
        if "time" not in cube.dims:
            to_zarr(level, coarser, mode="w", **options)
            return
        stale = ~_made_from(coarser, level)
        if stale.any():
            to_zarr(level.isel(time=stale), coarser, mode="a", **options)
        elif not _shown(coarser):  # a job was killed after its last date was written
            to_zarr(level, coarser, mode="a", resume=True, **options)


def _options_of(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `to_zarr` by which a variable was encoded as it is."""
    if np.dtype(stored["dtype"]).kind == "f":
        return {"dtype": "float32"}
    return {"dtype": "uint16"} if Encoding.from_attrs(stored) == ESA else {"like": "input"}


def _made_from(store: str, level: xr.Dataset) -> np.ndarray:
    """Return which dates of a level are in its store already, complete and made from the same pixels."""
    try:
        complete = status(store)
    except FileNotFoundError:
        return np.zeros(level.sizes["time"], bool)
    with whole(store).opened(at(store)) as stored:
        known = stored[SOURCE].reset_coords(drop=True).where(complete.values, 0).load()
    known = known.reindex(time=level["time"].astype(known["time"].dtype), fill_value=np.uint64(0))
    return known.values == level[SOURCE].values


def _shown(store: str) -> bool:
    """Return whether readers see all dates of a level."""
    seen = Documents.seen(at(store))
    return seen is not None and seen.lengths("time") == whole(store).lengths("time")


def halved(cube: xr.Dataset) -> xr.Dataset:
    """Return the cube whose pixels are the means of 2 × 2 of another's; lazy where the other is.

    What lies on other grids, as ``SCL`` at 20 m, is left out.
    """
    windows = dict.fromkeys(FINE_DIMS, 2)
    cube = cube.drop_dims([dim for dims in DIMS.values() for dim in dims if dim in cube.dims and dim not in FINE_DIMS])
    y, x = _coarser(Grid.from_coords(cube)).coords()
    result = {}
    for name, variable in cube.data_vars.items():
        if not set(FINE_DIMS) <= set(variable.dims):
            result[name] = variable
        elif np.issubdtype(variable.dtype, np.floating):
            mean = variable.astype("float32").coarsen(windows, boundary="pad").mean(keep_attrs=True)
            result[name] = mean.assign_coords(y=y, x=x)
        else:
            result[name] = variable.isel(y=slice(None, None, 2), x=slice(None, None, 2)).assign_coords(y=y, x=x)
    halves = xr.Dataset(result, attrs=cube.attrs).drop_encoding()
    for dim in FINE_DIMS:
        halves[dim].attrs = cube[dim].attrs
    return halves


def _attributes(names: list[str], grids: list[Grid], crs: Any) -> dict[str, Any]:
    """Return the attributes of the conventions, by which maps find the levels."""
    from zarr_cm import create_many

    layout = [
        {"asset": name, "spatial:transform": list(grid.transform), "spatial:shape": list(grid.shape)}
        | ({"derived_from": names[i - 1], "transform": {"scale": [2.0, 2.0]}} if i else {})
        for i, (name, grid) in enumerate(zip(names, grids, strict=True))
    ]
    code = crs.to_authority()
    return create_many(
        {
            "multiscales": {"layout": layout, "resampling_method": "average"},
            "proj": {"proj:code": ":".join(code)} if code else {"proj:wkt2": crs.to_wkt()},
            "spatial": {
                "spatial:dimensions": list(FINE_DIMS),
                "spatial:transform": list(grids[0].transform),
                "spatial:shape": list(grids[0].shape),
                "spatial:bbox": list(grids[0].bounds),
            },
        }
    )


def _show(place: StorePath, before: dict[str, Any], names: list[str], attrs: dict[str, Any]) -> None:
    """Put the group's attributes, and in one object with them all that readers see of its members."""
    known = (before.get("consolidated_metadata") or {}).get("metadata", {})
    listed = {**dict.fromkeys(names), **dict.fromkeys(key.partition("/")[0] for key in known)}
    metadata: dict[str, Any] = {}
    for name in (*listed, *sorted(set(members(place)) - listed.keys())):
        seen = Documents.seen(place / name)
        if seen is None:
            if (array := json.loads(get(place, f"{name}/zarr.json") or b"{}")).get("node_type") == "array":
                metadata[name] = array
        elif name in listed or not (SOURCE in seen.arrays or is_temporary(name)):  # levels that were not finished
            metadata[name] = {"attributes": seen.attrs, "zarr_format": 3, "node_type": "group"} | _consolidated({})
            metadata |= {f"{name}/{array}": documents["zarr.json"] for array, documents in seen.arrays.items()}
    root = {"attributes": before.get("attributes", {}) | attrs, "zarr_format": 3, "node_type": "group"}
    put(place, "zarr.json", json.dumps(root | _consolidated(metadata), indent=2).encode())


def _consolidated(metadata: dict[str, Any]) -> dict[str, Any]:
    return {"consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": metadata}}
