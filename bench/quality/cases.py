"""From samples to what a model evaluates: units of a prompt, and the tokens of the answer that follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llava_edge.bench.quality.data import Data, Sample
from llava_edge.bench.quality.store import compact
from llava_edge.errors import InputError
from llava_edge.prompt import Answer, ImageRef, Segment, TokenRun, Unit, UserText

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llava_edge.engine import Engine
    from llava_edge.model import Model

# llama-perplexity's: the second half of each run of 512 tokens is scored
CHUNK = 512


@dataclass(frozen=True)
class Case:
    """A prompt and the tokens that are scored after it. Cases of one ``group``, a picture, are not independent.

    ``asks`` tells whether it is the first question of ``sample``, which the model may answer by itself too.
    """

    sample: int
    group: str
    units: tuple[Unit, ...]
    answer: tuple[int, ...]
    picture: Path | None = None
    asks: bool = False


def make_cases(model: Model, data: Data, *, answer_tokens: int, chunks: int | None) -> list[Case]:
    """All cases in the model's tokens; InputError if there are none."""
    if data.text is not None:
        cases = list(_chunks(model, data.text))[:chunks]
        if not cases:
            raise InputError(f"{data.source} is too short: a run of {CHUNK} tokens is needed")
        return cases
    return [
        case for number, sample in enumerate(data.samples) for case in _sample(model, number, sample, answer_tokens)
    ]


def evaluate_text(engine: Engine, case: Case) -> NDArray[np.float16]:
    """Compact logits before each scored token of a text, evaluated in one batch as llama-perplexity does.

    One by one they would differ a little, and of a 4-bit model that little is as large as what the types cost.
    """
    (run,) = case.units
    assert isinstance(run, TokenRun)
    ids = (*run.ids, *case.answer)
    engine.truncate(0)
    engine.decode_tokens(ids)
    return compact(np.stack([engine.logits(row) for row in range(len(run.ids) - 1, len(ids) - 1)]))


def _sample(model: Model, number: int, sample: Sample, answer_tokens: int) -> Iterator[Case]:
    segments: list[Segment] = []
    for place, (question, answer) in enumerate(sample.turns):
        pictures = [ImageRef(str(sample.picture))] if sample.picture is not None and place == 0 else []
        segments += model.format.turn(place, pictures, question, None)
        ids = _answer(model, segments, answer)
        end = (min(model.stop_tokens),) if model.stop_tokens else ()
        scored = (*ids, *end)[:answer_tokens]
        group = str(number if sample.picture is None else sample.picture)
        yield Case(number, group, tuple(model.tokenizer.units(segments)), scored, sample.picture, asks=place == 0)
        segments.append(Answer(ids))


def _answer(model: Model, segments: list[Segment], answer: str) -> tuple[int, ...]:
    """The answer's tokens as they follow the prompt, where the vocabulary keeps both apart."""
    text = f" {answer}" if model.engine.spm else answer
    prompt, whole = (model.tokenizer.units(part)[-1] for part in (segments, [*segments, UserText(text)]))
    assert isinstance(prompt, TokenRun)
    assert isinstance(whole, TokenRun)
    if whole.ids[: len(prompt.ids)] == prompt.ids:
        return whole.ids[len(prompt.ids) :]
    return tuple(model.tokenizer.plain(answer))


def _chunks(model: Model, text: str) -> Iterator[Case]:
    tokens = model.engine.tokenize(text, special=False)
    bos = model.engine.tokenize(model.engine.bos, special=True) if model.engine.bos else []
    tokens = bos + tokens
    first = CHUNK // 2 + 1
    for number, start in enumerate(range(0, len(tokens) - CHUNK + 1, CHUNK)):
        run = [*bos, *tokens[start + len(bos) : start + CHUNK]]
        yield Case(number, str(number), (TokenRun(tuple(run[:first])),), tuple(run[first:]))
