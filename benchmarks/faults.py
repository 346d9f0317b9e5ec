"""What a job loses when things go wrong: each fault is made for real, then the same call is made again.

    python benchmarks/faults.py

Writes ``benchmarks/faults.md``; ``--part`` writes one of its two tables anew. A simulated season of four dates is
served over HTTP by a server that fails as told, and super-resolved into a Zarr store. After each fault the store must
open, its complete dates must equal those of a job that met no fault, to the bit, and the next call must complete it.
Then tiny jobs are killed before each of their changes of a store: see `kills`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import kills
import numpy as np
import xarray as xr
from distributed import Client, LocalCluster
from faulty import Plan, faulty
from quality import table

import xr_ginet
from xr_ginet.sentinel2 import patience
from xr_ginet.simulation import simulate, write_cogs

DAYS = (6, 11, 16, 21)
STRUCK = "11/B02.tif"


def season(folder: Path, side: int) -> list[dict[str, Any]]:
    """Write four dates of one simulated scene as COGs, each in a folder of its own; return their items."""
    scene = simulate((side, side), seed=3)
    place = {"transform": scene.transform, "crs": scene.crs}
    dates = (f"2024-06-{day:02d}T10:56:21Z" for day in DAYS)
    return [
        write_cogs(scene.fine, scene.coarse, folder, item_id=f"{day:02d}", datetime=date, **place)
        for day, date in zip(DAYS, dates, strict=True)
    ]


def write(items: list[dict[str, Any]], folder: Path, url: str, store: Path, **options: Any) -> None:
    """Super-resolve a season that is served at a URL; this is the call that is made twice."""
    served = []
    for item in items:
        assets = {
            name: asset | {"href": f"{url}/{Path(asset['href']).relative_to(folder)}"}
            for name, asset in item["assets"].items()
        }
        served.append(item | {"assets": assets})
    cube = xr_ginet.open_stac(served, chunks=256)
    cube.ginet.superresolve(weights="ginet-xs", depth="auto").ginet.to_zarr(
        store, resume=True, dtype="uint16", **options
    )


def complete(store: Path, truth: xr.Dataset) -> tuple[int, bool]:
    """Return how many dates a store holds completely, by their checksums, and whether all of them are right."""
    if not store.exists():
        return 0, True
    held = xr_ginet.status(store, verify=True).values
    stored = xr.open_zarr(store, mask_and_scale=False)
    right = all(
        np.array_equal(stored[band][i], truth[band][i]) for band in ("B02", "B05", "B12") for i in np.flatnonzero(held)
    )
    return int(held.sum()), right and bool((held == xr_ginet.status(store).values).all())


class Case:
    """One store of one fault: the first call, what it left, the second call."""

    def __init__(self, items: list[dict[str, Any]], folder: Path, store: Path, truth: xr.Dataset) -> None:
        self.items, self.folder, self.store, self.truth = items, folder, store, truth

    def row(self, fault: str, first: Callable[[], str | None]) -> list[str]:
        began = time.monotonic()
        try:
            said = first() or "completed"
        except Exception as error:
            said = f"{type(error).__name__}"
        seconds = time.monotonic() - began
        held, right = complete(self.store, self.truth)
        with faulty(self.folder) as url:
            write(self.items, self.folder, url, self.store)
        again, still = complete(self.store, self.truth)
        return [
            fault,
            said,
            f"{seconds:.1f}",
            f"{held} of {len(DAYS)}",
            _yes(right),
            _yes(still and again == len(DAYS)),
        ]


def _yes(true: bool) -> str:
    return "yes" if true else "**no**"


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path | None]:
    """Have a file system of so many kilobytes, or None where it may not be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def killed(case: Case, seconds: float) -> str | None:
    """Make the call in another process, and kill that some seconds after it has begun."""
    with faulty(case.folder) as url:
        code = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from faults import *; "
            "print('ready', flush=True); "
            f"write(season_of({str(case.folder)!r}), Path({str(case.folder)!r}), {url!r}, Path({str(case.store)!r}))"
        )
        command = [sys.executable, "-W", "ignore", "-c", code]
        job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        job.stdout.readline()
        try:
            job.wait(seconds)
        except subprocess.TimeoutExpired:
            job.send_signal(signal.SIGKILL)
            job.wait()
            return "killed"
    return None


def season_of(folder: str) -> list[dict[str, Any]]:
    """Return the items whose JSON lies beside their COGs."""
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


def rows(folder: Path, side: int, moments: int) -> Iterator[list[str]]:
    items = season(folder / "cogs", side)
    for item in items:
        (folder / "cogs" / f"{item['id']}.json").write_text(json.dumps(item))
    with faulty(folder / "cogs") as url:
        began = time.monotonic()
        write(items, folder / "cogs", url, folder / "truth.zarr")
        whole = time.monotonic() - began
    truth = xr.open_zarr(folder / "truth.zarr", mask_and_scale=False).load()

    def case(name: str) -> Case:
        return Case(items, folder / "cogs", folder / f"{name}.zarr", truth)

    yield case("none").row("none", lambda: None)
    passing = {"two requests in three": lambda n: n % 3 < 2, "the first three requests": lambda n: n < 3}
    for fault in ("429", "500", "503", "drop", "truncate", "corrupt", "hang"):
        label, when = list(passing.items())[fault in ("truncate", "corrupt", "hang")]
        this = case(fault)
        with faulty(folder / "cogs", Plan(fault, STRUCK, when)) as url:
            yield this.row(f"raster: {fault}, {label}", lambda u=url, t=this: write(items, t.folder, u, t.store))
    for fault in ("404", "500", "truncate", "corrupt"):
        this = case(f"always-{fault}")
        with faulty(folder / "cogs", Plan(fault, STRUCK)) as url:
            yield this.row(
                f"raster of one date: {fault}, always", lambda u=url, t=this: write(items, t.folder, u, t.store)
            )
    this = case("worker")
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
        faulty(folder / "cogs") as url,
    ):
        pids = list(client.run(os.getpid).values())

        def strike(outcome: object) -> None:
            if pids:
                os.kill(pids.pop(), signal.SIGKILL)
                pids.clear()

        yield this.row("a worker killed", lambda: write(items, this.folder, url, this.store, tell=strike))
    for i, share in enumerate(np.random.default_rng(0).uniform(0, 1, moments)):
        that = case(f"killed-{i}")
        seconds = share * whole
        yield that.row(f"the job killed after {seconds:.1f} s", lambda t=that, s=seconds: killed(t, s))
    with small_disk(folder / "disk", side * side // 20) as disk, faulty(folder / "cogs") as url:
        if disk is not None:
            full = Case(items, folder / "cogs", disk / "cube.zarr", truth)

            def fill() -> None:
                try:
                    write(items, full.folder, url, full.store)
                finally:  # what is asked of the disk's owner before the second call
                    subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)

            yield full.row("a full disk, then a larger one", fill)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512, help="pixels of the scene at 10 m")
    parser.add_argument("--moments", type=int, default=20, help="at which a job is killed")
    parser.add_argument("--part", choices=("faults", "kills"), help="write one of the tables anew")
    parser.add_argument("--step", type=int, default=1, help="kill before every so manieth change of a store")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("faults.md"))
    options = parser.parse_args(arguments)
    os.environ["GDAL_HTTP_LOW_SPEED_TIME"] = "2"  # of 20 s, so that a server that hangs is not waited for so long
    patience.FIRST_PAUSE = 0.1
    header = [
        "fault",
        "first call",
        "seconds",
        "complete dates then",
        "right to the bit",
        "complete after the second call",
    ]
    parts = options.out.read_text().split(KILLS) if options.out.exists() else ["", ""]
    with TemporaryDirectory() as folder:
        if options.part != "kills":
            parts[0] = _faults(table(header, list(rows(Path(folder), options.side, options.moments))), options.side)
        if options.part != "faults":
            parts[1:] = [_kills(list(kills.rows(Path(folder), options.step)), options.step)]
    options.out.write_text(parts[0] + KILLS + "".join(parts[1:]))
    print(options.out.read_text())


KILLS = "## Kills\n"


def _faults(found: str, side: int) -> str:
    parts = [
        "# Faults",
        f"`python benchmarks/faults.py`: four dates of {side} × {side} pixels over HTTP into a Zarr "
        "store with `to_zarr(resume=True)`. A date counts as complete when its pixels have the checksum that was "
        "recorded, and as right when it equals, bit for bit, that of a job without faults. Pauses between attempts are "
        "a fifth of the default, and a server counts as hanging after 2 s in place of 20.",
        found,
        "Catalogues that fail, Icechunk, S3 servers that drop requests, and two jobs on one store: "
        "`tests/test_faults.py`, `tests/test_object_stores.py`, `tests/test_guards.py`.",
    ]
    return "\n\n".join(parts) + "\n\n"


def _kills(found: list[list[str]], step: int) -> str:
    header = ["operation", "store", "kills", "unreadable then", "parts of dates seen", "not completed by the same call"]
    which = "each change" if step == 1 else f"every {step}th change"
    told = (
        f"`python benchmarks/faults.py --part kills`: jobs on cubes of 4 × 4 pixels are killed before {which} that "
        "they make to a store (writes, deletions, renames, commits). Then a reader opens it, and must find whole dates "
        "only, the old ones or the new ones, or no cube where there was none; then the job is run again, and must end "
        "with the content of one that was not disturbed."
    )
    return f"\n{told}\n\n{table(header, found)}\n"


if __name__ == "__main__":
    main()
