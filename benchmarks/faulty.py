"""An HTTP server on localhost that fails as told: for tests of what catalogues and object stores do on bad days."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HANG_SECONDS = 30.0


@dataclass
class Plan:
    """What goes wrong: of the GET requests whose path ends in ``path``, those numbered in ``when`` meet ``fault``."""

    fault: str
    """A status such as ``"500"``, or ``hang``, ``drop`` (the connection), ``truncate`` or ``corrupt`` (the body)."""
    path: str = ""
    when: Callable[[int], bool] = lambda number: True
    seen: Counter = field(default_factory=Counter)

    def meets(self, path: str) -> bool:
        if not path.partition("?")[0].endswith(self.path):
            return False
        self.seen["requests"] += 1
        struck = self.when(self.seen["requests"] - 1)
        self.seen["faults"] += struck
        return struck


@contextmanager
def faulty(answer: Path | Callable[[str, Any], Any], *plans: Plan) -> Iterator[str]:
    """Serve a folder with ranges, or what a function of path and posted JSON returns as JSON; yield the URL."""
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.reply(head=True)

        def do_GET(self) -> None:
            self.reply()

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, posted: Any = None, *, head: bool = False) -> None:
            status, headers, body = self.content(posted)
            fault = next((p.fault for p in plans if not head and p.meets(self.path)), None)
            if fault == "hang":
                closing.wait(HANG_SECONDS)
            if fault in ("hang", "drop"):
                self.close_connection = True
                return
            if fault and fault.isdigit():
                status, headers, body = int(fault), {"Retry-After": "0"} if fault == "429" else {}, b"bad day"
            if fault == "corrupt":
                body = bytes(len(body))
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if not head:
                self.wfile.write(body[: len(body) // 2] if fault == "truncate" else body)
            if fault == "truncate":
                self.close_connection = True

        def content(self, posted: Any) -> tuple[int, dict[str, str], bytes]:
            if callable(answer):
                found = answer(self.path, posted)
                return (404, {}, b"") if found is None else (200, {"Content-Type": "application/json"}, found)
            file = answer / self.path.partition("?")[0].lstrip("/")
            if not file.is_file():
                return 404, {}, b""
            data = file.read_bytes()
            if "Range" not in self.headers:
                return 200, {"Accept-Ranges": "bytes"}, data
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or len(data) - 1) + 1, len(data))
            return 206, {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop]

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
