"""Times of a cube, in one unit and one zone.

xarray has times in seconds to nanoseconds, with and without a time zone, as objects and in calendars of climate models.
What compares times or stores them works on microseconds in UTC, which all of Sentinel-2's times fit.
"""

from __future__ import annotations

from datetime import date
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray


def in_microseconds(ds: xr.Dataset) -> xr.Dataset:
    """Return a dataset whose times are microseconds in UTC, whatever they were, without an encoding of elsewhere.

    Parameters
    ----------
    ds : Dataset
        Its coordinate ``time``, along a dimension or a scalar, and other variables with times or durations: datetime64
        or timedelta64 of any unit, `datetime` objects, with or without a time zone; what has none is taken for UTC.

    Returns
    -------
    Dataset
        With datetime64[us] and timedelta64[us] in their place; lazy where it was.

    Raises
    ------
    ValueError
        If ``time`` is missing in places (NaT), is of another calendar (cftime), or is no time at all.
    """
    changed = {}
    for name, variable in ds.variables.items():
        if isinstance(variable.dtype, np.dtype) and variable.dtype.kind in "mM":
            unit = f"{'timedelta' if variable.dtype.kind == 'm' else 'datetime'}64[us]"
            new = variable.to_base_variable().astype(unit, keep_attrs=True)
        elif name == "time" or _holds_datetimes(variable):
            new = xr.Variable(variable.dims, _from_objects(str(name), variable), variable.attrs)
        else:
            continue
        if name == "time" and variable.chunks is None and (missing := int(np.isnat(new.values).sum())):
            raise ValueError(
                f"{missing} of {new.size} times are missing (NaT): a date is known by its time. Type "
                "ds.dropna('time', subset=['time']), or give them with ds.assign_coords(time=[…])"
            )
        new.encoding = {}
        changed[name] = new
    data = {name: new for name, new in changed.items() if name in ds.data_vars}
    return ds.assign_coords({name: new for name, new in changed.items() if name in ds.coords}).assign(data)


def times_of(ds: xr.Dataset) -> NDArray:
    """Return a cube's times, datetime64[us] in UTC, one-dimensional; raises as `in_microseconds`."""
    return np.atleast_1d(in_microseconds(ds[["time"]])["time"].values)


def _holds_datetimes(variable: xr.Variable) -> bool:
    if str(variable.dtype).startswith("datetime64[") and variable.chunks is None:  # pandas' own, with a time zone
        return True
    if variable.dtype != object or variable.chunks is not None or not variable.size:
        return False
    return all(isinstance(value, date) for value in np.ravel(variable.values))  # datetime, Timestamp and NaT too


def _from_objects(name: str, variable: xr.Variable) -> NDArray:
    """Return times that are no datetime64 of numpy's as such, in UTC."""
    import pandas as pd  # type: ignore[import-untyped,unused-ignore]

    if str(variable.dtype).startswith("datetime64["):
        values: Any = variable.to_index()
    elif variable.dtype == object:
        values = np.ravel(variable.values)
    else:
        values = np.empty(0, object)
    strange = sorted({_named(value) for value in values if not (value is None or isinstance(value, date))})
    if strange or not len(values):
        what = ", ".join(strange) or str(variable.dtype)
        remedy = f"ds.assign_coords({name}=[np.datetime64('2024-06-21T10:56:21'), …])"
        if "str" in what or what.startswith("<U"):
            remedy = f"ds.assign_coords({name}=pd.to_datetime(ds['{name}'].values))"
        elif "cftime" in what:
            remedy = "ds.convert_calendar('standard', use_cftime=False)"
        elif "eriod" in what:
            remedy = f"ds.assign_coords({name}=ds.indexes['{name}'].to_timestamp())"
        raise ValueError(f"the coordinate {name!r} holds {what}; times are needed, as datetime64. Type {remedy}")
    converted = pd.to_datetime(values, utc=True).tz_localize(None)
    return converted.to_numpy("datetime64[us]").reshape(variable.shape)


def _named(value: Any) -> str:
    return f"{type(value).__module__.partition('.')[0]}.{type(value).__name__}"
