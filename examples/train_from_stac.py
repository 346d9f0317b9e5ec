"""Train weights on what a STAC catalogue holds of an area, and judge them on another: on this machine alone.

Two simulated scenes are served as COGs by a real STAC API on localhost. A tiny network is trained on the first at
reduced scale, as `xr-ginet train --config run.toml --folder …` does, and evaluated on the second. Prints the ratio of
its error to bicubic interpolation's.
"""

import sys
from pathlib import Path

from local_stac import serve

import xr_ginet
from xr_ginet.simulation import simulate, write_cogs
from xr_ginet.training.run import Run, train

RUN = """
name = "tiny"

[network]
assignment = "soft"
n_features = 6
n_stages = 1
window_size = 3
cluster_features = [8, 8]

[patches]
band_gain_spread = 0.08

[fit]
steps = {steps}
learning_rate = 3e-3
warm_up = 10
averaging = 0.98
accelerator = "cpu"
threads = 1

[[train]]
path = "cube.zarr"
"""


def main(folder: Path, size: int = 768, steps: int = 400) -> float:
    items = []
    for month, seed in ((6, 3), (7, 4)):
        scene = simulate((size, size), seed=seed)
        place = {"transform": scene.transform, "crs": scene.crs, "datetime": f"2024-{month:02d}-21T10:56:21Z"}
        items.append(write_cogs(scene.fine, scene.coarse, folder / "cogs", item_id=f"S2A_simulated_{month}", **place))
    with serve(items, folder / "cogs") as url:
        # Once from the catalogue to a local store, rather than through the network for every pass.
        xr_ginet.open_stac(url, datetime="2024-06", chunks=384).ginet.to_zarr(folder / "cube.zarr", mode="w")
        (folder / "run.toml").write_text(RUN.format(steps=steps))
        weights = train(Run.from_toml(folder / "run.toml"), folder / "tiny", progress=True)
        table = xr_ginet.open_stac(url, datetime="2024-07", chunks=384).ginet.evaluate(["bicubic", weights])
    ratio = float(table["rmse_all"][1] / table["rmse_all"][0])
    print(table["rmse"].to_pandas().round(1).to_string())
    print(f"{weights.name} / bicubic on the scene that was not trained on: {ratio:.2f}")
    return ratio


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo/train"))
