"""Learning from what the model draws itself: self-critical sequence training.

At each step the model draws a few captions of some training pictures. Those that agree with people's captions better
than the picture's other draws are made more likely, the others less (Rennie et al., CVPR 2017, arXiv 1612.00563, with
the mean of a picture's other draws as the baseline: Luo 2020, arXiv 2003.09971). What agreement is, the caller's score
says; for captions it is CIDEr-D.

Nothing here keeps a state: a step's pictures and draws follow from the seed and the step's number.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llava_edge.errors import InputError
from llava_edge.train_gpu.drawing import Score
from llava_edge.train_gpu.prompts import IGNORE, Tokens
from llava_edge.train_gpu.rows import make_document
from llava_edge.train_gpu.samples import Asked, PictureRef, Sample, pictures_folder, read_asked, read_json

if TYPE_CHECKING:
    from llava_edge.train_gpu.config import Recipe
    from llava_edge.train_gpu.data import Mixture
    from llava_edge.train_gpu.model import Trainee
    from llava_edge.train_gpu.rows import Batch, Document

MakeScore = Callable[[Sequence[Sequence[str]]], Score]
"""A score, made from people's captions of every picture."""

_SMALL = 1e-6


class SelfCritical:
    """The draws of each step, as batches from whose loss the model learns to score better.

    The loss is a draw's mean over its tokens, so that short and long ones count alike.

    Parameters
    ----------
    make_score
        It is called with people's captions of every picture that is drawn from.
    """

    def __init__(self, recipe: Recipe, mixture: Mixture, make_score: MakeScore) -> None:
        assert recipe.reward is not None
        assert recipe.data.samples is not None
        self.config = recipe.reward
        self.seed = recipe.seed
        self.mixture = mixture
        self.renderer = mixture.renderer
        self.end = self._end()
        tokenizer = self.renderer.tokenizer
        self.special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        asked = read_asked(read_json(Path(recipe.data.samples)), self.config.source, self.config.references)
        self.images = pictures_folder(recipe.data)
        self.score = make_score([one.references for one in asked])
        self.by_question: dict[str, list[Asked]] = {}
        for one in asked:
            self.by_question.setdefault(one.question, []).append(one)
        self.steps_in_pass = len(self._order(0))

    def _end(self) -> int:
        ids = self.renderer.tokenizer(self.renderer.stop, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise InputError(f"reward needs a format whose answers end in one token; this one has {len(ids)}")
        return int(ids[0])

    def _order(self, number: int) -> list[list[Asked]]:
        """The pictures of each step of a pass through all of them: at most as many as it takes, of one question."""
        rng = random.Random(f"{self.seed} reward {number}")
        size = self.config.pictures
        steps = []
        for group in self.by_question.values():
            shuffled = rng.sample(group, len(group))
            steps += [shuffled[first : first + size] for first in range(0, len(group), size)]
        rng.shuffle(steps)
        return steps

    def draw(self, trainee: Trainee, step: int) -> tuple[list[Batch], float]:
        """What a step learns from, and the mean score of its draws.

        The sum of the batches' losses is ``reward.weight`` times the mean over the draws of each one's advantage (see
        :func:`advantages`) times the mean surprise of its tokens at ``reward.temperature``.
        """
        number, place = divmod(step, self.steps_in_pass)
        asked, tokens = self._order(number)[place], self.mixture.image_tokens(step)
        prompt = self.renderer.prompt(Sample(asked[0].picture, ((asked[0].question, "?"),)))
        drawn = self._draw(trainee, asked, prompt, tokens, random.Random(f"{self.seed} draws {step}").getrandbits(31))
        scores = [
            [self._score(answer, one.references) for answer in answers]
            for one, answers in zip(asked, drawn, strict=True)
        ]
        documents = self._documents(asked, drawn, advantages(scores), prompt, tokens)
        batches = self.mixture.batches(documents, tokens) if documents else []
        mean = statistics.fmean(score for each in scores for score in each)
        return [replace(batch, temperature=self.config.temperature) for batch in batches], mean

    def _document(self, one: Asked, samples: Sequence[Tokens], tokens: int) -> Document:
        pictures = (PictureRef(one.picture, self.images / one.picture),)
        return make_document(samples, pictures, one.picture, self.renderer.image_token, tokens)

    def _draw(
        self, trainee: Trainee, asked: Sequence[Asked], prompt: list[int], tokens: int, seed: int
    ) -> list[list[list[int]]]:
        unanswered = [Tokens(prompt, [IGNORE] * len(prompt))]
        rows = [[self._document(one, unanswered, tokens)] for one in asked]
        batch = self.mixture.batch(rows, tokens).to(trainee.feature_shift.device)
        generator = torch.Generator(batch.ids.device).manual_seed(seed)
        training = trainee.training
        trainee.eval()
        try:
            return trainee.draw(
                batch, self.config.draws, temperature=self.config.temperature, max_tokens=self.config.max_tokens,
                end=self.end, never=self.renderer.image_token, generator=generator,
            )  # fmt: skip
        finally:
            trainee.train(training)

    def _score(self, answer: Sequence[int], references: Sequence[str]) -> float:
        """The score of an answer; one that was cut off has none, nor one with a special token, which text hides."""
        if answer[-1] != self.end or not self.special.isdisjoint(answer[:-1]):
            return 0.0
        return self.score(self.renderer.tokenizer.decode(answer, skip_special_tokens=True).strip(), references)

    def _documents(
        self,
        asked: Sequence[Asked],
        drawn: Sequence[Sequence[Sequence[int]]],
        gains: Iterable[Sequence[float]],
        prompt: list[int],
        tokens: int,
    ) -> list[Document]:
        documents, unit = [], self.config.weight / (len(asked) * self.config.draws)
        for one, answers, of_answers in zip(asked, drawn, gains, strict=True):
            summed: dict[tuple[int, ...], float] = {}
            for answer, gain in zip(answers, of_answers, strict=True):
                summed[tuple(answer)] = summed.get(tuple(answer), 0.0) + gain
            samples = [
                Tokens(prompt + list(answer), [IGNORE] * len(prompt) + list(answer), gain * unit / len(answer))
                for answer, gain in summed.items()
                if abs(gain) > _SMALL
            ]
            if samples:
                documents.append(self._document(one, samples, tokens))
        return documents


def advantages(scores: Sequence[Sequence[float]]) -> Iterator[list[float]]:
    """Of each picture's draws: the score less the mean of the others', over the scores' deviation from these means.

    ``scores`` has as many draws, two or more, of each picture.
    """
    gains = [[(score - sum(each) / len(each)) * len(each) / (len(each) - 1) for score in each] for each in scores]
    deviation = statistics.pstdev([gain for each in gains for gain in each])
    for each in gains:
        yield [gain / deviation if deviation > _SMALL else 0.0 for gain in each]
