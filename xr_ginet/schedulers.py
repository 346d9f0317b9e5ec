"""Who computes what is written: a cluster that this process is a client of, or one of Dask's local schedulers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import dask
import numpy as np
from dask.core import get_deps

WAITS = ("list-", "_finalize_store-", "finalize_store-", "finalize-hlgfinalizecompute-")
"""How the names of tasks begin that do nothing but wait for others, in Dask and in xarray."""


def current_client() -> Any | None:
    """Return the distributed client that computes here, or None."""
    try:
        from distributed import get_client

        return get_client()
    except (ImportError, ValueError):  # ValueError: no client
        return None


def workers_elsewhere() -> bool:
    """Return whether other processes than this one compute: workers of a cluster, or of Dask's ``processes``."""
    client = current_client()
    if client is None:
        return getattr(dask.base.get_scheduler(), "__module__", "") == "dask.multiprocessing"
    return not (client.scheduler and str(client.scheduler.address).startswith("inproc"))


def compute_writes(writes: Sequence[Any], *, progress: bool, position: slice = slice(1, None)) -> list[Any]:
    """Compute what writes blocks when it is computed, row by row, under a progress bar if asked for.

    Parameters
    ----------
    writes : sequence of Delayed or dask arrays
    progress : bool
    position : slice
        Where the keys of blocks, ``(name, …)``, tell where the blocks lie: what is written of one place is one piece of
        work.

    Returns
    -------
    list
        Of arrays, their elements, in any order.
    """
    if any(_needs_resources(write) for write in writes):  # see `map_windows`: told by layers, which Dask has to keep
        with dask.config.set({"optimization.fuse.active": False}):
            return _elements(dask.compute(*writes))
    (together,) = dask.optimize(dask.delayed(list)(list(writes)))
    graph = by_place(together.__dask_graph__(), together.key, position)
    client = current_client()
    if client is None:
        from dask.diagnostics import ProgressBar

        get = dask.base.get_scheduler() or dask.threaded.get
        with ProgressBar() if progress else nullcontext():
            return _elements(get(graph, together.key))
    future = client.get(graph, together.key, sync=False)
    if progress:
        from distributed import progress as show

        show(future)
    return _elements(client.gather(future))


def _needs_resources(write: Any) -> bool:
    return any("resources" in (layer.annotations or {}) for layer in getattr(write.dask, "layers", {}).values())


def _elements(found: Any) -> list[Any]:
    """Return what arrays hold, however deep in lists they are."""
    if isinstance(found, np.ndarray):
        return found.ravel().tolist()
    return [element for part in found for element in _elements(part)] if isinstance(found, list | tuple) else []


def by_place(graph: Mapping[Any, Any], key: Any, position: slice) -> dict[Any, Any]:
    """Return a graph in which ``key`` waits for all places, and each of these for all that is written there.

    Where a task waits for all blocks of a band, Dask has a cluster write one band of each block, and keep the others
    until no block is left to compute.
    """
    depends_on, _ = get_deps(graph)
    places: dict[Any, set[Any]] = defaultdict(set)
    waits, left = set(), [key]
    while left:
        task = left.pop()
        if not isinstance(task, tuple) and str(task).startswith(WAITS):
            waits.add(task)
            left += depends_on[task] - waits
        else:
            places[task[position] if isinstance(task, tuple) else (task,)].add(task)
    # Dask goes from place to place in the order of their keys.
    done = {(f"place-{key}", *place): (_wait, list(blocks)) for place, blocks in places.items()}
    return {name: task for name, task in graph.items() if name not in waits} | done | {key: (_wait, list(done))}


def _wait(blocks: list[Any]) -> list[Any]:
    """Return what was done: it is the arguments."""
    return blocks
