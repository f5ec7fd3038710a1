"""Captions that a model draws itself, of which those are kept that agree best with people's.

One round of rejection sampling: training on what is kept moves a captioner towards what people agree on (RAFT, arXiv
2304.06767, with a score of captions in place of the reward model). What agreement is, the caller's score says.

Shapes: N pictures, C captions of each, S positions, D width of the LLM, V its vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_edge.errors import InputError
from llava_edge.train_gpu.build import load_model, load_tokenizer
from llava_edge.train_gpu.datagen.generate import Progress
from llava_edge.train_gpu.features import FeatureCache
from llava_edge.train_gpu.model import pool_tokens
from llava_edge.train_gpu.precision import has_bfloat16
from llava_edge.train_gpu.prompts import IMAGE, Renderer
from llava_edge.train_gpu.samples import Sample, from_llava

# Leaving rows out of the KV cache copies it.
_WORTH_KEEPING = 0.7

Score = Callable[[str, Sequence[str]], float]
"""How well a caption agrees with what people say of the picture; more is better."""


@dataclass(frozen=True)
class Asked:
    """A picture, by its name, the question to it, with ``<image>``, and people's captions."""

    picture: str
    question: str
    references: tuple[str, ...]


@dataclass
class Statistics:
    """Pictures, captions drawn and kept, and the sums of their scores."""

    pictures: int = 0
    drawn: int = 0
    kept: int = 0
    drawn_score: float = 0.0
    kept_score: float = 0.0
    samples: list[dict[str, Any]] = field(default_factory=list)


def read_asked(values: Any, source: str, references: str) -> list[Asked]:
    """The pictures of ``source`` with its first question to each, and the answers that ``references`` has of them.

    ``values`` are LLaVA samples by source, as ``data.samples`` of a recipe names them.

    Raises
    ------
    InputError
        There is no such source, or it has no picture with two captions.
    """
    if not isinstance(values, dict) or not {source, references} <= set(values):
        found = sorted(values) if isinstance(values, dict) else "no sources"
        raise InputError(f"the samples have {found}; expected {source!r} and {references!r}")
    said: dict[str, list[str]] = {}
    for name, _, answer in _first_turns(values[references]):
        said.setdefault(name, []).append(answer)
    questions: dict[str, str] = {}
    for name, question, _ in _first_turns(values[source]):
        questions.setdefault(name, question)
    asked = [
        Asked(name, question, tuple(said[name])) for name, question in questions.items() if len(said.get(name, ())) > 1
    ]
    if not asked:
        raise InputError(f"no picture of {source!r} has two captions or more in {references!r}")
    return asked


def _first_turns(items: Iterable[Any]) -> Iterator[tuple[str, str, str]]:
    """Picture, first question and first answer of each sample that has one picture."""
    for item in items:
        sample = from_llava(item, Path())
        if len(sample.pictures) == 1:
            yield sample.pictures[0].name, *sample.turns[0]


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
        if self._features.blocks:
            raise InputError(f"the features in {features} leave {self._features.blocks} blocks of the tower to be run")
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
        prompt = self._prompt(question, pictures)
        out = self._llm(inputs_embeds=prompt, use_cache=True)
        cache = out.past_key_values
        cache.batch_repeat_interleave(count)
        logits = self._head(out.last_hidden_state[:, -1]).repeat_interleave(count, dim=0)  # [N * C, V]
        answers: list[list[int]] = [[] for _ in range(len(pictures) * count)]
        rows, ended = list(range(len(answers))), set[int]()  # the answers that the cache's rows belong to
        embed = self._llm.get_input_embeddings()
        for _ in range(max_tokens):
            chances = torch.softmax(logits.float() / temperature, dim=-1)
            tokens = torch.multinomial(chances, 1, generator=self._random)
            for answer, token in zip(rows, tokens[:, 0].tolist(), strict=True):
                if token == self._tokenizer.eos_token_id:
                    ended.add(answer)
                elif answer not in ended:
                    answers[answer].append(token)
            if len(ended) == len(answers):
                break
            on = [row for row, answer in enumerate(rows) if answer not in ended]
            if len(on) < _WORTH_KEEPING * len(rows):
                cache.batch_select_indices(torch.tensor(on))
                rows, tokens = [rows[row] for row in on], tokens[on]
            out = self._llm(inputs_embeds=embed(tokens), past_key_values=cache, use_cache=True)
            logits = self._head(out.last_hidden_state[:, -1])
        texts = [text.strip() for text in self._tokenizer.batch_decode(answers, skip_special_tokens=True)]
        texts = [text if answer in ended else "" for answer, text in enumerate(texts)]
        return [texts[first : first + count] for first in range(0, len(texts), count)]

    def _prompt(self, question: str, pictures: Sequence[str]) -> torch.Tensor:
        """What the LLM reads, ``[N, S, D]``."""
        ids = self._renderer.prompt(Sample("?", ((question, "?"),)))
        before, after = ids[: ids.index(self._renderer.image_token)], ids[ids.index(self._renderer.image_token) + 1 :]
        features = torch.from_numpy(np.stack([self._features[name] for name in pictures])).float()
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
        if one.question.count(IMAGE) != 1:
            raise InputError(f"the question {one.question!r} has no single {IMAGE}")
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
            turns = [{"from": "human", "value": one.question}, {"from": "gpt", "value": text}]
            statistics.samples.append({"id": f"{one.picture}#{number}", "image": one.picture, "conversations": turns})
    return statistics
