"""Captions that a model draws itself, of which those are kept that agree best with people's.

One round of rejection sampling: training on what is kept moves a captioner towards what people agree on (RAFT, arXiv
2304.06767, with a score of captions in place of the reward model). What agreement is, the caller's score says.

Shapes: N pictures, S positions, D width of the LLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_edge.train_gpu.build import load_model, load_tokenizer
from llava_edge.train_gpu.datagen.generate import Progress, conversation
from llava_edge.train_gpu.drawing import Score, draw_answers
from llava_edge.train_gpu.features import FeatureCache, through_blocks
from llava_edge.train_gpu.model import pool_tokens
from llava_edge.train_gpu.precision import has_bfloat16
from llava_edge.train_gpu.prompts import Renderer
from llava_edge.train_gpu.samples import Asked, Sample


@dataclass
class Statistics:
    """Pictures, captions drawn and kept, and the sums of their scores."""

    pictures: int = 0
    drawn: int = 0
    kept: int = 0
    drawn_score: float = 0.0
    kept_score: float = 0.0
    samples: list[dict[str, Any]] = field(default_factory=list)


class Drawer:
    """A checkpoint that answers questions about cached pictures at random.

    Parameters
    ----------
    checkpoint
        A LLaVA that transformers loads.
    features
        A cache of its pictures' features.
    prompt_format
        The name of the conversation's format, as in a recipe.
    image_tokens
        Tokens of a picture, to which the grid is pooled.
    seed
        Of the draws.
    bf16
        Compute in bfloat16; None is where the CPU has instructions for it.
    """

    def __init__(
        self,
        checkpoint: Path,
        features: Path,
        prompt_format: str,
        image_tokens: int,
        seed: int,
        *,
        bf16: bool | None = None,
    ) -> None:
        self._model = load_model(str(checkpoint)).eval().requires_grad_(False)
        self._features = FeatureCache(features)
        self._tower = self._model.model.vision_tower.float()
        self._projector = self._model.model.multi_modal_projector.float()
        bf16 = has_bfloat16("cpu") if bf16 is None else bf16
        self._llm = self._model.model.language_model.to(torch.bfloat16 if bf16 else torch.float32)
        self._head = self._model.lm_head.to(self._llm.dtype)
        self._tokenizer = load_tokenizer(str(checkpoint))
        self._renderer = Renderer(self._tokenizer, prompt_format, self._model.config.image_token_id)
        self._image_tokens = image_tokens
        self._random = torch.Generator().manual_seed(seed)

    @torch.inference_mode()
    def draw(
        self, question: str, pictures: Sequence[str], count: int, temperature: float, max_tokens: int
    ) -> list[list[str]]:
        """``count`` answers to a question with ``<image>`` about each of the pictures."""
        drawn = draw_answers(
            self._llm, self._head, self._prompt(question, pictures), count,
            temperature=temperature, max_tokens=max_tokens, end=self._tokenizer.eos_token_id,
            never=self._renderer.image_token, generator=self._random,
        )  # fmt: skip
        return [[self._text(answer) for answer in answers] for answers in drawn]

    def _text(self, answer: list[int]) -> str:
        """What an answer says; nothing, if it was cut off."""
        if answer[-1] != self._tokenizer.eos_token_id:
            return ""
        text: str = self._tokenizer.decode(answer, skip_special_tokens=True)
        return text.strip()

    def _prompt(self, question: str, pictures: Sequence[str]) -> torch.Tensor:
        """What the LLM reads, ``[N, S, D]``."""
        ids = self._renderer.prompt(Sample("?", ((question, "?"),)))
        before, after = ids[: ids.index(self._renderer.image_token)], ids[ids.index(self._renderer.image_token) + 1 :]
        features = torch.from_numpy(np.stack([self._features[name] for name in pictures])).float()
        if self._features.blocks:
            features = through_blocks(self._tower, self._model.config, features, self._features.blocks)
        images = pool_tokens(self._projector(features), self._image_tokens).to(self._llm.dtype)
        embed = self._llm.get_input_embeddings()
        texts = [embed(torch.tensor(part))[None].expand(len(pictures), -1, -1) for part in (before, after)]
        return torch.cat([texts[0], images, texts[1]], dim=1)


def draw_all(
    drawer: Drawer,
    asked: Sequence[Asked],
    progress: Progress,
    *,
    count: int,
    temperature: float,
    max_tokens: int = 32,
    batch_size: int = 48,
) -> Iterator[int]:
    """Draw ``count`` captions of each picture that ``progress`` lacks. Yields how many it has, after each batch."""
    by_question: dict[str, list[Asked]] = {}
    for one in asked:
        if one.picture not in progress.done:
            by_question.setdefault(one.question, []).append(one)
    yield len(progress.done)
    for question, group in by_question.items():
        for first in range(0, len(group), batch_size):
            names = [one.picture for one in group[first : first + batch_size]]
            drawn = drawer.draw(question, names, count, temperature, max_tokens)
            for name, texts in zip(names, drawn, strict=True):
                progress.add({"image": name, "texts": texts})
            yield len(progress.done)


def best_captions(
    asked: Sequence[Asked], progress: Progress, score: Score, keep: int, min_score: float = 0.0
) -> Statistics:
    """Of what was drawn, the ``keep`` best of each picture that differ and have ``min_score`` or more, as samples."""
    statistics = Statistics()
    for one in asked:
        texts = progress.done[one.picture]["texts"]
        scores = {text: score(text, one.references) for text in texts if text}
        best = [text for text in sorted(scores, key=lambda text: -scores[text])[:keep] if scores[text] >= min_score]
        statistics.pictures += 1
        statistics.drawn += len(texts)
        statistics.drawn_score += sum(scores.get(text, 0.0) for text in texts)
        statistics.kept += len(best)
        statistics.kept_score += sum(scores[text] for text in best)
        for number, text in enumerate(best):
            said = conversation([(one.question, text)])
            statistics.samples.append({"id": f"{one.picture}#{number}", "image": one.picture, "conversations": said})
    return statistics
