"""Questions about pictures, and the answers along which language models are compared.

Shapes: T tokens, D width of the language model, V size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llava_edge.prompt import BundleFormat, ImageRef, PromptTokenizer, TokenRun

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llava_edge.bundle import PromptFormat
    from llava_edge.engine import Engine

QUESTIONS = (
    "What is in this picture?",
    "Describe the image briefly.",
    "Which colours do you see? Name 2.",
    "Is there an animal or a person?",
    "Where was this photo taken?",
    "Tell me a story about it.",
    "What is on the left side?",
    "How many things are there?",
    "What is the weather like?",
    "Write a short caption for this picture.",
    "What could happen next?",
    "Name 3 things that are not in the picture.",
)
ANSWER_TOKENS = 40
POSITIONS = 200
TEXT_TOKENS = 512  # room for a question and its answer


@dataclass(frozen=True)
class Case:
    """One prompt with a picture ``[T, D]``, the greedy answer of one model, and its logits ``[T, V]``."""

    before: list[int]
    picture: NDArray[np.float32]
    after: list[int]
    tokens: list[int]
    logits: NDArray[np.float32]


def prompt_ids(engine: Engine, prompt: PromptFormat, question: str) -> tuple[list[int], list[int]]:
    """The token ids before and after a picture, made as the runtime makes them."""
    units = PromptTokenizer(engine).units(BundleFormat(prompt).turn(0, [ImageRef("")], question, None))
    at = next(index for index, unit in enumerate(units) if isinstance(unit, ImageRef))
    before = [token for unit in units[:at] if isinstance(unit, TokenRun) for token in unit.ids]
    after = [token for unit in units[at + 1 :] if isinstance(unit, TokenRun) for token in unit.ids]
    return before, after


def ask(
    engine: Engine,
    prompt: PromptFormat,
    pictures: Sequence[NDArray[np.float32]],
    tell: Callable[[int, int], None] | None = None,
) -> list[Case]:
    """Greedy answers to questions about pictures, until there are enough positions to compare."""
    cases: list[Case] = []
    reader = _Reader(engine)
    asked = [prompt_ids(engine, prompt, question) for question in QUESTIONS]
    for number, picture in enumerate(pictures, 1):
        for before, after in asked:
            cases.append(_answer(reader, before, picture, after))
            done = sum(len(case.tokens) for case in cases)
            if tell:
                tell(min(done, POSITIONS), POSITIONS)
            if done >= POSITIONS * number / len(pictures):
                break
    return cases


def follow(
    engine: Engine, cases: Sequence[Case], tell: Callable[[int, int], None] | None = None
) -> list[NDArray[np.float32]]:
    """The logits ``[T, V]`` of a model that is led along each case's answer."""
    reader = _Reader(engine)
    found = []
    for case in cases:
        reader.read(case.before, case.picture, case.after)
        rows = [engine.logits()]
        for token in case.tokens[:-1]:
            engine.decode_tokens([token])
            rows.append(engine.logits())
        found.append(np.stack(rows))
        if tell:
            tell(len(found), len(cases))
    return found


class _Reader:
    """Puts prompts into a model's cache. A picture that the prompt before showed too stays there, as in ``chat``."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._before: list[int] = []
        self._picture: NDArray[np.float32] | None = None
        self._past = 0

    def read(self, before: list[int], picture: NDArray[np.float32], after: list[int]) -> None:
        """Evaluate a prompt; the logits are those of its last place."""
        engine = self.engine
        same = picture is self._picture and before == self._before and bool(after)
        if not (same and engine.truncate(self._past)):
            engine.truncate(0)
            if before:
                engine.decode_tokens(before, logits=False)
            engine.decode_embeddings(picture, logits=not after)
            self._before, self._picture, self._past = before, picture, engine.n_past
        if after:
            engine.decode_tokens(after)


def _answer(reader: _Reader, before: list[int], picture: NDArray[np.float32], after: list[int]) -> Case:
    engine = reader.engine
    reader.read(before, picture, after)
    logits = [engine.logits()]
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < ANSWER_TOKENS and not engine.is_end(tokens[-1]):
        engine.decode_tokens(tokens[-1:])
        logits.append(engine.logits())
        tokens.append(int(logits[-1].argmax()))
    return Case(before, picture, after, tokens, np.stack(logits))
