"""A local server that answers like the Hugging Face hub as far as a download goes, and misbehaves on demand."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"


@dataclass
class Faults:
    """What goes wrong. Counts are of requests for files; ``cut`` and ``stall`` are bytes after which it happens."""

    cut: int | None = None
    cuts: int = 0
    stall: int | None = None
    stalls: int = 0
    busy: int = 0
    busy_listing: int = 0
    head_size: int | None = None
    other_content: int = 0
    more_bytes: int = 0
    no_ranges: bool = False
    gated: bool = False
    token: str | None = None
    storage: str | None = None
    slow_seconds: float = 0.0


@dataclass
class FakeHub:
    """Repositories (name -> path -> content), faults, and what was asked for."""

    url: str
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, fault: str) -> bool:
        """Use up one of a number of faults."""
        with self.lock:
            left: int = getattr(self.faults, fault)
            setattr(self.faults, fault, max(0, left - 1))
            return left > 0

    def ranges(self) -> list[str]:
        """The ranges that were asked for."""
        return [headers["range"] for method, _, headers in self.requests if method == "GET" and "range" in headers]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve("HEAD")

    def do_GET(self) -> None:
        self._serve("GET")

    def _serve(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append((method, path, {k.lower(): v for k, v in self.headers.items()}))
        if path.startswith("/api/models/"):
            self._listing(path.removeprefix("/api/models/"))
        elif "/resolve/" in path:
            name, _, rest = path.lstrip("/").partition("/resolve/")
            self._file(method, name, rest.partition("/")[2])
        else:
            self._answer(404)

    def _listing(self, name: str) -> None:
        name = name.partition("/revision/")[0]
        if self.hub.take("busy_listing"):
            self._answer(429, {"Retry-After": "0"})
            return
        files = self.hub.repositories.get(name)
        if files is None or not self._allowed():
            self._answer(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return
        siblings = []
        for path, content in files.items():
            entry: dict[str, Any] = {"rfilename": path, "size": len(content)}
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if path.endswith((".gguf", ".onnx")):
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 135}
            siblings.append(entry)
        gated: Any = "manual" if self.hub.faults.gated else False
        body = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "gated": gated, "private": False,
                "tags": ["license:apache-2.0"], "cardData": {"license": "apache-2.0"}}  # fmt: skip
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def _file(self, method: str, name: str, path: str) -> None:
        faults, content = self.hub.faults, self.hub.repositories.get(name, {}).get(path)
        if content is None or not self._allowed():
            self._answer(404, {"X-Error-Code": "EntryNotFound"})
            return
        if faults.gated:
            self._answer(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
            return
        if self.hub.take("busy"):
            self._answer(429, {"Retry-After": "0"})
            return
        digest = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if method == "HEAD":
            size = len(content) if faults.head_size is None else faults.head_size
            headers |= {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{digest}"'}
            if faults.storage:
                self._answer(302, {**headers, "Location": f"{faults.storage}/{name}/resolve/{COMMIT}/{path}"})
            else:
                self._answer(200, {**headers, "Content-Length": str(size)})
            return
        self._body(path, content, headers)

    def _body(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        faults = self.hub.faults
        start, status = 0, 200
        if "Range" in self.headers and not faults.no_ranges:
            start, status = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.hub.take("other_content"):
            content = bytes(byte ^ 1 for byte in content)
        body = content[start:] + b"x" * faults.more_bytes
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        limit = len(body)
        if faults.cut is not None and self.hub.take("cuts"):
            limit = min(limit, faults.cut)
        if faults.stall is not None and self.hub.take("stalls"):
            limit = min(limit, faults.stall)
        try:
            for at in range(0, limit, 16_384):
                piece = body[at : min(at + 16_384, limit)]
                self.wfile.write(piece)
                self.hub.sent[path] += len(piece)
                time.sleep(faults.slow_seconds)
            if limit < len(body):
                if faults.stall is not None:
                    time.sleep(4)
                self.close_connection = True
                self.connection.close()
        except OSError:
            self.close_connection = True

    def _allowed(self) -> bool:
        token = self.hub.faults.token
        return token is None or self.headers.get("Authorization") == f"Bearer {token}"

    def _answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A running server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = FakeHub(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
