"""Digests of blocks: of what a task writes, and of what a store gives back; they tell whether these are the same.

A block is a chunk of a Zarr array, or a shard, or the part of it that belongs to one date.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from itertools import product
from typing import Any

import dask
import numpy as np
from numpy.typing import NDArray

Region = tuple[slice, ...]


def digest(block: NDArray) -> int:
    """Return the digest of a block's values: of any NaN, and of zeros of any sign, the same."""
    if block.dtype.kind in "OTUS":  # text, of any length
        content = b"".join(len(item).to_bytes(8, "little") + item for item in map(_bytes, block.ravel().tolist()))
    else:
        if block.dtype.kind in "fc":
            block = np.where(np.isnan(block), block.dtype.type(np.nan), block + block.dtype.type(0))
        content = np.ascontiguousarray(block, block.dtype.newbyteorder("<")).tobytes()
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def _bytes(item: Any) -> bytes:
    return item if isinstance(item, bytes) else str(item).encode()


def outer_chunks(array: Any) -> tuple[int, ...]:
    """Return the shape of what an array is written by: its shards, or its chunks."""
    return tuple(array.shards or array.chunks)


def region_of(dims: Sequence[str], where: Mapping[str, slice]) -> Region:
    """Return the region of an array of some dimensions; all of it along those that are not named."""
    return tuple(where.get(dim, slice(None)) for dim in dims)


def blocks(array: Any, region: Region) -> Iterator[Region]:
    """Return the parts of a region that are written one by one, in the order of their indices."""
    ranges = []
    for size, part, step in zip(array.shape, region, outer_chunks(array), strict=True):
        start, stop, _ = part.indices(size)
        ranges.append([slice(at, min(at + step, stop)) for at in range(start, stop, step)])
    yield from product(*ranges)


def stored(arrays: Mapping[str, tuple[Any, Region]]) -> dict[str, NDArray]:
    """Return the digests of the blocks of regions of arrays, read here, whatever else computes."""
    found = {}
    with ThreadPoolExecutor(int(dask.config.get("num_workers", 0) or 8)) as pool:
        for name, (array, region) in arrays.items():
            read = pool.map(lambda part, array=array: digest(np.asarray(array[part])), blocks(array, region))
            found[name] = np.fromiter(read, "<u8")
    return found


def total(digests: Mapping[str, NDArray]) -> int:
    """Return one checksum of the digests of several arrays; never 0."""
    together = blake2b(digest_size=8)
    for name in sorted(digests):
        together.update(name.encode() + np.ascontiguousarray(digests[name], "<u8").tobytes())
    return int.from_bytes(together.digest(), "little") or 1
