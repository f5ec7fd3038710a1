"""Whether what a language model wrote can be trained on: its form, its words, and whether the symbols bear it out."""

from __future__ import annotations

import re
from collections import Counter

from llava_edge.train_gpu.datagen.scenes import Scene
from llava_edge.train_gpu.datagen.symbols import word_set, words
from llava_edge.train_gpu.datagen.tasks import TASKS, Kind, detail_request

Turns = list[tuple[str, str]]

_PAIR = re.compile(r"Question:\s*(.*?)\s*===\s*Answer:\s*(.*?)\s*(?:===|$)\s*", re.DOTALL)
_SOURCE = re.compile(
    r"\b(captions?|bounding box(es)?|coordinates?|sentences?|(provided|given) (information|text|descriptions?)"
    r"|descriptions? (say|says|mention|mentions|state|states)|according to the|as an ai|language model)\b",
    re.IGNORECASE,
)
_UNSURE = re.compile(
    r"\b(not (clear|certain|sure|known|specified|mentioned|possible to)|unclear|unknown|"
    r"(can(no|')t|cannot|impossible to) (tell|say|determine|know|see)|"
    r"(does|do|is|are)(n't| not) (say|specify|mention)\w*)\b",
    re.IGNORECASE,
)
_PRESENCE = re.compile(r"^(?:is|are) there (?:an?|any|some)? ?(?:\w+ )??(\w+)(?: in .*)?\?$", re.IGNORECASE)
_COMMON = word_set("""
a an the is are was be of in on at to with and or it its this that there they their he she his her what which who where
how many why when do does did can could would might may should you i we photo picture image scene shown seen see look
looks kind thing things people person from by for as not no yes one two three some any into over under main colour color
happening doing describe following most likely
""")
_NUMBER_WORDS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
MAX_ANSWER_CHARACTERS = 4000


class Rejected(Exception):
    """The text can't be used; the message is the reason, in words that can be counted."""


def accept(kind: Kind, scene: Scene, text: str, *, cut_off: bool) -> Turns:
    """Questions and answers of a text, or :class:`Rejected`."""
    if cut_off:
        raise Rejected("cut off at the limit of tokens")
    turns = _parse(kind, scene, text)
    seen: set[str] = set()
    for question, answer in turns:
        _check(kind, scene, question, answer)
        if question.lower() in seen:
            raise Rejected("asks the same question twice")
        seen.add(question.lower())
    if len({answer.lower() for _, answer in turns}) < len(turns):
        raise Rejected("gives the same answer twice")
    return turns


def _parse(kind: Kind, scene: Scene, text: str) -> Turns:
    text = text.strip()
    if not text:
        raise Rejected("empty")
    form = TASKS[kind].form
    if form == "text":
        if "===" in text or "Question:" in text:
            raise Rejected("not in the form that was asked for")
        return [(detail_request(scene.image), text)]
    turns = [(question, answer) for question, answer in _PAIR.findall(text)]
    rest = _PAIR.sub("", text).strip(" =\n")
    if not turns or rest:
        raise Rejected("not in the form that was asked for")
    if form == "pair" and len(turns) != 1:
        raise Rejected("more than one question")
    return turns


def _check(kind: Kind, scene: Scene, question: str, answer: str) -> None:
    if not question or not answer:
        raise Rejected("a question or an answer is empty")
    if "<image>" in question + answer:
        raise Rejected("holds the mark of a picture")
    if len(answer) > MAX_ANSWER_CHARACTERS:
        raise Rejected("an answer is too long")
    if _SOURCE.search(question) or _SOURCE.search(answer):
        raise Rejected("speaks of its sources")
    if _UNSURE.search(answer):
        raise Rejected("has no certain answer")
    symbols = " ".join((*scene.captions, *(name for name, _ in scene.objects)))
    known = _stems(symbols)
    presence = _PRESENCE.match(question)
    if presence and answer.lower().startswith("yes") and not _stems(presence[1]) & known:
        raise Rejected("affirms what the symbols don't show")
    if kind != "reasoning" and not _numbers(answer) <= _numbers(symbols) | _counts(scene):
        raise Rejected("states a number that the symbols don't have")
    if not _stems(f"{answer} {question if kind != 'detail' else ''}") & known:
        raise Rejected("can't be answered from the symbols")


def _numbers(text: str) -> set[int]:
    """Whole numbers above one that a text names, in digits or words."""
    found = {int(digits) for digits in re.findall(r"\b\d{1,6}\b", text)} - {0, 1}
    return found | {number for number, word in enumerate(_NUMBER_WORDS, start=2) if word in words(text)}


def _counts(scene: Scene) -> set[int]:
    """How many things of each category there are."""
    return set(Counter(name for name, _ in scene.objects).values())


def _stems(text: str) -> set[str]:
    """Words that carry meaning, without the commonest endings."""
    return {re.sub(r"(?:ing|ed|es|s|e)$", "", word) or word for word in words(text) - _COMMON}
