"""Paths as users type them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def expanded(path: Any) -> Any:
    """Return a path whose ``~`` is the home folder, in the type that it came in; all that is no path as it is.

    Raises
    ------
    ValueError
        If there is no such home folder. A folder whose name begins with ``~`` is ``./~name``.

    Examples
    --------
    >>> expanded("cubes/~old.zarr"), expanded("s3://bucket/~/cube.zarr")
    ('cubes/~old.zarr', 's3://bucket/~/cube.zarr')
    """
    if type(path).__name__ == "LocalStore":  # of Zarr, which does not expand it
        root = expanded(path.root)
        return path if root == path.root else type(path)(root, read_only=path.read_only)
    if not isinstance(path, str | Path) or not str(path).startswith("~"):
        return path
    home = os.path.expanduser(path)
    if str(home).startswith("~"):
        raise ValueError(
            f"{path}: no home folder of {str(path).split('/')[0]} is known. Type the whole path, or ./{path}"
        )
    return type(path)(home)
