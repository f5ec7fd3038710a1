"""Where conversations lie in the KV cache, and how a prompt finds what was evaluated before.

A lane is one sequence of the cache. What a lane held before it is used for another conversation is kept as a copy in
memory, so that the conversation goes on from there when its next question comes. A prompt that begins like a
conversation that another lane is busy with gets a copy of the common beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llava_edge.engine import Engine
from llava_edge.kv_cache import Entry, KvCache, SavedCache, common_units
from llava_edge.prompt import Unit

# A copy costs more than it saves below this many tokens.
MIN_SHARED_TOKENS = 16
STORE_BYTES = 256 * 1024 * 1024


@dataclass
class Lane:
    """One sequence of the KV cache."""

    cache: KvCache
    busy: bool = False
    used: int = 0  # when, by the count of answers

    @property
    def seq(self) -> int:
        """The engine's number of the sequence."""
        return self.cache.seq


@dataclass
class Lanes:
    """All lanes of an engine, and copies of conversations that have none, up to ``store_bytes``."""

    engine: Engine
    store_bytes: int
    lanes: list[Lane] = field(init=False)
    stored: list[SavedCache] = field(init=False, default_factory=list)  # the least recently used first
    _count: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.lanes = [Lane(KvCache(self.engine, seq)) for seq in range(self.engine.n_seq_max)]

    @property
    def stored_bytes(self) -> int:
        """Memory of the copies."""
        return sum(saved.nbytes for saved in self.stored)

    def free(self) -> bool:
        """Whether a conversation can be taken in."""
        return any(not lane.busy for lane in self.lanes)

    def take(self, units: Sequence[Unit]) -> Lane:
        """A free lane that holds as much of the beginning of a prompt as is known; it is busy from now on."""
        idle = [lane for lane in self.lanes if not lane.busy]
        own = max(idle, key=lambda lane: self._suits(lane, units))
        shared = _shared(own.cache.entries, units)
        if shared < own.cache.tokens:  # it loses something
            self._keep(own)
        sources: list[Sequence[Entry]] = [saved.entries for saved in self.stored]
        sources += [lane.cache.entries for lane in self.lanes if lane.busy]
        best = max(sources, key=lambda entries: _shared(entries, units), default=())
        if _worth(best, units) > shared:
            own.cache.restore(self._copy_of(best))
        own.busy = True
        return own

    def release(self, lane: Lane) -> None:
        """The answer is over; what it has evaluated stays."""
        self._count += 1
        lane.busy, lane.used = False, self._count

    def _suits(self, lane: Lane, units: Sequence[Unit]) -> tuple[int, bool, bool, int]:
        """What speaks for a lane: what it holds of the prompt; that it is empty; a busy neighbour, as only neighbours
        are evaluated together; that nobody has come back to it for long.
        """
        beside = any(other.busy and abs(other.seq - lane.seq) == 1 for other in self.lanes)
        return _worth(lane.cache.entries, units), not lane.cache.entries, beside, -lane.used

    def _copy_of(self, entries: Sequence[Entry]) -> SavedCache:
        for saved in self.stored:
            if saved.entries is entries:
                self.stored.remove(saved)
                self.stored.append(saved)
                return saved
        return next(lane for lane in self.lanes if lane.cache.entries is entries).cache.save()

    def _keep(self, lane: Lane) -> None:
        """Copy what a lane holds, in place of older copies of the same conversation."""
        units = lane.cache.units
        if any(saved.units[: len(units)] == units for saved in self.stored):
            return
        if self.engine.state_size(lane.seq) > self.store_bytes:
            return
        saved = lane.cache.save()
        self.stored = [old for old in self.stored if units[: len(old.entries)] != old.units]
        self.stored.append(saved)
        while self.stored_bytes > self.store_bytes:
            del self.stored[0]


def _shared(entries: Sequence[Entry], units: Sequence[Unit]) -> int:
    """Tokens at the beginning of a prompt that these entries hold."""
    count = common_units([entry.unit for entry in entries], units)
    return entries[count - 1].tokens if count else 0


def _worth(entries: Sequence[Entry], units: Sequence[Unit]) -> int:
    """The same, 0 where it is too little to matter."""
    shared = _shared(entries, units)
    return shared if shared >= MIN_SHARED_TOKENS else 0
