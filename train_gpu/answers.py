"""What the model says in between to a fixed set of questions, by which a person sees it learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llava_edge.train_gpu.data import place_picture
from llava_edge.train_gpu.pictures import stack
from llava_edge.train_gpu.prompts import IGNORE
from llava_edge.train_gpu.rows import Document, collate

if TYPE_CHECKING:
    from llava_edge.train_gpu.config import Recipe
    from llava_edge.train_gpu.data import Mixture
    from llava_edge.train_gpu.engine import Engine
    from llava_edge.train_gpu.prompts import Renderer
    from llava_edge.train_gpu.samples import Sample


@dataclass(frozen=True)
class _Question:
    sample: Sample
    ids: list[int]
    pictures: torch.Tensor


class DevSet:
    """Samples whose first questions are asked greedily."""

    def __init__(self, samples: list[Sample], recipe: Recipe, renderer: Renderer, mixture: Mixture) -> None:
        assert recipe.dev is not None
        self.renderer = renderer
        self.max_tokens = recipe.dev.max_tokens
        # One count of visual tokens, so that answers of different steps can be compared.
        self.image_tokens = max(recipe.data.image_tokens, default=mixture.grid_tokens)
        self.pictures = mixture.pictures
        self.questions = [self._question(place_picture(sample)) for sample in samples]

    def _question(self, sample: Sample) -> _Question:
        ids: list[int] = []
        for token in self.renderer.prompt(sample):
            ids += [token] * (self.image_tokens if token == self.renderer.image_token else 1)
        arrays = [self.pictures.load(picture) for picture in sample.pictures] or [self.pictures.blank()]
        return _Question(sample, ids, stack(arrays))

    @torch.no_grad()
    def ask(self, engine: Engine) -> list[dict[str, str]]:
        """Question, answer and the answer expected, of each sample. Every process takes part."""
        training = engine.forward.training
        engine.forward.eval()
        try:
            return [self._ask(engine, question) for question in self.questions]
        finally:
            engine.forward.train(training)

    def _ask(self, engine: Engine, question: _Question) -> dict[str, str]:
        ids: list[int] = []
        ends = {self.renderer.tokenizer.eos_token_id}
        text = ""
        for _ in range(self.max_tokens):
            every = question.ids + ids
            document = Document(
                every, [IGNORE] * len(every), list(range(len(every))), [0] * len(every),
                question.sample.pictures, question.sample.id,
            )  # fmt: skip
            batch = collate([[document]], question.pictures, self.pictures.are_features, self.image_tokens)
            token = int(engine.forward(batch.to(engine.device), predict=True)[0].argmax())
            ids.append(token)
            text = self.renderer.tokenizer.decode(ids)
            if token in ends or self.renderer.stop in text:
                break
        answer = text.split(self.renderer.stop)[0].strip()
        asked, expected = question.sample.turns[0]
        return {"id": question.sample.id, "question": asked, "answer": answer, "expected": expected}
