"""Several questions about one picture, read and answered in one batch after the picture's one place in the KV cache.

What stands beside a token in a batch moves its logits a little (by up to 0.3 for a 4-bit model). An answer that such a
move could have changed, because somewhere its two likeliest tokens lay close together, is not taken: the caller asks
that question by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llava_edge.generate import Generation, TokenLoop
from llava_edge.kv_cache import common_units
from llava_edge.prompt import ImageRef, TokenRun, Unit
from llava_edge.sampling import Sampler
from llava_edge.types import SamplingParams

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llava_edge.model import Model
    from llava_edge.vision import EncodedImage

QUESTIONS = 12
"""Questions in a batch, at most."""
CLOSE = 1.0
"""Logits between the two likeliest tokens below which a batch is not believed."""


class _Careful(Sampler):
    """The greedy choice, and whether it was ever a close one."""

    def __init__(self) -> None:
        super().__init__(SamplingParams())
        self.close = False

    def choose(self, logits: NDArray[np.float32]) -> int:
        second, first = np.partition(logits, len(logits) - 2)[-2:]
        self.close |= bool(first - second < CLOSE)
        return super().choose(logits)


def answer_together(
    model: Model, prompts: Sequence[list[Unit]], images: Mapping[str, EncodedImage], max_tokens: int
) -> list[Generation | None]:
    """Greedy answers to prompts that begin with the same picture; None for those that are to be asked alone."""
    begin = _beginning(prompts)
    if not begin:
        return [None] * len(prompts)
    engine, cache = model.engine, model.cache
    tails = [[token for unit in units[begin:] for token in _ids(unit)] for units in prompts]
    shared = [
        images[unit.key].n_tokens if isinstance(unit, ImageRef) else len(_ids(unit)) for unit in prompts[0][:begin]
    ]
    needed = sum(shared) + sum(len(tail) + max_tokens for tail in tails)
    if needed > engine.n_ctx or sum(map(len, tails)) > engine.n_batch or len(tails) >= engine.n_seq_max:
        return [None] * len(prompts)
    cache.prefill(prompts[0][:begin], images)
    sequences = range(1, len(tails) + 1)
    choosers = {seq: _Careful() for seq in sequences}
    answers = {seq: Generation() for seq in sequences}
    loops = {seq: model.token_loop(answers[seq], choosers[seq], max_tokens) for seq in sequences}
    engine.copy(cache.seq, sequences)
    try:
        _write(model, loops, choosers, dict(zip(sequences, tails, strict=True)))
    finally:
        for seq in sequences:
            engine.truncate(0, seq)
    return [None if choosers[seq].close else answers[seq] for seq in sequences]


def _write(
    model: Model, loops: Mapping[int, TokenLoop], choosers: Mapping[int, _Careful], runs: dict[int, Sequence[int]]
) -> None:
    """Step by step, all answers that are not ended and not in doubt."""
    while runs:
        rows = model.engine.decode_runs(runs)
        for seq, logits in zip(list(runs), rows, strict=True):
            loops[seq].step(logits, model.engine.n_ctx)
            if loops[seq].done or choosers[seq].close:
                del runs[seq]
            else:
                runs[seq] = loops[seq].generation.ids[-1:]


def _beginning(prompts: Sequence[list[Unit]]) -> int:
    """How many of the first units are the same; 0 if the picture is not among them."""
    first = prompts[0]
    begin = min(common_units(first, units) for units in prompts)
    pictured = any(isinstance(unit, ImageRef) for unit in first[:begin])
    plain = all(isinstance(unit, TokenRun) for units in prompts for unit in units[begin:])
    return begin if pictured and plain else 0


def _ids(unit: Unit) -> tuple[int, ...]:
    assert isinstance(unit, TokenRun)
    return unit.ids
