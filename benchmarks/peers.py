"""A peer that can be installed, its weights included, on the same scenes and the same core: error and time.

    python -m venv build/peer
    build/peer/bin/pip install "tensorflow-cpu==2.15.*"
    build/peer/bin/pip install --no-deps s2super
    python benchmarks/peers.py --peer build/peer/bin/python

Writes ``benchmarks/peers.md``. s2super (MIT licence) runs in an environment of its own: its saved network is called as
it is, on the tiles of 64 pixels that it takes, of which the inner 48 are kept, with 20 m bands upsampled bilinearly,
which is its input. Its own function blends shifted tiles too, for which it needs GDAL's bindings.
Without ``--peer`` only our weights are measured. SEN2SR installs too, but not its weights; DSen2 and Evoland cannot be
installed from the package index.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

TILE, MARGIN = 64, 8
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}


def s2super(images: Path, out: Path) -> None:
    """Super-resolve the pairs in a file, in an environment that holds the peer and not this package."""
    import importlib.util

    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    import tensorflow as tf

    folder = Path(importlib.util.find_spec("s2super").origin).parent / "s2super_v5"
    network = tf.saved_model.load(str(folder)).signatures["serving_default"]

    def tiles(image):  # (y, x, channel) -> (tile, 64, 64, channel), overlapping by the margins
        inner = TILE - 2 * MARGIN
        rows, columns = (-(-n // inner) for n in image.shape[:2])
        padding = [(MARGIN, MARGIN + n * inner - m) for n, m in zip((rows, columns), image.shape[:2], strict=True)]
        padded = np.pad(image, [*padding, (0, 0)], mode="edge")
        starts = [(r * inner, c * inner) for r in range(rows) for c in range(columns)]
        return np.stack([padded[y : y + TILE, x : x + TILE] for y, x in starts]), rows, columns

    def run(ms, hs):
        rgb, rows, columns = tiles(ms[2::-1].transpose(1, 2, 0)[..., ::-1])  # B02 B03 B04
        upsampled = tf.image.resize(hs.transpose(1, 2, 0), ms.shape[1:], "bilinear").numpy()
        result = []
        for band in range(len(hs)):
            low, *_ = tiles(upsampled[..., band : band + 1])
            outputs = [
                network(
                    s2super_v2_input_low=tf.constant(low[i : i + 64]),
                    s2super_v2_input_rgb=tf.constant(rgb[i : i + 64]),
                )["concatenate_3"].numpy()[:, MARGIN:-MARGIN, MARGIN:-MARGIN, 0]
                for i in range(0, len(low), 64)
            ]
            inner = np.concatenate(outputs).reshape(rows, columns, TILE - 2 * MARGIN, TILE - 2 * MARGIN)
            whole = inner.transpose(0, 2, 1, 3).reshape(rows * inner.shape[2], columns * inner.shape[3])
            result.append(whole[: ms.shape[1], : ms.shape[2]])
        return np.stack(result)

    with np.load(images) as file:
        pairs = {key[3:]: (file[key], file["hs_" + key[3:]]) for key in file if key.startswith("ms_")}
    run(*next(iter(pairs.values())))  # the first call builds the graph
    results, seconds, pixels = {}, 0.0, 0
    for name, (ms, hs) in pairs.items():
        start = time.process_time()
        results[name] = run(ms, hs)
        seconds += time.process_time() - start
        pixels += ms[0].size
    np.savez(out, seconds_per_megapixel=seconds / pixels * 1e6, **results)


def ours(pairs: dict, name: str) -> tuple[dict, float]:
    """Return the output of packaged weights for each pair, and the CPU seconds per megapixel."""
    from evaluation import predict

    from xr_ginet.network import load_checkpoint

    network = load_checkpoint(name).network()
    predict(network, *next(iter(pairs.values()))[:2])  # the first call compiles
    start, pixels = time.process_time(), sum(ms[0].size for ms, *_ in pairs.values())
    results = {scene: predict(network, ms, hs) for scene, (ms, hs, _) in pairs.items()}
    return results, (time.process_time() - start) / pixels * 1e6


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, default=Path("../shared/data/scenes"))
    parser.add_argument("--peer", type=Path, help="a Python that can import tensorflow and holds s2super")
    parser.add_argument("--names", nargs="*", help="scenes to take: those that no weights were trained on")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("peers.md"))
    parser.add_argument("--run", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run:
        s2super(*options.run)
        return
    import torch
    from attention import machine
    from evaluation import TEST, VALIDATION, read_scene, wald_pair
    from quality import BORDER, overall, table

    from xr_ginet.training.metrics import rmse

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    names = options.names or [*VALIDATION, *TEST]
    rows = []
    for degradation, weights in (("mtf", ["ginet-xs", "ginet-s"]), ("box", ["ginet-xs-box", "ginet-s-box"])):
        pairs = {name: wald_pair(read_scene(options.scenes, name), degradation) for name in names}
        methods = {name: ours(pairs, name) for name in weights}
        if options.peer:
            with TemporaryDirectory() as folder:
                images, out = Path(folder) / "in.npz", Path(folder) / "out.npz"
                parts = {f"ms_{n}": ms for n, (ms, *_) in pairs.items()} | {f"hs_{n}": p[1] for n, p in pairs.items()}
                np.savez(images, **parts)
                command = [options.peer, __file__, "--run", images, out]
                subprocess.run(command, check=True, env=os.environ | ONE_THREAD)
                with np.load(out) as file:
                    methods["s2super"] = {n: file[n] for n in names}, float(file["seconds_per_megapixel"])
        for method, (images, seconds) in methods.items():
            errors = [overall(rmse(images[n], pairs[n][2], border=BORDER)) for n in names]
            rows.append([degradation, method, f"{seconds:.1f}", *(f"{e:.1f}" for e in errors)])
    torch.set_num_threads(threads)
    page = (
        "# Against a peer that can be installed\n\n"
        "RMSE in digital numbers at reduced scale, and CPU seconds per megapixel at 10 m (six bands), all on one "
        f"thread of one machine: `python benchmarks/peers.py --peer …`. {machine(1)}. How the peer was run is told "
        "by the script; its own function blends shifted tiles too.\n\n"
        f"{table(['degradation', 'method', 's per megapixel', *names], rows)}\n"
    )
    options.out.write_text(page)
    print(page)


if __name__ == "__main__":
    sys.exit(main())
