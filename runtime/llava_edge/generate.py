"""The token loop: logits to token, token to text, until something ends the answer."""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from llava_edge.kv_cache import KvCache
    from llava_edge.sampling import Sampler
    from llava_edge.types import FinishReason


class Pieces(Protocol):
    """What the loop needs to know of the vocabulary; :class:`llava_edge.engine.Engine` has it."""

    def piece(self, token: int) -> bytes: ...
    def is_end(self, token: int) -> bool: ...


class TextStream:
    """Bytes of tokens to text that can be shown: whole characters, and nothing that may become a stop text."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(stop)
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._held = ""
        self.stopped = False

    def push(self, data: bytes) -> str:
        """Text that is sure to be part of the answer. ``stopped`` tells when a stop text has come."""
        self._held += self._decode(data)
        ends = [end for end in (self._held.find(stop) for stop in self._stop) if end >= 0]
        if ends:
            self.stopped = True
            return self._take(min(ends))
        return self._take(len(self._held) - self._undecided())

    def flush(self) -> str:
        """What was held back, once nothing more comes. A character that was cut off is left out."""
        return self._take(len(self._held))

    @property
    def undecided(self) -> bool:
        """Whether text is held back that may still become a stop text."""
        return bool(self._held)

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _undecided(self) -> int:
        """Length of the longest end of the text with which a stop text begins."""
        longest = max(map(len, self._stop), default=0) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


@dataclass
class Generation:
    """An answer in the making. It is complete after every token, so a loop that is left anywhere can be recorded.

    ``ids`` are the answer's tokens without the one that ended it. Times are those of this loop alone, not of what
    the caller does between two pieces of text.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason = "cancelled"
    first_token_at: float | None = None
    decode_seconds: float = 0.0
    decoded: int = 0


def generate(
    generation: Generation,
    cache: KvCache,
    sampler: Sampler,
    vocabulary: Pieces,
    *,
    max_tokens: int,
    stop_tokens: frozenset[int] = frozenset(),
    stop_texts: Sequence[str] = (),
    strip_blank: bool = False,
) -> Iterator[str]:
    """Go on from the logits in the cache and yield pieces of text; ``generation`` holds the whole answer.

    ``strip_blank`` takes the blank from the first word, which a SentencePiece vocabulary puts there.
    """
    stream = TextStream(stop_texts)
    shown = 0  # tokens whose text is sure to belong to the answer
    for _ in range(max_tokens):
        started = time.perf_counter()
        if generation.ids:
            cache.append(generation.ids[-1])
            generation.decoded += 1
        token = sampler.choose(cache.logits())
        now = time.perf_counter()
        if generation.first_token_at is None:
            generation.first_token_at = now
        else:
            generation.decode_seconds += now - started
        if token in stop_tokens or vocabulary.is_end(token):
            generation.finish_reason = "stop"
            break
        piece = vocabulary.piece(token)
        if strip_blank and not generation.ids:
            piece = piece.removeprefix(b" ")
        text = stream.push(piece)
        generation.text += text
        if stream.stopped:
            generation.finish_reason = "stop"
            del generation.ids[shown:]
            if text:
                yield text
            return
        generation.ids.append(token)
        if not stream.undecided:
            shown = len(generation.ids)
        if text:
            yield text
        if cache.free < 1:
            generation.finish_reason = "length"
            break
    else:
        generation.finish_reason = "length"
    rest = stream.flush()
    generation.text += rest
    if rest:
        yield rest
