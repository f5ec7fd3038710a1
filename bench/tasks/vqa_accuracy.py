"""VQA accuracy: how an answer is normalised and how it is weighed against those of ten people.

Two rules are in use: that of the VQA challenge (``vqaEval.py``), which normalises answers only where people differ,
and that of EvalAI's server, which TextVQA and LLaVA's submissions follow. Both are reproduced, peculiarities included.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

ARTICLES = frozenset(("a", "an", "the"))
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBER_WORDS)}}

# Each is restored when one of its apostrophes is missing.
_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # the published pattern means to spare "3." too, but does not
_PERIODS_AT_MOST = 32  # the published call passes a flag where the count belongs


@functools.cache
def contractions() -> dict[str, str]:
    """Contractions with one apostrophe missing, and how they are written."""
    restored = {"somebody'd": "somebodyd"}  # a slip of the published table
    for word in _APOSTROPHES.split():
        for place, letter in enumerate(word):
            if letter == "'":
                restored[word[:place] + word[place + 1 :]] = word
    return restored


def challenge_answer(text: str) -> str:
    """An answer as the VQA challenge's script normalises it."""
    return _digits_and_articles(_without_punctuation(_one_line(text)))


def evalai_answer(text: str) -> str:
    """An answer as EvalAI's server normalises it."""
    return challenge_answer(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def challenge_accuracy(predicted: str, people: Sequence[str]) -> float:
    """Accuracy on VQAv2 (Antol et al., ICCV 2015). Where all people agree, answers are compared by the letter."""
    answers = [_one_line(text) for text in people]
    if len(set(answers)) > 1:
        return agreement(challenge_answer(predicted), [challenge_answer(text) for text in answers])
    return agreement(_one_line(predicted), answers)


def evalai_accuracy(predicted: str, people: Sequence[str]) -> float:
    """Accuracy on TextVQA."""
    return agreement(evalai_answer(predicted), [evalai_answer(text) for text in people])


def agreement(predicted: str, people: Sequence[str]) -> float:
    """The mean over leaving out each person of min(1, others who gave this answer / 3)."""
    matching = sum(answer == predicted for answer in people)
    total = sum(min(1.0, (matching - (answer == predicted)) / 3) for answer in people)
    return total / len(people)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Marks that touch a blank go, others become one. A number with a comma in it makes all marks go."""
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _MARKS:
        touches = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if touches or in_number else " ")
    return _PERIOD.sub("", result, count=_PERIODS_AT_MOST)


def _digits_and_articles(text: str) -> str:
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(contractions().get(word, word) for word in words if word not in ARTICLES)
