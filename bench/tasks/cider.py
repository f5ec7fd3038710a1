"""CIDEr-D (Vedantam, Zitnick, Parikh, CVPR 2015, section 4 and the D variant of the published evaluation).

Words are lower-cased; n-grams of 1 to 4 words are weighted by how rare they are over the references' pictures; a
candidate's weights are clipped to the reference's; a Gaussian of width 6 punishes a difference in length.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from llava_edge.bench.tasks.ngrams import Ngram, ngrams, words

SIGMA = 6.0
ORDERS = (1, 2, 3, 4)
_END = "."  # no word has a full stop


class CiderD:
    """Scores captions against references. How rare a word is, all pictures' references together tell.

    ``count_end`` takes a caption's end for its last word. The published score doesn't; a model that is trained on it
    learns to break off, because "in a" earns more than an end does.
    """

    def __init__(self, references: Sequence[Sequence[str]], *, count_end: bool = False) -> None:
        self._end = [_END] if count_end else []
        pictures: Counter[Ngram] = Counter()
        for texts in references:
            pictures.update(set().union(*(self._counts(text) for text in texts)))
        self._unseen = math.log(len(references)) if references else 0.0
        self._rarity = {ngram: self._unseen - math.log(count) for ngram, count in pictures.items()}

    def score(self, candidate: str, references: Sequence[str]) -> float:
        """One caption against its picture's, on the scale on which papers print 1.0 as "100"."""
        counted = self._counts(candidate)
        total = sum(self._similarity(counted, self._counts(reference)) for reference in references)
        return 10 * total / len(references)

    def _similarity(self, candidate: Counter[Ngram], reference: Counter[Ngram]) -> float:
        """Mean over the orders of the clipped cosine, with the length penalty."""
        difference = _length(candidate) - _length(reference)
        penalty = math.exp(-(difference**2) / (2 * SIGMA**2))
        total = 0.0
        for order in ORDERS:
            ours = self._weights(candidate, order)
            theirs = self._weights(reference, order)
            norm = math.hypot(*ours.values()) * math.hypot(*theirs.values())
            if norm > 0:
                total += penalty * sum(min(w, theirs[g]) * theirs[g] for g, w in ours.items() if g in theirs) / norm
        return total / len(ORDERS)

    def _counts(self, text: str) -> Counter[Ngram]:
        return ngrams(words(text) + self._end, ORDERS)

    def _weights(self, counted: Counter[Ngram], order: int) -> dict[Ngram, float]:
        return {g: c * self._rarity.get(g, self._unseen) for g, c in counted.items() if len(g) == order}


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """Mean score and score per picture.

    ``references[i]`` holds the captions of picture i. At least two pictures are needed: with one, every n-gram
    is in every picture and weighs nothing.
    """
    if len(candidates) != len(references) or len(candidates) < 2:
        raise ValueError(
            f"{len(candidates)} candidates, {len(references)} sets of references; expected the same, 2 or more"
        )
    scorer = CiderD(references)
    scores = [scorer.score(candidate, texts) for candidate, texts in zip(candidates, references, strict=True)]
    return sum(scores) / len(scores), scores


def _length(counted: Counter[Ngram]) -> int:
    """The number of bigrams, which is what the published script takes for the length."""
    return sum(count for ngram, count in counted.items() if len(ngram) == 2)
