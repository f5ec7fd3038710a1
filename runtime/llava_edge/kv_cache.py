"""What is in the KV cache, unit by unit, so that nothing is evaluated twice.

Units are reused whole or not at all: the same tokens in another split give slightly other logits, so a prompt is
always evaluated in the same pieces, and an answer from a kept prefix is bit-identical to one from a fresh start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_edge.errors import ContextFullError
from llava_edge.prompt import ImageRef, TokenRun, Unit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llava_edge.engine import Engine
    from llava_edge.vision import EncodedImage


@dataclass(frozen=True)
class Prefill:
    """Tokens of a prompt: all of them, those that were in the cache, and those of pictures."""

    tokens: int
    cached: int
    image: int


@dataclass(frozen=True)
class _Entry:
    unit: Unit
    tokens: int  # in the cache up to the unit's end
    end: int  # position after the unit


class KvCache:
    """The engine's cache and a list of the units in it. The list is never ahead of the cache."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._entries: list[_Entry] = []

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return self._entries[-1].tokens if self._entries else 0

    @property
    def free(self) -> int:
        """Tokens that still fit the context."""
        return self._engine.n_ctx - self.tokens

    def prefill(self, units: Sequence[Unit], images: Mapping[str, EncodedImage]) -> Prefill:
        """Bring the cache to hold exactly these units, with logits for the last one.

        Raises
        ------
        ContextFullError
            The units and one more token don't fit; the cache is as it was.
        """
        sizes = [len(u.ids) if isinstance(u, TokenRun) else images[u.key].n_tokens for u in units]
        needed = sum(sizes)
        if needed >= self._engine.n_ctx:
            raise ContextFullError(
                f"the prompt has {needed} tokens and the context {self._engine.n_ctx}; an answer needs room too",
                hint="Load the model with a larger n_ctx (--n-ctx), shorten the question, or reset the conversation.",
            )
        kept = self._keep(self._common(units))
        for index, unit in enumerate(units[kept:], kept):
            self._evaluate(unit, images, last=index == len(units) - 1)
        image = sum(size for size, unit in zip(sizes, units, strict=True) if isinstance(unit, ImageRef))
        return Prefill(needed, sum(sizes[:kept]), image)

    def append(self, token: int) -> None:
        """Evaluate one more token of an answer."""
        self._evaluate(TokenRun((token,)), {}, last=True)

    def logits(self) -> NDArray[np.float32]:
        """Logits after the last unit, ``float32 [V]``."""
        return self._engine.logits()

    def clear(self) -> None:
        """Forget everything."""
        self._keep(0)

    def _common(self, units: Sequence[Unit]) -> int:
        """Units that can stay. The last one is evaluated again, because only that gives its logits."""
        count = 0
        for entry, unit in zip(self._entries, units[:-1], strict=False):
            if entry.unit != unit:
                break
            count += 1
        return count

    def _keep(self, count: int) -> int:
        """Cut the list first and the cache to fit it; 0 if the model can only forget everything."""
        del self._entries[count:]
        if not self._engine.truncate(self._entries[-1].end if self._entries else 0):
            self._entries.clear()
        return len(self._entries)

    def _evaluate(self, unit: Unit, images: Mapping[str, EncodedImage], *, last: bool) -> None:
        engine = self._engine
        start = engine.n_past
        try:
            if isinstance(unit, TokenRun):
                tokens = len(unit.ids)
                engine.decode_tokens(unit.ids, logits=last)
            else:
                tokens = images[unit.key].n_tokens
                self._evaluate_image(images[unit.key], last)
        except BaseException:
            engine.truncate(start)
            raise
        self._entries.append(_Entry(unit, self.tokens + tokens, engine.n_past))

    def _evaluate_image(self, image: EncodedImage, last: bool) -> None:
        for index, chunk in enumerate(image.chunks):
            logits = last and index == len(image.chunks) - 1
            if chunk.embeddings is None:
                self._engine.decode_tokens(chunk.tokens, logits=logits)
            else:
                self._engine.decode_embeddings(
                    chunk.embeddings,
                    positions=chunk.positions,
                    n_pos=chunk.n_pos,
                    causal=chunk.causal,
                    logits=logits,
                )
