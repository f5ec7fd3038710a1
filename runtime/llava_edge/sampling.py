"""How the next token is chosen from the logits, in NumPy and the same on every machine.

Shapes: V size of the vocabulary, K tokens that are left to choose from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llava_edge.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llava_edge.types import SamplingParams


class Sampler:
    """Chooses tokens for one answer.

    The filters work on the model's own probabilities, in llama.cpp's order: top-k, top-p, min-p. The temperature
    applies to what is left. With temperature 0 the likeliest token is taken, the first of equals.
    """

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._random = np.random.default_rng(params.seed) if params.temperature > 0 else None

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token for logits ``[V]``; ModelError if they are not numbers."""
        best = int(logits.argmax())  # a NaN counts as the largest
        if not np.isfinite(logits[best]):
            raise ModelError("the model gave logits that are not numbers", hint="Its file is damaged, or overflows.")
        if self._random is None:
            return best
        ids, probabilities = candidates(logits, self._params)
        point = self._random.random() * probabilities.sum()
        index = int(np.searchsorted(probabilities.cumsum(), point, side="right"))
        return int(ids[min(index, len(ids) - 1)])


def candidates(logits: NDArray[np.float32], params: SamplingParams) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids ``[K]`` that pass the filters, likeliest first, and their probabilities at the temperature ``[K]``."""
    ids = likeliest(logits, params.top_k)
    scores = logits[ids].astype(np.float64)
    probabilities = _softmax(scores)
    kept = probabilities >= params.min_p * probabilities[0]
    if params.top_p < 1:  # a sum that is rounded up to 1 must not cut the unlikely ones off
        kept &= probabilities.cumsum() - probabilities < params.top_p  # enough of the likeliest to make it up
    kept[0] = True
    return ids[kept], _softmax(scores[kept] / params.temperature)


def likeliest(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Ids in falling order of their logits, equal ones in rising order of the id; all of them if ``count`` is 0."""
    if 0 < count < len(logits):
        edge = np.partition(logits, len(logits) - count)[len(logits) - count]
        some = np.flatnonzero(logits >= edge)
        return some[_falling(logits[some])][:count]
    return _falling(logits)


def _falling(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """The places of logits in falling order, equal ones as they come.

    One sort of whole numbers, each made of a logit and its place: NumPy has instructions for that which it has not for
    a stable sort of floats, and a vocabulary takes a fifth of the time.
    """
    bits = (logits + np.float32(0)).view(np.uint32)  # no -0, which would lie beside 0
    rising = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    keys = (~rising).astype(np.uint64) << np.uint64(32) | np.arange(len(logits), dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(scores - scores.max())
    probabilities: NDArray[np.float64] = powers / powers.sum()
    return probabilities
