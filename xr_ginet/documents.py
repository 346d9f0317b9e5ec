"""The JSON documents of a Zarr store: what readers see of a cube, and what there is of it.

Readers open a cube by its consolidated metadata, which is one object (``zarr.json``, or ``.zmetadata`` in version 2):
to put it is to show, at once, all that was written before. The metadata of each array may be ahead of it, with room for
dates that are not whole yet.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import xarray as xr
import zarr
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore, StorePath, WrapperStore

from .folders import local_path
from .sentinel2.addresses import without_secrets

MEMBER = {3: ("zarr.json",), 2: (".zarray", ".zattrs")}


def at(target: Any) -> StorePath:
    """Return where a target's keys lie, for reading and, where there is such a folder or it is none, for writing."""
    from zarr.storage._common import make_store_path

    path = local_path(target) if isinstance(target, str | Path) else None
    if path is not None:
        return StorePath(LocalStore(path, read_only=not path.exists()))
    return sync(make_store_path(target))


def get(place: StorePath, key: str) -> bytes | None:
    """Return what a key holds, or None."""
    found = sync((place / key).get())
    return None if found is None else found.to_bytes()


def put(place: StorePath, key: str, content: bytes) -> None:
    """Set a key; on every store either all of it is there afterwards, or nothing new."""
    sync((place / key).set(default_buffer_prototype().buffer.from_bytes(content)))


def delete(place: StorePath, key: str) -> None:
    """Delete a key, if it is there."""
    sync((place / key).delete())


def keys(place: StorePath, prefix: str = "") -> list[str]:
    """Return the keys that begin so, relative to the place."""
    start = f"{place.path}/" if place.path else ""

    async def found() -> list[str]:
        return [key.removeprefix(start) async for key in place.store.list_prefix(start + prefix)]

    return sync(found())


@dataclass
class Documents:
    """The metadata of a cube."""

    version: int
    attrs: dict[str, Any]
    arrays: dict[str, dict[str, dict[str, Any]]]
    """Of each array its documents, by their keys."""

    @classmethod
    def seen(cls, place: StorePath) -> Documents | None:
        """Return what readers see, or None where there is no group; without consolidated metadata all that there is."""
        if (root := get(place, "zarr.json")) is not None:
            document = json.loads(root)
            if document.get("node_type") != "group":
                return None
            known = (document.get("consolidated_metadata") or {}).get("metadata")
            attrs = document.get("attributes") or {}
            if known is None:
                return cls(3, attrs, {}).there(place, members(place))
            arrays = {name: {"zarr.json": d} for name, d in known.items() if d.get("node_type") == "array"}
            return cls(3, attrs, arrays)
        if get(place, ".zgroup") is None:
            return None
        attrs = json.loads(get(place, ".zattrs") or b"{}")
        if (root := get(place, ".zmetadata")) is None:
            return cls(2, attrs, {}).there(place, members(place))
        known = json.loads(root)["metadata"]
        names = [key.removesuffix("/.zarray") for key in known if key.endswith("/.zarray")]
        return cls(2, attrs, {n: {k: known.get(f"{n}/{k}", {}) for k in MEMBER[2]} for n in names})

    def there(self, place: StorePath, names: Iterable[str] | None = None) -> Documents:
        """Return the documents of arrays as each holds its own: what there is, whatever readers see."""
        arrays = {}
        for name in self.arrays if names is None else names:
            found = {key: get(place, f"{name}/{key}") for key in MEMBER[self.version]}
            if (main := found[MEMBER[self.version][0]]) is None:
                continue
            if json.loads(main).get("node_type", "array") == "array":
                arrays[name] = {key: json.loads(content or b"{}") for key, content in found.items()}
        return Documents(self.version, dict(self.attrs), arrays)

    def main(self, name: str) -> dict[str, Any]:
        """Return the document that has an array's shape."""
        return self.arrays[name][MEMBER[self.version][0]]

    def dims(self, name: str) -> list[str]:
        """Return the names of an array's dimensions."""
        if self.version == 3:
            return list(self.main(name).get("dimension_names") or ())
        return list(self.arrays[name][".zattrs"].get("_ARRAY_DIMENSIONS", ()))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return an array's shape."""
        return tuple(self.main(name)["shape"])

    def along(self, dim: str) -> list[str]:
        """Return the names of the arrays along a dimension, that of the dimension itself last."""
        return sorted((n for n in self.arrays if dim in self.dims(n)), key=lambda name: (name == dim, name))

    def length(self, dim: str, name: str) -> int:
        """Return how long an array is along a dimension."""
        return self.shape(name)[self.dims(name).index(dim)]

    def lengths(self, dim: str) -> int:
        """Return how long all arrays are along a dimension at least; 0 where none has it."""
        return min((self.length(dim, name) for name in self.along(dim)), default=0)

    def resized(self, dim: str, length: int) -> Documents:
        """Return the documents of the same arrays, of another length along a dimension."""
        new = copy.deepcopy(self)
        for name in new.along(dim):
            new.main(name)["shape"][new.dims(name).index(dim)] = length
        return new

    def array_files(self, names: Iterable[str]) -> dict[str, bytes]:
        """Return the files of the metadata of some arrays."""
        return {f"{name}/{key}": _json(document) for name in names for key, document in self.arrays[name].items()}

    def root_files(self, *, consolidated: bool = True) -> dict[str, bytes]:
        """Return the files by which readers open the cube, in the order in which they are put; the last shows it."""
        if self.version == 3:
            root: dict[str, Any] = {"attributes": self.attrs, "zarr_format": 3, "node_type": "group"}
            if consolidated:
                metadata = {name: documents["zarr.json"] for name, documents in self.arrays.items()}
                root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": metadata}
            return {"zarr.json": _json(root)}
        files: dict[str, Any] = {".zattrs": self.attrs, ".zgroup": {"zarr_format": 2}}
        for name, documents in self.arrays.items():
            files |= {f"{name}/{key}": document for key, document in documents.items()}
        last = {key: _json(files[key]) for key in (".zattrs", ".zgroup")}
        everything = _json({"metadata": files, "zarr_consolidated_format": 1})
        return {".zattrs": last[".zattrs"], ".zmetadata": everything, ".zgroup": last[".zgroup"]}

    def show(self, place: StorePath) -> None:
        """Let readers see these arrays and no others; does nothing where they do already."""
        for key, content in self.root_files().items():
            if get(place, key) != content:
                put(place, key, content)

    def array(self, place: StorePath, name: str) -> zarr.Array:
        """Open one of the arrays, for writing where the store can be written to."""
        mode: Any = "r" if place.read_only else "r+"
        return zarr.open_array(place, path=name, mode=mode, zarr_format=self.version)  # type: ignore[arg-type]

    def opened(self, place: StorePath, **options: Any) -> xr.Dataset:
        """Open a store as a reader would find it that saw these documents."""
        return xr.open_zarr(self.seen_in(place), zarr_format=self.version, **{"chunks": None} | options)

    def seen_in(self, place: StorePath) -> Any:
        """Return the store as a reader would find it that saw these documents."""
        start = f"{place.path}/" if place.path else ""
        files = {start + key: content for key, content in self.root_files().items()}
        return StorePath(Overlaid(place.store, files), place.path)


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode()


def members(place: StorePath) -> list[str]:
    """Return the names of what lies right in a place."""

    async def found() -> list[str]:
        return [name async for name in place.store.list_dir(place.path)]

    return sorted(sync(found()))


class Overlaid(WrapperStore[Store]):
    """A store some of whose keys hold something else."""

    def __init__(self, store: Store, files: Mapping[str, bytes]) -> None:
        super().__init__(store)
        self.files = dict(files)

    def _with_store(self, store: Store) -> Overlaid:
        return type(self)(store, self.files)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Overlaid) and (self._store, self.files) == (other._store, other.files)

    @property
    def supports_consolidated_metadata(self) -> bool:
        return True

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
        prototype = prototype or default_buffer_prototype()
        if key in self.files:
            return prototype.buffer.from_bytes(self.files[key])
        return await self._store.get(key, prototype, byte_range)

    async def exists(self, key: str) -> bool:
        return key in self.files or await self._store.exists(key)


def whole(target: Any) -> Documents:
    """Return the metadata of all that there is of a cube: room for dates that readers do not see yet, too.

    Raises
    ------
    FileNotFoundError
        If there is no cube.
    """
    place = at(target)
    gone = isinstance(place.store, LocalStore) and not place.store.root.exists()
    seen = None if gone else Documents.seen(place)
    if seen is None:
        raise FileNotFoundError(f"no cube in {without_secrets(str(target))}")
    there = seen.there(place)
    return there.resized("time", there.lengths("time"))  # room that a job was making when it was killed is none


def chunk_keys(array: Any) -> Iterator[str]:
    """Return the keys of all chunks that an array may have, relative to it."""
    outer = array.shards or array.chunks
    for index in product(*(range(-(-n // size)) for n, size in zip(array.shape, outer, strict=True))):
        yield array.metadata.encode_chunk_key(index)


def in_memory(cube: xr.Dataset, encoding: Mapping[str, Any], zarr_format: int) -> StorePath:
    """Return a store in memory that holds a cube but for what is lazy in it."""
    store = MemoryStore()
    options: dict[str, Any] = {"mode": "w-", "zarr_format": zarr_format, "consolidated": True, "compute": False}
    cube.to_zarr(store, encoding=dict(encoding), **options)
    return at(store)


def copied(source: StorePath, target: StorePath) -> Documents:
    """Copy all of a small store but what makes it a group: it is nothing to readers until its documents are shown."""
    documents = Documents.seen(source)
    assert documents is not None
    metadata, roots = documents.array_files(documents.arrays), documents.root_files()
    for key in (*metadata, *sorted(set(keys(source)) - metadata.keys() - roots.keys())):
        put(target, key, get(source, key) or b"")
    return documents
