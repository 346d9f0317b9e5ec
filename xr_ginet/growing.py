"""Cubes that grow and that interrupted jobs go on with: written date by date, each recorded when it is complete.

A date's record is the checksum of its pixels as the store gives them back, in a variable of the cube, written last: a
date without a record is not complete, whatever became of the job. Nothing is recorded outside of the store.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import dask
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .sentinel2.addresses import without_secrets
from .sentinel2.grids import FINE_DIMS
from .transactions import Place, is_open, readable

CHECKSUM = "ginet_checksum"
"""Variable with the checksum of each date, 0 where it is not complete."""

OF_A_DATE = ("source_items", "radiometry")
"""Attributes that may differ between what is in a cube and what is appended to it."""

COMPARED = ("dtype", "scale_factor", "add_offset", "chunks", "shards")
"""Encodings that must be the same throughout a cube."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of a store that later dates would meet too."""

_log = logging.getLogger(__name__)


State = Literal["written", "kept", "failed"]


class Outcome(NamedTuple):
    """What became of one date."""

    date: str
    """ISO 8601, to the second; empty for a cube without dates."""
    state: State
    """``kept``: it was complete already."""
    seconds: float
    error: str = ""
    """Kind and message of what went wrong, without secrets."""


class PartialFailure(RuntimeError):
    """Some dates of a cube could not be written; the others are complete."""

    def __init__(self, target: Any, outcomes: Sequence[Outcome]) -> None:
        self.target = without_secrets(str(target))
        failed = [o for o in outcomes if o.state == "failed"]
        shown = "; ".join(f"{o.date or 'the cube'}: {o.error}" for o in failed[:3])
        super().__init__(
            f"{len(failed)} of {len(outcomes)} dates of {self.target} could not be written ({shown}"
            f"{'; …' * (len(failed) > 3)}). The others are complete; the same call tries the failed ones again"
        )
        self.outcomes = list(outcomes)
        """Of all dates, in order."""

    def __reduce__(self) -> tuple[Any, ...]:  # it may come from another process
        return type(self), (self.target, self.outcomes)


def recorded(cube: xr.Dataset) -> xr.Dataset:
    """Return a cube with an empty record for each of its dates."""
    times = cube.sizes.get("time")
    empty = xr.Variable((), np.uint64(0)) if times is None else xr.Variable("time", np.zeros(times, "uint64"))
    empty.attrs = {"long_name": "blake2b of the date's stored pixels, 0 where it is not complete"}
    return cube.assign({CHECKSUM: empty})


def with_static(cube: xr.Dataset) -> xr.Dataset:
    """Return a cube with what belongs to none of its dates in memory, so that it is written with the metadata."""
    part = _part_dim(cube)
    static = {n: v.compute() for n, v in cube.variables.items() if v.chunks is not None and part not in v.dims}
    return cube.assign(static) if static else cube


def _part_dim(cube: xr.Dataset) -> str:
    """Return the dimension along which a cube is written, part by part or, without dates, as one."""
    return "time" if "time" in cube.dims else "y"


def fill(
    place: Place,
    cube: xr.Dataset,
    *,
    progress: bool = False,
    tell: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Write the dates of a cube that its store does not hold completely; return what became of each.

    The store has all of the cube's metadata already. A date is computed, written, read back and recorded before the
    next one begins, so that no more than one is ever in doubt. One that fails is left without a record, and the next
    one begins; where the store has no room left, the error is raised at once.
    """
    with xr.open_zarr(place.store, chunks=None) as stored:
        done = np.atleast_1d(stored[CHECKSUM].values) != 0
        order = _order(stored, cube)
    place.commit("room for the dates")
    shown = without_secrets(str(place.store))
    dates = np.atleast_1d(cube["time"].values).astype("datetime64[s]") if "time" in cube.dims else [""]
    outcomes = []
    for i, index in enumerate(order):
        began, error = time.monotonic(), ""
        state: State = "kept"
        if not done[index]:
            try:
                _write(place, cube, i, index, progress=progress)
                _record(place.store, index if "time" in cube.dims else None)
                state = "written"
            except Exception as problem:
                if isinstance(problem, OSError) and problem.errno in NO_ROOM:
                    raise
                place.undo()
                state, error = "failed", without_secrets(f"{type(problem).__name__}: {problem}")
        outcome = Outcome(str(dates[i]), state, round(time.monotonic() - began, 3), error)
        outcomes.append(outcome)
        told = f"{len(outcomes)}/{len(order)} {outcome.date} {state}, {outcome.seconds:.1f} s"
        place.commit(told)
        told += f": {error}" if error else ""
        _log.log(logging.WARNING if error else logging.INFO, "%s %s", shown, told)
        if tell:
            tell(outcome)
    return outcomes


def append(target: Any, cube: xr.Dataset, *, keep: bool) -> None:
    """Make room for those dates of a cube that its store does not have, and take back the records of those it has.

    With ``keep`` records stay, and complete dates are not written anew.

    Raises
    ------
    ValueError
        If a new date lies before the last of the store.
    """
    with xr.open_zarr(target, chunks=None) as stored:
        there, attrs = stored["time"].values, dict(stored.attrs)
    times = cube["time"].values.astype(there.dtype)
    new = ~np.isin(times, there)
    if new.any() and times[new].min() < there.max():
        raise ValueError(
            f"{times[new].min()} lies before {there.max()}, the last date of {target}, where it would have to be "
            "inserted. Make the store of the whole job at once, with resume=True"
        )
    if not keep:
        _forget(target, there, times)
    if not new.any():
        return
    items = dict.fromkeys([*attrs.get("source_items", []), *cube.attrs.get("source_items", [])])
    reasons = dict.fromkeys(a["radiometry"] for a in (attrs, cube.attrs) if "radiometry" in a)
    joined = {"source_items": list(items), "radiometry": "; ".join(reasons)}
    room = recorded(cube.isel(time=new)).assign_attrs({key: value for key, value in joined.items() if value})
    room.to_zarr(target, append_dim="time", compute=False)


def repair(target: Any) -> None:
    """Take back what a job that ended had begun: room for dates, which had no pixels yet, and files not yet whole."""
    import zarr

    if isinstance(target, Path):
        for begun in target.rglob("*.partial"):  # Zarr renames a file once all of it is written
            begun.unlink()
    group = zarr.open_group(target, mode="r+", use_consolidated=False)
    arrays: dict[str, Any] = dict(group.arrays())
    along = {name: _dims(array).index("time") for name, array in arrays.items() if "time" in _dims(array)}
    lengths = {arrays[name].shape[axis] for name, axis in along.items()}
    if len(lengths) > 1:
        for name, axis in along.items():
            shape = arrays[name].shape
            arrays[name].resize(tuple(min(lengths) if i == axis else n for i, n in enumerate(shape)))
        zarr.consolidate_metadata(group.store)


def _dims(array: Any) -> list[str]:
    """Return the names of a Zarr array's dimensions, where each version of the format keeps them."""
    kept = array.metadata.dimension_names if array.metadata.zarr_format == 3 else array.attrs["_ARRAY_DIMENSIONS"]
    return list(kept or ())


def status(target: Any, *, verify: bool = False) -> xr.DataArray:
    """Return which dates of a cube in a Zarr store are complete; reads its records, or with ``verify`` its pixels.

    Parameters
    ----------
    target : str, Path, zarr store or icechunk.Repository
        A cube that was written with ``resume=True`` or ``mode="a"``.
    verify : bool
        Read every complete date, chunk by chunk, and compare it with its checksum.

    Returns
    -------
    DataArray
        Dims ``time``, or none; bool, in memory.

    Raises
    ------
    ValueError
        If the cube has no records.
    """
    target = readable(target)
    with xr.open_zarr(target, chunks=None) as stored:
        if CHECKSUM not in stored:
            raise ValueError(f"{target} has no {CHECKSUM}: it was not written with resume=True or mode='a'")
        records = stored[CHECKSUM].load()
    complete = records != 0
    if verify:
        known = [(i if records.ndim else None, int(record)) for i, record in enumerate(np.atleast_1d(records.values))]
        held = [record != 0 and checksum(target, time) == record for time, record in known]
        complete = complete.copy(data=np.reshape(held, records.shape))
    return complete.rename("complete").drop_attrs()


def checksum(target: Any, time: int | None) -> int:
    """Return the checksum of one date's pixels, as they are stored; never 0."""
    with xr.open_zarr(target, mask_and_scale=False, chunks={}) as raw:
        images = raw if time is None else raw.isel(time=slice(time, time + 1))
        names = sorted(str(n) for n in raw.data_vars if n != CHECKSUM and set(FINE_DIMS) <= set(raw[n].dims))
        blocks = [images[name].data for name in names]
        digests = dask.compute(
            *(b.map_blocks(_digest, chunks=(1,) * b.ndim, meta=np.empty((0,) * b.ndim, "uint64")) for b in blocks),
            scheduler="threads" if is_open(target) else None,
        )
    total = blake2b(digest_size=8)
    for name, digest in zip(names, digests, strict=True):
        total.update(name.encode() + np.ascontiguousarray(digest, "<u8").tobytes())
    return int.from_bytes(total.digest(), "little") or 1


def _digest(block: NDArray) -> NDArray:
    digest = blake2b(np.ascontiguousarray(block).tobytes(), digest_size=8).digest()
    return np.frombuffer(digest, "<u8").reshape((1,) * block.ndim)


def check_same(target: Any, cube: xr.Dataset, encoding: Mapping[str, Mapping[str, Any]], *, whole: bool) -> None:
    """Raise unless a cube is what its store was made for: the same bands, pixels, chunks, encoding and provenance.

    With ``whole`` the same dates too; without, dates and what they were made from may be new.

    Raises
    ------
    ValueError
        With what differs.
    """
    with xr.open_zarr(target, chunks=None, mask_and_scale=True, decode_coords="all") as stored:
        if CHECKSUM not in stored:
            raise ValueError(
                f"{target} has no {CHECKSUM}: it was not written with resume=True or mode='a', and which of its dates "
                "are complete cannot be told. Name another store, or type mode='w' to replace it"
            )
        differ = list(_differences(stored, cube, encoding, whole))
    if differ:
        raise ValueError(
            f"{target} was made differently: {'; '.join(differ)}. Go on with the same, or name another store"
        )


def _differences(
    stored: xr.Dataset, cube: xr.Dataset, encoding: Mapping[str, Mapping[str, Any]], whole: bool
) -> Iterator[str]:
    if set(stored.data_vars) - {CHECKSUM} != set(cube.data_vars):
        bands = (", ".join(str(name) for name in ds.data_vars if name != CHECKSUM) for ds in (stored, cube))
        yield "bands {}, now {}".format(*bands)
        return
    for dim in ("y", "x", *(["time"] if whole else [])):
        if dim in cube.coords and not np.array_equal(stored[dim].values, cube[dim].values):
            yield "{} {}, now {}".format(
                dim, *(f"{ds[dim].size} from {ds[dim].values.ravel()[0]}" for ds in (stored, cube))
            )
    if stored.rio.crs != cube.rio.crs:
        yield f"crs {stored.rio.crs}, now {cube.rio.crs}"
    for name in cube.data_vars:
        known = stored[name].encoding
        for key, now in encoding[str(name)].items():
            if key in COMPARED and known.get(key) != (np.dtype(now) if key == "dtype" else now):
                yield f"{key} of {name} {known.get(key)}, now {now}"
    for key in sorted({*stored.attrs, *cube.attrs}, key=str):
        before, after = (np.asarray(ds.attrs.get(key), object) for ds in (stored, cube))
        if (whole or key not in OF_A_DATE) and not np.array_equal(before, after):  # Zarr gives tuples back as lists
            yield f"{key} {before.tolist()!r}, now {after.tolist()!r}"


def _order(stored: xr.Dataset, cube: xr.Dataset) -> list[int]:
    """Return where each date of a cube lies in its store."""
    if "time" not in cube.dims:
        return [0]
    places = {time: i for i, time in enumerate(stored["time"].values)}
    return [places[time] for time in cube["time"].values.astype(stored["time"].dtype)]


def _write(place: Place, cube: xr.Dataset, index: int, there: int, *, progress: bool) -> None:
    """Write one date; what is no part of it is there already."""
    dim = _part_dim(cube)
    region = {dim: slice(there, there + 1) if dim == "time" else slice(0, cube.sizes[dim])}
    part = cube.isel(time=slice(index, index + 1)) if dim == "time" else cube
    part = part.drop_vars([n for n, v in part.variables.items() if dim not in v.dims or n in part.indexes])
    place.write(part, region, progress=progress)


def _record(target: Any, time: int | None) -> None:
    """Record a date as complete, by what the store gives back of it."""
    import zarr

    record = zarr.open_array(target, path=CHECKSUM, mode="r+")
    record[() if time is None else time] = np.uint64(checksum(target, time))


def _forget(target: Any, there: NDArray, times: NDArray) -> None:
    """Take back the records of dates that will be written anew."""
    import zarr

    record = zarr.open_array(target, path=CHECKSUM, mode="r+")
    for place in np.flatnonzero(np.isin(there, times)):
        record[int(place)] = np.uint64(0)
