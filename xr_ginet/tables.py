"""A TOML file as a frozen dataclass: keys are its fields, and what is wrong is told with the place where it stands."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from .paths import expanded

T = TypeVar("T")


def read(path: str | Path, make: Callable[[dict[str, Any], Path], T]) -> T:
    """Return what ``make`` makes of a file's table and its path.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no TOML, or ``make`` refuses it or stumbles over a value that has not the type that it should have.
    """
    path = Path(expanded(path))
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from error
    try:
        return make(table, path)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{path} makes no sense: {error!r}") from error


def build(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    """Return a dataclass of the values of a table, whose keys must be its fields.

    Raises
    ------
    ValueError
        If it is no table, has an unknown key, lacks one, or a value is out of range.
    """
    if not isinstance(table, dict):
        raise ValueError(f"{where} is {table!r}; a table is needed")
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(table.keys() - known):
        raise ValueError(f"{where} has {', '.join(unknown)}; the keys are {', '.join(sorted(known))}")
    try:
        return kind(**table)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error
