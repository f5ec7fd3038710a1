"""Answers in the shapes of OpenAI's chat completions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_edge.server.answer import Finished, Piece, TokenLogprob
    from llava_edge.types import Usage


class Completion:
    """The parts that all messages of one answer have in common."""

    def __init__(self, model: str, *, include_usage: bool = False) -> None:
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._include_usage = include_usage

    def whole(self, pieces: Sequence[Piece], finished: Finished, *, logprobs: bool) -> dict[str, Any]:
        """The answer in one object."""
        tokens = [token for piece in pieces for token in piece.logprobs]
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None},
            "logprobs": _logprobs(tokens) if logprobs else None,
            "finish_reason": finished.reason,
        }
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": _usage(finished.usage),
            "timings": finished.timings,
        }

    def first(self) -> bytes:
        """The event that opens a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, piece: Piece) -> bytes:
        """An event with a piece of text."""
        return self._chunk({"content": piece.text}, logprobs=_logprobs(piece.logprobs) if piece.logprobs else None)

    def last(self, finished: Finished) -> bytes:
        """The events that close a stream."""
        events = self._chunk({}, finish_reason=finished.reason, timings=finished.timings)
        if self._include_usage:
            events += event({**self._head("chat.completion.chunk"), "choices": [], "usage": _usage(finished.usage)})
        return events + b"data: [DONE]\n\n"

    def _chunk(
        self,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        timings: dict[str, float | None] | None = None,
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        message = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self._include_usage:
            message["usage"] = None
        return event(message if timings is None else {**message, "timings": timings})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}


def event(message: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def models(name: str, created: int, details: dict[str, Any]) -> dict[str, Any]:
    """The list of models; ``details`` is what the page wants to know."""
    model = {"id": name, "object": "model", "created": created, "owned_by": "llava-edge", **details}
    return {"object": "list", "data": [model]}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "image_tokens": usage.image_tokens},
    }


def _logprobs(tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
    content = [
        {
            **_token(token.token, token.logprob),
            "top_logprobs": [_token(data, logprob) for data, logprob in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _token(data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}
