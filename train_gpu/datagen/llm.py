"""The language model that writes: any OpenAI-compatible endpoint, or a local GGUF through the runtime."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llava_edge.errors import InputError, LlavaEdgeError
from llava_edge.train_gpu.datagen.tasks import Message


@dataclass(frozen=True)
class Completion:
    """What the model wrote. ``tokens`` are those of the request and of the answer."""

    text: str
    tokens: int
    cut_off: bool


class LlmError(LlavaEdgeError):
    """The model can't be reached, or answers nothing that can be read, after all attempts."""


class Llm(Protocol):
    """Writes one answer to a list of messages. May be called from several threads."""

    def complete(self, messages: Sequence[Message], max_tokens: int) -> Completion: ...
    def close(self) -> None: ...


def open_llm(
    where: str, *, model: str | None, api_key: str | None, temperature: float, seed: int, **options: Any
) -> Llm:
    """An endpoint for an address that begins with http, else a local model: a GGUF file."""
    if where.startswith(("http://", "https://")):
        return Endpoint(where, model=model, api_key=api_key, temperature=temperature, seed=seed, **options)
    return LocalLlm(Path(where), temperature=temperature, seed=seed)


class Endpoint:
    """``POST …/chat/completions``. What may pass (429, 5xx, no connection, half an answer) is tried again.

    The waits double from half a second, with a random share so that threads don't knock in step; a ``Retry-After``
    is respected.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None,
        api_key: str | None,
        temperature: float,
        seed: int,
        retries: int = 6,
        timeout_seconds: float = 120,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not urllib.parse.urlsplit(url).netloc:
            raise InputError(f"--llm {url!r} is not an address")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model = model
        self.api_key = api_key
        self.temperature = temperature
        self.seed = seed
        self.retries = retries
        self.timeout_seconds = timeout_seconds
        self._sleep = sleep
        self._lock = threading.Lock()
        self.retried = 0

    def complete(self, messages: Sequence[Message], max_tokens: int) -> Completion:
        """See :class:`Llm`; LlmError after the last attempt, or at once for what won't pass."""
        body = {
            "model": self.model or "default",
            "messages": [{"role": role, "content": text} for role, text in messages],
            "max_tokens": max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }
        for attempt in range(self.retries + 1):
            try:
                return _completion(self._post(body), messages)
            except _Passing as problem:
                if attempt == self.retries:
                    raise LlmError(f"{self.url}: {problem} after {attempt + 1} attempts") from None
                with self._lock:
                    self.retried += 1
                wait = problem.wait_seconds
                self._sleep(random.uniform(0.5, 1) * min(30, 0.5 * 2**attempt) if wait is None else min(wait, 60))
        raise AssertionError("the last attempt returns or raises")

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(500).decode("utf-8", "replace").strip()
            if error.code in (408, 409, 425, 429) or error.code >= 500:
                raise _Passing(f"status {error.code}", _seconds(error.headers.get("Retry-After"))) from None
            raise LlmError(
                f"{self.url} refuses: status {error.code}: {said}", hint="Check the address, the model and the key."
            ) from None
        except json.JSONDecodeError:
            raise _Passing("an answer that is not JSON") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Passing(
                f"no answer ({getattr(error, 'reason', None) or str(error) or type(error).__name__})"
            ) from None

    def close(self) -> None:
        """Nothing is held open."""


class _Passing(Exception):
    """A failure that may be over at the next attempt."""

    def __init__(self, message: str, wait_seconds: float | None = None) -> None:
        super().__init__(message)
        self.wait_seconds = wait_seconds


def _seconds(text: str | None) -> float | None:
    return float(text) if text and text.isdigit() else None


def _completion(answer: Any, messages: Sequence[Message]) -> Completion:
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] or ""
        usage = answer.get("usage") or {}
        guess = (sum(len(said) for _, said in messages) + len(text)) // 4
        return Completion(str(text), int(usage.get("total_tokens") or guess), choice.get("finish_reason") == "length")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _Passing("an answer without choices") from None


class LocalLlm:
    """A GGUF language model with its own chat template; one answer at a time."""

    def __init__(self, path: Path, *, temperature: float, seed: int) -> None:
        from llava_edge.chat_template import TemplateFormat
        from llava_edge.engine import Engine
        from llava_edge.kv_cache import KvCache
        from llava_edge.prompt import PromptTokenizer
        from llava_edge.types import SamplingParams

        self._params = SamplingParams(temperature=temperature, seed=seed)
        self._engine = Engine(path)
        try:
            self._format = TemplateFormat(self._engine.chat_template, bos=self._engine.bos, eos=self._engine.eos)
            self._cache = KvCache(self._engine)
            self._tokenizer = PromptTokenizer(self._engine)
            for number in (0, 1):
                self._tokenizer.learn(self._format.turn(number, [], "?", "?"))
        except BaseException:
            self._engine.close()
            raise
        self._lock = threading.Lock()

    def complete(self, messages: Sequence[Message], max_tokens: int) -> Completion:
        """See :class:`Llm`. The instructions and examples stay in the KV cache from picture to picture."""
        from llava_edge.generate import Generation, TokenLoop, generate
        from llava_edge.prompt import Segment, UserText
        from llava_edge.sampling import Sampler

        system = next((text for role, text in messages if role == "system"), None)
        segments: list[Segment] = []
        number = 0
        for role, text in messages:
            if role == "user":
                segments += self._format.turn(number, [], text, system)
                number += 1
            elif role == "assistant":
                segments.append(UserText(text))
        with self._lock:
            prefill = self._cache.prefill(self._tokenizer.units(segments), {})
            generation = Generation()
            loop = TokenLoop(
                generation, Sampler(self._params), self._engine, max_tokens=max_tokens, strip_blank=self._engine.spm
            )
            for _ in generate(loop, self._cache):
                pass
        tokens = prefill.tokens + len(generation.ids)
        return Completion(generation.text, tokens, generation.finish_reason == "length")

    def close(self) -> None:
        """Free the model, once an answer under way is finished."""
        with self._lock:
            self._engine.close()
