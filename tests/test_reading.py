"""What reading rasters over a network costs, in requests and bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import rasterio

import xr_ginet
from xr_ginet.sentinel2 import rasters
from xr_ginet.simulation import write_cogs

HEADER = 32 * 1024
"""Bytes that GDAL asks for first of a file."""


@contextmanager
def counting(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Serve a folder with ranges; yield the URL, and the bytes sent for each request."""
    sent: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(head=True)

        def do_GET(self) -> None:
            self.answer(head=False)

        def answer(self, *, head: bool) -> None:
            content = (folder / self.path.lstrip("/")).read_bytes()
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last or len(content)) + 1]
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) if head else len(part)))
            self.end_headers()
            sent.append(0 if head else len(part))
            if not head:
                self.wfile.write(part)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()


def fewest(path: Path, chunk: int) -> tuple[int, int]:
    """Return how many requests and bytes reading a file by square chunks takes: tiles of a row lie side by side."""
    with rasterio.open(path) as file:
        (height, width), tile = file.shape, file.block_shapes[0][0]
        places = [(column, row) for row in range(height // tile) for column in range(width // tile)]
        sizes = [int(file.get_tag_item(f"BLOCK_SIZE_{x}_{y}", "TIFF", bidx=1)) for x, y in places]
    return 2 + (width // chunk) * (height // tile), HEADER + sum(sizes)


@pytest.mark.parametrize("kept", [None, 1])
def test_no_byte_is_asked_for_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int | None) -> None:
    if kept is not None:  # a cache that holds no block, so that this test can fail
        monkeypatch.setitem(rasters.LIMITS, "GDAL_CACHEMAX", kept)
    rng = np.random.default_rng(0)
    fine = rng.integers(1, 9000, (4, 1024, 1024), dtype="uint16")
    coarse = rng.integers(1, 9000, (6, 512, 512), dtype="uint16")
    place = {"transform": (10, 0, 600_000, 0, -10, 4_900_020), "crs": "EPSG:32630"}
    item = write_cogs(fine, coarse, tmp_path, **place, datetime="2024-06-21T10:56:21Z", item_id="S2")
    bands = {"B02": ("blue", 512), "B05": ("rededge1", 256)}
    parts = [fewest(Path(item["assets"][key]["href"]), chunk) for key, chunk in bands.values()]
    requests, size = (sum(numbers) for numbers in zip(*parts, strict=True))
    with counting(tmp_path) as (url, sent):
        for key, _ in bands.values():
            asset = item["assets"][key]
            asset["href"] = f"{url}/{Path(asset['href']).relative_to(tmp_path)}"
        cube = xr_ginet.open_stac([item], chunks=512, bands=tuple(bands)).compute(scheduler="synchronous")
    np.testing.assert_allclose(cube["B02"].values[0], fine[0] / 1e4, rtol=1e-6)
    few = len(sent) <= 1.1 * requests and sum(sent) <= 1.1 * size
    assert few == (kept is None), (len(sent), requests, sum(sent), size)
