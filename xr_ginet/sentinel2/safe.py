"""SAFE products of ESA, as folder or zip, to the two-grid cube of reflectance.

Which file is which band is read from names, what digital numbers mean from the product's metadata. Pixels are read by
GDAL, also out of the zip, when Dask asks for them.

References
----------
ESA, Sentinel-2 Products Specification Document (S2-PDGS-TAS-DI-PSD), sections 4.6.3 and 4.9 (L1C and L2A products).
"""

from __future__ import annotations

import operator
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
import xarray as xr

from ..paths import expanded
from .addresses import failure
from .bands import BANDS_10M, BANDS_20M, SCL, bands_of, resolution_of
from .grids import COARSE_DIMS, FINE_DIMS
from .layouts import pair, place
from .provenance import ITEMS, MASK, REASONS, of_dates
from .radiometry import OFFSET_BASELINE, Radiometry, source_attrs

BAND_IDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
"""What the metadata's ``band_id`` counts."""

LARGEST_METADATA = 16 * 2**20
"""Bytes; ESA's have a hundredth of it."""
QUANTIFICATION = (100.0, 1e6)
"""Between which a product's digital numbers per reflectance lie; ESA's are 10,000."""

IMAGES = ("JP2OpenJPEG", "JP2KAK", "JP2ECW", "JP2MrSID")
"""GDAL's drivers of JPEG2000, by which alone images are opened."""


@dataclass(frozen=True)
class Product:
    """The files of one product."""

    name: str
    """Of the product, without ``.SAFE``."""
    root: str
    """What GDAL puts before the name of a file."""
    files: tuple[str, ...]
    """Relative to the root."""
    metadata: ElementTree.Element
    """Of the product: MTD_MSIL1C.xml or MTD_MSIL2A.xml."""

    @classmethod
    def find(cls, path: str | Path) -> Product:
        """Return the product at a path: its folder, its zip or its metadata file.

        Raises
        ------
        FileNotFoundError
            If there is nothing.
        ValueError
            If there is no Sentinel-2 product of level 1C or 2A, or more than one.
        """
        path = Path(expanded(path)).absolute()
        if path.suffix == ".xml":
            path = path.parent
        if path.is_dir():
            root, files = str(path), [f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file()]
        elif path.is_file():
            root, files = f"/vsizip/{path}", _members(path)
        elif path.exists():
            raise ValueError(f"{path} is neither a folder nor a zip: pass the .SAFE folder or the .zip of a product")
        else:
            raise FileNotFoundError(f"no product at {path}")
        found = [f for f in files if re.search(r"(^|/)(MTD_MSI|S2\w+_MTD_SAF)L(1C|2A)\w*\.xml$", f)]
        if len(found) != 1:
            raise ValueError(
                f"{path} holds {len(found)} files of product metadata (MTD_MSIL1C.xml or MTD_MSIL2A.xml)"
                f"{': ' + ', '.join(sorted(found)[:3]) if found else ''}. Pass the .SAFE folder or .zip of one product"
            )
        name = re.sub(r"(\.SAFE|\.zip)+$", "", Path(found[0]).parent.name or path.name)
        return cls(name, root, tuple(sorted(files)), _parsed(_content(path, found[0]), f"{path}/{found[0]}"))

    def image(self, name: str, resolution: int) -> str:
        """Return what GDAL opens for a band or a map at a resolution.

        Raises
        ------
        ValueError
            If there is no such image, or one for each of several tiles.
        """
        pattern = rf"/IMG_DATA/(?:R{resolution}m/\w+_{name}_{resolution}m|\w+_{name})\.jp2$"
        found = [f for f in self.files if re.search(pattern, f"/{f}")]
        if len(found) > 1:
            raise ValueError(
                f"{self.name} holds {name} of {len(found)} tiles: only products of one tile, as since December 2016, "
                "are read"
            )
        if not found:
            images = sorted({match for f in self.files for match in re.findall(r"IMG_DATA/.*_(B\w\w)", f)})
            raise ValueError(
                f"{self.name} has no {name} at {resolution} m under GRANULE/*/IMG_DATA; it has "
                f"{', '.join(images) or 'no image'}. The product may not be whole: get it again, or name bands="
            )
        return f"{self.root}/{found[0]}"

    def number(self, tag: str, text: str, bounds: tuple[float, float]) -> float:
        """Return a number of the metadata, which must lie between bounds.

        Raises
        ------
        ValueError
            If it does not, or is no number.
        """
        try:
            value = float(text)
        except ValueError:
            value = np.nan
        if not bounds[0] <= value <= bounds[1]:
            raise ValueError(
                f"{self.name}: its metadata states {tag} {text[:40]!r}; a number from {bounds[0]:g} to {bounds[1]:g} "
                "is expected. The product may be damaged: get it again"
            )
        return value

    def texts(self, tag: str) -> list[tuple[dict[str, str], str]]:
        """Return the attributes and text of each element of the metadata whose name ends with a tag."""
        return [(e.attrib, (e.text or "").strip()) for e in self.metadata.iter() if e.tag.endswith(tag)]


def open_safe(
    path: str | Path,
    *,
    chunks: int = 1024,
    offset: float | Literal["auto"] = "auto",
    bands: Sequence[str] = (*BANDS_10M, *BANDS_20M),
) -> xr.Dataset:
    """Return the lazy two-grid cube of reflectance of a SAFE product, of level 1C or 2A.

    Parameters
    ----------
    path : str or Path
        The ``.SAFE`` folder, its ``MTD_MSIL*.xml``, or the ``.zip`` that holds it, which is not unpacked.
    chunks : int
        Pixels per chunk and axis at 10 m, even; 20 m bands get half of it. ESA's images are compressed in tiles of
        1024 pixels at 10 m and 640 at 20 m.
    offset : "auto" or number
        Digital numbers to add; ``"auto"`` is what the product's metadata says, or 0 before processing baseline 04.00.
    bands : sequence of str
        ESA names of the bands to load, some of 10 m and some of 20 m.

    Returns
    -------
    Dataset
        Dims ``time, y, x`` and ``time, y_20m, x_20m``; one time; float32 reflectance, NaN where the digital number is
        0, or 65535 for saturated; lazy, chunked. L2A products have the scene classification ``SCL`` too, uint8 at
        20 m.

    Raises
    ------
    FileNotFoundError
        If there is nothing at the path.
    ValueError
        If there is no product of level 1C or 2A, it is cut or damaged, lacks a band or holds several tiles, or its
        metadata does not tell what digital numbers mean.
    RuntimeError
        When computed: if an image cannot be read.
    """
    if chunks < 2 or chunks % 2:
        raise ValueError(f"chunks={chunks}: must be an even number of 10 m pixels, so that 20 m chunks nest")
    if unknown := [band for band in bands if band not in (*BANDS_10M, *BANDS_20M)]:
        raise ValueError(f"bands holds {', '.join(unknown)}: must be among {', '.join((*BANDS_10M, *BANDS_20M))}")
    product = Product.find(path)
    meaning = read_radiometry(product, bands, offset)
    time = _start_time(product)
    images = {name: _image(product, name, resolution_of(name)) for name in bands}
    if any(re.search(r"_SCL_20m\.jp2$", f) for f in product.files):
        images[SCL] = _image(product, SCL, 20)
    _check_alike(images)
    fine, coarse = (
        xr.Dataset(
            {
                name: _reflectance(_read(images[name], chunks * 10 // resolution), meaning[name])
                for name in bands
                if name in bands_of(resolution)
            }
        )
        for resolution in (10, 20)
    )
    cube = pair(fine, coarse).expand_dims(time=[time])
    if SCL in images:
        classes = _read(images[SCL], chunks // 2).rename(dict(zip(FINE_DIMS, COARSE_DIMS, strict=True)))
        cube[SCL] = classes.variable.set_dims({"time": 1, **classes.sizes})
        cube[SCL].attrs = {"long_name": "scene classification"}
    reasons = "; ".join(sorted({meaning[name].reason for name in bands}))
    said = source_attrs(m.encoding for m in meaning.values()) | {ITEMS: [product.name], REASONS: reasons, MASK: "none"}
    chosen = {} if offset == "auto" else {"source_offset": float(offset)}
    return of_dates(place(cube, crs=images[bands[0]].crs).assign_attrs(chosen), [said])


def read_radiometry(
    product: Product, bands: Sequence[str], offset: float | Literal["auto"] = "auto"
) -> Mapping[str, Radiometry]:
    """Return what the digital numbers of each band mean, by the product's metadata.

    Raises
    ------
    ValueError
        If the metadata states no quantification value, or no offset where its processing baseline has one.
    """
    quantification = [text for _, text in product.texts("QUANTIFICATION_VALUE") if text]
    of_bands = [text for _, text in product.texts("BOA_QUANTIFICATION_VALUE")] or quantification
    if not of_bands:
        raise ValueError(f"{product.name}: no QUANTIFICATION_VALUE in its metadata, so its scale cannot be told")
    scale = 1 / product.number("QUANTIFICATION_VALUE", of_bands[0], QUANTIFICATION)
    if offset != "auto":
        return {name: Radiometry(scale, float(offset), f"offset {offset:g} given by the caller") for name in bands}
    stated = {
        _band_of(product, attributes): product.number(tag, text, (-1e5, 1e5))
        for tag in ("RADIO_ADD_OFFSET", "BOA_ADD_OFFSET")
        for attributes, text in product.texts(tag)
    }
    baseline = next((text for _, text in product.texts("PROCESSING_BASELINE")), "unknown")
    before = re.fullmatch(r"\d\d\.\d\d", baseline) is not None and float(baseline) < OFFSET_BASELINE
    missing = [name for name in bands if name not in stated]
    if missing and (stated or not before):
        raise ValueError(
            f"{product.name}: its metadata states no offset for {', '.join(missing)}, and its processing baseline is "
            f"{baseline}. Type offset=0 or offset=-1000"
        )
    if not stated:
        reason = f"offset 0: none stated, processing baseline {baseline}"
        return {name: Radiometry(scale, 0.0, reason) for name in bands}
    return {
        name: Radiometry(scale, stated[name], f"offset {stated[name]:g} as the product's metadata states")
        for name in bands
    }


def _band_of(product: Product, attributes: Mapping[str, str]) -> str:
    """Return the band that an offset of the metadata is of."""
    text = attributes.get("band_id", "")
    if not re.fullmatch("[0-9]{1,2}", text) or int(text) >= len(BAND_IDS):
        raise ValueError(
            f"{product.name}: its metadata states an offset for band_id {text[:20]!r}; from 0 to {len(BAND_IDS) - 1} "
            "is expected. The product may be damaged: get it again; or type offset=0 or offset=-1000"
        )
    return BAND_IDS[int(text)]


def _members(path: Path) -> list[str]:
    """Return the names of the files in a zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception as error:  # BadZipFile, and what zipfile meets in bytes that are no zip
        problem = failure(error)
    raise ValueError(
        f"{path} is neither a folder nor a zip: pass the .SAFE folder or the .zip of a product; if it is its .zip, it "
        f"is cut or damaged ({problem}): get it again"
    )


def _content(path: Path, file: str) -> bytes:
    """Return a file of metadata of a folder or of a zip, whose size is looked at first."""
    try:
        if path.is_dir():
            if (size := (path / file).stat().st_size) <= LARGEST_METADATA:
                return (path / file).read_bytes()
        else:
            with zipfile.ZipFile(path) as archive:
                if (size := archive.getinfo(file).file_size) <= LARGEST_METADATA:
                    return archive.read(file)
        problem = f"it has {size >> 20} MiB, far more than metadata has"
    except Exception as error:  # BadZipFile, zlib.error, RuntimeError of what is encrypted, …
        problem = failure(error)
    raise ValueError(f"{path}/{file} cannot be read: {problem}. The product may be cut or damaged: get it again")


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses what declares entities, by which a few bytes of XML become gigabytes."""

    def doctype(self, *declared: str | None) -> None:
        raise ValueError("it declares a DOCTYPE, which ESA's metadata does not")


def _parsed(content: bytes, path: str) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(content, ElementTree.XMLParser(target=_NoDoctype()))
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError of an unknown encoding
        problem = failure(error)
    raise ValueError(f"{path} cannot be read as XML: {problem}. The product may be cut or damaged: get it again")


def _start_time(product: Product) -> np.datetime64:
    text = next((text for _, text in product.texts("PRODUCT_START_TIME")), None)
    if not text:
        raise ValueError(f"{product.name}: no PRODUCT_START_TIME in its metadata")
    try:
        time: Any = np.datetime64(text.removesuffix("Z"), "us")
    except ValueError:
        time = np.datetime64("NaT")
    if not np.datetime64("2015") < time < np.datetime64("2100"):
        raise ValueError(
            f"{product.name}: its metadata states PRODUCT_START_TIME {text[:40]!r}; a time such as "
            "2024-08-30T10:05:59.024Z is expected. The product may be damaged: get it again"
        )
    return time.astype("datetime64[ns]")


def _image(product: Product, name: str, resolution: int) -> Any:
    """Return an image of a product, of which no pixel was read; it must be what its name says.

    Raises
    ------
    ValueError
        If it is not.
    """
    from .rasters import Image

    path = product.image(name, resolution)
    about = f"{product.name}: {path.removeprefix('/vsizip/')}"
    image = Image(path, about, IMAGES)
    dtype = "uint8" if name == SCL else "uint16"
    if image.crs is None or image.crs.to_epsg() is None:
        raise ValueError(
            f"{about} has no CRS with an EPSG code, to place its pixels by. It may be damaged: get the product again"
        )
    if image.dtype != dtype or (image.grid.dx, -image.grid.dy) != (resolution, resolution):
        raise ValueError(
            f"{about} holds {image.dtype} in pixels of {image.grid.dx:g} by {-image.grid.dy:g}; {dtype} in pixels of "
            f"{resolution} m is expected. It may be damaged: get the product again"
        )
    return image


def _check_alike(images: Mapping[str, Any]) -> None:
    """Raise where images of one resolution cover different ground, or any are in different CRS."""
    first: dict[float, Any] = {}
    for image in images.values():
        other = first.setdefault(image.grid.dx, image)
        if image.grid != other.grid or image.crs != next(iter(images.values())).crs:
            raise ValueError(
                f"{image.about} has {_placed(image)}; {other.about.partition(': ')[2]} has {_placed(other)}. The "
                "product may be damaged: get it again"
            )


def _placed(image: Any) -> str:
    return f"{image.shape} pixels from {image.grid.x0:.10g}, {image.grid.y0:.10g} in {image.crs}"


def _read(image: Any, size: int) -> xr.DataArray:
    """Return an image, lazily, one task per chunk."""
    import dask.array as da

    y, x = image.grid.coords()
    pixels = da.from_array(image, chunks=(size, size), getitem=operator.getitem, meta=np.empty((0, 0), image.dtype))
    return xr.DataArray(pixels, {"y": y, "x": x}, FINE_DIMS)


def _reflectance(digital_number: xr.DataArray, meaning: Radiometry) -> xr.DataArray:
    reflectance = xr.apply_ufunc(meaning.reflectance, digital_number, dask="parallelized", output_dtypes=["float32"])
    return reflectance.drop_attrs(deep=False)
