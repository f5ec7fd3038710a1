"""A judge: any endpoint that speaks OpenAI's chat protocol, or a model on this machine."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from llava_edge.errors import InputError, LlavaEdgeError

if TYPE_CHECKING:
    from llava_edge.model import Model

KEY_VARIABLES = ("LLAVA_EDGE_JUDGE_KEY", "OPENAI_API_KEY")
MAX_REPLY_BYTES = 16 * 1024 * 1024
_LATER = {408, 409, 429, 500, 502, 503, 504}


class JudgeError(LlavaEdgeError):
    """The judge can't be reached, or refuses."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


class Judge(Protocol):
    """Whoever reads a text and writes one."""

    @property
    def name(self) -> str:
        """The model's name."""
        ...

    def ask(self, system: str, text: str, *, temperature: float, max_tokens: int) -> str:
        """The judge's answer."""
        ...


@dataclass(frozen=True)
class LocalJudge:
    """A loaded model. Sampling has a fixed seed, so that a judgement can be repeated."""

    model: Model

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.name

    def ask(self, system: str, text: str, *, temperature: float, max_tokens: int) -> str:
        """See :class:`Judge`."""
        with self.model.chat(system) as chat:
            return chat.ask(text, max_tokens=max_tokens, temperature=temperature, seed=0).text


class HttpJudge:
    """An endpoint with ``POST URL/chat/completions``. Busy and failing servers are asked again, up to ``tries`` times.

    The key is read from ``LLAVA_EDGE_JUDGE_KEY`` or ``OPENAI_API_KEY`` and never written anywhere.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout_seconds: float = 120,
        tries: int = 5,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(f"the judge's address is {url!r}; expected http(s)://HOST/v1")
        self.name = model
        self._url = url.rstrip("/") + "/chat/completions"
        self._timeout_seconds = timeout_seconds
        self._tries = tries
        self._wait = wait

    def ask(self, system: str, text: str, *, temperature: float, max_tokens: int) -> str:
        """See :class:`Judge`; JudgeError says what the server answered."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        body = {"model": self.name, "messages": messages, "temperature": temperature, "max_tokens": max_tokens}
        reply = self._post(json.dumps(body).encode())
        try:
            content = reply["choices"][0]["message"]["content"]
            content = "" if content is None else content  # null where it refuses to answer
        except (KeyError, IndexError, TypeError):
            content = None
        if not isinstance(content, str):
            raise JudgeError(f"{self._url} answered without choices[0].message.content: {json.dumps(reply)[:200]}")
        return content

    def _post(self, body: bytes) -> Any:
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json", **_authorization()})
        for attempt in range(1, self._tries + 1):
            try:
                with _OPENER.open(request, timeout=self._timeout_seconds) as response:
                    return json.loads(response.read(MAX_REPLY_BYTES))
            except urllib.error.HTTPError as error:
                with error:
                    said = error.read(500).decode("utf-8", "replace")
                failure = f"{self._url} answered {error.code}: {said}"
                if error.code not in _LATER:
                    raise JudgeError(failure, hint=_hint(error.code)) from None
                pause = _retry_after(error.headers.get("Retry-After"))
            except (OSError, ValueError, http.client.HTTPException) as error:
                failure, pause = f"{self._url} can't be asked: {error}", None
            if attempt < self._tries:
                self._wait(pause if pause is not None else min(60.0, 2.0**attempt))
        raise JudgeError(f"{failure} ({self._tries} tries)", hint="Try again later; judgements so far are kept.")


def _authorization() -> dict[str, str]:
    name = next((name for name in KEY_VARIABLES if os.environ.get(name)), None)
    if name is None:
        return {}
    key = os.environ[name].strip()
    if not key.isascii() or not key.isprintable():
        raise InputError(f"{name} has characters that no key can have", hint="Is there a line break in it?")
    return {"Authorization": f"Bearer {key}"}


def _hint(code: int) -> str:
    return f"Set {' or '.join(KEY_VARIABLES)}." if code in (401, 403) else "Check --judge-url and --judge-model."


def _retry_after(value: str | None) -> float | None:
    return min(60.0, float(value)) if value is not None and value.isdigit() else None
