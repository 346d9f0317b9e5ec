"""A batch job on a cluster: two areas and three dates of a catalogue into Zarr cubes, resumed after a failure.

    python examples/batch_cluster.py FOLDER                 # a LocalCluster of this machine
    python examples/batch_cluster.py FOLDER --on slurm      # dask-jobqueue, on a machine that submits to Slurm
    python examples/batch_cluster.py FOLDER --on gateway    # dask-gateway, as Pangeo hubs on Kubernetes have it

The job file that it writes is what `xr-ginet submit FOLDER/job.toml` takes; with ``catalog`` and ``bbox`` changed it is
a job of your own. Here a simulated season is served by a STAC API on localhost. ``--on slurm`` and ``--on gateway``
need a catalogue and a store that the workers reach: ``--catalog URL --store s3://…``; with ``--local`` a LocalCluster
takes the place of theirs.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path

from local_stac import serve

from xr_ginet.jobs import Job, Report, run
from xr_ginet.simulation import simulate, write_cogs

CLUSTERS = {
    "local": """
class = "distributed.LocalCluster"
options = { n_workers = 2, threads_per_worker = 1, dashboard_address = ":0" }
""",
    "slurm": """
class = "dask_jobqueue.SLURMCluster"
workers = [1, 20]
options = { cores = 2, processes = 1, memory = "8GiB", walltime = "02:00:00", queue = "compute" }
""",
    "gateway": """
class = "dask_gateway.GatewayCluster"
workers = [1, 20]
options = { worker_cores = 2, worker_memory = 8 }
""",
}
JOB = """
catalog = "{catalog}"
datetime = "2024-06"
store = "{store}/{{area}}.zarr"
report = "report.json"

[open]
chunks = 256

[superresolve]
weights = "ginet-xs"
depth = "auto"

[write]
dtype = "uint16"

[cluster]
{cluster}
[[area]]
name = "west"
bbox = {west}

[[area]]
name = "east"
bbox = {east}
"""


def season(folder: Path, size: int) -> list[dict]:
    """Write three dates of one simulated scene as COGs; return their STAC items."""
    items = []
    for i, day in enumerate((11, 16, 21)):
        scene = simulate((size, 2 * size), seed=3, season=0.44 + 0.014 * i)
        place = {"transform": scene.transform, "crs": scene.crs, "datetime": f"2024-06-{day}T10:56:21Z"}
        items.append(write_cogs(scene.fine, scene.coarse, folder, item_id=f"S2A_simulated_{day}", **place))
    return items


def main(folder: Path, size: int = 512, on: str = "local", local: bool = False, **elsewhere: str | None) -> Report:
    folder.mkdir(parents=True, exist_ok=True)
    items = season(folder / "cogs", size)
    catalog, store = elsewhere.get("catalog"), elsewhere.get("store")
    with nullcontext(catalog) if catalog else serve(items, folder / "cogs") as url:
        west, south, east, north = items[0]["bbox"]
        inner = (south + 0.002, north - 0.002, (west + east) / 2)
        text = JOB.format(
            catalog=url,
            store=store or "cubes",
            cluster=CLUSTERS["local" if local else on],
            west=[west + 0.003, inner[0], inner[2], inner[1]],
            east=[inner[2], inner[0], east - 0.003, inner[1]],
        )
        (folder / "job.toml").write_text(text)
        job = Job.from_toml(folder / "job.toml")
        return run(job, tell=lambda area, outcome: print(area, outcome.date, outcome.state, f"{outcome.seconds:.1f} s"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=512, help="height of the scene in pixels; it is twice as wide")
    parser.add_argument("--on", choices=list(CLUSTERS), default="local")
    parser.add_argument("--local", action="store_true", help="a LocalCluster in place of the one of --on")
    parser.add_argument("--catalog", help="URL of a STAC API that the workers reach")
    parser.add_argument("--store", help="where cubes are written, that the workers reach")
    report = main(**vars(parser.parse_args()))
    print(report.state, report.counts)
