"""Zarr arrays of products and of cubes: what their metadata says is looked at before a byte is decoded.

A codec is code that metadata names, and one of numcodecs unpickles. So only codecs that decode bytes to numbers are let
at a store, by name, and none whose chunks would not fit in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .addresses import Address, failure, public_url, without_secrets
from .patience import patiently

CODECS = frozenset(
    # Of Zarr 3; then numcodecs', in Zarr 2 under these names and in Zarr 3 after "numcodecs.".
    "bytes blosc gzip zstd crc32c transpose sharding_indexed vlen-utf8 vlen-bytes "
    "adler32 bitround bz2 crc32 delta fixedscaleoffset fletcher32 jenkins_lookup3 lz4 lzma packbits pcodec quantize "
    "shuffle zfpy zlib scale_offset cast_value".split()
)
"""That may decode what is stored. None of them makes objects; text is for coordinates of a user's cube."""

LARGEST_CHUNK = 2**30
"""Bytes of a chunk, which is decoded as a whole: a tile of Sentinel-2 as float64 has 0.96 of it."""
LARGEST_INDEX = 2**24
"""Elements of a coordinate, which xarray loads when it opens a store."""


def open_array(address: Address) -> Any:
    """Return a Zarr array, of which nothing was decoded yet.

    Raises
    ------
    ValueError
        If its codecs are not among those that may decode it, or its chunks are too large.
    RuntimeError
        If it cannot be opened.
    """
    return _calling(address, lambda: _opened(address))


def read_array(address: Address, place: tuple[slice, ...]) -> NDArray:
    """Return a part of a Zarr array.

    Raises
    ------
    RuntimeError
        If it cannot be read.
    """
    return _calling(address, lambda: np.asarray(_opened(address)[place]))


def _calling(address: Address, function: Any) -> Any:
    """Return what a function returns, again where it fails on the way; what it raises names the address."""
    try:
        return patiently(address.whole)(function)
    except ImportError:
        raise
    except (_Refused, FileNotFoundError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        failed: Exception = kind(f"{address}: {without_secrets(str(error), address.whole)}")
    except Exception as error:  # whatever a store or a codec raises
        failed = RuntimeError(f"{address} cannot be read ({failure(error, address.whole)})")
    raise failed


class _Refused(ValueError):
    pass


def _opened(address: Address) -> Any:
    """Return an array, kept open where its address holds for good."""
    return _kept(address) if address.sign is None else _open(address)


@lru_cache(maxsize=256)
def _kept(address: Address) -> Any:
    return _open(address)


def _open(address: Address) -> Any:
    import zarr

    whole = address.reveal()
    array = zarr.open_array(whole, mode="r", storage_options=_options(whole))
    check_array(array)
    if array.dtype.kind not in "uif":
        raise _Refused(f"holds {array.dtype}, and no numbers")
    return array


def _options(whole: str) -> dict[str, Any] | None:
    """Return what fsspec is told of an address: that no answer may unpack to more than a chunk may hold."""
    if not whole.startswith(("http://", "https://")):
        return None
    return {"client_kwargs": {"response_class": _limited_response()}}


@lru_cache(maxsize=1)
def _limited_response() -> type:
    from aiohttp import ClientResponse

    class LimitedResponse(ClientResponse):
        async def read(self) -> bytes:
            pieces, size = [], 0
            while self._body is None and (piece := await self.content.readany()):
                pieces.append(piece)
                size += len(piece)
                if size > LARGEST_CHUNK:
                    self.close()
                    raise _Refused(f"answers with more than {LARGEST_CHUNK >> 20} MiB")
            self._body = b"".join(pieces) if self._body is None else self._body
            return await super().read()

    return LimitedResponse


def check_array(array: Any) -> None:
    """Raise where a Zarr array names a codec that may not decode it, or its chunks are too large to be decoded.

    Raises
    ------
    ValueError
    """
    strange = sorted({name for name in codecs_of(array.metadata.to_dict()) if name not in CODECS})
    if strange:
        raise _Refused(
            f"its codecs are {', '.join(strange)}, which may run code or are not known to be safe; those read are "
            f"{', '.join(sorted(CODECS))}. If it is your own, write it again with one of these"
        )
    size = prod(array.chunks) * max(1, array.dtype.itemsize)
    if size > LARGEST_CHUNK:
        raise _Refused(
            f"its chunks are {array.chunks} of {array.dtype}, {size / 2**30:.1f} GiB, which would have to be read whole"
        )


def codecs_of(metadata: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of all codecs in the metadata of an array, those within shards too."""
    if metadata.get("zarr_format") == 2:
        for codec in (*(metadata.get("filters") or ()), metadata.get("compressor")):
            if codec is not None:
                yield str(codec.get("id") if isinstance(codec, Mapping) else codec)
        return
    yield from _names(metadata.get("codecs") or ())


def _names(codecs: Iterable[Any]) -> Iterator[str]:
    for codec in codecs:
        name, inner = (
            (codec.get("name"), codec.get("configuration") or {}) if isinstance(codec, Mapping) else (codec, {})
        )
        yield str(name).removeprefix("numcodecs.")
        for key in ("codecs", "index_codecs"):
            yield from _names(inner.get(key) or ())


def open_cube(store: str, **options: Any) -> xr.Dataset:
    """Return a cube in a Zarr store as xarray opens it, its CRS among the coordinates, once it is known to be safe.

    Raises
    ------
    FileNotFoundError
        If there is no store.
    ValueError
        If it is damaged, or `check_store` refuses it.
    """
    try:
        check_store(store)
        return xr.open_zarr(store, **{"decode_coords": "all"} | options)
    except (ImportError, FileNotFoundError, _Refused):
        raise
    except Exception as error:  # whatever zarr and xarray meet in a store that is damaged
        problem = failure(error, store)
    raise ValueError(f"{public_url(store)} cannot be opened as a cube in Zarr ({problem}). Is it whole?")


def check_store(store: Any) -> None:
    """Raise where an array of a store may not be decoded, before xarray decodes its coordinates.

    Parameters
    ----------
    store : str, Path or Zarr store
        Group with a cube.

    Raises
    ------
    ValueError
        If an array's codecs are not among those that may decode it, or a coordinate or a chunk is too large.
    """
    import zarr

    group = zarr.open_group(store, mode="r")
    for name, array in group.arrays():
        try:
            check_array(array)
            if array.ndim == 1 and array.shape[0] > LARGEST_INDEX:
                raise _Refused(f"has {array.shape[0]} elements, and xarray loads coordinates whole")
        except _Refused as error:
            raise _Refused(f"{public_url(str(store))}/{name}: {error}") from None
