"""What a digital number means: ``reflectance = (digital_number + offset) * scale``, and why.

Since processing baseline 04.00 ESA adds 1000 to digital numbers. Some catalogues take it away again, some state it,
some say nothing, and one states an offset that its pixels no longer have. So the decision looks at what an item says
of itself and at what is known of those who say it, never at its date, and carries its reason.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

OFFSET_BASELINE = 4.0
"""First processing baseline whose digital numbers carry ESA's offset."""


SATURATED = 65535
"""ESA's digital number of a saturated pixel; no other product's numbers reach it."""


def _number(nodata: Any, dtype: np.dtype) -> float | None:
    """Return a nodata value as a number of a dtype, or None where it is none."""
    if nodata is None or not np.isfinite(nodata):
        return None
    if dtype.kind == "f":
        return float(nodata)
    info = np.iinfo(dtype)
    return int(nodata) if nodata == int(nodata) and info.min <= nodata <= info.max else None


@dataclass(frozen=True)
class Encoding:
    """How values are stored as numbers, in the words of CF: ``value = number * scale_factor + add_offset``."""

    dtype: str
    """Of the stored numbers."""
    scale_factor: float = 1.0
    add_offset: float = 0.0
    nodata: float | None = None
    """The number of a missing pixel; None where no number of the dtype stands for it. NaN is missing in any case."""

    def __post_init__(self) -> None:
        dtype = np.dtype(self.dtype)
        scale, offset = float(self.scale_factor), float(self.add_offset)
        if dtype.kind not in "iuf":
            raise ValueError(f"dtype {dtype}: numbers are stored as integers or floating point")
        if not (np.isfinite(scale) and np.isfinite(offset) and scale != 0):
            raise ValueError(f"scale {scale:g} and offset {offset:g}: must be finite, and the scale not 0")
        for name, value in {"dtype": dtype.name, "scale_factor": scale, "add_offset": offset}.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "nodata", _number(self.nodata, dtype))

    @classmethod
    def from_attrs(cls, attrs: Mapping[str, Any], *, dtype: Any = None) -> Encoding:
        """Return what ``scale_factor``, ``add_offset`` and ``_FillValue`` say, attributes or xarray's encoding."""
        stored = np.dtype(attrs.get("dtype", dtype))
        nodata = attrs.get("_FillValue", attrs.get("missing_value", attrs.get("fill_value")))
        return cls(stored.name, attrs.get("scale_factor", 1.0), attrs.get("add_offset", 0.0), nodata)

    def to_attrs(self) -> dict[str, Any]:
        """Return dtype, scale, offset and fill value as xarray's encoding has them."""
        fill = np.dtype(self.dtype).type(np.nan if self.nodata is None else self.nodata) if self._has_fill else None
        said = {"dtype": self.dtype, "scale_factor": self.scale_factor, "add_offset": self.add_offset}
        return said | ({} if fill is None else {"_FillValue": fill if self.is_float else int(fill)})

    @property
    def is_float(self) -> bool:
        """Return whether numbers are floating point."""
        return np.dtype(self.dtype).kind == "f"

    @property
    def _has_fill(self) -> bool:
        return self.is_float or self.nodata is not None

    @property
    def reserved(self) -> set[int]:
        """Return the integers that stand for no value: nodata, and ESA's for saturated pixels."""
        info = np.iinfo(self.dtype)
        return {int(n) for n in (self.nodata, SATURATED) if n is not None and info.min <= n <= info.max}

    @property
    def numbers(self) -> tuple[int, int]:
        """Return the least and the greatest integer that stands for a value."""
        info, reserved = np.iinfo(self.dtype), self.reserved
        low, high = max(info.min, -(2**53)), min(info.max, 2**53)  # beyond, float64 does not tell integers apart
        while low in reserved:
            low += 1
        while high in reserved:
            high -= 1
        return low, high

    @property
    def limits(self) -> tuple[float, float]:
        """Return the least and the greatest value that can be stored."""
        if self.is_float:
            return -np.inf, np.inf
        low, high = sorted(number * self.scale_factor + self.add_offset for number in self.numbers)
        return low, high

    def decode(self, numbers: NDArray) -> NDArray:
        """Return the values of numbers, NaN where they are missing or saturated; float64 of float64, else float32."""
        return self._values(numbers, np.float64 if numbers.dtype == np.float64 else np.float32)

    def _values(self, numbers: NDArray, dtype: Any) -> NDArray:
        if numbers.dtype.kind == "f":
            numbers = numbers.astype(dtype, copy=False)
        zero = -self.add_offset / self.scale_factor
        if abs(zero - round(zero)) < 1e-6:  # then both roundings but one are spared
            zero = round(zero)
        values: NDArray = numbers.astype(dtype)
        values -= zero  # in its own dtype
        values *= self.scale_factor
        missing = numbers == SATURATED
        if self.nodata is not None:
            missing |= numbers == self.nodata
        values[missing | ~np.isfinite(values)] = np.nan
        return values

    def encode(self, values: NDArray) -> NDArray:
        """Return the numbers that are nearest to values; what lies beyond `limits` is clipped, NaN becomes nodata.

        A value whose nearest number is reserved, as a nodata of 9999 amidst uint16, becomes the next one.

        Raises
        ------
        ValueError
            If a value is missing, and no number stands for that.
        """
        dtype = np.dtype(self.dtype)
        wide = np.float32 if values.dtype.itemsize <= 4 and self._fits_float32 else np.float64
        with np.errstate(over="ignore"):  # what is beyond any number is infinite, and so missing
            exact: NDArray = values.astype(wide)
            exact -= self.add_offset
            exact /= self.scale_factor
        missing = ~np.isfinite(exact)
        if missing.any() and not self._has_fill:
            raise ValueError(f"a value is missing, and no number of {dtype} stands for that. Type dtype='float32'")
        fill = np.nan if self.nodata is None else self.nodata
        if self.is_float:
            return np.where(missing, fill, exact).astype(dtype)
        low, high = self.numbers
        numbers = np.clip(np.rint(np.where(missing, low, exact)), low, high)
        for number in sorted(n for n in self.reserved if low < n < high):
            below, above = number - 1, number + 1
            while below in self.reserved:
                below -= 1
            while above in self.reserved:
                above += 1
            numbers = np.where(numbers == number, np.where(exact < number, below, above), numbers)
        result: NDArray = numbers.astype(dtype)
        if missing.any():
            result[missing] = dtype.type(fill)
        return result

    def hold(self, values: NDArray) -> NDArray:
        """Return what becomes of values when they are stored and read again, as `held_dtype`."""
        return self._values(self.encode(values), self.held_dtype)

    @property
    def held_dtype(self) -> type[np.floating]:
        """Return float32 where that tells all numbers apart, or float64."""
        return np.float32 if self._fits_float32 else np.float64

    @property
    def _fits_float32(self) -> bool:
        """Return whether float32 tells apart all that is stored, with room for a few roundings."""
        if self.is_float:
            return np.dtype(self.dtype).itemsize <= 4
        furthest = max(abs(limit) for limit in (*self.limits, self.add_offset))
        return furthest / abs(self.scale_factor) < 2**18


ESA = Encoding("uint16", 1e-4, -0.1, 0)
"""Of reflectance in Sentinel-2's own products: -0.0999 to 6.4534 in steps of 0.0001."""


@dataclass(frozen=True)
class Radiometry:
    """How to read one asset's pixels."""

    scale: float
    """Reflectance per digital number."""
    offset: float
    """Added to the digital number before scaling: 0 or -1000."""
    reason: str
    """In words, for the result's attributes."""
    nodata: float = 0
    """A pixel is missing where its stored number is not above this one."""
    dtype: str = "uint16"
    """Of the stored numbers; floating point where a store holds reflectance."""

    @property
    def encoding(self) -> Encoding:
        """Return how the pixels are stored."""
        return Encoding(self.dtype, self.scale, self.offset * self.scale, self.nodata)

    def reflectance(self, numbers: NDArray) -> NDArray:
        """Return stored numbers as reflectance, float32, NaN where they are missing or saturated."""
        result = self.encoding.decode(numbers).astype("float32", copy=False)
        result[~(numbers > self.nodata)] = np.nan  # below it too: what no raster covers has the least of several nodata
        return result


CLASS_NUMBERS = Radiometry(1.0, 0.0, "", dtype="uint8")
"""Of the scene classification, whose class 0 is no data."""

NBART = Radiometry(1e-4, 0.0, "offset 0: Geoscience Australia's NBART carries none", nodata=-999, dtype="int16")
"""Not ESA's product: its items name the baseline of the scene that it was made from, and state no scale or nodata."""

REFLECTANCE = Radiometry(
    1.0, 0.0, "offset 0: the store holds reflectance, scale and offset applied", nodata=-0.09995, dtype="float32"
)
"""Of decoded pixels. ESA's digital number 0 is missing, and -0.1 where whoever decoded it overlooked that."""


def radiometry(
    item: Mapping[str, Any], asset: Mapping[str, Any], offset: float | Literal["auto"] = "auto"
) -> Radiometry:
    """Return the radiometry of an asset of a STAC item.

    The first that applies decides:

    ======================================  ======================================================================
    The item or the asset                   Digital numbers to add
    ======================================  ======================================================================
    ``boa_offset_applied`` is true          0 for COGs, whatever offset is stated beside it: Earth Search has
                                            subtracted it from them (but not from ESA's JPEG2000 files)
    ``boa_offset_applied`` is false, yet    an error: of such items of Earth Search some have 1000 on top of their
    an offset is stated or, where nothing   pixels and others have not, and nothing in the item tells which
    is, the baseline is 04.00 or later
    an offset is stated                     that; an error where the baseline is before 04.00, as ESA added none
    the processing baseline is known        -1000 from 04.00 on, else 0
    otherwise                               an error
    ======================================  ======================================================================

    Geoscience Australia's NBART, and stores of floating point reflectance, carry no offset.

    Parameters
    ----------
    item, asset : mapping
        STAC JSON of the item and of the asset that holds the band.
    offset : "auto" or number
        Digital numbers to add, where the caller knows better than the catalogue.

    Raises
    ------
    ValueError
        If what the item says leaves two answers, or an offset is given for pixels that are reflectance.
    """
    scale, stated = _stated(asset)
    _check_scale(f"item {item['id']}", scale, stated)
    if scale is None and _data_type(asset).startswith("float"):
        if offset not in ("auto", 0):
            raise ValueError(
                f"item {item['id']} has reflectance in its store, not digital numbers: offset={offset:g} cannot be "
                "added. Leave it out"
            )
        return replace(REFLECTANCE, dtype=_data_type(asset))
    is_nbart = any(str(band.get("name")).startswith("nbart_") for band in described_bands(asset))
    pixels = NBART
    if not is_nbart:
        dtype = _data_type(asset)
        pixels = Radiometry(1e-4 if scale is None else scale, 0.0, "", _lowest(stated_nodata(asset), dtype), dtype)
    if offset != "auto":
        return replace(pixels, offset=float(offset), reason=f"offset {offset:g} given by the caller")
    if is_nbart:
        return pixels
    number, reason = _decide(item, asset, None if stated is None else round(stated / pixels.scale))
    return replace(pixels, offset=number, reason=reason)


def _decide(item: Mapping[str, Any], asset: Mapping[str, Any], stated: float | None) -> tuple[float, str]:
    """Return the offset of ESA's digital numbers, and why, from what is stated, the flag and the baseline."""
    flag = next((v for k, v in item["properties"].items() if k.endswith("boa_offset_applied")), None)
    baseline = processing_baseline(item)
    shifted = baseline is not None and baseline >= OFFSET_BASELINE
    if flag is not None and "jp2" not in (asset.get("type") or ""):
        if flag:
            return 0.0, "offset 0: the catalogue took it from the pixels (boa_offset_applied)"
        if stated or (stated is None and shifted):
            raise ValueError(
                f"item {item['id']} says boa_offset_applied=false, yet "
                + (f"states an offset of {stated:g}" if stated else f"its processing baseline is {baseline:05.2f}")
                + ". Of such items some still have 1000 on top of their pixels and some have not: dark water is near "
                "1000, or near 0. Load the collection 'sentinel-2-c1-l2a', whose items can be trusted, or look at the "
                "pixels and type offset=-1000 or offset=0 for these items"
            )
    if stated is None and baseline is None:
        raise ValueError(
            f"item {item['id']} states neither an offset nor its processing baseline, so its digital numbers may or "
            "may not carry 1000 on top. Type offset=0 or offset=-1000"
        )
    if stated is None:
        return (-1000.0 if shifted else 0.0), (
            f"offset {-1000 if shifted else 0}: nothing stated, processing baseline {baseline:05.2f}"
        )
    if stated and baseline is not None and not shifted:
        raise ValueError(
            f"item {item['id']} states an offset of {stated:g}, but its processing baseline is {baseline:05.2f}, and "
            "ESA added none before 04.00. Type offset=0 if the pixels are ESA's own, offset=-1000 if 1000 was added"
        )
    return float(stated), f"offset {stated:g}, as its asset or store states"


def source_attrs(stored: Iterable[Encoding | None]) -> dict[str, Any]:
    """Return how the numbers were stored that a cube is made of, as its attributes; none where bands differ."""
    found = set(stored)
    [one] = found if len(found) == 1 else [None]
    if one is None:
        return {}
    said = {"dtype": one.dtype, "scale_factor": one.scale_factor, "add_offset": one.add_offset, "nodata": one.nodata}
    return {f"source_{key}": value for key, value in said.items() if value is not None}


def source_encoding(attrs: Mapping[str, Any]) -> Encoding | None:
    """Return what `source_attrs` has told of a cube, or None."""
    if "source_dtype" not in attrs:
        return None
    said = (attrs.get(f"source_{key}") for key in ("dtype", "scale_factor", "add_offset", "nodata"))
    return Encoding(*said)  # type: ignore[arg-type]


BRIGHTEST, DARKEST = 3.0, -0.5
"""Medians of a block's reflectance between which scenes lie: clouds and snow reach 1.5, and glint is not everywhere."""
IMPOSSIBLE = 100.0
"""What no pixel reflects: percent are below, digital numbers above."""
OFFSET_TWICE, SCALED_TWICE = -0.01, 5e-4
"""Medians below which a band was probably shifted twice, or all bands of a block were scaled twice."""
ENOUGH = 64
"""Valid pixels whose median says something of a scene."""


def check_reflectance(block: NDArray, band: str) -> tuple[float, int]:
    """Raise where the pixels of a block, by their median, cannot be reflectance; return it, and how many told it.

    Single pixels are never refused, nor a few, unless they are beyond anything that reflects.

    Raises
    ------
    ValueError
        With what the block holds and what to type.
    """
    median, n_valid = _middle(block)
    where = f"the median of a block of {band} is {median:.6g}"
    if median > (BRIGHTEST if n_valid >= ENOUGH else IMPOSSIBLE):
        guess = "digital numbers" if median > IMPOSSIBLE else "percent or digital numbers"
        raise ValueError(
            f"{where}: these are {guess}, and reflectance is needed, mostly between 0 and 1. Type scale=1e-4 (with "
            "offset=-0.1 where the product kept its offset), or scale=0.01 for percent, in superresolve, xr_ginet.pair "
            "or xr_ginet.to_native. Where such a value stands for missing pixels, mask it: ds.where(ds < 10)"
        )
    if median < (DARKEST if n_valid >= ENOUGH else -IMPOSSIBLE):
        raise ValueError(
            f"{where}: that is no reflectance. If it stands for missing pixels, mask it, ds.where(ds > -1), or type "
            f"nodata={median:g} in superresolve, xr_ginet.pair or xr_ginet.to_native"
        )
    return median, n_valid


def check_bands_of_block(blocks: Sequence[NDArray], bands: Sequence[str]) -> None:
    """Check the bands of one block by `check_reflectance`, and warn where they are darker than any scene.

    Warns
    -----
    UserWarning
        If scale or offset were probably applied twice.
    """
    found = [check_reflectance(block, band) for block, band in zip(blocks, bands, strict=True)]
    told = {band: median for band, (median, n_valid) in zip(bands, found, strict=True) if n_valid >= ENOUGH}
    if dark := [f"{band} {median:.3f}" for band, median in told.items() if median < OFFSET_TWICE]:
        warnings.warn(
            f"the medians of a block ({', '.join(dark)}) are darker than water. Probably an offset of 0.1 that was "
            "taken from their pixels already was taken again, as stackstac does with items of Earth Search "
            "(rescale=True, its default). Load digital numbers, with rescale=False, and type scale=1e-4, or load with "
            "xr_ginet.open_stac",
            stacklevel=2,
        )
    elif len(told) > 1 and 0 < max(told.values()) < SCALED_TWICE:
        warnings.warn(
            f"the medians of a block are below {SCALED_TWICE:g} in {', '.join(told)}: probably reflectance was scaled "
            "again. Load the cube once more, and scale it once",
            stacklevel=2,
        )


def decode_if_numbers(block: NDArray, encoding: Encoding, band: str) -> NDArray:
    """Return the reflectance of a block of floats that state a scale: digital numbers, or what was scaled by hand.

    xarray's arithmetic keeps attributes, and floats may be digital numbers of which some are missing: so the pixels
    decide. Integers, and medians far above reflectance, are digital numbers.

    Raises
    ------
    ValueError
        If it could be either.
    """
    valid = block[np.isfinite(block) & (block != SATURATED)]
    if encoding.nodata is not None:
        valid = valid[valid != encoding.nodata]
    if valid.size == 0:
        return encoding.decode(block)
    median, most = float(np.median(valid.astype("float64"))), float(np.abs(valid).max())
    whole = bool((valid == np.rint(valid)).all())
    if (whole and most > 2) or median > 10 * BRIGHTEST:
        return encoding.decode(block)
    if not whole and DARKEST < median < 2:
        return without_missing(block.astype(np.result_type(block.dtype, np.float32), copy=True), encoding)
    raise ValueError(
        f"{band} states scale_factor={encoding.scale_factor:g}, and the median of a block is {median:.6g}: digital "
        f"numbers, or reflectance that kept its attributes? Type scale={encoding.scale_factor:g}, "
        f"offset={encoding.add_offset:g} for digital numbers, and drop the attributes of reflectance: ds.drop_attrs()"
    )


def decode_numbers(block: NDArray, encoding: Encoding, band: str) -> NDArray:
    """Return the reflectance of a block of floats that are said to be digital numbers.

    Raises
    ------
    ValueError
        If they are reflectance already.
    """
    median, n_valid = _middle(np.where(block == (encoding.nodata or 0), np.nan, block))
    if abs(encoding.scale_factor) <= 1e-3 and n_valid >= ENOUGH and abs(median) < 2:
        sample = block[np.isfinite(block)][:4096]
        if (sample != np.rint(sample)).any():
            raise ValueError(
                f"the median of a block of {band} is {median:.6g}: that is reflectance already, and "
                f"scale={encoding.scale_factor:g} would scale it again. Leave scale and offset out"
            )
    return encoding.decode(block)


def without_missing(reflectance: NDArray, encoding: Encoding) -> NDArray:
    """Return decoded reflectance with NaN where its number was nodata or saturated, if whoever decoded it forgot."""
    for number in (encoding.nodata, SATURATED):
        if number is not None:
            decoded = number * encoding.scale_factor + encoding.add_offset
            reflectance = np.where(np.abs(reflectance - decoded) < abs(encoding.scale_factor) / 2, np.nan, reflectance)
    return reflectance


def _middle(block: NDArray) -> tuple[float, int]:
    """Return the median of the valid pixels of a block, of some thousands where there are more, and how many told it.

    Which pixels are looked at depends on the block's shape alone.
    """
    step = max(1, int((block.size / 8192) ** 0.5))
    for sample in (block[..., ::step, ::step], block):
        valid = sample[np.isfinite(sample)]
        if valid.size >= ENOUGH:
            break
    return (float(np.median(valid.astype("float64"))), valid.size) if valid.size else (np.nan, 0)


def processing_baseline(item: Mapping[str, Any]) -> float | None:
    """Return an item's processing baseline, from its properties or from its product's name, or None.

    Examples
    --------
    >>> processing_baseline({"id": "S2B_MSIL2A_20200705T101559_N0500_R065_T32TMT", "properties": {}})
    5.0
    """
    properties = item["properties"]
    for key in (
        "s2:processing_baseline",
        "sentinel:processing_baseline",
        "sentinel2:processing_baseline",
        "processing:version",
    ):
        if re.fullmatch(r"\d{2}\.\d{2}", str(properties.get(key, ""))):
            return float(properties[key])
    for text in (item["id"], *(v for v in properties.values() if isinstance(v, str))):
        if match := re.search(r"_N(\d{2})[.]?(\d{2})(?:_|$)", text):
            return float(f"{match.group(1)}.{match.group(2)}")
    return None


def described_bands(asset: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what an asset says of each of its bands, by STAC 1.1 or by the extension before it."""
    return asset.get("bands") or asset.get("eo:bands") or []


def statements(asset: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the places where an asset may state its radiometry, in the words of three versions of STAC."""
    places = (asset, *asset.get("raster:bands", [])[:1], *asset.get("bands", [])[:1])
    return [place for place in places if isinstance(place, Mapping)]


def _stated(asset: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Return the scale of an asset, and the offset in reflectance, where it states them."""
    for source in statements(asset):
        for prefix in ("", "raster:"):
            if source.get(f"{prefix}scale") is not None:
                offset = source.get(f"{prefix}offset")
                return float(source[f"{prefix}scale"]), None if offset is None else float(offset)
    return None, None


def stated_nodata(asset: Mapping[str, Any]) -> float | None:
    """Return what an asset says that missing pixels hold, or None."""
    found = next((place["nodata"] for place in statements(asset) if place.get("nodata") is not None), None)
    return None if found is None else float(found)


def _lowest(nodata: float | None, dtype: str) -> float:
    """Return the number that pixels must be above: a stated one below 0, or else 0, which ESA's missing pixels hold."""
    return nodata if nodata is not None and -np.inf < nodata < 0 and not dtype.startswith("u") else 0


def _check_scale(about: str, scale: float | None, offset: float | None) -> None:
    """Raise where a stated scale or offset cannot be one of reflectance; NaN neither."""
    if scale is not None and not 1e-6 <= scale <= 1:
        raise ValueError(
            f"{about} states a scale of {scale:g} reflectance per digital number; from 1e-6 to 1 make sense. Correct "
            "the item's raster:scale (1e-4 is ESA's)"
        )
    if offset is not None and not abs(offset) <= 10:
        raise ValueError(
            f"{about} states an offset of {offset:g} in reflectance; from -10 to 10 make sense. Correct the item's "
            "raster:offset, or type offset=0 or offset=-1000"
        )


def _data_type(asset: Mapping[str, Any]) -> str:
    """Return the type of an asset's stored numbers: ESA's own where it states none."""
    return next((str(source["data_type"]) for source in statements(asset) if source.get("data_type")), "uint16")
