"""How exact and how fast the network is on a CUDA device, as a share of what its matrix products reach in the same run.

python benchmarks/gpu/measure.py --data build/gpu/data.npz --out build/gpu/measured.md

Needs the package installed; takes about two minutes on an H200.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import train
from quality import table
from throughput import operations

from xr_ginet.mapping.devices import arithmetic
from xr_ginet.mapping.predictor import Predictor
from xr_ginet.network import GINet, GINetConfig, available_weights, load_checkpoint
from xr_ginet.network.attention import WindowAttention
from xr_ginet.network.convolution_gpu import Bordered, Convolution
from xr_ginet.network.mixed import WIDE, copies_blocks, mix

NAMES = ("ginet", "ginet-s", "ginet-xs")
TILE, BLOCKS = 10_980, 24


def seconds(function: Callable[[], object], runs: int = 5, warm_up: int = 2) -> float:
    """Return the median of the device's time."""
    times = []
    for _ in range(runs + warm_up):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times[warm_up:])


def peaks() -> dict[str, float]:
    """Return operations per second of matrix products."""
    rates = {}
    for dtype in (torch.float16, torch.float32):
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        rates[str(dtype).removeprefix("torch.")] = 2 * 8192**3 / seconds(lambda: a @ b)  # noqa: B023
    return rates


def attention() -> str:
    module = WindowAttention(5, 3, window_size=5, patch_size=3).cuda()
    x, y = torch.randn(1, 5, 1024, 1024, device="cuda"), torch.randn(1, 3, 1024, 1024, device="cuda")
    exact = copy.deepcopy(module).double()
    times, errors = {}, {}
    with torch.inference_mode():
        truth = exact(x.double(), y.double())
        for name, function in (
            ("kernel", module),
            ("torch", torch.compiler.disable(lambda x, y: module._attend(x, y))),
        ):
            errors[name] = float((function(x, y) - truth).abs().max())
            times[name] = 1e3 * seconds(lambda: function(x, y)) / 1.048576  # noqa: B023
    rows = [[name, f"{times[name]:.3f}", f"{errors[name]:.1e}"] for name in times]
    return table(["attention", "ms per megapixel", "largest difference from float64"], rows)


def widths(side: int, peak: dict[str, float]) -> str:
    """Return the rate of one convolution of a residual block by its channels: cuDNN's, and ours where it serves."""
    rows = []
    for width in (16, 32, 64, 128, 136, 144, 160, 192, 256):
        x = torch.rand(1, width, side, side, device="cuda", dtype=torch.float16)
        x = x.contiguous(memory_format=torch.channels_last)
        layer = torch.nn.Conv2d(width, width, 3, padding=1).cuda().half().to(memory_format=torch.channels_last)
        geometry = [1, 1], [1, 1], [1, 1], 1
        forms = [lambda: torch.cudnn_convolution_relu(x, layer.weight, layer.bias, *geometry)]  # noqa: B023
        if width in WIDE and copies_blocks(x.device):
            ours, bordered = Convolution(layer), Bordered.empty(1, width, side, side, like=x)
            bordered.images.copy_(x)
            out = bordered.new(width)
            forms.append(lambda: ours(bordered, out))  # noqa: B023
        row = [f"{width}"]
        for form in forms:
            with torch.inference_mode():
                taken = seconds(form)
            rate = 2 * 9 * width**2 * side**2 / taken
            row += [f"{1e9 * taken / side**2:.2f}", f"{rate / peak['float16']:.0%}"]
        rows.append(row + [""] * (5 - len(row)))
    share = "of the matrix products' rate"
    return table(["channels, float16", "cuDNN: ms per megapixel", share, "kernel: ms per megapixel", share], rows)


def _step(n: int) -> tuple[float, float]:
    """Return the seconds of a step with a batch of ``n``, and the GiB that it takes."""
    torch.cuda.reset_peak_memory_stats()
    images = torch.rand(n, 4, 48, 48), torch.rand(n, 6, 24, 24), torch.rand(n, 6, 48, 48)
    ms, hs, truth = (image.cuda() for image in images)
    run = train.Training(GINetConfig(assignment="soft"), 1e-4, "cuda")
    return seconds(lambda: run.step((ms, hs, truth))), torch.cuda.max_memory_allocated() / 2**30


def training(batches: tuple[int, ...] = (32, 64)) -> str:
    """Return how long a step of train.py takes with attention's gradient in torch and by kernels."""
    rows = []
    for form in ("torch", "kernels"):
        before = WindowAttention._may_compile_gradient
        if form == "torch":
            WindowAttention._may_compile_gradient = lambda self, x: False
        for n in batches:
            taken, memory = _step(n)
            rows.append([form, f"{n}", f"{1e3 * taken:.1f}", f"{n / taken:.0f}", f"{memory:.1f}"])
        WindowAttention._may_compile_gradient = before
    return table(["attention's gradient", "patches of 48²", "ms a step", "patches a second", "peak GiB"], rows)


def exactness(scene: tuple[Tensor, Tensor]) -> str:
    """Return how far precisions are from float64 on a real scene."""
    rows = []
    for name in available_weights():
        network = load_checkpoint(name).network().cuda()
        with torch.inference_mode(), arithmetic("cuda"):
            exact = copy.deepcopy(network).double()(*(image.double() for image in scene))
            for precision in ("float32", "mixed"):
                function = mix(network) if precision == "mixed" else network
                error = 1e4 * (function(*scene) - exact)
                rows.append([name, precision, f"{error.abs().max():.4f}", f"{error.pow(2).mean().sqrt():.4f}"])
    return table(["weights", "precision", "largest difference, digital numbers", "RMS"], rows)


def blocks(sides: list[int], peak: dict[str, float]) -> str:
    """Return the network's rates on blocks that are on the device."""
    rows = []
    for name in NAMES:
        small = torch.rand(1, 4, 64, 64), torch.rand(1, 6, 32, 32)
        with torch.inference_mode():
            per_pixel = operations(lambda: load_checkpoint(name).network()(*small)) / 64**2  # noqa: B023
        for precision in ("float32", "mixed"):
            network = load_checkpoint(name).network().cuda()
            network = mix(network) if precision == "mixed" else network
            for side in sides if precision == "mixed" else sides[:1]:
                ms, hs = torch.rand(1, 4, side, side).cuda(), torch.rand(1, 6, side // 2, side // 2).cuda()
                torch.cuda.reset_peak_memory_stats()
                with torch.inference_mode(), arithmetic("cuda"):
                    start = time.perf_counter()
                    network(ms, hs)
                    torch.cuda.synchronize()
                    first = time.perf_counter() - start
                    rate = side**2 / seconds(lambda: network(ms, hs), 3)  # noqa: B023
                share = rate * per_pixel / peak["float16" if precision == "mixed" else "float32"]
                memory = torch.cuda.max_memory_allocated() / 2**30
                rows.append(
                    [name, precision, f"{side}", f"{rate / 1e6:.1f}", f"{share:.0%}", f"{memory:.2f}", f"{first:.2f}"]
                )
                print(rows[-1], flush=True)
    return table(
        [
            "weights",
            "precision",
            "block",
            "Mpixel/s",
            "of the matrix products' rate",
            "peak GiB",
            "s for the first one",
        ],
        rows,
    )


def tile(block: int) -> str:
    """Return the device's time for a tile that is there, in overlapping blocks."""
    ms, hs = torch.rand(1, 4, TILE, TILE, device="cuda"), torch.rand(1, 6, TILE // 2, TILE // 2, device="cuda")
    out = torch.empty(1, 6, TILE, TILE, device="cuda")
    rows = []
    for name in NAMES:
        checkpoint = load_checkpoint(name)
        network, depth = mix(checkpoint.network().cuda()), checkpoint.card["depth"]

        def run(network: GINet = network, depth: int = depth) -> None:
            for y in range(0, TILE, block):
                for x in range(0, TILE, block):
                    y0, x0 = max(y - depth, 0), max(x - depth, 0)
                    y1, x1 = min(y + block + depth, TILE), min(x + block + depth, TILE)
                    result = network(ms[..., y0:y1, x0:x1], hs[..., y0 // 2 : y1 // 2, x0 // 2 : x1 // 2])
                    y2, x2 = min(y + block, TILE), min(x + block, TILE)
                    out[..., y:y2, x:x2] = result[..., y - y0 : y2 - y0, x - x0 : x2 - x0]

        with torch.inference_mode(), arithmetic("cuda"):
            rows.append([name, f"{block}", f"{depth}", f"{seconds(run, 1, 1):.2f}"])
        print(rows[-1], flush=True)
    return table(["weights, mixed precision", "block", "depth", "s for a tile of 10,980² on the device"], rows)


def host(side: int) -> str:
    """Return the rate of blocks from host memory and back there, as Dask's threads run them."""
    rng = np.random.default_rng(0)
    fine, coarse = rng.random((4, side, side), "float32"), rng.random((6, side // 2, side // 2), "float32")
    rows = []
    for name in NAMES:
        run = Predictor.of(load_checkpoint(name), device="cuda")
        for threads in (1, 2, 4, 8):
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda _: run(fine, coarse), range(2 * threads)))  # noqa: B023
                start = time.perf_counter()
                list(pool.map(lambda _: run(fine, coarse), range(BLOCKS)))  # noqa: B023
                rate = BLOCKS * side**2 / (time.perf_counter() - start)
            rows.append([name, f"{side}", f"{threads}", f"{rate / 1e6:.1f}"])
            print(rows[-1], flush=True)
    return table(["weights, mixed precision", "block", "threads", "Mpixel/s from host memory and back"], rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="of pack.py")
    parser.add_argument("--out", type=Path, default=Path("build/gpu/measured.md"))
    parser.add_argument("--scene", default="ucnn_usa")
    parser.add_argument("--sides", type=int, nargs="+", default=[544, 1056, 2080])
    parser.add_argument("--parts", nargs="+", help="the tables to make: attention, exactness, blocks, tile, …")
    options = parser.parse_args(arguments)
    with np.load(options.data) as file:
        scene = tuple(
            torch.from_numpy(file[f"{options.scene}/{k}"] / np.float32(1e4))[None].cuda() for k in ("b10", "b20")
        )
    peak = peaks()
    page = [
        f"# On a GPU\n\n`python benchmarks/gpu/measure.py` on {torch.cuda.get_device_name()} with torch "
        f"{torch.__version__}. Matrix products of 8192²: "
        + ", ".join(f"{rate / 1e12:.0f} TFLOP/s in {dtype}" for dtype, rate in peak.items())
        + "."
    ]
    parts = {
        "attention": attention,
        "exactness": lambda: exactness(scene),
        "blocks": lambda: blocks(options.sides, peak),
        "tile": lambda: tile(options.sides[-1] - 64),
        "widths": lambda: widths(options.sides[1], peak),
        "training": training,
        "host": lambda: host(options.sides[1] // 64 * 64),
    }
    for name in options.parts or parts:
        page.append(parts[name]())
        print(page[-1], flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n\n".join(page) + "\n")


if __name__ == "__main__":
    main()
