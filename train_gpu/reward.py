"""Self-critical training: the model writes answers, and those that people's captions agree with become likelier.

Cross-entropy teaches to go on as a person would have, word by word; it never sees what the model itself says when it
is asked. Here it is asked (Rennie et al., "Self-critical sequence training", arXiv 1612.00563): of every picture it
draws several answers, each is scored by CIDEr-D against all captions of that picture, and the logarithm of its
probability is raised in proportion to how far it lies above the mean of the other draws (Luo, arXiv 2003.09971), or
lowered. What is said without being seen costs score, so it is said less.

Shapes: N pictures, R rows of a pass (N times the draws, less those that have ended), S positions, V words.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from llava_edge.cider import CiderD
from llava_edge.errors import InputError
from llava_edge.train_gpu.pictures import stack
from llava_edge.train_gpu.prompts import IGNORE, Tokens
from llava_edge.train_gpu.rows import Document, make_document

if TYPE_CHECKING:
    from llava_edge.train_gpu.config import RewardConfig
    from llava_edge.train_gpu.data import Drawn, Mixture, Step
    from llava_edge.train_gpu.engine import Engine
    from llava_edge.train_gpu.samples import Sample

# Stands behind captions that end, as a word of its own: else "a man in a", which breaks off, would score well.
_END = " endofcaption"


class SelfCritic:
    """Makes the steps of a run in which some sources are rewarded; the others are trained on as ever.

    Raises
    ------
    InputError
        A source isn't there or has too few pictures, or several processes share the run.
    """

    def __init__(self, config: RewardConfig, mixture: Mixture, engine: Engine, seed: int) -> None:
        unknown = sorted(set(config.sources) - set(mixture.items))
        if unknown:
            raise InputError(f"reward.sources names {unknown}; the data has {sorted(mixture.items)}")
        if engine.world > 1:
            raise InputError(f"a run with [reward] is one process; there are {engine.world}")
        self.config = config
        self.mixture = mixture
        self.engine = engine
        self.seed = seed
        self.scorers = {name: CiderD([_references(item) for item in mixture.items[name]]) for name in config.sources}
        for name in config.sources:
            if len(mixture.items[name]) < 2:
                raise InputError(f"reward: the source {name!r} has one picture; how rare a word is takes at least two")

    def step(self, number: int) -> tuple[Step, float | None]:
        """A step, and the mean score of what the model wrote for it (None if nothing was rewarded)."""
        mixture = self.mixture
        drawn = mixture.drawn(number)
        asked = [one for one in drawn if one.source in self.scorers]
        documents, truncated = mixture.documents_of([one for one in drawn if one.source not in self.scorers], number)
        rewarded, score = self._rewarded(asked, number) if asked else ([], None)
        return mixture.to_step([*rewarded, *documents], number, truncated), score

    def _rewarded(self, asked: Sequence[Drawn], number: int) -> tuple[list[Document], float]:
        """The model's answers as documents, weighted by what they are worth, and their mean score."""
        mixture, draws = self.mixture, self.config.draws
        image_tokens = mixture.image_tokens(number)
        samples = [random.Random(f"{mixture.seed} draw {one.draw}").choice(one.item) for one in asked]
        prompts = [mixture.prompt(sample) for sample in samples]
        answers = self._write(samples, prompts, image_tokens, number)
        scores = torch.tensor([
            [self._score(one, answer) for answer in answers[row * draws : (row + 1) * draws]]
            for row, one in enumerate(asked)
        ])  # fmt: skip
        others = (scores.sum(dim=1, keepdim=True) - scores) / (draws - 1)
        advantage = scores - others
        advantage = self.config.weight * advantage / advantage.square().mean().sqrt().clamp(min=1e-6)
        documents = []
        for row, (sample, prompt) in enumerate(zip(samples, prompts, strict=True)):
            every = [
                Tokens(prompt + answer, [IGNORE] * len(prompt) + answer)
                for answer in answers[row * draws : (row + 1) * draws]
            ]
            name = f"{sample.pictures[0].name} x {draws}"
            documents.append(make_document(
                every, sample.pictures, name, mixture.renderer.image_token, image_tokens, advantage[row].tolist()
            ))  # fmt: skip
        return documents, float(scores.mean())

    def _score(self, one: Drawn, answer: list[int]) -> float:
        renderer = self.mixture.renderer
        text = renderer.tokenizer.decode(answer)
        before, stop, _ = text.partition(renderer.stop)
        return self.scorers[one.source].score(before + _END if stop else text, _references(one.item))

    @torch.no_grad()
    def _write(
        self, samples: Sequence[Sample], prompts: Sequence[list[int]], image_tokens: int, number: int
    ) -> list[list[int]]:
        """``draws`` answers to each prompt, one behind the other, with the token that ends them."""
        trainee, config, renderer = self.engine.trainee, self.config, self.mixture.renderer
        device = self.engine.device
        generator = torch.Generator(device).manual_seed(random.Random(f"{self.seed} answers {number}").getrandbits(62))
        spread = [
            [token for id_ in prompt for token in [id_] * (image_tokens if id_ == renderer.image_token else 1)]
            for prompt in prompts
        ]
        width = max(map(len, spread))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in spread], device=device)
        known = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in spread], device=device)
        pictures = stack([self.mixture.pictures.load(p) for sample in samples for p in sample.pictures]).to(device)
        was_training = trainee.training
        trainee.eval()
        try:
            logits, cache = trainee.prefill(ids, known, pictures, self.mixture.pictures.are_features, image_tokens)
            cache.batch_repeat_interleave(config.draws)
            logits, known = (x.repeat_interleave(config.draws, dim=0) for x in (logits, known))
            answers: list[list[int]] = [[] for _ in range(len(samples) * config.draws)]
            rows = list(range(len(answers)))
            for place in range(config.max_tokens):
                logits[:, renderer.image_token] = -torch.inf  # in an answer it would stand for a picture
                chances = torch.softmax(logits / config.temperature, dim=-1)
                said = torch.multinomial(chances, 1, generator=generator)[:, 0]
                for row, token in zip(rows, said.tolist(), strict=True):
                    answers[row].append(token)
                going = [i for i, row in enumerate(rows) if not self._ended(answers[row])]
                if not going or place + 1 == config.max_tokens:
                    break
                if len(going) < len(rows):
                    kept = torch.tensor(going, device=device)
                    cache.batch_select_indices(kept)
                    said, known, rows = said[kept], known[kept], [rows[i] for i in going]
                known = torch.cat([known, known.new_ones(len(rows), 1)], dim=1)
                logits = trainee.go_on(said, known, cache)
        finally:
            trainee.train(was_training)
        return answers

    def _ended(self, answer: list[int]) -> bool:
        renderer = self.mixture.renderer
        return answer[-1] == renderer.tokenizer.eos_token_id or renderer.stop in renderer.tokenizer.decode(answer[-8:])


def _references(item: Sequence[Sample]) -> list[str]:
    return [sample.turns[0][1] + _END for sample in item]
