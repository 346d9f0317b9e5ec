"""Replacing a cube in an object store, where nothing can be renamed: readers see the old one or the new one.

The chunks of the new cube get other keys than those of the old one, by the other separator that Zarr knows
(``c/0/1``, ``c.0.1``). So both lie side by side until one object is put, the consolidated metadata by which readers
open the cube; then what was there before is deleted.
"""

from __future__ import annotations

import copy
from typing import Any

import zarr
from zarr.core.sync import sync
from zarr.storage import MemoryStore, StorePath

from .documents import MEMBER, Documents, Overlaid, at, chunk_keys, delete, get, keys, put
from .guards import Alive
from .sentinel2.addresses import without_secrets
from .transactions import Plain

OTHER = {"/": ".", ".": "/"}


class Replacing(Plain):
    """A store whose cube is replaced when all of another one is written."""

    def __init__(self, target: Any, alive: Alive) -> None:
        super().__init__(target, alive)
        self.real = self.where
        seen = Documents.seen(self.real)
        assert seen is not None
        self.old = seen

    def make(self, memory: StorePath) -> None:
        """Write the values of the new cube that are known already; its metadata is kept until it is shown.

        Raises
        ------
        ValueError
            If a value would have the key of another one of the old cube.
        """
        new = Documents.seen(memory)
        assert new is not None
        self.documents = _with_other_keys(new, self.old)
        start = f"{self.real.path}/" if self.real.path else ""
        files = {start + key: content for key, content in self.documents.array_files(new.arrays).items()}
        self.where = StorePath(Overlaid(self.real.store, files), self.real.path)
        values = _rekeyed(memory, new, self.documents)
        self._check_shared(self.documents, values)
        for name in new.arrays:  # what a job left that was killed when it wrote these
            self._delete_chunks(name, self.documents)
        for key, content in values.items():
            put(self.real, key, content)

    def commit(self, message: str, length: int | None) -> None:
        """Show the new cube, then delete what is left of the old one."""
        assert self.documents is not None
        self.alive()
        new, old = self.documents, self.old
        new.show(self.real)
        if new.version != old.version:
            for key in old.root_files():
                delete(self.real, key)
        for key, content in new.array_files(new.arrays).items():
            put(self.real, key, content)
        for name in old.arrays:
            if name not in new.arrays:
                sync((self.real / name.partition("/")[0]).delete_dir())
                continue
            self._delete_chunks(name, old)
            if new.version != old.version:
                for key in MEMBER[old.version]:
                    delete(self.real, f"{name}/{key}")

    def _check_shared(self, new: Documents, values: dict[str, bytes]) -> None:
        """Raise where the two cubes have a key in common, and other values under it."""
        for name in set(self.old.arrays) & set(new.arrays) if self.old.version == new.version else ():
            for key in _shared(new, name):
                if get(self.real, f"{name}/{key}") != values.get(f"{name}/{key}"):
                    raise ValueError(
                        f"{without_secrets(str(self.real))} cannot be replaced without a moment at which readers find "
                        f"neither cube: {name} differs, and both have it under one key. Name another store"
                        + (", or type zarr_format=3" if self.old.version == 2 else "")
                    )

    def _delete_chunks(self, name: str, documents: Documents) -> None:
        """Delete the chunks that an array has by its metadata, but for those that both cubes share."""
        kind, shared = _keys(documents, name), set(_shared(documents, name))
        for key in keys(self.real, f"{name}/"):
            chunk = key.removeprefix(f"{name}/")
            if chunk not in shared and _belongs(chunk, *kind):
                delete(self.real, key)


def _with_other_keys(new: Documents, old: Documents) -> Documents:
    """Return documents by which the chunks of arrays that are in both have other keys than in the old ones."""
    changed = copy.deepcopy(new)
    for name in set(new.arrays) & set(old.arrays) if new.version == old.version else ():
        kind, separator = _keys(old, name)
        if new.version == 2:
            changed.main(name)["dimension_separator"] = OTHER[separator]
        elif old.shape(name) and new.shape(name):
            other = OTHER[separator] if kind == "default" else "/"
            encoding = {"name": "default", "configuration": {"separator": other}}
            changed.main(name)["chunk_key_encoding"] = encoding
        else:  # a scalar has no separator
            encoding = {"name": "v2", "configuration": {"separator": "."}}
            if kind != "default":
                encoding = {"name": "default", "configuration": {"separator": "/"}}
            changed.main(name)["chunk_key_encoding"] = encoding
    return changed


def _keys(documents: Documents, name: str) -> tuple[str, str]:
    """Return the kind of an array's chunk keys, and their separator."""
    main = documents.main(name)
    if documents.version == 2:
        return "v2", main.get("dimension_separator", ".")
    encoding = main["chunk_key_encoding"]
    default = "/" if encoding["name"] == "default" else "."
    return encoding["name"], (encoding.get("configuration") or {}).get("separator", default)


def _shared(documents: Documents, name: str) -> list[str]:
    """Return the keys of chunks that an array has by either separator."""
    if documents.version == 3 or len(documents.shape(name)) > 1:
        return []
    return list(chunk_keys(zarr.open_array(_alone(documents, name), path=name, mode="r")))


def _belongs(chunk: str, kind: str, separator: str) -> bool:
    """Return whether a key is that of a chunk, by one kind of keys."""
    if kind == "default":
        return chunk == "c" or chunk.startswith(f"c{separator}")
    return all(part.isdigit() for part in chunk.split(separator))


def _alone(documents: Documents, name: str) -> StorePath:
    """Return a store that holds nothing but an array's metadata."""
    place = at(MemoryStore())
    for key, content in documents.array_files([name]).items():
        put(place, key, content)
    return place


def _rekeyed(memory: StorePath, before: Documents, after: Documents) -> dict[str, bytes]:
    """Return the chunks that a store in memory holds, by their new keys."""
    found = {}
    for name in before.arrays:
        old, new = (zarr.open_array(_alone(d, name), path=name, mode="r") for d in (before, after))
        for was, now in zip(chunk_keys(old), chunk_keys(new), strict=True):
            if (content := get(memory, f"{name}/{was}")) is not None:
                found[f"{name}/{now}"] = content
    return found
