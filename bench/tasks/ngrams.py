"""BLEU and ROUGE-L of captions, as in the published COCO caption evaluation."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

Ngram = tuple[str, ...]
BLEU_ORDERS = (1, 2, 3, 4)
ROUGE_BETA = 1.2
_TINY, _SMALL = 1e-15, 1e-9  # the published script's guards against a division by nothing


def words(text: str) -> list[str]:
    """Lower-cased words without punctuation."""
    return re.findall(r"[a-z0-9']+", text.lower())


def ngrams(tokens: Sequence[str], orders: Iterable[int]) -> Counter[Ngram]:
    """How often each run of words comes."""
    return Counter(tuple(tokens[i : i + n]) for n in orders for i in range(len(tokens) - n + 1))


def bleu_counts(candidate: str, references: Sequence[str]) -> list[int]:
    """What one caption adds to BLEU-4: clipped matches of each order, n-grams of each order, own length, length of
    the reference that is closest (the shorter of two).
    """
    ours = words(candidate)
    theirs = [words(reference) for reference in references]
    counts: list[int] = []
    totals: list[int] = []
    for order in BLEU_ORDERS:
        have = ngrams(ours, (order,))
        allowed: Counter[Ngram] = Counter()
        for reference in theirs:
            allowed |= ngrams(reference, (order,))
        counts.append(sum((have & allowed).values()))
        totals.append(max(0, len(ours) - order + 1))
    closest = min((abs(len(reference) - len(ours)), len(reference)) for reference in theirs)[1]
    return [*counts, *totals, len(ours), closest]


def bleu4(sums: Sequence[float]) -> float:
    """BLEU-4 of a set of captions from the sums of their :func:`bleu_counts` (Papineni et al., ACL 2002)."""
    matches, totals, (ours, theirs) = sums[:4], sums[4:8], sums[8:]
    product = 1.0
    for match, total in zip(matches, totals, strict=True):
        product *= (match + _TINY) / (total + _SMALL)
    score: float = product**0.25
    brevity = (ours + _TINY) / (theirs + _SMALL)
    return score * math.exp(1 - 1 / brevity) if brevity < 1 else score


def rouge_l(candidate: str, references: Sequence[str]) -> float:
    """ROUGE-L: best precision and best recall of the longest common subsequence, beta 1.2 (Lin, 2004)."""
    ours = words(candidate)
    precision = recall = 0.0
    for reference in references:
        theirs = words(reference)
        common = _longest_common(ours, theirs)
        precision = max(precision, common / len(ours) if ours else 0.0)
        recall = max(recall, common / len(theirs) if theirs else 0.0)
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for place, other in enumerate(second, 1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]
