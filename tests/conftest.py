"""What several tests share: a small network with random weights, cubes with a story, real data where it is at hand."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import rasterio
import rioxarray  # noqa: F401 - registers .rio
import torch
import xarray as xr
from hypothesis import HealthCheck, settings

import xr_ginet
from xr_ginet.network import Checkpoint, GINet, GINetConfig, available_weights, load_checkpoint, save_checkpoint
from xr_ginet.sentinel2.bands import BANDS_10M, BANDS_20M, BANDS_60M
from xr_ginet.sentinel2.grids import DIMS
from xr_ginet.simulation import Scene, write_cogs

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason=f"real data is not at {SHARED}")

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels for GPUs, interpreted
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the notebooks' kernels

# Hypothesis has limits of time, which a busy machine exceeds: 0.2 s per example, and a second until there are some.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def dashboard_port_is_held() -> Iterator[bool]:
    """Hold the port of Dask's dashboard: a test that needs it then fails always, not only beside another cluster.

    Yields whether it is this process that holds it.
    """
    with socket.socket() as holder:
        held = False
        with suppress(OSError):  # somebody else holds it already
            holder.bind(("127.0.0.1", 8787))
            holder.listen()
            held = True
        yield held


@contextmanager
def no_compute() -> Iterator[None]:
    """Fail where Dask computes anything."""

    def scheduler(graph: object, keys: object, **kwargs: object) -> None:
        raise AssertionError("computed while only the graph should be built")

    with dask.config.set(scheduler=scheduler):
        yield


def packaged_weights() -> list[Any]:
    """Return the names of the packaged weights, those for GPUs marked as slow."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] * (load_checkpoint(name).config.n_features > 100))
        for name in available_weights()
    ]


def random_checkpoint(path: Path, **config: object) -> Checkpoint:
    """Write a network with random weights whose attention is far from uniform and whose stages all matter."""
    torch.manual_seed(7)
    network = GINet(GINetConfig(**{"n_features": 6, "n_stages": 2, "assignment": "soft"} | config)).double()
    for name, parameter in network.named_parameters():
        if "theta" in name or "phi" in name:
            parameter.data *= 12
    return save_checkpoint(path, network)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return random_checkpoint(tmp_path_factory.mktemp("weights") / "random.safetensors")


def single_grid(
    bands: tuple[str, ...], shape: tuple[int, int], pixel: float, *, n_times: int | None = None, seed: int = 0
) -> xr.Dataset:
    """Return random float64 reflectance on a north-up grid in UTM zone 30, without symmetry."""
    rng = np.random.default_rng((seed, int(pixel)))
    lead = () if n_times is None else (n_times,)
    dims = ("y", "x") if n_times is None else ("time", "y", "x")
    coords = {
        "y": 4_848_600 - pixel * (np.arange(shape[0]) + 0.5),
        "x": 742_920 + pixel * (np.arange(shape[1]) + 0.5),
    }
    if n_times is not None:
        coords["time"] = np.datetime64("2024-05-01T10:50:31", "ns") + np.arange(n_times) * np.timedelta64(5, "D")
    data = {band: (dims, 0.05 + 0.4 * rng.random((*lead, *shape))) for band in bands}
    return xr.Dataset(data, coords).rio.write_crs("EPSG:32630")


def two_grids(shape: tuple[int, int] = (48, 36), *, n_times: int | None = None, seed: int = 0) -> xr.Dataset:
    """Return a random two-grid cube, not chunked; ``shape`` is at 20 m."""
    return xr_ginet.pair(
        single_grid(BANDS_10M, (2 * shape[0], 2 * shape[1]), 10, n_times=n_times, seed=seed),
        single_grid(BANDS_20M, shape, 20, n_times=n_times, seed=seed),
    )


def three_grids(shape: tuple[int, int] = (4, 6), *, n_times: int | None = None, seed: int = 0) -> xr.Dataset:
    """Return a random cube of all bands, not chunked; ``shape`` is at 60 m."""
    cube = two_grids((3 * shape[0], 3 * shape[1]), n_times=n_times, seed=seed)
    sixty = single_grid(BANDS_60M, shape, 60, n_times=n_times, seed=seed)
    return cube.merge(sixty.rename(dict(zip(DIMS[10], DIMS[60], strict=True))), compat="override", join="override")


def scene_item(scene: Scene, folder: Path) -> dict[str, Any]:
    """Write a simulated scene as COGs; return the STAC item of midsummer that describes them."""
    place = {"transform": scene.transform, "crs": scene.crs, "datetime": "2024-06-21T10:56:21Z"}
    return write_cogs(scene.fine, scene.coarse, folder, item_id="simulated", **place)


def with_classification(item: dict[str, Any], classes: np.ndarray, path: Path) -> dict[str, Any]:
    """Return an item of `scene_item` that has a scene classification too, written to ``path``."""
    asset = item["assets"]["rededge1"]
    place = {"crs": f"EPSG:{item['properties']['proj:epsg']}", "transform": rasterio.Affine(*asset["proj:transform"])}
    height, width = classes.shape
    with rasterio.open(path, "w", "GTiff", width, height, 1, dtype="uint8", nodata=0, **place) as file:
        file.write(classes, 1)
    scl = asset | {"href": str(path), "eo:bands": [], "raster:bands": []}
    return item | {"assets": item["assets"] | {"scl": scl}}


def real_scene(name: str) -> tuple[xr.Dataset, xr.Dataset]:
    """Return the digital numbers of a real scene at 10 m and at 20 m, with its CRS."""
    with np.load(SHARED / "scenes" / f"{name}.npz") as file:
        meta = json.loads(str(file["meta"]))
        parts = []
        for key, bands in (("b10", BANDS_10M), ("b20", BANDS_20M)):
            dx, _, x0, _, dy, y0 = meta["transform10" if key == "b10" else "transform20"]
            height, width = file[key].shape[-2:]
            coords = {"y": y0 + dy * (np.arange(height) + 0.5), "x": x0 + dx * (np.arange(width) + 0.5)}
            data = {band: (("y", "x"), image) for band, image in zip(bands, file[key], strict=True)}
            parts.append(xr.Dataset(data, coords).rio.write_crs(meta["crs"]))
    return parts[0], parts[1]
