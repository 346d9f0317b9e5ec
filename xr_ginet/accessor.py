"""``ds.ginet``, ``dt.ginet``: each method is a docstring and one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import xarray as xr

from . import cog, mapping, store
from .sentinel2 import eopf, selection
from .sentinel2.layouts import unstack
from .sentinel2.scl import CLOUDY, mask_clouds

if TYPE_CHECKING:
    from .encoding import StoredDtype
    from .growing import Outcome
    from .mapping.predictor import Consistency, Precision
    from .network import Checkpoint
    from .sentinel2.search import Catalog
    from .training.patches import Patches


@xr.register_dataset_accessor("ginet")
@xr.register_dataarray_accessor("ginet")
class GINetAccessor:
    """Super-resolution of a Sentinel-2 cube.

    The cube is a two-grid Dataset, as `xr_ginet.open_stac`, `xr_ginet.open_safe`, `xr_ginet.pair` and
    `xr_ginet.to_native` return it; `superresolve` takes 10 m cubes with repeated 20 m bands too. Of a DataArray the
    bands along ``band`` are meant.

    Notes
    -----
    To xarray the two grids are four independent dimensions. ``ds.B08 - ds.B05`` becomes an array over all four, of
    gigabytes, without a word, and ``ds.sel``, ``ds.isel`` and ``ds.rio.clip`` cut one grid alone: take those of
    ``ds.ginet``, and compute with bands of one grid, or with any after `superresolve`.

    On a cluster of `distributed` a cube that was built before ``persist`` must not be computed after it beside the
    persisted one: Dask (seen with 2026.8) gives merged tasks of both the same names, and may fail with ``KeyError:
    ('reflectance-getitem-…', …)``. Build what is computed from what ``persist`` returned, or type
    ``dask.config.set({"optimization.fuse.active": False})`` before both.
    """

    def __init__(self, cube: xr.Dataset | xr.DataArray) -> None:
        self._cube = cube

    @property
    def _ds(self) -> xr.Dataset:
        return unstack(self._cube, "cube")

    def isel(self, *, x: slice | None = None, y: slice | None = None, time: Any = None, **others: Any) -> xr.Dataset:
        """Return a part by the positions of 10 m pixels, on all grids: see `xr_ginet.sentinel2.selection.isel`."""
        return selection.isel(self._ds, x=x, y=y, time=time, **others)

    def sel(self, *, x: slice | None = None, y: slice | None = None, time: Any = None, **others: Any) -> xr.Dataset:
        """Return a part by coordinates, on all grids: see `xr_ginet.sentinel2.selection.sel`."""
        return selection.sel(self._ds, x=x, y=y, time=time, **others)

    def clip(self, area: Any, *, crs: Any = None) -> xr.Dataset:
        """Return the part in a box or geometry, on all grids: see `xr_ginet.sentinel2.selection.clip`."""
        return selection.clip(self._ds, area, crs=crs)

    def point(
        self,
        x: float | None = None,
        y: float | None = None,
        *,
        lon: float | None = None,
        lat: float | None = None,
    ) -> xr.Dataset:
        """Return the values of all bands at a place: see `xr_ginet.sentinel2.selection.point`."""
        return selection.point(self._ds, x, y, lon=lon, lat=lat)

    def mask_clouds(self, classes: Sequence[int] = CLOUDY, *, buffer: int = 0) -> xr.Dataset:
        """Return the cube without what its scene classification calls cloudy: see `xr_ginet.mask_clouds`."""
        return mask_clouds(self._ds, classes, buffer=buffer)

    def superresolve(
        self,
        *,
        weights: str | Path | Checkpoint | None = "default",
        bands: Literal["20m", "all"] = "20m",
        weights_60m: str | Path | Checkpoint | None = None,
        depth: int | str | None = None,
        device: str = "auto",
        precision: Precision = "auto",
        consistency: Consistency = "none",
        self_ensemble: bool = False,
        resources: Mapping[str, float] | None = None,
        catalog: Catalog | None = None,
        collection: str = "sentinel-2-l2a",
        sign: Callable[[Any], Any] | None = None,
        scale: float | None = None,
        offset: float = 0.0,
        nodata: float | None = 0,
        like_store: Any = None,
    ) -> xr.Dataset:
        """Return all bands on the 10 m grid, lazily: see `xr_ginet.superresolve`."""
        return mapping.superresolve(
            self._cube,
            weights=weights,
            bands=bands,
            weights_60m=weights_60m,
            depth=depth,
            device=device,
            precision=precision,
            consistency=consistency,
            self_ensemble=self_ensemble,
            resources=resources,
            catalog=catalog,
            collection=collection,
            sign=sign,
            scale=scale,
            offset=offset,
            nodata=nodata,
            like_store=like_store,
        )

    def guide(
        self,
        *,
        method: Literal["learned", "kmeans"] = "learned",
        weights: str | Path | Checkpoint = "default",
        device: str = "auto",
    ) -> xr.DataArray:
        """Return the geometry guide drawn from the 10 m bands, lazily: see `xr_ginet.guide`."""
        return mapping.guide(self._ds, method=method, weights=weights, device=device)

    def patches(self, **options: Any) -> Patches:
        """Return a torch dataset of training patches: see `xr_ginet.training.patches`, whose options are taken."""
        from .training.patches import Patches, PatchOptions

        return Patches([self._ds], PatchOptions(**options))

    def adapt(self, path: str | Path, **arguments: Any) -> Checkpoint:
        """Fine-tune weights on this cube, now, and store them: see `xr_ginet.training.fit.adapt`."""
        from .training.fit import adapt

        return adapt(self._ds, path, **arguments)

    def evaluate(
        self, models: Sequence[str | Path | Checkpoint] = ("bicubic", "default"), **options: Any
    ) -> xr.Dataset:
        """Return how good models are on this cube, now: see `xr_ginet.evaluation.evaluate`."""
        from .evaluation import evaluate

        return evaluate(self._ds, models, **options)

    def to_zarr(
        self,
        target: Any,
        *,
        mode: store.Mode | None = None,
        resume: bool = False,
        dtype: StoredDtype = "float32",
        like: Literal["input"] | None = None,
        zarr_format: int = 3,
        inner_chunks: int | None = None,
        compression_level: int = 3,
        progress: bool = False,
        tell: Callable[[Outcome], None] | None = None,
        compute: bool = True,
    ) -> Any:
        """Write the cube to a Zarr store: see `xr_ginet.to_zarr`."""
        return store.to_zarr(
            self._ds,
            target,
            mode=mode,
            resume=resume,
            dtype=dtype,
            like=like,
            zarr_format=zarr_format,
            inner_chunks=inner_chunks,
            compression_level=compression_level,
            progress=progress,
            tell=tell,
            compute=compute,
        )

    def to_cog(
        self,
        folder: str | Path,
        *,
        stacked: bool = False,
        dtype: StoredDtype = "uint16",
        like: Literal["input"] | None = None,
        overwrite: bool = False,
        progress: bool = False,
    ) -> list[Path]:
        """Write the cube as Cloud Optimized GeoTIFFs: see `xr_ginet.to_cog`."""
        return cog.to_cog(
            self._ds, folder, stacked=stacked, dtype=dtype, like=like, overwrite=overwrite, progress=progress
        )


@xr.register_datatree_accessor("ginet")
class GINetTreeAccessor:
    """Super-resolution of an EOPF product, as ``xr.open_datatree(url, engine="zarr", chunks={})`` returns it."""

    def __init__(self, tree: xr.DataTree) -> None:
        self._tree = tree

    def superresolve(
        self,
        *,
        weights: str | Path | Checkpoint | None = "default",
        depth: int | str = "exact",
        device: str = "auto",
        precision: Precision = "auto",
        consistency: Consistency = "none",
        self_ensemble: bool = False,
    ) -> xr.DataTree:
        """Return the product with its 20 m bands in ``measurements/reflectance/r10m`` too, lazily.

        The new bands are float reflectance, missing as NaN, and carry in their attributes what made them; everything
        else in the tree is as it was. Options are those of `xr_ginet.superresolve`.
        """
        result = mapping.superresolve(
            eopf.to_cube(self._tree),
            weights=weights,
            depth=depth,
            device=device,
            precision=precision,
            consistency=consistency,
            self_ensemble=self_ensemble,
        )
        return eopf.with_bands(self._tree, result)
