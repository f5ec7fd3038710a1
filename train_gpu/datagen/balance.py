"""Captions balanced over what they speak of: the noun-phrase filter with which LLaVA made CC-595K from CC3M.

Phrases that are too rare are dropped; the others are visited from the rarest on, and each brings at most so many of
its captions (arXiv 2304.08485, appendix E).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llava_edge.errors import require_extra

_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*|\d+|[^\w\s]")
# Tags of the British National Corpus (C5), which the tagger gives: adjectives, numbers, participles, then nouns.
_BEFORE = ("AJ", "CRD", "ORD", "VVN", "VVG")
_NOUN = ("NN", "NP")


@dataclass(frozen=True)
class Balanced:
    """The captions that were kept, by their numbers, and how many phrases there were."""

    kept: list[int]
    phrases: int
    used: int


class PhraseTagger:
    """Noun phrases of English sentences, by the part-of-speech tagger HanTa."""

    def __init__(self) -> None:
        require_extra("train", "HanTa")
        from HanTa.HanoverTagger import HanoverTagger

        self._tagger: Any = HanoverTagger("morphmodel_en.pgz")

    def __call__(self, caption: str) -> list[str]:
        """The phrases, lower-cased and without article: ``a brown dog`` gives ``brown dog``."""
        tokens = _WORD.findall(caption)
        tagged = self._tagger.tag_sent(tokens) if tokens else []
        phrases: list[str] = []
        run: list[str] = []
        nouns = 0
        for word, _, tag in [*tagged, ("", "", "")]:
            if tag.startswith(_NOUN):
                run.append(word.lower())
                nouns += 1
                continue
            if nouns:
                phrases.append(" ".join(run))
            if not tag.startswith(_BEFORE) or nouns:
                run, nouns = [], 0
            if tag.startswith(_BEFORE):
                run.append(word.lower())
        return phrases


def balance(
    captions: Sequence[str],
    phrases_of: Callable[[str], Iterable[str]],
    *,
    min_count: int = 3,
    max_per_phrase: int = 100,
    seed: int = 0,
    told: Callable[[int], None] = lambda done: None,
) -> Balanced:
    """Choose captions so that what is rare is kept and what is common is thinned."""
    where: dict[str, list[int]] = {}
    for number, caption in enumerate(captions):
        for phrase in dict.fromkeys(phrases_of(caption)):
            where.setdefault(phrase, []).append(number)
        told(number + 1)
    frequent = {phrase: numbers for phrase, numbers in where.items() if len(numbers) >= min_count}
    rng = random.Random(seed)
    kept: set[int] = set()
    for _, numbers in sorted(frequent.items(), key=lambda item: (len(item[1]), item[0])):
        kept.update(numbers if len(numbers) <= max_per_phrase else rng.sample(numbers, max_per_phrase))
    return Balanced(sorted(kept), len(where), len(frequent))
