"""Bad and hostile input: items, job files and checkpoints with anything in them end in a result or in a named error.

`benchmarks/fuzz.py` runs the same with inputs that are led by coverage.
"""

from __future__ import annotations

import copy
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED, needs_shared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xr_ginet.jobs import Job
from xr_ginet.network import Checkpoint, load_checkpoint
from xr_ginet.sentinel2.bands import LAYERS
from xr_ginet.sentinel2.items import read_item
from xr_ginet.training.run import Run

INPUTS = int(os.environ.get("XR_GINET_FUZZ", "300"))
"""Per test; `make test-slow` tries many more."""

NASTY = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**63, 10**400, 1e308, float("inf"), float("nan"), "", "../..", "file:///etc/passwd"]),
    st.sampled_from(["/vsicurl/http://a", "EPSG:0", "9999-99-99", "{}", "[" * 2000, "\x00", "٣", "0" * 5000]),
    st.text(max_size=20),
    st.floats(),
    st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=4), max_leaves=6),
    st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=5), max_size=3),
)
fuzzed = settings(
    max_examples=INPUTS, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Return the path of each value in JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, item in inner for p in places(item, (*path, key)))]


def mutated(draw: Callable, original: Any) -> Any:
    """Return JSON with some values replaced, dropped or copied elsewhere."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 4))):
        paths = [p for p in places(value) if p]
        if not paths:
            return draw(NASTY)
        *way, last = draw(st.sampled_from(paths))
        parent = value
        for key in way:
            parent = parent[key]
        kind = draw(st.sampled_from(["replace", "replace", "drop", "copy"]))
        if kind == "drop":
            del parent[last]
        elif kind == "copy":
            source = value
            for key in draw(st.sampled_from(paths)):
                source = source[key]
            parent[last] = copy.deepcopy(source)
        else:
            parent[last] = draw(NASTY)
    return value


def items() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((SHARED / "stac-items").glob("*.json"))]


ITEMS = [item for item in items() if isinstance(item, dict) and "assets" in item]


def read_or_refuse_an_item(data: st.DataObject) -> None:
    item = mutated(data.draw, data.draw(st.sampled_from(ITEMS)))
    bands = data.draw(st.lists(st.sampled_from(LAYERS), min_size=1, unique=True))

    def look(href: str) -> dict[str, Any]:
        return data.draw(st.dictionaries(st.sampled_from(["proj:transform", "proj:shape", "data_type"]), NASTY))

    try:
        scene = read_item(item, bands, look=look, remote_only=data.draw(st.booleans()))
    except ValueError:
        pass
    else:
        assert set(scene.bands) == set(bands)


@needs_shared
@fuzzed
@given(st.data())
def test_an_item_is_read_or_refused(data: st.DataObject) -> None:
    read_or_refuse_an_item(data)


JOB = {
    "catalog": "https://stac.example",
    "datetime": "2024",
    "store": "cubes/{area}.zarr",
    "open": {"chunks": 64},
    "cluster": {"class": "distributed.LocalCluster", "workers": 2},
    "area": [{"name": "a", "bbox": [0.0, 1.0, 2.0, 3.0]}, {"name": "b", "intersects": {"type": "Point"}}],
}
RUN = {
    "name": "mine",
    "clusters": "kmeans",
    "network": {"n_features": 4, "cluster_features": [4, 4], "assignment": "soft"},
    "patches": {"size": 16, "degradation": "mtf", "fine_gain": [0.2, 0.4]},
    "fit": {"steps": 3, "averaging": 0.9},
    "train": [{"path": "cube.zarr", "repeat": 2}, {"catalog": "https://stac.example", "bbox": [0, 1, 2, 3]}],
}


def toml(value: Any, *, top: bool = True) -> str:
    """Return JSON as TOML, nulls left out."""
    if isinstance(value, dict):
        pairs = [f"{json.dumps(str(k))} = {toml(v, top=False)}" for k, v in value.items() if v is not None]
        return "\n".join(pairs) if top else "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml(v, top=False) for v in value if v is not None) + "]"
    if isinstance(value, float):
        return repr(value) if abs(value) < float("inf") or value != value else ("inf" if value > 0 else "-inf")
    return json.dumps(value)


def read_or_refuse_a_file(kind: type, original: dict, folder: Path, data: st.DataObject) -> None:
    path = folder / "fuzzed.toml"
    text = toml(mutated(data.draw, original)) if data.draw(st.integers(0, 9)) else data.draw(st.text(max_size=60))
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        result = kind.from_toml(path)
    except ValueError:
        pass
    else:
        assert isinstance(result, kind)


@pytest.mark.parametrize(("kind", "original"), [(Job, JOB), (Run, RUN)], ids=["job", "run"])
@fuzzed
@given(st.data())
def test_a_job_or_run_file_is_read_or_refused(
    kind: type, original: dict, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    read_or_refuse_a_file(kind, original, tmp_path_factory.getbasetemp(), data)


def read_or_refuse_a_checkpoint(checkpoint: Path, folder: Path, data: st.DataObject) -> None:
    raw = checkpoint.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    way = data.draw(st.sampled_from(["ours", "header", "bytes", "length"]))
    if way == "ours":
        content = mutated(data.draw, json.loads(header["__metadata__"]["ginet"]))
        header["__metadata__"]["ginet"] = json.dumps(content)
    elif way == "header":
        header = mutated(data.draw, header)
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + body
    if way == "bytes":
        at = data.draw(st.integers(0, len(content) - 1))
        content = content[:at] + data.draw(st.binary(max_size=9)) + content[at + data.draw(st.integers(0, 9)) :]
    if way == "length":
        content = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1))) + content[8:]
    path = folder / "fuzzed.safetensors"
    path.write_bytes(content)
    try:
        network = load_checkpoint(path).network()
    except ValueError:
        pass
    else:
        assert sum(p.numel() for p in network.parameters()) * 8 <= len(content) + 10**6


@fuzzed
@given(st.data())
def test_a_checkpoint_is_read_or_refused(
    checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    read_or_refuse_a_checkpoint(checkpoint.path, tmp_path_factory.getbasetemp(), data)


@pytest.mark.slow  # 100,000 inputs in all
@pytest.mark.timeout(6000)
@needs_shared
def test_very_many_inputs_end_in_a_result_or_a_named_error() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "--timeout", "0", __file__]
    environment = os.environ | {"XR_GINET_FUZZ": "25000"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=5400, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
