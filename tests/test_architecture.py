"""Who may import whom, what importing costs, and how much memory a block may take."""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import needs_cuda
from distributed import LocalCluster

import xr_ginet
from xr_ginet.mapping import heap, predictor
from xr_ginet.mapping.predictor import Predictor, block_memory
from xr_ginet.network import GINet, GINetConfig, available_weights, load_checkpoint, save_checkpoint

PACKAGE = Path(xr_ginet.__file__).parent

# Room: what its modules may import at their top. Inside functions: anything but accessor and cli.
STANDARD = {"numpy", "xarray"}
MAY_IMPORT = {
    "paths": set(),
    "sentinel2": STANDARD | {"paths", "rasterio", "stackstac", "tenacity", "sentinel2"},
    "network": {"numba", "numpy", "torch", "triton", "safetensors", "paths", "network"},
    "mapping": STANDARD | {"paths", "scipy", "dask", "sentinel2", "mapping", "training", "__init__"},
    "evaluation": STANDARD | {"dask", "mapping", "sentinel2", "training"},
    # Writing, from the lowest to the highest.
    "encoding": STANDARD | {"sentinel2"},
    "schedulers": {"dask", "numpy"},
    "folders": set(),
    "documents": STANDARD | {"zarr", "folders", "sentinel2"},
    "digests": {"dask", "numpy"},
    "guards": {"zarr", "documents", "folders", "sentinel2"},
    "transactions": STANDARD | {"dask", "zarr", "digests", "documents", "guards", "paths", "schedulers"},
    "replacing": STANDARD | {"zarr", "documents", "guards", "sentinel2", "transactions"},
    "growing": STANDARD | {"dask", "zarr", "digests", "documents", "sentinel2", "transactions"},
    "store": STANDARD
    | {"documents", "encoding", "folders", "growing", "guards", "paths", "replacing"}
    | {"schedulers", "sentinel2", "transactions"},
    "overviews": STANDARD
    | {"zarr", "documents", "encoding", "folders", "growing", "guards", "paths", "sentinel2", "store"},
    "cog": STANDARD | {"dask", "encoding", "folders", "guards", "paths", "schedulers", "sentinel2"},
    "training": STANDARD | {"scipy", "dask", "torch", "folders", "network", "paths", "sentinel2", "tables", "training"},
    "simulation": STANDARD | {"scipy", "sentinel2", "training", "simulation"},
    "tables": {"paths"},
    "jobs": STANDARD | {"folders", "growing", "paths", "sentinel2", "tables"},
    "accessor": {"xarray", "cog", "mapping", "sentinel2", "store"},
    "cli": {"typer", "paths"},
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


def distributions(folder: Path) -> dict[str, set[str]]:
    """Return the third-party modules that a folder's files import anywhere, and what may be installed for each."""
    nodes = [node for path in folder.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    known = packages_distributions()
    found = {name: known.get(name, []) for name in {n.partition(".")[0] for n in names} - sys.stdlib_module_names}
    return {name: {canonical(one) for one in names} for name, names in found.items()}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> set[str]:
    """Return the names of what pyproject.toml asks for, with those of some extras."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    assert all(re.fullmatch(r"[\w.-]+(\[.+\])?|[^<]+>=[\d.]+[^<]*", one) for one in asked)  # floors, and no caps
    return {canonical(re.match(r"[\w.-]+", one)[0]) for one in asked}


@pytest.mark.parametrize(
    ("folder", "extras", "optional"),
    [
        # Triton comes with torch where it works; who has an Icechunk repository has Icechunk.
        ("xr_ginet", ("distributed", "train"), {"triton", "icechunk"}),
        # boto3 comes with moto; asked for by name, pip takes the newest and then seeks an s3fs that fits it.
        ("tests", ("distributed", "train", "demo", "test"), {"boto3"}),
        ("examples", ("distributed", "demo"), set()),
        (
            "benchmarks",
            ("distributed", "train", "demo", "test", "mutation"),
            {"atheris", "tensorflow"},
        ),  # a fuzzer; a peer's
    ],
)
def test_what_is_imported_is_declared(folder: str, extras: tuple[str, ...], optional: set[str]) -> None:
    root = PACKAGE.parent
    local = {path.stem for name in ("tests", "benchmarks", "examples") for path in (root / name).rglob("*.py")}
    asked = declared(*extras)
    missing = {
        name
        for name, candidates in distributions(root / folder).items()
        if name not in local | optional | {"xr_ginet"} and not (candidates or {name}) & asked  # not all are installed
    }
    assert not missing


def test_nothing_imports_the_accessor_or_the_cli() -> None:
    for path in PACKAGE.rglob("*.py"):
        imports = {n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.level}
        names = {alias.name for node in imports for alias in node.names} | {node.module for node in imports}
        assert not names & {"cli"}
        assert "accessor" not in names or path.name == "__init__.py"


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, xr_ginet; print(*{name.partition('.')[0] for name in sys.modules})"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "xr_ginet" in output
    assert not NEVER_LOADED & set(output.split())


MEASURE = r"""
import re, sys
import numpy as np, torch
from xr_ginet.mapping import overlap, predictor as modules
from xr_ginet.mapping.predictor import Predictor
from xr_ginet.network import load_checkpoint

def memory(field):
    return 1024 * int(re.search(field + r":\s+(\d+) kB", open("/proc/self/status").read()).group(1))

def block(height, width):
    predictor(np.ones((4, height, width), "float32"), np.ones((6, height // 2, width // 2), "float32"))

path, side, precision = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
predictor = Predictor.of(load_checkpoint(path), precision=precision, device="cpu")
overlap.PART = modules.PART = int(sys.argv[4])
overlap.part_side.__defaults__ = (overlap.PART,)
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
    [
        (22, 5, 448, "float32"),
        (22, 7, 320, "float32"),
        (54, 5, 320, "float32"),
        (22, 5, 448, "bfloat16"),
        (6, 3, 384, "float64"),
        (22, 5, 320, "float64"),
        (54, 7, 192, "float64"),
    ],
)
def test_blocks_stay_within_the_memory_promised(case: tuple[int, int, int, str], tmp_path: Path) -> None:
    n_features, window_size, side, precision = case
    config = GINetConfig(n_features=n_features, n_stages=1, window_size=window_size)
    assert 0.3 < _measured(config, tmp_path, side, precision, 10**6) / block_memory(config, side, side, precision) <= 1


def _measured(config: GINetConfig, folder: Path, side: int, precision: str, part: int) -> int:
    """Return the peak of a process that works on blocks of several shapes, in parts, besides what it has before."""
    path = save_checkpoint(folder / "w.safetensors", GINet(config), {}).path
    command = [sys.executable, "-c", MEASURE, str(path), str(side), precision, str(part)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_memory_does_not_grow_with_the_block_beyond_its_input_and_output(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, side = GINetConfig(n_features=22, n_stages=1), 768 if precision == "float32" else 320
    part, libraries = 224, 2**26  # what oneDNN keeps for each shape
    whole = block_memory(config, side, side, precision)
    monkeypatch.setattr(predictor, "PART", part)
    in_parts = block_memory(config, side, side, precision)
    assert in_parts == block_memory(config, 10**5, 10**5, precision) < whole / 3
    arrays = (4 + 6 / 4 + 6 * (2 if precision == "float64" else 1)) * 4 * side**2
    assert _measured(config, tmp_path, side, precision, part) <= in_parts + arrays + libraries < whole / 3


def test_what_was_measured_on_a_gpu_is_within_the_memory_promised() -> None:
    page = Path(xr_ginet.__file__).parents[1] / "benchmarks" / "gpu" / "measured.md"
    rows = [line.strip("| ").split(" | ") for line in page.read_text().splitlines()]
    found = [row for row in rows if len(row) == 7 and row[2].isdigit()]
    assert len(found) >= 11
    for name, precision, side, _, _, gib, _ in found:
        config = load_checkpoint(name).config if name in available_weights() else GINetConfig()
        promised = block_memory(config, int(side), int(side), precision, "cuda")
        assert 0.3 < float(gib) * 2**30 / promised <= 1


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
        assert 0.2 < taken / block_memory(checkpoint.config, side, side, precision, "cuda") <= 1


def test_memory_by_hand() -> None:
    # 10 · 138 planes of features and 10 · 6 of bands, 5 · 25 of logits in a strip, 4 bytes each.
    assert block_memory(GINetConfig(), 10, 20) == (1380 + 60 + 125) * 200 * 4
    # 8 bytes each, and nine planes for each of 138 channels, thrice, and of 32 and 64.
    assert block_memory(GINetConfig(), 10, 20, "float64") == (1380 + 60 + 125 + 9 * (414 + 96)) * 200 * 8
    # 4 · 144 planes of features in 16 bits, 10 · 6 of bands.
    assert block_memory(GINetConfig(), 10, 20, "mixed") == (4 * 144 * 2 + 60 * 4) * 200 + 2**26
    assert block_memory(GINetConfig(), 512, 512) == ((1380 + 60) * 512 * 512 + 125 * 65536) * 4
    # On processors at most 1280 pixels each way, rounded to whole coarse ones, whatever the block.
    most = ((1380 + 60) * 1284**2 + 125 * 65536) * 4
    assert block_memory(GINetConfig(), 10_980, 10_980) == block_memory(GINetConfig(), 1284, 20_000) == most
    assert block_memory(GINetConfig(), 1284, 2000, device="cuda") > most


FAULTS = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np, torch
from xr_ginet.mapping import heap, predictor
from xr_ginet.network import load_checkpoint

torch.set_num_threads(1)
heap.IDLE_SECONDS = 3600  # on a busy machine a second may pass between two blocks
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


def test_free_memory_goes_back_to_the_system_when_no_block_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    timers: list[FakeTimer] = []
    given_back: list[int] = []

    class FakeTimer:
        def __init__(self, seconds: float, function: Any, arguments: tuple) -> None:
            self.seconds, self.call, self.state = seconds, lambda: function(*arguments), "new"
            timers.append(self)

        def start(self) -> None:
            self.state = "waiting"

        def cancel(self) -> None:
            self.state = "cancelled"

    monkeypatch.setattr(heap, "_idle", [])
    monkeypatch.setattr(heap, "glibc", lambda: SimpleNamespace(malloc_trim=given_back.append))
    monkeypatch.setattr(heap.threading, "Timer", FakeTimer)
    for _ in range(3):
        assert heap._call(lambda a, b: a + b, (1, 2)) == 3
    with pytest.raises(ZeroDivisionError):
        heap._call(lambda a: a / 0, (1,))
    assert [timer.state for timer in timers] == ["cancelled"] * 3 + ["waiting"]
    assert timers[-1].seconds == heap.IDLE_SECONDS
    assert given_back == []
    timers[-1].call()
    assert given_back == [0]


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_are_stored_without_outputs(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)


CLOCK = re.compile(r"\b(perf_counter|monotonic|process_time|timeit|time\.time|datetime\.now|utcnow)(_ns)?\(")


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("*test*.py")), ids=lambda p: p.stem)
def test_no_test_looks_at_a_clock(path: Path) -> None:
    # What a busy machine makes slow must fail no test. Benchmarks take times; their tests check what they count.
    assert not CLOCK.search(path.read_text())


def test_a_clock_would_be_found() -> None:
    assert CLOCK.search("began = time.mono" + "tonic()")


@pytest.mark.parametrize("option", [{}, {"dashboard_address": None}, {"dashboard_address": ":8787"}], ids=str)
def test_a_cluster_that_needs_the_port_of_the_dashboard_fails(option: dict, dashboard_port_is_held: bool) -> None:
    if not dashboard_port_is_held:
        pytest.skip("another process had port 8787 when the tests began, and may have left it since")
    with pytest.raises(RuntimeError, match="Port 8787 is already in use"):  # held by conftest.py
        LocalCluster(n_workers=0, processes=False, **option)
