"""From two models' logits of the same tokens to the figures of a table.

Shapes: T tokens, V size of the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llava_edge.bench import statistics
from llava_edge.bench.record import Metric
from llava_edge.bench.tasks import stats
from llava_edge.bench.tasks.cider import cider_d

if TYPE_CHECKING:
    from numpy.typing import NDArray

KL, AGREES, NLL_REFERENCE, NLL = range(4)
_ROWS = 32  # evaluated together, so that a long answer needs no more memory


def compare(reference: NDArray[np.float16], found: NDArray[np.float16], tokens: Sequence[int]) -> NDArray[np.float64]:
    """Per token: KL divergence in nats, whether the most likely token is the same, and both surprises ``[T, 4]``."""
    parts = [
        _compare(reference[start : start + _ROWS], found[start : start + _ROWS], tokens[start : start + _ROWS])
        for start in range(0, len(tokens), _ROWS)
    ]
    return np.concatenate(parts)


def _compare(reference: NDArray[np.float16], found: NDArray[np.float16], tokens: Sequence[int]) -> NDArray[np.float64]:
    p, q = _log_softmax(reference), _log_softmax(found)
    rows = np.arange(len(tokens))
    agrees = reference.argmax(axis=1) == found.argmax(axis=1)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    return np.stack([kl, agrees.astype(np.float64), -p[rows, list(tokens)], -q[rows, list(tokens)]], axis=1)


def _log_softmax(logits: NDArray[np.float16]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return result


def summarize(groups: Sequence[NDArray[np.float64]]) -> dict[str, Metric]:
    """The table's figures of :func:`compare`'s rows, with intervals over groups (pictures)."""
    return {
        "kl_mean": statistics.bootstrap(groups, lambda rows: float(rows[:, KL].mean()), "nats"),
        "kl_median": statistics.bootstrap(groups, lambda rows: float(np.median(rows[:, KL])), "nats"),
        "kl_p99": statistics.bootstrap(groups, lambda rows: float(np.quantile(rows[:, KL], 0.99)), "nats"),
        "top1_agreement": statistics.bootstrap(groups, lambda rows: float(rows[:, AGREES].mean()), "share"),
        "perplexity": statistics.bootstrap(groups, lambda rows: float(np.exp(rows[:, NLL].mean())), "perplexity"),
        "perplexity_ratio": statistics.bootstrap(groups, _perplexity_ratio, "ratio"),
    }


def _perplexity_ratio(rows: NDArray[np.float64]) -> float:
    return float(np.exp((rows[:, NLL] - rows[:, NLL_REFERENCE]).mean()))


def same_text(answers: Sequence[str], expected: Sequence[str], pictures: Sequence[str]) -> Metric:
    """Share of answers that are the reference's. ``pictures`` names the one that each answer is about."""
    equal = [float(a == b) for a, b in zip(answers, expected, strict=True)]
    return _metric("share", stats.share_of(pictures, equal))


def captions(answers: Sequence[str], references: Sequence[Sequence[str]], pictures: Sequence[str]) -> Metric:
    """CIDEr-D of answers against people's captions."""
    _, scores = cider_d(answers, references)
    return _metric("CIDEr-D", stats.mean(pictures, list(scores)))


def accuracy(answers: Sequence[str], references: Sequence[Sequence[str]], pictures: Sequence[str]) -> Metric:
    """Share of answers that are one of the known ones, but for case and punctuation."""
    right = [
        float(_words(answer) in [_words(reference) for reference in known])
        for answer, known in zip(answers, references, strict=True)
    ]
    return _metric("share", stats.share_of(pictures, right))


def _metric(unit: str, found: stats.Metric) -> Metric:
    assert found.value is not None
    return Metric(unit, found.value, None if found.low is None or found.high is None else (found.low, found.high))


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.casefold())
