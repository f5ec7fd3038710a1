"""CIDEr-D (Vedantam, Zitnick, Parikh, CVPR 2015, section 4 and the D variant of the published evaluation).

Words are lower-cased; n-grams of 1 to 4 words are weighted by how rare they are over the references' pictures; a
candidate's weights are clipped to the reference's; a Gaussian of width 6 punishes a difference in length.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

SIGMA = 6.0
ORDERS = (1, 2, 3, 4)
Ngram = tuple[str, ...]


def words(text: str) -> list[str]:
    """Lower-cased words without punctuation."""
    return re.findall(r"[a-z0-9']+", text.lower())


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """Mean score and score per picture, on the scale on which papers print 1.0 as "100".

    ``references[i]`` holds the captions of picture i. At least two pictures are needed: with one, every n-gram
    is in every picture and weighs nothing.
    """
    if len(candidates) != len(references) or len(candidates) < 2:
        raise ValueError(
            f"{len(candidates)} candidates, {len(references)} sets of references; expected the same, 2 or more"
        )
    counted = [[_ngrams(words(text)) for text in texts] for texts in references]
    pictures: Counter[Ngram] = Counter()
    for texts in counted:
        pictures.update(set().union(*texts))
    log_total = math.log(len(references))
    rarity = {ngram: log_total - math.log(count) for ngram, count in pictures.items()}

    scores = []
    for candidate, texts in zip(candidates, counted, strict=True):
        ngrams = _ngrams(words(candidate))
        total = sum(_similarity(ngrams, reference, rarity, log_total) for reference in texts)
        scores.append(10 * total / len(texts))
    return sum(scores) / len(scores), scores


def _ngrams(text: list[str]) -> Counter[Ngram]:
    return Counter(tuple(text[i : i + n]) for n in ORDERS for i in range(len(text) - n + 1))


def _similarity(
    candidate: Counter[Ngram], reference: Counter[Ngram], rarity: dict[Ngram, float], unseen: float
) -> float:
    """Mean over the orders of the clipped cosine, with the length penalty."""
    difference = _length(candidate) - _length(reference)
    penalty = math.exp(-(difference**2) / (2 * SIGMA**2))
    total = 0.0
    for order in ORDERS:
        ours = {g: c * rarity.get(g, unseen) for g, c in candidate.items() if len(g) == order}
        theirs = {g: c * rarity.get(g, unseen) for g, c in reference.items() if len(g) == order}
        norm = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        if norm > 0:
            total += penalty * sum(min(w, theirs[g]) * theirs[g] for g, w in ours.items() if g in theirs) / norm
    return total / len(ORDERS)


def _length(ngrams: Counter[Ngram]) -> int:
    """The number of bigrams, which is what the published script takes for the length."""
    return sum(count for ngram, count in ngrams.items() if len(ngram) == 2)
