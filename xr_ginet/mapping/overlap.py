"""Map a function over overlapping blocks of arrays that cover the same ground at different resolutions.

Each output chunk is one call on one window: the chunk, enlarged by a depth and rounded outwards to whole coarse
pixels, cut out of whatever chunks hold it. So chunks of either grid may be of any size, smaller than the depth or
ragged, may start at odd positions and differ between the grids; nothing is rechunked, and output chunks are the fine
input's. Windows end at the image's border, where the function does its own padding, as it would on the whole image.

`dask.array.map_overlap` cannot do this: over arrays of two sizes it refuses, or with ``align_arrays=False`` declares
a wrong shape, and it merges chunks smaller than the depth.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from numpy.typing import DTypeLike, NDArray

Block = Callable[..., NDArray]

PART = 1280
"""Fine pixels on a side of what is worked on at once on processors: the default chunk with its overlap is no larger."""


class Window(NamedTuple):
    """Where one output chunk's input lies on one axis, in fine pixels."""

    start: int
    stop: int
    trim: slice
    """The output chunk within the window."""

    @classmethod
    def around(cls, part: slice, size: int, *, factor: int, depth: int, least: int = 0) -> Window:
        """Return the window of ``part`` of an axis of ``size`` fine pixels, rounded outwards to whole coarse ones.

        A part with less than ``least`` pixels has the window of one with as many, if the axis has them.
        """
        lacking = max(0, min(least, size) - (part.stop - part.start))
        low = max(0, min(part.start - lacking // 2, size - least if lacking else size))
        high = max(part.stop, low + min(least, size)) if lacking else part.stop
        start = max(0, low // factor * factor - depth)
        stop = min(size, -(-high // factor) * factor + depth)
        return cls(start, stop, slice(part.start - start, part.stop - start))


def windows(chunks: Sequence[int], *, factor: int, depth: int, least: int = 0) -> list[Window]:
    """Return the window of each output chunk along one axis.

    Parameters
    ----------
    chunks : sequence of int
        Chunk sizes of the fine grid; their sum is a multiple of ``factor``.
    factor : int
        Windows start and stop at multiples of it.
    depth : int
        Fine pixels of overlap on each side, a multiple of ``factor``.
    least : int
        Fine pixels that a chunk counts as at least.

    Examples
    --------
    >>> windows((3, 5), factor=2, depth=2)
    [Window(start=0, stop=6, trim=slice(0, 3, None)), Window(start=0, stop=8, trim=slice(3, 8, None))]
    """
    bounds = itertools.pairwise(itertools.accumulate(chunks, initial=0))
    return [Window.around(slice(*bound), sum(chunks), factor=factor, depth=depth, least=least) for bound in bounds]


def part_side(depth: int, most: int = PART) -> int:
    """Return the side, without their overlap, of parts of a block that overlap by a depth."""
    return max(most - 2 * depth, most // 4)


def parts(rows: slice, columns: slice, *, side: int | None) -> Iterator[tuple[slice, slice]]:
    """Yield parts of a block of about the same size, at most ``side`` long each way; None: all of it.

    Examples
    --------
    >>> [(rows.start, columns.start) for rows, columns in parts(slice(1, 11), slice(0, 4), side=4)]
    [(1, 0), (4, 0), (7, 0)]
    """
    yield from itertools.product(*(_split(axis, side or max(axis.stop - axis.start, 1)) for axis in (rows, columns)))


def _split(axis: slice, side: int) -> list[slice]:
    n = -(-(axis.stop - axis.start) // side)
    bounds = [axis.start + (axis.stop - axis.start) * i // n for i in range(n + 1)]
    return [slice(*bound) for bound in itertools.pairwise(bounds)]


def in_parts(function: Block, *blocks: NDArray, factors: Sequence[int], depth: int) -> NDArray:
    """Return ``function`` of blocks of the same ground, image by image and part by part, for memory's sake.

    Parameters
    ----------
    function : callable
        Takes blocks ``(band, h / factor, w / factor)`` and returns ``(n_bands, h, w)``.
    *blocks : (..., band, h / factor, w / factor)
        The first has the factor 1.
    factors : sequence of int
        How many times coarser each block is than the first.
    depth : int
        Pixels of the first block by which parts overlap, a multiple of the largest factor.
    """
    *lead, _, height, width = blocks[0].shape
    out: NDArray | None = None
    for image in np.ndindex(*lead):
        for part in parts(slice(0, height), slice(0, width), side=part_side(depth)):
            y, x = (
                Window.around(p, n, factor=max(factors), depth=depth)
                for p, n in zip(part, (height, width), strict=True)
            )
            cuts = (
                block[(*image, slice(None), slice(y.start // f, y.stop // f), slice(x.start // f, x.stop // f))]
                for block, f in zip(blocks, factors, strict=True)
            )
            result = function(*cuts)[:, y.trim, x.trim]
            if out is None:
                out = np.empty((*lead, len(result), height, width), result.dtype)
            out[(*image, slice(None), *part)] = result
    assert out is not None
    return out


def map_windows(
    function: Block,
    *arrays: da.Array,
    factors: Sequence[int],
    depth: int,
    n_bands: int,
    dtype: DTypeLike,
    parameters: Sequence[Delayed] = (),
    resources: Mapping[str, float] | None = None,
    by_part: bool = False,
    least: int = 0,
) -> da.Array:
    """Return ``function`` mapped over overlapping windows of all arrays, lazily.

    Parameters
    ----------
    function : callable
        Takes one numpy block per array, ``(..., band, h / factor, w / factor)``, and returns ``(..., n_bands, h, w)``.
        Must be picklable for distributed schedulers.
    *arrays : (..., band, y / factor, x / factor)
        Dask arrays of the same ground and the same leading axes, whole in ``band``, chunked in any way in y and x. The
        first decides the output's chunks and has the factor 1.
    factors : sequence of int
        How many times coarser each array is than the first.
    depth : int
        Pixels of the first array by which a window exceeds its chunk on each side; a multiple of the largest factor.
        With a depth of at least the function's receptive radius the result does not depend on the chunks.
    n_bands, dtype
        Of the output.
    parameters : sequence of Delayed
        What the function takes after the blocks, the same for all of them, computed in the same graph.
    resources : mapping, optional
        What a call of the function takes of a distributed worker, as ``{"GPU": 1}``: it then runs only where workers
        have it. Dask forgets that of graphs that it fuses, and of what is written with ``compute=False``; `to_zarr`
        avoids both.
    by_part : bool
        Whether the function takes ``part=(rows, columns)``, where the output chunk lies in the fine block, and returns
        that part alone; otherwise it returns the whole block, which is cut.
    least : int
        Pixels of the first array on a side that a chunk counts as at least, where windows are cut.

    Returns
    -------
    (..., n_bands, y, x)
        Lazy, chunked in y and x as the first array; one call of ``function`` per chunk.

    Raises
    ------
    ValueError
        If the shapes do not nest, an array is chunked along ``band``, or the depth is not a multiple of the factor.
    """
    factor = max(factors)
    _check(arrays, factors, depth, factor)
    first = arrays[0]
    lead = first.chunks[:-3]
    arrays = tuple(a.rechunk({i: c for i, c in enumerate(lead)}) if a.chunks[:-3] != lead else a for a in arrays)
    rows = windows(first.chunks[-2], factor=factor, depth=depth, least=least)
    columns = windows(first.chunks[-1], factor=factor, depth=depth, least=least)

    token = tokenize(function, *arrays, tuple(factors), depth, least, n_bands, np.dtype(dtype), *parameters)
    # Schedulers tell from a name's words how long a task will take, so the cuts, which take no time, have a name apart.
    name, cuts_name = f"ginet-windows-{token}", f"ginet-cuts-{token}"
    graph: dict[Any, Any] = {}
    cuts: dict[Any, Any] = {}
    extra = [parameter.key for parameter in parameters]
    for position in itertools.product(*(range(len(c)) for c in lead)):
        for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
            pieces = [
                _pieces(cuts, f"{cuts_name}-{n}", array, f, position, (i, row), (j, column))
                for n, (array, f) in enumerate(zip(arrays, factors, strict=True))
            ]
            apply = _apply_to_part if by_part else _apply
            graph[name, *position, 0, i, j] = (apply, function, (row.trim, column.trim), extra, *pieces)
    chunks = (*lead, (n_bands,), first.chunks[-2], first.chunks[-1])
    dependencies: list[Any] = [*arrays, *parameters]
    inputs = HighLevelGraph.from_collections(cuts_name, cuts, dependencies=dependencies)
    calls = MaterializedLayer(graph, annotations={"resources": dict(resources)} if resources else None)
    whole = HighLevelGraph(
        {**inputs.layers, name: calls},
        {**inputs.dependencies, name: {cuts_name, *inputs.dependencies[cuts_name]}},
    )
    return da.Array(whole, name, chunks=chunks, meta=np.empty((0,) * len(chunks), dtype))


def _check(arrays: Sequence[da.Array], factors: Sequence[int], depth: int, factor: int) -> None:
    if depth < 0 or depth % factor:
        raise ValueError(f"depth={depth}: must be a multiple of the resolution ratio {factor}, and not negative")
    fine = arrays[0]
    for array, f in zip(arrays, factors, strict=True):
        if array.numblocks[-3] != 1:
            raise ValueError(
                f"the band axis of an array of shape {array.shape} is chunked {array.chunks[-3]}; the function needs "
                "all bands at once: array.rechunk({-3: -1})"
            )
        if array.shape[:-3] != fine.shape[:-3] or any(
            n * f != m for n, m in zip(array.shape[-2:], fine.shape[-2:], strict=True)
        ):
            raise ValueError(
                f"arrays of shapes {fine.shape} and {array.shape} do not nest with the ratio {f}: all axes before band "
                f"must agree, and the first's y and x must be {f} times the second's"
            )
        if fine.shape[-2] % factor or fine.shape[-1] % factor:
            raise ValueError(f"y and x of {fine.shape} must be multiples of {factor}")


def _pieces(
    cuts: dict[Any, Any],
    name: str,
    array: da.Array,
    factor: int,
    position: tuple[int, ...],
    row: tuple[int, Window],
    column: tuple[int, Window],
) -> list[list[Any]]:
    """Return the keys of the parts that make up one window of one array, as rows of columns.

    Parts of chunks are cut where the chunk lies, by tasks added to ``cuts``, so that only halos travel between
    workers.
    """
    (i, row_window), (j, column_window) = row, column
    overlaps_y = _overlaps(array.chunks[-2], row_window.start // factor, row_window.stop // factor)
    overlaps_x = _overlaps(array.chunks[-1], column_window.start // factor, column_window.stop // factor)
    block = []
    for source_y, cut_y in overlaps_y:
        line = []
        for source_x, cut_x in overlaps_x:
            source = (array.name, *position, 0, source_y, source_x)
            if cut_y is None and cut_x is None:
                line.append(source)
                continue
            key = (name, *position, i, j, source_y, source_x)
            cuts[key] = (_cut, source, cut_y or slice(None), cut_x or slice(None))
            line.append(key)
        block.append(line)
    return block


def _overlaps(chunks: Sequence[int], start: int, stop: int) -> list[tuple[int, slice | None]]:
    """Return the chunks that ``start..stop`` touches, each with the part needed, or None for all of it."""
    bounds = np.concatenate([[0], np.cumsum(chunks)])
    first = int(np.searchsorted(bounds, start, side="right")) - 1
    last = int(np.searchsorted(bounds, stop, side="left"))
    result: list[tuple[int, slice | None]] = []
    for chunk in range(first, last):
        begin, end = int(bounds[chunk]), int(bounds[chunk + 1])
        cut = slice(max(start, begin) - begin, min(stop, end) - begin)
        if cut.stop > cut.start:
            result.append((chunk, None if cut == slice(0, end - begin) else cut))
    return result


def _cut(block: NDArray, rows: slice, columns: slice) -> NDArray:
    """Return a part of a block as a copy: a view would keep the whole block in memory."""
    return block[..., rows, columns].copy()


def _apply(function: Block, trim: tuple[slice, slice], extra: list[Any], *pieces: list[list[NDArray]]) -> NDArray:
    """Return the trimmed output of one window, from the parts of each array."""
    return function(*map(_join, pieces), *extra)[..., trim[0], trim[1]]


def _apply_to_part(
    function: Block, part: tuple[slice, slice], extra: list[Any], *pieces: list[list[NDArray]]
) -> NDArray:
    """Return the output of a function that trims itself."""
    return function(*map(_join, pieces), *extra, part=part)


def _join(pieces: list[list[NDArray]]) -> NDArray:
    """Return one block of the rows of columns that make it up."""
    lines = [line[0] if len(line) == 1 else np.concatenate(line, axis=-1) for line in pieces]
    return lines[0] if len(lines) == 1 else np.concatenate(lines, axis=-2)
