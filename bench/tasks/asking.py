"""Ask a model one question after the other, each as a conversation of its own.

The KV cache keeps the longest common beginning of two prompts, so that questions on one picture that follow each other
cost one reading of it.
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
from llava_edge.types import SamplingParams

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llava_edge.bench.tasks.samples import Sample
    from llava_edge.bench.tasks.task import Task
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

    def answer(self, task: Task, sample: Sample) -> Said:
        """Ask as the sample wants it: choose among its choices, or write."""
        if sample.choices:
            return self.choose(sample.question, sample.image, sample.choices, task.choose_by)
        return self.say(sample.question, sample.image, max_tokens=task.max_tokens)

    def say(self, question: str, image: Path | None, *, max_tokens: int) -> Said:
        """Let the model write an answer of at most ``max_tokens``."""
        model = self._model
        units, _ = self._read(question, image)
        generation = Generation()
        loop = model.token_loop(generation, Sampler(SamplingParams()), max_tokens)
        for _ in generate(loop, model.cache):
            pass
        return Said(generation.text.strip(), _prompt_hash(units), len(generation.ids))

    def choose(self, question: str, image: Path | None, choices: Sequence[str], by: ChoiceBy) -> Said:
        """Choose by probability: of the choice's letter after the prompt (one forward pass, whatever the number of
        choices), or of the choice's own tokens, as their mean logarithm. Nothing is generated.
        """
        units, encoded = self._read(question, image)
        if by == "letter":
            scores = self._letter_scores(len(choices))
        else:
            scores = [self._text_score(choice, units, encoded) for choice in choices]
        best = int(np.argmax(scores))
        return Said(choices[best], _prompt_hash(units), 0, tuple(round(score, 6) for score in scores))

    def _read(self, question: str, image: Path | None) -> tuple[list[Unit], dict[str, EncodedImage]]:
        """Evaluate a prompt, up to the logits of the answer's first token."""
        model = self._model
        if not self._share:
            model.forget()
            self._opened = None
        encoded = {}
        refs = []
        if image is not None:
            picture = model.encode(self._open(image))
            encoded, refs = {picture.key: picture}, [ImageRef(picture.key)]
        units = model.tokenizer.units(model.format.turn(0, refs, question, self._system))
        model.cache.prefill(units, encoded)
        return units, encoded

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


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    scores = logits.astype(np.float64)
    scores -= scores.max()
    result: NDArray[np.float64] = scores - np.log(np.exp(scores).sum())
    return result


def _prompt_hash(units: Sequence[Unit]) -> str:
    parts = [list(unit.ids) if isinstance(unit, TokenRun) else unit.key for unit in units]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
