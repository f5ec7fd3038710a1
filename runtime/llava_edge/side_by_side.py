"""Several sequences of the KV cache evaluated together, each with what it has alone.

Kernels for several rows add in another order than those for one, and llama.cpp's fastest ones take rows by fours: what
is left over goes through the kernel for one row. So an answer's tokens are evaluated together as far as this machine
gives the same bits, which is measured, and the questions of an evaluation in whole fours: then only the last product,
of one row alone and of several together, may differ, by its rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llava_edge.kv_cache import KvCache, finish
from llava_edge.prompt import TokenRun, Unit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llava_edge.engine import Engine
    from llava_edge.generate import TokenLoop
    from llava_edge.model import Model
    from llava_edge.vision import EncodedImage

# From a context of 512 cells on llama.cpp divides the attention of a lone token among its threads, but not that of
# several tokens, and it takes cells in blocks of 256: from this cell on sequences are evaluated one by one.
ALONE_FROM = 256
_LEARNT, _QUESTION = 15, 22  # lengths of a trial's prompts
_ROUNDING = 1e-5  # of the largest logit


class SideBySide:
    """Questions that begin alike, up to a picture or further, read and answered together.

    It works on a model's own cache and the engine's other sequences, which have to be empty and nobody else's.
    ``width`` is how many can be read together; 0 where this is of no use.
    """

    def __init__(self, model: Model) -> None:
        engine = model.engine
        model.forget()
        self._engine = engine
        self._lanes = [model.cache, *(KvCache(engine, seq) for seq in range(1, engine.n_seq_max))]
        several = engine.n_seq_max > 1
        self._rows = exact_rows(engine) if several else 1
        self.width = exact_questions(engine) if several else 0

    def fits(self, prompts: Sequence[Sequence[Unit]], known: Mapping[str, EncodedImage]) -> bool:
        """Whether these prompts can be read together: they differ in their last piece only, and there is room."""
        *begin, _ = prompts[0]
        if len(prompts) > self.width or any(list(units[:-1]) != begin for units in prompts):
            return False
        if not all(isinstance(units[-1], TokenRun) for units in prompts):
            return False
        *sizes, _ = self._lanes[0].check_room(prompts[0], known)
        length = self._engine.padded(max(len(ids) for ids in _questions(prompts)))
        return length * len(prompts) <= self._engine.n_batch and sum(sizes) + length < self._engine.n_ctx

    def read(self, prompts: Sequence[Sequence[Unit]], known: Mapping[str, EncodedImage]) -> NDArray[np.float32]:
        """Evaluate prompts that fit; the logits after each, ``float32 [prompts, V]``."""
        begin = prompts[0][:-1]
        first, *others = lanes = self._lanes[: len(prompts)]
        finish(first.prefill_steps(begin, known, ahead=True))
        first.cut(len(begin))
        saved = None
        for lane in others:
            if lane.units[: len(begin)] != tuple(begin):
                saved = saved or first.save()
                lane.restore(saved)
            lane.cut(len(begin))
        questions = _questions(prompts)
        logits = self._engine.decode_side_by_side(dict(enumerate(questions)))
        for lane, ids in zip(lanes, questions, strict=True):
            lane.evaluated(TokenRun(ids))
        return logits

    def write(self, loops: Sequence[TokenLoop], logits: NDArray[np.float32]) -> None:
        """Write the answers to the prompts that were read last, to their ends."""
        lanes = dict(enumerate(self._lanes[: len(loops)]))
        for seq, lane in lanes.items():
            loops[seq].step(logits[seq], lane.free)
        while going := [seq for seq in lanes if not loops[seq].done]:
            for group in groups({seq: lanes[seq].tokens for seq in going}, self._rows):
                tokens = {seq: loops[seq].generation.ids[-1] for seq in group}
                for seq, row in zip(group, self._engine.decode_each(tokens), strict=True):
                    lanes[seq].appended(tokens[seq])
                    loops[seq].step(row, lanes[seq].free)


def exact_rows(engine: Engine) -> int:
    """How many sequences can be evaluated together, a token each, without changing a bit of their logits, on this
    machine. The engine's sequences have to be empty.
    """
    prompts = _prompts(engine, _LEARNT + 1)
    alone = []
    try:
        for seq, ids in enumerate(prompts):
            engine.decode_tokens(ids[:-1], seq=seq)
            alone.append(engine.decode_each({seq: ids[-1]})[0].tobytes())
            engine.truncate(_LEARNT, seq)
        for rows in range(2, engine.n_seq_max + 1):
            together = engine.decode_each({seq: prompts[seq][-1] for seq in range(rows)})
            if any(together[seq].tobytes() != alone[seq] for seq in range(rows)):
                return rows - 1
            for seq in range(rows):
                engine.truncate(_LEARNT, seq)
    finally:
        _empty(engine)
    return engine.n_seq_max


def exact_questions(engine: Engine) -> int:
    """The same of runs of tokens, but for the rounding of the last product: all sequences, or 1 where one feels the
    others; 0 where the model can't forget a part of a sequence, or the context is too small to try.
    """
    prompts = _prompts(engine, _LEARNT + _QUESTION + engine.n_seq_max)
    questions = {seq: ids[_LEARNT : _LEARNT + _QUESTION + seq] for seq, ids in enumerate(prompts)}
    longest = engine.padded(_QUESTION + engine.n_seq_max)
    if longest * engine.n_seq_max > engine.n_batch or _LEARNT + longest > engine.n_ctx:
        return 0
    alone = []
    try:
        for seq, ids in enumerate(prompts):
            engine.decode_tokens(ids[:_LEARNT], seq=seq)
            alone.append(engine.decode_side_by_side({seq: questions[seq]})[0])
            if not engine.truncate(_LEARNT, seq):
                return 0
        together = engine.decode_side_by_side(questions)
        pairs = zip(together, alone, strict=True)
        same = all(abs(row - other).max() <= _ROUNDING * abs(other).max() for row, other in pairs)
        return engine.n_seq_max if same else 1
    finally:
        _empty(engine)


def groups(cells: Mapping[int, int], rows: int) -> list[list[int]]:
    """Sequences that one batch can evaluate together with the bits of each alone, by how many cells each holds."""
    alone = [seq for seq, count in cells.items() if count >= ALONE_FROM]
    return [*runs([seq for seq in cells if seq not in alone], rows), *([seq] for seq in alone)]


def _questions(prompts: Sequence[Sequence[Unit]]) -> list[tuple[int, ...]]:
    return [last.ids for *_, last in prompts if isinstance(last, TokenRun)]


def runs(sequences: Sequence[int], longest: int) -> list[list[int]]:
    """Sequences that one batch can evaluate together, at most so many: llama.cpp divides a batch of sequences where the
    next one's number is not one more.
    """
    found: list[list[int]] = []
    for seq in sorted(sequences):
        if found and len(found[-1]) < longest and seq == found[-1][-1] + 1:
            found[-1].append(seq)
        else:
            found.append([seq])
    return found


def _prompts(engine: Engine, length: int) -> list[list[int]]:
    """Different tokens for every sequence."""
    return [
        [(index * 7919 + seq * 104729) % engine.n_vocab for index in range(1, length + 1)]
        for seq in range(engine.n_seq_max)
    ]


def _empty(engine: Engine) -> None:
    for seq in range(engine.n_seq_max):
        engine.truncate(0, seq)
