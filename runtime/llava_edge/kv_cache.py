"""What is in the KV cache, unit by unit, so that nothing is evaluated twice.

Units are reused whole or not at all: the same tokens in another split give slightly other logits, so a prompt is
always evaluated in the same pieces, and an answer from a kept prefix is bit-identical to one from a fresh start.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_edge.engine import Engine, EngineError
from llava_edge.errors import ContextFullError
from llava_edge.prompt import ImageRef, TokenRun, Unit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llava_edge.vision import EncodedImage


@dataclass(frozen=True)
class Prefill:
    """Tokens of a prompt: all of them, those that were in the cache, and those of pictures."""

    tokens: int
    cached: int
    image: int


@dataclass(frozen=True)
class Entry:
    """A unit in the cache, and where it ends."""

    unit: Unit
    tokens: int  # in the cache up to the unit's end
    end: int  # position after the unit


class KvCache:
    """A sequence of the engine's cache and a list of the units in it. The list is never ahead of the cache."""

    def __init__(self, engine: Engine, seq: int = 0) -> None:
        self.seq = seq
        self._engine = engine
        self._entries: list[Entry] = []

    @property
    def entries(self) -> Sequence[Entry]:
        """What is in the cache, and where each unit ends."""
        return self._entries

    @property
    def units(self) -> tuple[Unit, ...]:
        """What is in the cache."""
        return tuple(entry.unit for entry in self._entries)

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
        return finish(self.prefill_steps(units, images))

    def prefill_steps(
        self, units: Sequence[Unit], images: Mapping[str, EncodedImage], *, ahead: bool = False
    ) -> Generator[None, None, Prefill]:
        """:meth:`prefill` with a pause between two units and two batches. Closing it leaves whole units.

        With ``ahead`` a prompt is going to begin with these units, and there are no logits afterwards.
        """
        sizes = self.check_room(units, images)
        needed = sum(sizes)
        there = _shared(self.units, units) if ahead else self.common(units)
        image = sum(size for size, unit in zip(sizes, units, strict=True) if isinstance(unit, ImageRef))
        if ahead and there == len(units):  # and perhaps more, which is kept
            return Prefill(needed, needed, image)
        kept = self.cut(there)
        for index, unit in enumerate(units[kept:], kept):
            if index > kept:
                yield
            yield from self._evaluate(unit, images, last=not ahead and index == len(units) - 1)
        return Prefill(needed, sum(sizes[:kept]), image)

    def check_room(self, units: Sequence[Unit], images: Mapping[str, EncodedImage]) -> list[int]:
        """The units' tokens; ContextFullError if they and one more don't fit the context."""
        sizes = [len(u.ids) if isinstance(u, TokenRun) else images[u.key].n_tokens for u in units]
        if sum(sizes) >= self._engine.n_ctx:
            raise ContextFullError(
                f"the prompt has {sum(sizes)} tokens and the context {self._engine.n_ctx}; an answer needs room too",
                hint="Load the model with a larger n_ctx (--n-ctx), shorten the question, or reset the conversation.",
            )
        return sizes

    def append(self, token: int) -> None:
        """Evaluate one more token of an answer."""
        self._engine.decode_tokens((token,), seq=self.seq)
        self.appended(token)

    def appended(self, token: int) -> None:
        """Note one more token of an answer, which the engine has evaluated."""
        self.evaluated(TokenRun((token,)))

    def evaluated(self, run: TokenRun) -> None:
        """Note tokens that the engine has evaluated after what is in the cache."""
        self._note(run, len(run.ids))

    def logits(self) -> NDArray[np.float32]:
        """Logits after the last unit, ``float32 [V]``."""
        return self._engine.logits()

    def common(self, units: Sequence[Unit]) -> int:
        """How many of the first of these units are in the cache and can stay."""
        return common_units([entry.unit for entry in self._entries], units)

    def cut(self, count: int) -> int:
        """Forget everything after the first ``count`` units; how many are left, 0 if the model can only forget all."""
        del self._entries[count:]
        self._cut(self._entries[-1].end if self._entries else 0)
        return len(self._entries)

    def clear(self) -> None:
        """Forget everything."""
        self.cut(0)

    def save(self) -> SavedCache:
        """A copy of what is in the cache."""
        return SavedCache(tuple(self._entries), self._engine, self.seq)

    def restore(self, saved: SavedCache) -> None:
        """Replace what is in the cache by a copy."""
        self._entries.clear()
        saved.load(self._engine, self.seq)
        self._entries.extend(saved.entries)

    def adopt(self, state: ctypes.Array[ctypes.c_uint8], entries: Sequence[Entry]) -> bool:
        """Put a state that another process saved, cut to these entries, in place of everything; False if it is none."""
        self._entries.clear()
        try:
            self._engine.restore_state(self.seq, state, entries[-1].end)
        except EngineError:
            return False
        if self._engine.position(self.seq) != entries[-1].end:  # a model that can't forget a part
            self.cut(0)
            return False
        self._entries.extend(entries)
        return True

    def _cut(self, end: int) -> None:
        """Cut the cache to a position; a model that can't forget a part has forgotten everything, now or before."""
        if self._engine.position(self.seq) < end:
            self._engine.truncate(0, self.seq)
            self._entries.clear()
        elif not self._engine.truncate(end, self.seq):
            self._entries.clear()

    def _evaluate(self, unit: Unit, images: Mapping[str, EncodedImage], *, last: bool) -> Iterator[None]:
        start = self._engine.position(self.seq)
        try:
            if isinstance(unit, TokenRun):
                tokens = len(unit.ids)
                yield from self._evaluate_tokens(unit.ids, last)
            else:
                tokens = images[unit.key].n_tokens
                yield from self._evaluate_image(images[unit.key], last)
        except BaseException:
            self._cut(start)
            raise
        self._note(unit, tokens)

    def _note(self, unit: Unit, tokens: int) -> None:
        self._entries.append(Entry(unit, self.tokens + tokens, self._engine.position(self.seq)))

    def _evaluate_tokens(self, ids: Sequence[int], last: bool) -> Iterator[None]:
        for piece in self._pieces(len(ids)):
            if piece.start:
                yield
            self._engine.decode_tokens(ids[piece], logits=last and piece.stop == len(ids), seq=self.seq)

    def _evaluate_image(self, image: EncodedImage, last: bool) -> Iterator[None]:
        for index, chunk in enumerate(image.chunks):
            logits = last and index == len(image.chunks) - 1
            if index:
                yield
            if chunk.embeddings is None:
                yield from self._evaluate_tokens(chunk.tokens, logits)
            elif chunk.positions is None and chunk.causal:
                for piece in self._pieces(chunk.n_tokens):
                    if piece.start:
                        yield
                    wanted = logits and piece.stop == chunk.n_tokens
                    self._engine.decode_embeddings(chunk.embeddings[piece], logits=wanted, seq=self.seq)
            else:
                self._engine.decode_embeddings(
                    chunk.embeddings,
                    positions=chunk.positions,
                    n_pos=chunk.n_pos,
                    causal=chunk.causal,
                    logits=logits,
                    seq=self.seq,
                )

    def _pieces(self, count: int) -> Iterator[slice]:
        """The places at which the engine would cut a run itself."""
        for start in range(0, count, self._engine.n_batch):
            yield slice(start, min(count, start + self._engine.n_batch))


def finish(steps: Generator[None, None, Prefill]) -> Prefill:
    """Go through all steps of a prompt's evaluation."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            prefill: Prefill = done.value
            return prefill


class SavedCache:
    """A copy of a sequence's cache in memory of its own, which goes back to the system when it is dropped."""

    def __init__(self, entries: tuple[Entry, ...], engine: Engine, seq: int) -> None:
        self.entries = entries
        self.nbytes = engine.state_size(seq)
        memory = mmap.mmap(-1, self.nbytes)
        self._state = (ctypes.c_uint8 * self.nbytes).from_buffer(memory)
        engine.save_state(seq, self._state)

    @property
    def data(self) -> memoryview:
        """The copy's bytes."""
        return memoryview(self._state).cast("B")

    @property
    def units(self) -> tuple[Unit, ...]:
        """What the copy holds."""
        return tuple(entry.unit for entry in self.entries)

    def load(self, engine: Engine, seq: int) -> None:
        """Put the copy into a sequence of the engine's cache."""
        engine.restore_state(seq, self._state, self.entries[-1].end if self.entries else 0)


def entries_of(units: Sequence[Unit], images: Mapping[str, EncodedImage]) -> list[Entry]:
    """The entries that these units give in an empty cache."""
    entries: list[Entry] = []
    tokens = end = 0
    for unit in units:
        chunks = images[unit.key].chunks if isinstance(unit, ImageRef) else ()
        tokens += len(unit.ids) if isinstance(unit, TokenRun) else sum(chunk.n_tokens for chunk in chunks)
        end += len(unit.ids) if isinstance(unit, TokenRun) else sum(chunk.n_pos for chunk in chunks)
        entries.append(Entry(unit, tokens, end))
    return entries


def common_units(held: Sequence[Unit], units: Sequence[Unit]) -> int:
    """How many of the first units can stay. The last one is evaluated again, because only that gives its logits."""
    return _shared(held, units[:-1])


def _shared(held: Sequence[Unit], units: Sequence[Unit]) -> int:
    """How many units both begin with."""
    count = 0
    for have, want in zip(held, units, strict=False):
        if have != want:
            break
        count += 1
    return count
