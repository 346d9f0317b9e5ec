"""From a STAC catalogue to a 10 m Zarr cube, on this machine alone: `make demo`.

A simulated scene, whose true 10 m bands are known, is served as COGs by a real STAC API on localhost; the rest is what
anyone would type. Writes ``cube.zarr`` and ``before_after.png`` into the folder given.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import xarray as xr
from distributed import Client, LocalCluster
from local_stac import serve

import xr_ginet
from xr_ginet.sentinel2.bands import BANDS_10M, BANDS_20M
from xr_ginet.simulation import simulate, write_cogs
from xr_ginet.training.metrics import rmse

FALSE_COLOUR = ("B12", "B8A", "B05")


def main(folder: Path, size: int = 1024) -> None:
    scene = simulate((size, size), seed=3)
    item = write_cogs(
        scene.fine,
        scene.coarse,
        folder / "cogs",
        transform=scene.transform,
        crs=scene.crs,
        datetime="2024-06-21T10:56:21Z",
        item_id="S2A_simulated",
    )
    with (
        serve([item], folder / "cogs") as url,
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster),
    ):
        ds = xr_ginet.open_stac(url, datetime="2024-06", chunks=512)
        sr = ds.ginet.superresolve()
        sr.ginet.to_zarr(folder / "cube.zarr", mode="w", progress=True)

    cube = xr.open_zarr(folder / "cube.zarr", decode_coords="all").isel(time=0)
    ginet = cube[list(BANDS_20M)].to_array().values
    truth = scene.reference[len(BANDS_10M) :]
    coarse = torch.from_numpy(scene.coarse)[None]
    bicubic = torch.nn.functional.interpolate(coarse, scale_factor=2, mode="bicubic")[0].numpy()
    scores = {name: rmse(image, truth, border=16) * 1e4 for name, image in (("bicubic", bicubic), ("GINet", ginet))}
    print("RMSE against the true 10 m bands, digital numbers\n         " + "".join(f"{band:>7}" for band in BANDS_20M))
    for name, score in scores.items():
        print(f"{name:8} " + "".join(f"{value:7.1f}" for value in score))
    ratio = np.sqrt((scores["GINet"] ** 2).mean() / (scores["bicubic"] ** 2).mean())
    print(f"GINet / bicubic over all bands: {ratio:.2f}")
    picture(folder / "before_after.png", {"20 m": scene.coarse, "bicubic": bicubic, "GINet": ginet, "truth": truth})


def picture(path: Path, images: dict[str, np.ndarray]) -> None:
    """Draw the same 1.6 km of each image in false colour."""
    bands = [BANDS_20M.index(band) for band in FALSE_COLOUR]
    low, high = np.percentile(images["truth"][bands], (1, 99), axis=(1, 2))
    figure, axes = plt.subplots(1, 4, figsize=(20, 5.4), layout="constrained")
    for axis, (name, image) in zip(axes, images.items(), strict=True):
        side = image.shape[-1] * 160 // images["truth"].shape[-1]
        rgb = np.moveaxis(image[bands, side : 2 * side, side : 2 * side], 0, -1)
        axis.imshow(np.clip((rgb - low) / (high - low), 0, 1), interpolation="nearest")
        axis.set(title=f"{name} ({', '.join(FALSE_COLOUR)})", xticks=[], yticks=[])
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
