"""A chat with a model that a running server holds; the same calls as :class:`llava_edge.ChatSession`."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from llava_edge import images
from llava_edge.errors import InputError, LlavaEdgeError
from llava_edge.types import Chunk, FinishReason, Reply, SamplingParams, Timings, Usage

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 600.0
_ANSWER_TURN = tuple[str, str, list[str]]


class ServerError(LlavaEdgeError):
    """The server can't be reached, or did not do what it was asked for."""


@dataclass
class _Progress:
    """An answer as far as it has come."""

    text: str = ""
    first_at: float | None = None
    reason: FinishReason = "cancelled"
    usage: dict[str, Any] | None = None
    timings: dict[str, Any] | None = None


class RemoteModel:
    """A model on a server.

    Parameters
    ----------
    url
        The address that ``llava-edge serve`` shows; a key may stand behind ``#key=``.
    key
        The API key, if the server wants one.
    image_tokens
        Tokens of a picture; None is the server's default.

    Raises
    ------
    ServerError
        No such server, a wrong key, or no model that is ready.
    """

    def __init__(self, url: str, key: str | None = None, *, image_tokens: int | None = None) -> None:
        self._url = _server_url(url)
        self._key = key or next(iter(parse_qs(self._url.fragment).get("key", ())), None)
        self.image_tokens = image_tokens
        with self._request("GET", "models") as response:
            try:
                self._model = json.loads(response.read())["data"][0]
                self.name = str(self._model["id"])
            except (ValueError, LookupError, TypeError):
                raise ServerError(f"{self._shown()} is not a server of this kind: it lists no model") from None

    def __enter__(self) -> RemoteModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def chat(self, system: str | None = None) -> RemoteChat:
        """Begin a conversation."""
        return RemoteChat(self, system)

    def describe(self) -> dict[str, Any]:
        """What is known of the model, for people."""
        return {"model": self.name, "server": self._shown(), "n_ctx": self._model.get("n_ctx")}

    def events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The messages of a streamed chat completion."""
        with self._request("POST", "chat/completions", {"model": self.name, "stream": True, **body}) as response:
            try:
                for line in response:
                    data = line.strip().removeprefix(b"data: ")
                    if data == b"[DONE]":
                        return
                    if data:
                        yield _checked(json.loads(data))
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise ServerError(f"the answer of {self._shown()} broke off: {type(error).__name__}") from None
        raise ServerError(f"{self._shown()} ended the answer before its end")

    def begin(self, body: dict[str, Any]) -> _Unread:
        """Send a chat completion whose reply nobody reads. Closing it ends the server's work."""
        connection, message = self._connection(), {"model": self.name, **body}
        return _Unread(connection, lambda: self._send(connection, "POST", "chat/completions", message))

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        return kind(self._url.hostname or "", self._url.port, timeout=TIMEOUT_SECONDS)

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: dict[str, Any] | None
    ) -> None:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, f"{self._url.path}/{path}", data, headers)

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> _Response:
        connection = self._connection()
        try:
            self._send(connection, method, path, body)
            response = connection.getresponse()
            if response.status != 200:
                raise self._refusal(response)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise ServerError(
                f"can't reach {self._shown()}: {reason}", hint="Start a server with: llava-edge serve"
            ) from None
        except BaseException:
            connection.close()
            raise
        return _Response(connection, response)

    def _refusal(self, response: http.client.HTTPResponse) -> ServerError:
        try:
            message = str(json.loads(response.read())["error"]["message"])
        except (ValueError, LookupError, TypeError):
            message = f"status {response.status}"
        hint = "Name the file with the server's key: --api-key-file FILE." if response.status == 401 else None
        return ServerError(f"{self._shown()} says: {message}", hint=hint)

    def _shown(self) -> str:
        return f"{self._url.scheme}://{self._url.netloc}"


class _Response:
    """A response, and the connection that ends with it."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._response = response

    def __enter__(self) -> http.client.HTTPResponse:
        return self._response

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._response.close()
        self._connection.close()


class _Unread:
    """A request that is sent in a thread of its own, and stays open until it is closed."""

    def __init__(self, connection: http.client.HTTPConnection, send: Callable[[], None]) -> None:
        self._connection = connection
        self._send = send
        self._over = threading.Event()
        threading.Thread(target=self._run, name="llava-edge-ahead", daemon=True).start()

    def close(self) -> None:
        """Hang up, in the middle of sending too."""
        self._over.set()
        sock = self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        try:
            self._send()
            self._over.wait()
        except (OSError, http.client.HTTPException) as error:  # the question will meet it again, where it can be told
            log.debug("reading ahead ended: %s", type(error).__name__)
        finally:
            self._connection.close()


class RemoteChat:
    """A conversation with a :class:`RemoteModel`. The server keeps nothing of it; it is sent whole every time."""

    def __init__(self, model: RemoteModel, system: str | None = None) -> None:
        self._model = model
        self._system = system
        self._messages: list[dict[str, Any]] = []
        self._turns: list[_ANSWER_TURN] = []
        self._pending: list[tuple[str, str]] = []
        self._ahead: _Unread | None = None

    def __enter__(self) -> RemoteChat:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the conversation."""
        self.reset()

    def reset(self) -> None:
        """Forget all turns and pictures."""
        self._drop_ahead()
        self._messages, self._turns, self._pending = [], [], []

    def add_image(self, path: str | Path) -> None:
        """Read a picture now; it goes with the next question. ImageError says what is wrong with it."""
        self._drop_ahead()
        self._pending.append(_picture(Path(path)))

    def read_ahead(self) -> None:
        """Have the server read the pictures that were added, while the question is not known yet."""
        self._drop_ahead()
        if self._pending:
            body = self._body([{"role": "user", "content": _parts(self._pending)}], 0)
            self._ahead = self._model.begin(body)

    def _drop_ahead(self) -> None:
        """Hang up, which ends the server's work if it goes on."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _body(self, messages: list[dict[str, Any]], max_tokens: int) -> dict[str, Any]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        body = {"messages": [*system, *self._messages, *messages], "max_tokens": max_tokens}
        return body if self._model.image_tokens is None else {**body, "image_tokens": self._model.image_tokens}

    @property
    def turns(self) -> list[_ANSWER_TURN]:
        """Questions and answers so far: (role, text, names of pictures)."""
        return list(self._turns)

    def stream(
        self, text: str, images: Sequence[str | Path] = (), *, max_tokens: int = 256, **sampling: Any
    ) -> Generator[Chunk, None, None]:
        """Ask a question; see :meth:`llava_edge.ChatSession.stream`."""
        started = time.perf_counter()
        params = SamplingParams(**sampling)
        pictures = [*self._pending, *(_picture(Path(path)) for path in images)]
        question = {"role": "user", "content": [*_parts(pictures), {"type": "text", "text": text}]}
        body = {
            **self._body([question], max_tokens),
            "stream_options": {"include_usage": True},
            **{field.name: getattr(params, field.name) for field in fields(params)},
        }
        progress = _Progress()
        try:
            for message in self._model.events(body):
                piece = _note(message, progress)
                if piece:
                    progress.first_at = progress.first_at or time.perf_counter()
                    yield Chunk(piece)
        except (GeneratorExit, KeyboardInterrupt):
            self._drop_ahead()
            if progress.text:
                self._commit(question, text, [name for name, _ in pictures], progress.text)
            raise
        self._commit(question, text, [name for name, _ in pictures], progress.text)
        yield Chunk("", self._reply(progress, started))

    def _commit(self, question: dict[str, Any], text: str, pictures: list[str], answer: str) -> None:
        self._messages += [question, {"role": "assistant", "content": answer}]
        self._turns += [("user", text, pictures), ("assistant", answer, [])]
        self._pending = []
        self._drop_ahead()

    def _reply(self, progress: _Progress, started: float) -> Reply:
        usage, timings = progress.usage or {}, progress.timings or {}
        details = usage.get("prompt_tokens_details") or {}
        prompt, cached = int(usage.get("prompt_tokens", 0)), int(details.get("cached_tokens") or 0)
        prefill = float(timings.get("prefill_seconds") or 0.0)
        now = time.perf_counter()
        first = progress.first_at or now
        return Reply(
            progress.text,
            progress.reason,
            self._model.name,
            Usage(prompt, cached, int(details.get("image_tokens") or 0), int(usage.get("completion_tokens", 0))),
            Timings(
                load_seconds=0.0,
                encode_seconds=float(timings.get("encode_seconds") or 0.0),
                prefill_seconds=prefill,
                ttft_seconds=first - started,
                decode_seconds=now - first,
                prefill_tokens_per_second=(prompt - cached) / prefill if prefill else None,
                decode_tokens_per_second=timings.get("decode_tokens_per_second"),
            ),
        )


def _note(message: dict[str, Any], progress: _Progress) -> str:
    """Take in one message of a stream; the text that it brings."""
    progress.usage = message.get("usage") or progress.usage
    progress.timings = message.get("timings") or progress.timings
    for choice in message.get("choices", ()):
        progress.reason = choice.get("finish_reason") or progress.reason
        piece = str(choice["delta"].get("content") or "")
        progress.text += piece
        return piece
    return ""


def _checked(message: dict[str, Any]) -> dict[str, Any]:
    if "error" in message:
        raise ServerError(str(message["error"].get("message", "the server failed")))
    return message


def _parts(pictures: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Pictures as they stand in a message."""
    return [{"type": "image_url", "image_url": {"url": url}} for _, url in pictures]


def _picture(path: Path) -> tuple[str, str]:
    """Name and data URI of a picture that can be read."""
    images.open_image(path)
    data = path.read_bytes()
    return path.name, f"data:image/{images.kind(data)};base64,{base64.b64encode(data).decode()}"


def _server_url(url: str) -> SplitResult:
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        _ = parts.port
    except ValueError:
        raise InputError(f"{url!r} is not an address", hint="Expected http://127.0.0.1:8080.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"{url!r} is not an address of a server", hint="Expected http://127.0.0.1:8080.")
    path = parts.path.rstrip("/")
    return parts._replace(path=path if path.endswith("/v1") else f"{path}/v1")
