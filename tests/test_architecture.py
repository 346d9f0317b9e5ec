"""Who may import whom, what importing costs, and how much memory a block may take."""

from __future__ import annotations

import ast
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import needs_cuda

import xr_ginet
from xr_ginet.mapping.predictor import Predictor, block_memory
from xr_ginet.network import GINet, GINetConfig, available_weights, load_checkpoint, save_checkpoint

PACKAGE = Path(xr_ginet.__file__).parent

# Room: what its modules may import at their top. Inside functions: anything but accessor and cli.
STANDARD = {"numpy", "xarray"}
MAY_IMPORT = {
    "sentinel2": STANDARD | {"rasterio", "stackstac", "tenacity", "sentinel2"},
    "network": {"numba", "numpy", "torch", "triton", "safetensors", "network"},
    "mapping": STANDARD | {"scipy", "dask", "sentinel2", "mapping", "training", "__init__"},
    "evaluation": STANDARD | {"dask", "mapping", "sentinel2", "training"},
    "encoding": STANDARD | {"sentinel2"},
    "store": STANDARD | {"encoding", "growing", "schedulers", "transactions"},
    "growing": STANDARD | {"dask", "sentinel2", "transactions"},
    "overviews": STANDARD | {"encoding", "growing", "sentinel2", "store"},
    "transactions": STANDARD | {"dask", "schedulers"},
    "schedulers": {"dask"},
    "cog": STANDARD | {"dask", "sentinel2", "encoding", "schedulers"},
    "training": STANDARD | {"scipy", "dask", "torch", "network", "sentinel2", "tables", "training"},
    "simulation": STANDARD | {"scipy", "sentinel2", "training", "simulation"},
    "tables": set(),
    "jobs": STANDARD | {"growing", "sentinel2", "tables"},
    "accessor": {"xarray", "cog", "mapping", "sentinel2", "store"},
    "cli": {"typer"},
    "__init__": {"accessor"},
}
NEVER_LOADED = {
    "torch",
    "sklearn",
    "rasterio",
    "rioxarray",
    "pystac_client",
    "stackstac",
    "distributed",
    "matplotlib",
    "numba",
    "triton",
}


def top_imports(path: Path) -> set[str]:
    """Return the rooms and third-party libraries that a module imports when it is loaded, types aside."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            above = path.parent
            for _ in range(node.level - 1):
                above = above.parent
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                target = above / name.replace(".", "/")
                inside = target.exists() or target.with_suffix(".py").exists()
                room = target.relative_to(PACKAGE).parts[0] if inside else "__init__"
                found.add(room)
    return found - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_the_rooms_below_it(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert top_imports(path) <= MAY_IMPORT[room]


def test_nothing_imports_the_accessor_or_the_cli() -> None:
    for path in PACKAGE.rglob("*.py"):
        imports = {n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.level}
        names = {alias.name for node in imports for alias in node.names} | {node.module for node in imports}
        assert not names & {"cli"}
        assert "accessor" not in names or path.name == "__init__.py"


def test_importing_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, time, xarray, dask.array; start = time.perf_counter(); import xr_ginet; "
        "print(time.perf_counter() - start); print(*{m.split('.')[0] for m in sys.modules})"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, modules = output.splitlines()
    assert not NEVER_LOADED & set(modules.split())
    assert float(seconds) < 1


MEASURE = r"""
import re, sys
import numpy as np, torch
from xr_ginet.mapping.predictor import Predictor
from xr_ginet.network import load_checkpoint

def memory(field):
    return 1024 * int(re.search(field + r":\s+(\d+) kB", open("/proc/self/status").read()).group(1))

def block(height, width):
    predictor(np.ones((4, height, width), "float32"), np.ones((6, height // 2, width // 2), "float32"))

path, side, precision = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
predictor = Predictor.of(load_checkpoint(path), precision=precision)
block(32, 32)
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far, which may be the parent's
for height, width in ((side - 64, side), (side, side), (side // 2, side), (side, side - 32), (side, side)):
    block(height, width)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    "case",
    [(22, 1, 5, 448, "float32"), (22, 1, 7, 320, "float32"), (54, 1, 5, 320, "float32"), (22, 1, 5, 448, "bfloat16")],
)
def test_blocks_stay_within_the_memory_promised(case: tuple[int, int, int, int, str], tmp_path: Path) -> None:
    n_features, n_stages, window_size, side, precision = case
    config = GINetConfig(n_features=n_features, n_stages=n_stages, window_size=window_size)
    path = save_checkpoint(tmp_path / "w.safetensors", GINet(config), {}).path
    command = [sys.executable, "-c", MEASURE, str(path), str(side), precision]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.3 < int(run.stdout) / block_memory(config, side, side) <= 1


def test_what_was_measured_on_a_gpu_is_within_the_memory_promised() -> None:
    page = Path(xr_ginet.__file__).parents[1] / "benchmarks" / "gpu" / "measured.md"
    rows = [line.strip("| ").split(" | ") for line in page.read_text().splitlines()]
    found = [row for row in rows if len(row) == 7 and row[2].isdigit()]
    assert len(found) >= 11
    for name, precision, side, _, _, gib, _ in found:
        config = load_checkpoint(name).config if name in available_weights() else GINetConfig()
        assert 0.3 < float(gib) * 2**30 / block_memory(config, int(side), int(side), precision) <= 1


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "mixed"])
@pytest.mark.parametrize("name", ["ginet-xs", "ginet-s", "ginet"])
def test_blocks_stay_within_the_memory_of_a_device_promised(name: str, precision: str) -> None:
    checkpoint = load_checkpoint(name)
    predictor = Predictor.of(checkpoint, device="cuda", precision=precision)
    for side in (512, 768):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        predictor(np.ones((4, side, side), "float32"), np.ones((6, side // 2, side // 2), "float32"))
        taken = torch.cuda.max_memory_allocated()
        assert 0.2 < taken / block_memory(checkpoint.config, side, side, precision) <= 1


def test_memory_by_hand() -> None:
    # 10 · 138 planes of features and 10 · 6 of bands, 5 · 25 of logits in a strip, 4 bytes each.
    assert block_memory(GINetConfig(), 10, 20) == (1380 + 60 + 125) * 200 * 4
    assert block_memory(GINetConfig(), 10, 20, "float64") == (1380 + 60 + 125) * 200 * 8
    # 4 · 144 planes of features in 16 bits, 10 · 6 of bands.
    assert block_memory(GINetConfig(), 10, 20, "mixed") == (4 * 144 * 2 + 60 * 4) * 200 + 2**26
    assert block_memory(GINetConfig(), 512, 512) == ((1380 + 60) * 512 * 512 + 125 * 65536) * 4


FAULTS = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np, torch
from xr_ginet.mapping import heap, predictor
from xr_ginet.network import load_checkpoint

torch.set_num_threads(1)
if sys.argv[1] == "default":
    heap.glibc = lambda: None
run = predictor.Predictor.of(load_checkpoint(sys.argv[2]))
blocks = np.ones((4, 520, 520), "float32"), np.ones((6, 260, 260), "float32")
with ThreadPoolExecutor(1) as worker:  # as Dask's
    worker.submit(run, *blocks).result()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    worker.submit(run, *blocks).result()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


HEAPS = """
import threading
from xr_ginet.mapping import heap

def start(n):
    begun = threading.Barrier(n + 1)
    def wait():
        found.append(bytearray(10**6))
        begun.wait()
        ended.wait()
    ended = threading.Event()
    for _ in range(n):
        threading.Thread(target=wait, daemon=True).start()
    begun.wait()
    return ended

found = []
start(5).set()  # they leave heaps behind
start(12)  # they keep theirs
print(heap.glibc.cache_info().currsize, heap.one_at_a_time(threading.active_count, large=False))
print(heap.glibc.cache_info().currsize, heap.one_at_a_time(heap._is_on_main_heap))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is told of with glibc only")
def test_networks_take_memory_from_the_main_heap_whatever_threads_there_are() -> None:
    output = subprocess.run([sys.executable, "-c", HEAPS], capture_output=True, text=True, check=True).stdout
    assert output == "0 14\n0 True\n"  # for CUDA devices nothing is told to glibc


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is told of with glibc only")
def test_large_tensors_are_not_zeroed_anew_by_the_kernel(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "w.safetensors", GINet(GINetConfig(n_features=22, n_stages=3))).path
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}

    def faults(kind: str) -> int:
        command = [sys.executable, "-c", FAULTS, kind, str(path)]
        return int(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)

    default, ours = faults("default"), faults("ours")
    assert ours < default / 10  # what is left is the block's input and output


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_are_stored_without_outputs(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
