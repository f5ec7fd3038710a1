"""The token loop: logits to token, token to text, until something ends the answer."""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llava_edge.kv_cache import KvCache
    from llava_edge.types import FinishReason


class Pieces(Protocol):
    """What the loop needs to know of the vocabulary; :class:`llava_edge.engine.Engine` has it."""

    def piece(self, token: int) -> bytes: ...
    def is_end(self, token: int) -> bool: ...


class Chooser(Protocol):
    """Chooses the next token; :class:`llava_edge.sampling.Sampler` is one."""

    def choose(self, logits: NDArray[np.float32]) -> int: ...


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


class TokenLoop:
    """One answer, token by token: logits go in, text that is sure to belong to the answer comes out.

    Parameters
    ----------
    generation
        The record to keep.
    stop_tokens, stop_texts
        What ends the answer besides the vocabulary's own end.
    strip_blank
        Take the blank from the first word, which a SentencePiece vocabulary puts there.
    """

    def __init__(
        self,
        generation: Generation,
        sampler: Chooser,
        vocabulary: Pieces,
        *,
        max_tokens: int,
        stop_tokens: frozenset[int] = frozenset(),
        stop_texts: Sequence[str] = (),
        strip_blank: bool = False,
    ) -> None:
        self.generation = generation
        self.done = False
        self._sampler = sampler
        self._vocabulary = vocabulary
        self._max_tokens = max_tokens
        self._stop_tokens = stop_tokens
        self._strip_blank = strip_blank
        self._stream = TextStream(stop_texts)
        self._shown = 0  # tokens whose text is sure to belong to the answer

    @property
    def sure(self) -> int:
        """How many tokens have all of their text in the answer, whatever comes."""
        return len(self.generation.ids) if self.done else self._shown

    def step(self, logits: NDArray[np.float32], free: int) -> str:
        """Choose a token, which is to be evaluated next unless ``done``; ``free`` tells how many fit the context."""
        generation = self.generation
        token = self._sampler.choose(logits)
        if generation.first_token_at is None:
            generation.first_token_at = time.perf_counter()
        if token in self._stop_tokens or self._vocabulary.is_end(token):
            return self._finish("stop")
        piece = self._vocabulary.piece(token)
        if self._strip_blank and not generation.ids:
            piece = piece.removeprefix(b" ")
        text = self._stream.push(piece)
        generation.text += text
        if self._stream.stopped:
            del generation.ids[self._shown :]
            generation.finish_reason, self.done = "stop", True
            return text
        generation.ids.append(token)
        if not self._stream.undecided:
            self._shown = len(generation.ids)
        if free < 1 or len(generation.ids) == self._max_tokens:
            return text + self._finish("length")
        return text

    def _finish(self, reason: FinishReason) -> str:
        rest = self._stream.flush()
        self.generation.text += rest
        self.generation.finish_reason, self.done = reason, True
        return rest


def generate(loop: TokenLoop, cache: KvCache) -> Iterator[str]:
    """Go on from the logits in the cache and yield pieces of text; the loop's generation holds the whole answer."""
    generation = loop.generation
    while not loop.done:
        started = time.perf_counter()
        if generation.ids:
            cache.append(generation.ids[-1])
            generation.decoded += 1
        first = generation.first_token_at is None
        text = loop.step(cache.logits(), cache.free)
        if not first:
            generation.decode_seconds += time.perf_counter() - started
        if text:
            yield text
