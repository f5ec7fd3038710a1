"""Ask a model questions, each as a conversation of its own.

Questions on one picture that follow each other cost one reading of it, and are themselves read and answered together
where the engine has sequences for them and that changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from llava_edge.generate import Generation, generate
from llava_edge.prompt import ImageRef, TokenRun, Unit
from llava_edge.sampling import Sampler
from llava_edge.side_by_side import SideBySide
from llava_edge.types import SamplingParams

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llava_edge.bench.tasks.samples import Sample
    from llava_edge.bench.tasks.task import Task
    from llava_edge.generate import TokenLoop
    from llava_edge.model import Model, Picture
    from llava_edge.vision import EncodedImage

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ChoiceBy = Literal["letter", "text"]


@dataclass(frozen=True)
class Said:
    """An answer. ``log_probabilities`` are those of the choices, where the answer was chosen instead of written."""

    text: str
    prompt_sha256: str
    tokens: int
    log_probabilities: tuple[float, ...] = field(default=())


class Asker:
    """Asks a loaded model greedily. Without ``share`` every question reads its picture anew, which measures what
    sharing saves.
    """

    def __init__(self, model: Model, *, system: str | None = None, share: bool = True) -> None:
        self._model = model
        self._system = system
        self._share = share
        self._opened: tuple[Path, Picture] | None = None
        self._beside = SideBySide(model)

    @property
    def width(self) -> int:
        """How many questions on one picture are read together."""
        return max(1, self._beside.width) if self._share else 1

    def answers(self, task: Task, samples: Sequence[Sample]) -> list[Said]:
        """Ask up to ``width`` samples on one picture as they want it: choose among choices, or write."""
        first = samples[0]
        if first.choices:
            return [self.choose(s.question, s.image, s.choices, task.choose_by) for s in samples]
        return self.say([sample.question for sample in samples], first.image, max_tokens=task.max_tokens)

    def say(self, questions: Sequence[str], image: Path | None, *, max_tokens: int) -> list[Said]:
        """Let the model write answers of at most ``max_tokens`` to up to ``width`` questions on a picture."""
        prompts, known = self._prompts(questions, image)
        if self._beside.fits(prompts, known):
            return self._say_together(prompts, known, max_tokens)
        return [self._say_alone(units, known, max_tokens) for units in prompts]

    def _say_together(self, prompts: list[list[Unit]], known: dict[str, EncodedImage], max_tokens: int) -> list[Said]:
        loops = [self._loop(max_tokens) for _ in prompts]
        self._beside.write(loops, self._beside.read(prompts, known))
        return [_said(loop.generation, units) for loop, units in zip(loops, prompts, strict=True)]

    def _say_alone(self, units: list[Unit], known: dict[str, EncodedImage], max_tokens: int) -> Said:
        self._model.cache.prefill(units, known)
        loop = self._loop(max_tokens)
        for _ in generate(loop, self._model.cache):
            pass
        return _said(loop.generation, units)

    def _loop(self, max_tokens: int) -> TokenLoop:
        return self._model.token_loop(Generation(), Sampler(SamplingParams()), max_tokens)

    def choose(self, question: str, image: Path | None, choices: Sequence[str], by: ChoiceBy) -> Said:
        """Choose by probability: of the choice's letter after the prompt (one forward pass, whatever the number of
        choices), or of the choice's own tokens, as their mean logarithm. Nothing is generated.
        """
        (units,), encoded = self._prompts([question], image)
        self._model.cache.prefill(units, encoded)
        if by == "letter":
            scores = self._letter_scores(len(choices))
        else:
            scores = [self._text_score(choice, units, encoded) for choice in choices]
        best = int(np.argmax(scores))
        return Said(choices[best], _prompt_hash(units), 0, tuple(round(score, 6) for score in scores))

    def _prompts(
        self, questions: Sequence[str], image: Path | None
    ) -> tuple[list[list[Unit]], dict[str, EncodedImage]]:
        """The questions as prompts, and the picture that they are about."""
        model = self._model
        if not self._share:
            model.forget()
            self._opened = None
        encoded = {}
        refs = []
        if image is not None:
            picture = model.encode(self._open(image))
            encoded, refs = {picture.key: picture}, [ImageRef(picture.key)]
        turns = [model.format.turn(0, refs, question, self._system) for question in questions]
        return [model.tokenizer.units(turn) for turn in turns], encoded

    def _open(self, image: Path) -> Picture:
        if self._opened is None or self._opened[0] != image:
            self._opened = (image, self._model.open_picture(image))
        return self._opened[1]

    def _letter_scores(self, count: int) -> list[float]:
        """Logarithm of each letter's probability, with and without a blank before it."""
        logs = _log_softmax(self._model.cache.logits())
        scores = []
        for letter in LETTERS[:count]:
            spellings = {tuple(self._model.tokenizer.plain(text)) for text in (letter, f" {letter}")}
            ids = sorted(ids[0] for ids in spellings if len(ids) == 1)
            scores.append(float(np.logaddexp.reduce(logs[ids])) if ids else -np.inf)
        return scores

    def _text_score(self, choice: str, units: list[Unit], encoded: dict[str, EncodedImage]) -> float:
        """Mean logarithm of the probabilities of the choice's tokens after the prompt."""
        model = self._model
        last = units[-1]
        after_word = isinstance(last, TokenRun) and model.engine.piece(last.ids[-1]).strip()
        ids = model.tokenizer.plain(f" {choice}" if after_word and not model.engine.spm else choice)
        total = 0.0
        model.cache.prefill(units, encoded)
        for position, token in enumerate(ids):
            total += float(_log_softmax(model.cache.logits())[token])
            if position < len(ids) - 1:
                model.cache.append(token)
        return total / max(1, len(ids))


def _said(generation: Generation, units: Sequence[Unit]) -> Said:
    return Said(generation.text.strip(), _prompt_hash(units), len(generation.ids))


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    scores = logits.astype(np.float64)
    scores -= scores.max()
    result: NDArray[np.float64] = scores - np.log(np.exp(scores).sum())
    return result


def _prompt_hash(units: Sequence[Unit]) -> str:
    parts = [list(unit.ids) if isinstance(unit, TokenRun) else unit.key for unit in units]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
