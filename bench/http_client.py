"""A client of OpenAI-compatible servers that can leave early, and a server of one's own to ask."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Answer:
    """What came back.

    ``seconds`` are the times of the pieces since the request; ``pieces`` are tokens with the distance of the two
    likeliest, where that was asked for.
    """

    status: int
    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    complete: bool = False
    pieces: list[tuple[str, float]] = field(default_factory=list)

    @property
    def ttft_seconds(self) -> float | None:
        """From the request to the first piece."""
        return self.seconds[0] if self.seconds else None


class Client:
    """Speaks the protocol over connections of its own."""

    def __init__(self, url: str, model: str | None, max_tokens: int) -> None:
        self._url = urlsplit(url)
        self._model = model
        self._max_tokens = max_tokens

    def ask(
        self,
        messages: list[dict[str, Any]],
        *,
        leave_after: int | None = None,
        patience_seconds: float = 300.0,
        gaps: bool = False,
    ) -> Answer:
        """One streamed answer.

        ``leave_after`` so many pieces the connection is closed, or when nothing has come for ``patience_seconds``.
        """
        body: dict[str, Any] = {
            "messages": messages,
            "temperature": 0,
            "max_tokens": self._max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._model is not None:
            body["model"] = self._model
        if gaps:
            body |= {"logprobs": True, "top_logprobs": 2}
        started = time.perf_counter()
        answer = Answer(0)
        with self._connection(patience_seconds) as connection, contextlib.suppress(TimeoutError):
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            answer.status = response.status
            if response.status != 200:
                response.read()
                return answer
            for line in response:
                if not line.startswith(b"data: "):
                    continue  # the end of an event, or a comment that keeps the connection open
                data = line.strip().removeprefix(b"data: ")
                if data == b"[DONE]":
                    answer.complete = True
                elif _take(json.loads(data), answer):
                    answer.seconds.append(time.perf_counter() - started)
                    if len(answer.seconds) == leave_after:
                        return answer
        return answer

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a plain request."""
        with self._connection() as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()

    @contextlib.contextmanager
    def _connection(self, timeout: float = 300.0) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection(self._url.hostname or "", self._url.port, timeout=timeout)
        try:
            yield connection
        finally:
            connection.close()


def _take(message: dict[str, Any], answer: Answer) -> str:
    if message.get("usage"):
        answer.tokens = int(message["usage"]["completion_tokens"])
        answer.prompt_tokens = int(message["usage"]["prompt_tokens"])
    for choice in message.get("choices", ()):
        piece = str(choice["delta"].get("content") or "")
        answer.text += piece
        for token in (choice.get("logprobs") or {}).get("content") or ():
            top = [each["logprob"] for each in token["top_logprobs"]]
            answer.pieces.append((token["token"], top[0] - top[1] if len(top) > 1 else math.inf))
        return piece
    return ""


@contextlib.contextmanager
def server(url: str | None, arguments: Sequence[str]) -> Iterator[tuple[str, int | None]]:
    """Address and process of the server: a running one, or one that is started and stopped here."""
    if url is not None:
        yield url, None
        return
    command = [sys.executable, "-m", "llava_edge", "serve", "--port", "0", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                sys.stderr.write(line)
                if line.startswith("ready:"):
                    break
            found = re.search(r"http://[^\s/]+", line)
            if found is None:
                raise SystemExit("the server did not start")
            threading.Thread(target=lambda: [None for _ in process.stderr or ()], daemon=True).start()
            yield found[0], process.pid
        finally:
            process.terminate()
            process.wait(60)


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Median, 95th and 99th percentile."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {f"p{share}": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in (50, 95, 99)}
