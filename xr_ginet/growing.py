"""Cubes that grow and that interrupted jobs go on with: written date by date, each recorded when it is complete.

A date's record is the checksum of what was computed for it, written when the store gives the same back: a date without
a record is not complete, whatever became of the job. Readers see the dates up to the last complete one; there is room
for others, but not in the metadata by which a cube is opened (see `documents`). Nothing is recorded outside of the
store.
"""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from zarr.storage import MemoryStore, StorePath

from . import digests
from .documents import Documents, at, chunk_keys, get, put, whole
from .sentinel2 import provenance
from .sentinel2.addresses import without_secrets
from .sentinel2.grids import FINE_DIMS
from .transactions import Place, encoded_variables, readable

CHECKSUM = "ginet_checksum"
"""Variable with the checksum of each date, 0 where it is not complete."""

RULE = 2
"""Version of what a checksum covers: 1, the pixels of 10 m bands; 2, everything of a date, and what belongs to none."""

OF_A_DATE = (provenance.ITEMS, provenance.REASONS)
"""Attributes that may differ between what is in a cube of before 2026-12 and what is appended to it."""

INDIFFERENT = ("ginet_version",)
"""Attributes that decide no pixel."""

COMPARED = ("dtype", "scale_factor", "add_offset", "chunks", "shards")
"""Encodings that must be the same throughout a cube."""

MANY = 1024
"""Chunk of what is one number or text per date: all of it is read at once."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of a store that later dates would meet too."""

_NO_ROOM = re.compile("(?i)no space left|disk quota exceeded|read-only file system|not enough space|disk full")

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
    reason: str = ""
    """Why a date that was complete was written anew, other than by ``mode="a"`` without ``resume``."""


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


def no_room(error: BaseException) -> bool:
    """Return whether an error, or one that led to it, says that there is no room left."""
    left, known = [error], set()
    while left:
        one = left.pop()
        known.add(id(one))
        if (isinstance(one, OSError) and one.errno in NO_ROOM) or _NO_ROOM.search(str(one)):
            return True
        causes = (one.__cause__, one.__context__, *getattr(one, "exceptions", ()))
        left += [cause for cause in causes if cause is not None and id(cause) not in known]
    return False


def recorded(cube: xr.Dataset) -> xr.Dataset:
    """Return a cube with an empty record for each of its dates."""
    times = cube.sizes.get("time")
    empty = xr.Variable((), np.uint64(0)) if times is None else xr.Variable("time", np.zeros(times, "uint64"))
    empty.attrs = {"long_name": "blake2b of what is stored of the date, 0 where it is not complete", "version": RULE}
    return cube.assign({CHECKSUM: empty})


def by_date(cube: xr.Dataset) -> xr.Dataset:
    """Return a cube that can be written date by date: what is one value per date, or of no date, in memory.

    Raises
    ------
    ValueError
        If two dates have one time.
    """
    if "time" not in cube.dims:
        return cube
    times = cube["time"].values
    known, counts = np.unique(times, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"{counts.max()} steps have the time {known[counts.argmax()]}: a date has one place in a cube. Make one of "
            "them, as open_stac(groupby='solar_day') does, or give each a time of its own"
        )
    small = {n: v.compute() for n, v in cube.variables.items() if v.chunks is not None and "time" not in v.dims}
    for name, variable in cube.variables.items():
        if "time" in variable.dims and name not in cube.indexes:
            new = variable.chunk(time=1) if variable.ndim > 1 or variable.chunks is not None else variable
            small[name] = new.astype(object) if new.ndim == 1 and new.dtype.kind in "US" else new
    return cube.assign(small)


def encoding_of_dates(cube: xr.Dataset, encoding: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return an encoding in which what is one value per date lies in few chunks."""
    small = [str(n) for n, v in cube.variables.items() if v.dims == ("time",) and v.chunks is None]
    return {name: dict(kept) for name, kept in encoding.items()} | {
        name: dict(encoding.get(name, {})) | {"chunks": (MANY,)} for name in small
    }


def fill(
    place: Place,
    cube: xr.Dataset,
    *,
    progress: bool = False,
    tell: Callable[[Outcome], None] | None = None,
    reasons: Mapping[int, str] | None = None,
) -> list[Outcome]:
    """Write the dates of a cube that its store does not hold completely; return what became of each.

    The store has room for all of them already. A date is computed, written, read back, recorded and shown before the
    next one begins, so that no more than one is ever in doubt. One that fails is left without a record and all missing,
    and the next one begins; where the store has no room left, the error is raised at once.
    """
    assert place.documents is not None
    with place.documents.opened(place.where) as stored:
        records, order = np.atleast_1d(stored[CHECKSUM].values).copy(), _order(stored, cube)
    dated = "time" in cube.dims
    doubt = _in_doubt(place, records, order) if dated else set()
    place.commit("room for the dates", _whole(records, doubt) if dated else None)
    static = _static(place)
    shown = without_secrets(str(place.where))
    dates = cube["time"].values.astype("datetime64[s]") if dated else [""]
    outcomes = []
    for i, index in enumerate(order):
        began, error = time.monotonic(), ""
        state: State = "kept"
        if not records[index]:
            doubt.add(index)
            try:
                if dated and index < place.shown:
                    place.commit("before a date that failed is written again", _whole(records, doubt))
                records[index] = _write(place, cube, i, index if dated else None, static, progress=progress)
                state = "written"
            except Exception as problem:
                if no_room(problem):
                    raise
                place.undo(index if dated else None)
                state, error = "failed", without_secrets(f"{type(problem).__name__}: {problem}")
            doubt.discard(index)
        reason = (reasons or {}).get(i, "")
        outcome = Outcome(str(dates[i]), state, round(time.monotonic() - began, 3), error, reason)
        outcomes.append(outcome)
        place.commit(f"{outcome.date} {state}", _whole(records, doubt) if dated else None)
        told(shown, outcome, tell, f"{len(outcomes)}/{len(order)} ")
    return outcomes


def told(target: Any, outcome: Outcome, tell: Callable[[Outcome], None] | None, number: str = "") -> None:
    """Log what became of a date, and tell who asked."""
    line = f"{number}{outcome.date} {outcome.state}, {outcome.seconds:.1f} s" + "".join(
        f": {text}" for text in (outcome.reason, outcome.error) if text
    )
    _log.log(logging.WARNING if outcome.error else logging.INFO, "%s %s", without_secrets(str(target)), line)
    if tell:
        tell(outcome)


def write_whole(place: Place, cube: xr.Dataset, memory: StorePath, *, progress: bool) -> None:
    """Write a cube at once, compare what the store gives back with what was computed, and show it; record it if asked.

    Parameters
    ----------
    place : Place
        Where there is no cube, or one that is replaced.
    cube : Dataset
        With an empty record if one is wanted.
    memory : StorePath
        A store that holds all of it that is not lazy.
    progress : bool
    """
    place.make(memory)
    at_once = [name for name, v in cube.variables.items() if v.chunks is None and name != CHECKSUM]
    assert place.documents is not None
    _compare(place.documents, memory, place.where, at_once)
    computed = place.write(cube.drop_vars([*at_once, CHECKSUM], errors="ignore"), {}, progress=progress)
    found = _digests(place.where, place.documents, None)
    _confirm(computed, found)
    if CHECKSUM in cube:
        place.documents.array(place.where, CHECKSUM)[()] = np.uint64(digests.total(found))
    place.commit("all of it", None)


def _whole(records: NDArray, doubt: set[int]) -> int:
    """Return how many dates readers may see: up to the last complete one, and none that may hold a part of it."""
    return min([int(np.flatnonzero(records).max(initial=-1)) + 1, *doubt])


def _in_doubt(place: Place, records: NDArray, order: Sequence[int]) -> set[int]:
    """Return the dates that may hold parts of what a job that ended had begun; of those not written now, undo them."""
    assert place.documents is not None
    known = place.shown if _rule(place.documents) > 1 else 0
    doubt = set(np.flatnonzero(records == 0).tolist()) - set(range(known))
    for index in sorted(doubt - set(order)):
        place.undo(index)
    return doubt & set(order)


def make(place: Place, cube: xr.Dataset, encoding: Mapping[str, Mapping[str, Any]], zarr_format: int) -> None:
    """Make a store with room for the dates of a cube, of which readers see none."""
    from .documents import in_memory

    new = recorded(cube)
    memory = in_memory(new, encoding_of_dates(new, encoding), zarr_format)
    place.make(memory)
    assert place.documents is not None
    _compare(place.documents, memory, place.where, [n for n, v in new.variables.items() if v.chunks is None])


def _compare(documents: Documents, memory: StorePath, where: StorePath, names: Sequence[Any]) -> None:
    """Raise unless a store gives back what was written to it."""
    found = []
    for source in (memory, where):
        arrays = {str(name): documents.array(source, str(name)) for name in names}
        found.append(digests.stored({name: (array, (slice(None),) * array.ndim) for name, array in arrays.items()}))
    _confirm(*found)


def _confirm(computed: Mapping[str, NDArray], stored: Mapping[str, NDArray]) -> None:
    """Raise where a store does not give back what was computed.

    Raises
    ------
    OSError
        With what differs.
    """
    for name, known in computed.items():
        if n := int((known != stored[name]).sum()):
            raise OSError(
                f"the store does not give back what was written: {n} of {known.size} blocks of {name} differ, as this "
                "process reads them. Do all workers write to the same store, and no other job?"
            )


class Appended(NamedTuple):
    """What is to become of the dates of a cube in a store that has some of them."""

    cube: xr.Dataset
    """Dates for which the store has room, at the times that it has for them."""
    reasons: dict[int, str]
    """Why dates of it that were complete are written anew, by their place in it."""
    refused: list[Outcome]
    """Dates that the store has no place for."""


def as_stored(place: Place, cube: xr.Dataset) -> xr.Dataset:
    """Return a cube that tells of its dates as its store does: cubes of before 2026-12 have attributes for it."""
    assert place.documents is not None
    with place.documents.opened(place.where) as stored:
        known = [name for name in provenance.OF_A_DATE if name in stored.variables]
        attrs = dict(stored.attrs)
    if "time" not in cube.dims:
        return cube
    told = [name for name in provenance.OF_A_DATE if name in cube.coords]
    if not known and told and _rule(place.documents) == 1:
        flat = {key: value for key, value in provenance.of_all(cube).items() if key not in provenance.OF_A_DATE[1::3]}
        if flat.pop(provenance.MASK, "none") != attrs.get(provenance.MASK, "none"):
            _log.warning("%s does not tell whether it was masked; %s is", shown(place), provenance.MASK)
        return cube.drop_vars(told).assign_attrs(flat)
    lacking = [name for name in known if name not in cube.coords]
    empty = {name: ("time", np.full(cube.sizes["time"], provenance.EMPTY.get(name, ""), object)) for name in lacking}
    return cube.assign_coords(empty)


def append(place: Place, cube: xr.Dataset, *, keep: bool) -> Appended:
    """Make room for those dates of a cube that its store does not have, and take back the records of those it has.

    With ``keep`` records stay, and complete dates are not written anew unless what they are made from has changed: a
    date is known by its time, or by an item that it was made from, and is written anew where a tile has come later or
    an item is of another version. Dates before the last one that the store does not have are refused: readers count on
    the order of what is there.
    """
    documents = place.documents
    assert documents is not None
    with documents.opened(place.where) as stored:
        stored = stored[[CHECKSUM]].load()
    places = provenance.places(stored, cube)
    there, times = stored["time"].values, cube["time"].values.astype(stored["time"].dtype)
    late = (places < 0) & (times < there.max(initial=times.min()))
    refused = [_not_inserted(place, time, there.max()) for time in times[late]]
    times = np.where(places < 0, times, there[places] if there.size else times)
    cube = cube.assign_coords(time=("time", times, cube["time"].attrs)).isel(time=~late)
    places = places[~late]
    changed = provenance.changes(stored, cube, places)
    records = stored[CHECKSUM].values.copy()
    reasons = {i: reason for i, reason in changed.items() if keep and records[places[i]]}
    again = places[list(changed)].tolist() if keep else places[places >= 0].tolist()
    documents.attrs.update(_joined(documents.attrs, cube.attrs))
    if again:
        records[again] = 0  # what they hold is hidden before, with all that comes after them
        place.commit("dates to be written anew", _whole(records, set(again)))
        documents.array(place.where, CHECKSUM)[:] = records
    if (new := places < 0).any():
        _extend(place, documents, recorded(cube.isel(time=new)))
    return Appended(cube, reasons, refused)


def shown(place: Place) -> str:
    """Return where a job writes, as it may be shown."""
    return without_secrets(str(place.where))


def _not_inserted(place: Place, time: np.datetime64, last: np.datetime64) -> Outcome:
    """Return the outcome of a date that would have to be put between others."""
    error = (
        f"ValueError: it lies before {np.datetime_as_string(last, 's')}, the last date of {shown(place)}, and older "
        "dates are not inserted. Make the cube anew with mode='w' (in the shell: --overwrite), or name another store "
        "for them"
    )
    return Outcome(str(np.datetime_as_string(time, "s")), "failed", 0.0, error)


def _joined(before: Mapping[str, Any], now: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the attributes that tell of all dates, those of the store and those that come."""
    items = dict.fromkeys([*before.get("source_items", []), *now.get("source_items", [])])
    reasons = dict.fromkeys(
        reason for attrs in (before, now) if "radiometry" in attrs for reason in str(attrs["radiometry"]).split("; ")
    )
    joined = {"source_items": list(items), "radiometry": "; ".join(reasons)}
    return {key: value for key, value in joined.items() if value}


def _extend(place: Place, documents: Documents, room: xr.Dataset) -> None:
    """Make room for dates: their times and other values first, then the arrays' metadata, that of ``time`` last.

    All of it is made in memory first, so that the store never holds dates whose times are not there.
    """
    along, length = documents.along("time"), documents.length("time", "time")
    memory = at(MemoryStore())
    for key, content in (documents.array_files(documents.arrays) | documents.root_files()).items():
        put(memory, key, content)
    values = [name for name in along if len(documents.shape(name)) == 1 and name != CHECKSUM]
    for name in values:
        for key in chunk_keys(documents.array(memory, name)):
            if (known := get(place.where, f"{name}/{key}")) is not None:
                put(memory, f"{name}/{key}", known)
    ours = room.drop_vars([n for n, v in room.variables.items() if "time" not in v.dims or n not in documents.arrays])
    ours.to_zarr(memory, append_dim="time", compute=False, consolidated=False)
    grown = documents.there(memory).resized("time", length + room.sizes["time"])
    for key, content in grown.array_files(along).items():
        put(memory, key, content)
    new = {}
    for name in values:
        for key in chunk_keys(documents.array(memory, name)):
            if (value := get(memory, f"{name}/{key}")) is not None:
                new[f"{name}/{key}"] = value
    place.extend(new, grown.array_files(along))
    place.documents = Documents(documents.version, documents.attrs, grown.arrays)
    _compare(place.documents, memory, place.where, values)


def repair(place: Place) -> None:
    """Take back room for dates that a job which was killed had begun to make, before their times were there."""
    documents = place.documents
    assert documents is not None
    along = documents.along("time")
    if len({documents.length("time", name) for name in along}) < 2:
        return
    place.documents = documents.resized("time", documents.lengths("time"))
    for key, content in place.documents.array_files(along).items():
        put(place.where, key, content)


def status(target: Any, *, verify: bool = False) -> xr.DataArray:
    """Return which dates of a cube in a Zarr store are complete; reads its records, or with ``verify`` all of them.

    Parameters
    ----------
    target : str, Path, zarr store or icechunk.Repository
        A cube that was written with ``resume=True`` or ``mode="a"``. Dates that are not complete count, although
        readers do not see those after the last complete one.
    verify : bool
        Read every complete date, here, chunk by chunk, and compare it with its checksum.

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
    place, documents = at(target), whole(target)
    with documents.opened(place) as stored:
        if CHECKSUM not in stored:
            raise ValueError(f"{target} has no {CHECKSUM}: it was not written with resume=True or mode='a'")
        records = stored[CHECKSUM].load()
    complete = records != 0
    if verify:
        held, static = [], None
        for i, record in enumerate(np.atleast_1d(records.values)):
            if record and static is None:
                static = _digests(place, documents, None, dated=False)
            held.append(bool(record) and _checksum(place, documents, i if records.ndim else None, static) == record)
        complete = complete.copy(data=np.reshape(held, records.shape))
    return complete.rename("complete").drop_attrs()


def _is_there(variable: xr.Variable, index: int | None) -> bool:
    return variable.chunks is None if index is None else "time" not in variable.dims


def _rule(documents: Documents) -> int:
    """Return what the checksums of a cube cover: see `RULE`."""
    known = documents.arrays[CHECKSUM]
    attrs = known[".zattrs"] if documents.version == 2 else known["zarr.json"].get("attributes", {})
    return int(attrs.get("version", 1))


def _checksum(place: StorePath, documents: Documents, time: int | None, static: Mapping[str, NDArray] | None) -> int:
    """Return the checksum of what a store holds of a date; never 0."""
    if _rule(documents) == 1:
        return _checksum_of_pixels(place, documents, time)
    found = {} if time is None else _digests(place, documents, time, dated=True)
    return digests.total({**(static or {}), **found})


def _digests(
    where: StorePath, documents: Documents, time: int | None, *, dated: bool | None = None
) -> dict[str, NDArray]:
    """Return the digests of all arrays of a date, or of those of none; with ``dated=None`` of all in a whole cube."""
    part = {} if time is None else {"time": slice(time, time + 1)}
    found = {}
    for name in documents.arrays:
        dims = documents.dims(name)
        if name != CHECKSUM and (dated is None or dated == ("time" in dims)):
            found[name] = (documents.array(where, name), digests.region_of(dims, part))
    return digests.stored(found)


def _static(place: Place) -> dict[str, NDArray]:
    """Return the digests of what belongs to no date; of a cube without dates none, as all of it is written yet."""
    assert place.documents is not None
    return _digests(place.where, place.documents, None, dated=False) if place.documents.along("time") else {}


def _checksum_of_pixels(where: StorePath, documents: Documents, time: int | None) -> int:
    """Return a checksum by the first rule: of data on the finest grid alone, byte by byte."""
    part = {} if time is None else {"time": slice(time, time + 1)}
    total = blake2b(digest_size=8)
    with documents.opened(where) as cube:
        names = sorted(str(name) for name, v in cube.data_vars.items() if set(FINE_DIMS) <= set(v.dims))
    for name in names:
        array = documents.array(where, name)
        total.update(name.encode())
        for block in digests.blocks(array, digests.region_of(documents.dims(name), part)):
            total.update(blake2b(np.ascontiguousarray(array[block]).tobytes(), digest_size=8).digest())
    return int.from_bytes(total.digest(), "little") or 1


def check_same(place: Place, cube: xr.Dataset, encoding: Mapping[str, Mapping[str, Any]], *, whole: bool) -> None:
    """Raise unless a cube is what its store was made for: the same bands, pixels, chunks, encoding and provenance.

    With ``whole`` the same dates too; without, dates and what they were made from may be new.

    Raises
    ------
    ValueError
        With what differs.
    """
    shown = without_secrets(str(place.where))
    assert place.documents is not None
    with place.documents.opened(place.where, decode_coords="all") as stored:
        if CHECKSUM not in stored:
            raise ValueError(
                f"{shown} has no {CHECKSUM}: it was not written with resume=True or mode='a', and which of its dates "
                "are complete cannot be told. Name another store, or type mode='w' to replace it"
            )
        differ = list(_differences(stored, cube, encoding, whole))
        for key in INDIFFERENT:
            if (before := stored.attrs.get(key)) != (now := cube.attrs.get(key)):
                _log.info("%s was begun with %s %s, and goes on with %s", shown, key, before, now)
    if differ:
        raise ValueError(
            f"{shown} was made differently: {'; '.join(differ)}. Go on with the same, or name another store"
            + _remedy(differ, stored, whole)
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
    yield from provenance.differences(stored, cube, whole=whole)
    for key in sorted({*stored.attrs, *cube.attrs} - {*INDIFFERENT, *(() if whole else OF_A_DATE)}, key=str):
        before, after = (np.asarray(ds.attrs.get(key), object) for ds in (stored, cube))
        if not np.array_equal(before, after):  # Zarr gives tuples back as lists
            yield f"{key} {before.tolist()!r}, now {after.tolist()!r}"


def _remedy(differ: Sequence[str], stored: xr.Dataset, whole: bool) -> str:
    """Return what to type where a difference is one that the user may not have chosen."""
    keys = {f"ginet_{key}": key for key in ("precision", "depth", "weights")}
    typed = [
        f"{key}={stored.attrs[name]!r}"
        for name, key in keys.items()
        if name in stored.attrs and any(text.startswith(f"{name} ") for text in differ)
    ]
    remedy = f". Type superresolve({', '.join(typed)}), or superresolve(like_store=…) with this store" if typed else ""
    if whole and all(text.startswith(("time ", "source_items ", "source_versions ")) for text in differ):
        remedy += ". Type mode='a', resume=True to append dates that are new, and write those anew whose items changed"
    return remedy


def _order(stored: xr.Dataset, cube: xr.Dataset) -> list[int]:
    """Return where each date of a cube lies in its store."""
    if "time" not in cube.dims:
        return [0]
    places = {time: i for i, time in enumerate(stored["time"].values)}
    return [places[time] for time in cube["time"].values.astype(stored["time"].dtype)]


def _write(
    place: Place, cube: xr.Dataset, i: int, index: int | None, static: Mapping[str, NDArray], *, progress: bool
) -> int:
    """Write one date, compare what the store gives back with what was computed, record and return the checksum."""
    documents = place.documents
    assert documents is not None
    part, region = cube, {}
    if index is not None:
        part, region = cube.isel(time=slice(i, i + 1)), {"time": slice(index, index + 1)}
    expected = encoded_variables(part[["time"]] if index is not None else part[[]], documents, place.where)
    known = {n: np.array([digests.digest(np.asarray(v.data))], "<u8") for n, v in expected.items() if n == "time"}
    # What is of no date, or in memory in a cube without dates, was written with the metadata.
    leave = [n for n, v in part.variables.items() if n in part.indexes or _is_there(v, index)]
    computed = place.write(part.drop_vars(leave), region, progress=progress) | known
    found = _digests(place.where, documents, index, dated=index is not None)
    _confirm(computed, found)
    record = digests.total({**static, **found})
    if _rule(documents) == 1:
        record = _checksum_of_pixels(place.where, documents, index)
    array = documents.array(place.where, CHECKSUM)
    array[() if index is None else index] = np.uint64(record)
    return record
