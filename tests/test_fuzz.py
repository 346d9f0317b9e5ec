"""Bad and hostile input: items, job files and checkpoints with anything in them end in a result or in a named error.

`benchmarks/fuzz.py` runs the same with inputs that are led by coverage.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import SHARED, needs_shared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import xr_ginet
from xr_ginet.cli import app
from xr_ginet.jobs import Job
from xr_ginet.network import Checkpoint, GINetConfig, authors, from_authors, load_checkpoint
from xr_ginet.sentinel2.bands import LAYERS
from xr_ginet.sentinel2.items import DTYPES, LARGEST_SIDE, read_item
from xr_ginet.sentinel2.safe import Product, read_radiometry
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
RASTERS = [item for item in ITEMS if "zarr" not in json.dumps(item)][:6]
METADATA = (
    "<a><PRODUCT_START_TIME>2024-06-21T10:56:21Z</PRODUCT_START_TIME><PROCESSING_BASELINE>05.10</PROCESSING_BASELINE>"
    '<BOA_QUANTIFICATION_VALUE>10000</BOA_QUANTIFICATION_VALUE><BOA_ADD_OFFSET band_id="1">-1000</BOA_ADD_OFFSET>'
    '<BOA_ADD_OFFSET band_id="4">-1000</BOA_ADD_OFFSET></a>'
)


def read_or_refuse_an_item(data: st.DataObject) -> None:
    item = mutated(data.draw, data.draw(st.sampled_from(ITEMS)))
    bands = data.draw(st.lists(st.sampled_from(LAYERS), min_size=1, unique=True))

    def look(href: str) -> dict[str, Any]:
        return data.draw(st.dictionaries(st.sampled_from(["proj:transform", "proj:shape", "data_type"]), NASTY))

    try:
        scene = read_item(item, bands, look=look, remote_only=data.draw(st.booleans()))
    except ValueError as error:
        refused = str(error)
    else:
        assert set(scene.bands) == set(bands)
        for asset in scene.bands.values():
            assert 1 <= min(asset.grid.shape) <= max(asset.grid.shape) <= LARGEST_SIDE
            assert np.isfinite(asset.grid.transform).all()
            assert 1e-6 <= asset.radiometry.scale <= 1
            assert np.isfinite(asset.radiometry.offset)
            assert asset.radiometry.dtype in DTYPES
        return
    assert refused.startswith("item ")


def open_or_refuse_items(data: st.DataObject) -> None:
    """Open a cube, so that everything that needs no pixel is done with an item."""
    item = mutated(data.draw, data.draw(st.sampled_from(RASTERS)))
    bands = data.draw(st.sampled_from([["B02"], ["B02", "B05"], ["B05"]]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            xr_ginet.open_stac([item], bands=bands, chunks=4096)
    except ValueError:
        pass


def read_or_refuse_metadata(folder: Path, data: st.DataObject) -> None:
    """Read a SAFE product's metadata with characters and values changed."""
    text = METADATA
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        way = data.draw(st.sampled_from(["cut", "drop", "insert", "value", "value", "value"]))
        if way == "value":
            values = [match.span(1) for match in re.finditer(r'>([^<>]+)<|band_id="([^"]*)"', text) if match[1]]
            start, stop = data.draw(st.sampled_from(values)) if values else (at, at)
            text = text[:start] + str(data.draw(NASTY)) + text[stop:]
        else:
            text = {"cut": text[:at], "drop": text[:at] + text[at + 5 :]}.get(way, text[:at] + "<&x;" + text[at:])
    (folder / "MTD_MSIL2A.xml").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        product = Product.find(folder)
        meaning = read_radiometry(product, ["B02", "B05"])
    except ValueError as error:
        refused = str(error)
    else:
        assert all(1e-6 <= one.scale <= 1e-2 and abs(one.offset) <= 1e5 for one in meaning.values())
        return
    assert folder.stem in refused


def read_or_refuse_authors(state: dict[str, Any], folder: Path, data: st.DataObject) -> None:
    """Read a checkpoint with the authors' names, its bytes or its tensors changed."""
    path = folder / "authors.pt"
    changed = dict(state)
    for key in data.draw(st.lists(st.sampled_from(sorted(state)), max_size=2, unique=True)):
        shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
        changed[key] = data.draw(st.sampled_from([torch.zeros(shape), 3, None, torch.zeros(1).expand(10**9)]))
    torch.save(changed, path)
    content = path.read_bytes()
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content = content[:at] + data.draw(st.binary(max_size=4)) + content[at + data.draw(st.integers(0, 4)) :]
    path.write_bytes(content[: data.draw(st.sampled_from([None, None, 100, 0]))])
    try:
        network = from_authors(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017 - a result will do as well
    else:
        assert sum(p.numel() for p in network.parameters()) < 10**6


def tell_in_the_shell(folder: Path, data: st.DataObject) -> None:
    """Give the shell a file of items with anything in it, or a damaged store: one line, and exit code 1."""
    if data.draw(st.booleans()):
        text = json.dumps(mutated(data.draw, data.draw(st.sampled_from([*RASTERS, {"features": RASTERS[:1]}]))))
        path = folder / "item.json"
        path.write_bytes(text.encode("utf-8", "surrogatepass") if data.draw(st.integers(0, 5)) else b"\xff\xfe{")
        command = ["superresolve", str(path), str(folder / "out.zarr"), "--dry-run", "--weights", "ginet-xs"]
    else:
        path = folder / "cube.zarr"
        shutil.rmtree(path, ignore_errors=True)
        cube = xr.Dataset({"B02": (("y", "x"), np.ones((4, 4), "f4"))}, {"y": np.arange(4.0), "x": np.arange(4.0)})
        cube.to_zarr(path, zarr_format=data.draw(st.sampled_from([2, 3])), consolidated=False)
        files = sorted(p for p in path.rglob("*") if p.is_file())
        file = data.draw(st.sampled_from(files))
        content = file.read_bytes()
        at = data.draw(st.integers(0, len(content)))
        file.write_bytes(content[:at] + data.draw(st.binary(max_size=3)) + content[at + data.draw(st.integers(0, 9)) :])
        command = ["info", str(path)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(app, command)
    if result.exit_code:
        assert result.exit_code == 1, (command, result.output, result.exception)
        assert isinstance(result.exception, SystemExit), (command, result.exception)
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert result.stderr.startswith("error: ")
        assert "please report it" not in result.stderr, result.stderr


@needs_shared
@fuzzed
@given(st.data())
def test_an_item_is_read_or_refused(data: st.DataObject) -> None:
    read_or_refuse_an_item(data)


@needs_shared
@fuzzed
@given(st.data())
def test_items_are_opened_or_refused(data: st.DataObject) -> None:
    open_or_refuse_items(data)


@fuzzed
@given(st.data())
def test_metadata_of_a_product_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed.SAFE"
    folder.mkdir(exist_ok=True)
    read_or_refuse_metadata(folder, data)


AUTHORS = GINetConfig(n_stages=1, n_features=2, cluster_features=(4, 4))


@fuzzed
@given(st.data())
def test_a_checkpoint_of_the_authors_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    names = {key: shape for keys in authors._sources(AUTHORS).values() for key, shape in keys.items()}
    state = {key: torch.zeros(shape) for key, shape in names.items()}
    read_or_refuse_authors(state, tmp_path_factory.getbasetemp(), data)


@needs_shared
@settings(fuzzed, max_examples=max(40, INPUTS // 8))
@given(st.data())
def test_the_shell_tells_errors_on_one_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    tell_in_the_shell(tmp_path_factory.getbasetemp(), data)


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
