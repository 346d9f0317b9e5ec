"""A scene's bands as a catalogue would hold them: Cloud Optimized GeoTIFFs and the STAC item that describes them.

Nothing here knows that the bands were simulated. No mask of clouds, no thumbnail, no granule metadata is written.

References
----------
Item layout: Earth Search v1, collection ``sentinel-2-l2a``.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..sentinel2.bands import BANDS, BANDS_10M, BANDS_20M

_Grid = tuple[float, float, float, float, float, float]  # affine coefficients a b c d e f


def write_cogs(
    fine: NDArray[Any],
    coarse: NDArray[Any],
    folder: str | Path,
    *,
    transform: Sequence[float],
    crs: str,
    datetime: dt.datetime | str,
    item_id: str,
    collection: str = "sentinel-2-l2a",
) -> dict[str, Any]:
    """Write ten one-band Cloud Optimized GeoTIFFs and return the STAC item that describes them.

    Parameters
    ----------
    fine : (4, y, x)
        The bands BANDS_10M. Floating point reflectance (stored × 10,000, at least 1; NaN as 0), or uint16 digital
        numbers (stored as they are, 0 for missing).
    coarse : (6, y / 2, x / 2)
        The bands BANDS_20M, likewise.
    folder : path
        Files go to ``folder / item_id / B02.tif`` and so on. Created if missing.
    transform : sequence of float
        ``a b c d e f`` of the 10 m grid; a rasterio ``Affine`` will do.
    crs : str
        Anything that rasterio understands and that has an EPSG code.
    datetime : datetime or str
        Of acquisition. Without a time zone: UTC.
    item_id, collection : str
        For the item.

    Returns
    -------
    dict
        A STAC 1.0 item in the style of Earth Search v1; its hrefs are absolute local paths.

    Raises
    ------
    ValueError
        If the shapes do not fit together or the reference system has no EPSG code.
    TypeError
        If an array is neither floating point nor uint16.
    """
    from rasterio.crs import CRS

    fine, coarse = np.asarray(fine), np.asarray(coarse)
    if fine.ndim != 3 or len(fine) != 4 or coarse.shape != (6, fine.shape[1] / 2, fine.shape[2] / 2):
        raise ValueError(f"fine {fine.shape} and coarse {coarse.shape}: must be (4, y, x) and (6, y / 2, x / 2)")
    epsg = CRS.from_user_input(crs).to_epsg()
    if epsg is None:
        raise ValueError(f"crs={crs!r}: has no EPSG code, which the item needs; give one such as 'EPSG:32630'")
    folder = (Path(folder) / item_id).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    a, b, c, d, e, f = (float(value) for value in tuple(transform)[:6])
    fine_grid, coarse_grid = (a, b, c, d, e, f), (2 * a, 2 * b, c, 2 * d, 2 * e, f)
    assets = {}
    for names, bands, grid in ((BANDS_10M, fine, fine_grid), (BANDS_20M, coarse, coarse_grid)):
        for name, values in zip(names, bands, strict=True):
            path = folder / f"{name}.tif"
            _write_cog(path, digital_numbers(values), grid, f"EPSG:{epsg}")
            assets[BANDS[name].aliases[0]] = _asset(path, name, values.shape, grid)
    ring = _outline(fine_grid, fine.shape[1], fine.shape[2], epsg)
    return _item(item_id, collection, datetime, epsg, ring, assets)


def digital_numbers(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Return uint16 as it is, and floating point reflectance × 10,000, rounded, 1 to 65535, with NaN as 0."""
    if values.dtype == np.uint16:
        return values
    if not np.issubdtype(values.dtype, np.floating):
        raise TypeError(f"dtype {values.dtype}: must be floating point reflectance or uint16 digital numbers")
    scaled = np.rint(values * values.dtype.type(10000)).clip(1, 65535)
    return np.where(np.isnan(scaled), 0, scaled).astype(np.uint16)


def _write_cog(path: Path, values: NDArray[np.uint16], transform: _Grid, crs: str) -> None:
    import rasterio
    from rasterio import Affine

    height, width = values.shape
    profile = {"driver": "COG", "dtype": "uint16", "count": 1, "height": height, "width": width, "nodata": 0}
    options = {"compress": "deflate", "predictor": "yes", "blocksize": 256, "overview_resampling": "average"}
    with rasterio.open(path, "w", **profile, **options, transform=Affine(*transform), crs=crs) as file:
        file.write(values, 1)


def _asset(path: Path, name: str, shape: tuple[int, ...], transform: _Grid) -> dict[str, Any]:
    band = BANDS[name]
    alias = band.aliases[0]
    return {
        "href": str(path),
        "type": "image/tiff; application=geotiff; profile=cloud-optimized",
        "title": f"{band.long_name.capitalize()} - {band.resolution}m",
        "eo:bands": [
            {
                "name": name,
                "common_name": alias.rstrip("123") if "rededge" in alias else alias,
                "center_wavelength": round(band.wavelength / 1000, 4),
                "full_width_half_max": round(band.width / 1000, 4),
            }
        ],
        "gsd": band.resolution,
        "proj:shape": list(shape),
        "proj:transform": list(transform),
        "raster:bands": [
            {
                "nodata": 0,
                "data_type": "uint16",
                "spatial_resolution": band.resolution,
                "scale": 0.0001,
                "offset": 0,
            }
        ],
        "roles": ["data", "reflectance"],
    }


def _outline(transform: _Grid, height: int, width: int, epsg: int) -> NDArray[np.float64]:
    """Return the border ``(65, 2)``, longitude and latitude, closed and counterclockwise, with 16 points a side."""
    from rasterio.warp import transform as reproject

    t = np.arange(16) / 16
    columns = np.concatenate([0 * t, t, 0 * t + 1, 1 - t, [0]]) * width
    rows = np.concatenate([t, 0 * t + 1, 1 - t, 0 * t, [0]]) * height
    a, b, c, d, e, f = transform
    x, y = a * columns + b * rows + c, d * columns + e * rows + f
    return np.stack(reproject(f"EPSG:{epsg}", "EPSG:4326", x.tolist(), y.tolist()), axis=-1)


def _item(
    item_id: str,
    collection: str,
    datetime: dt.datetime | str,
    epsg: int,
    ring: NDArray[np.float64],
    assets: dict[str, Any],
) -> dict[str, Any]:
    when = dt.datetime.fromisoformat(datetime) if isinstance(datetime, str) else datetime
    when = when.replace(tzinfo=when.tzinfo or dt.UTC).astimezone(dt.UTC)
    small = 1e-7  # degrees: what the border may still bulge between two points of the ring
    west, south = (ring.min(axis=0) - small).tolist()
    east, north = (ring.max(axis=0) + small).tolist()
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [
            "https://stac-extensions.github.io/projection/v1.1.0/schema.json",
            "https://stac-extensions.github.io/sentinel-2/v1.0.0/schema.json",
            "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
            "https://stac-extensions.github.io/eo/v1.1.0/schema.json",
        ],
        "id": item_id,
        "geometry": {"type": "Polygon", "coordinates": [ring.tolist()]},
        "bbox": [west, south, east, north],
        "properties": {
            "platform": "sentinel-2b",
            "constellation": "sentinel-2",
            "instruments": ["msi"],
            "eo:cloud_cover": 0.0,
            "proj:epsg": epsg,
            "proj:centroid": {"lat": (south + north) / 2, "lon": (west + east) / 2},
            "s2:processing_baseline": "02.14",
            "s2:product_type": "S2MSI2A",
            "datetime": when.isoformat().replace("+00:00", "Z"),
            "earthsearch:boa_offset_applied": False,
        },
        "links": [],
        "assets": assets,
        "collection": collection,
    }
