"""Real server processes, and the official client."""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


class Server:
    """A process of ``llava-edge serve`` on a free port."""

    def __init__(self, *args: object, home: Path) -> None:
        environment = {**os.environ, "LLAVA_EDGE_HOME": str(home), "PYTHONUTF8": "1"}
        command = [sys.executable, "-m", "llava_edge", "serve", "--port", "0", *map(str, args)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines: list[str] = []
        self._clients: list[openai.OpenAI] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(60), "".join(self.lines)
        found = re.search(r"(http://\S+?)/(?:#key=(\S+))?$", self.lines[-1], re.MULTILINE)
        assert found, "".join(self.lines)
        self.url, self.key = found[1], found[2]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith(("ready:", "error:")):
                self._ready.set()
        self._ready.set()

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def client(self, **options: Any) -> openai.OpenAI:
        made = openai.OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": self.key or "none", "max_retries": 0, "timeout": 120, **options}
        )
        self._clients.append(made)
        return made

    def close(self) -> None:
        """End the process whatever it does."""
        for client in self._clients:
            client.close()
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def stop(self, sign: int = signal.SIGTERM) -> int:
        self.process.send_signal(sign)
        return self.process.wait(60)


def get(server: Server, path: str) -> str:
    with urllib.request.urlopen(server.url + path, timeout=20) as response:
        return str(response.read().decode())


def metric(server: Server, name: str) -> float:
    text = get(server, "/metrics")
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Start a server with these arguments; all are stopped at the end."""
    servers: list[Server] = []
    home = tmp_path_factory.mktemp("home")

    def start(*args: object) -> Server:
        servers.append(Server(*args, home=home))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def nano_server(serve: Callable[..., Server], nano: Any) -> Server:
    """nano; the fixture of the model skips where it is not there."""
    return serve("--parallel", 5)


@pytest.fixture(scope="session")
def client(nano_server: Server) -> openai.OpenAI:
    return nano_server.client()


@pytest.fixture(scope="session")
def tiny_server(serve: Callable[..., Server], tiny_bundle: Path) -> Server:
    """A tiny model with random weights, for what does not depend on answers."""
    return serve("--model", tiny_bundle, "--parallel", 2, "--queue", 2, "--threads", 1, "--n-ctx", 512)


def data_uri(path: Path) -> str:
    """A picture as it stands in a message."""
    kind = {".jpg": "jpeg", ".png": "png"}[path.suffix]
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def question(text: str, *pictures: Path, detail: str = "auto") -> dict[str, Any]:
    """A message of the user."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    parts += [{"type": "image_url", "image_url": {"url": data_uri(path), "detail": detail}} for path in pictures]
    return {"role": "user", "content": parts}


def answer(text: str) -> dict[str, Any]:
    """A message of the assistant."""
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    return [EXAMPLES / name for name in ("cat.jpg", "coffee.jpg", "rocket.jpg", "astronaut.jpg")]
