"""Answers drawn at random from the language model, and what judges them.

Shapes: N prompts, C answers of each, S positions, D width of the LLM, V its vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

Score = Callable[[str, Sequence[str]], float]
"""How well a caption agrees with what people say of the picture; more is better."""

# Leaving rows out of the KV cache copies it.
_WORTH_KEEPING = 0.7


@torch.no_grad()
def draw_answers(
    llm: nn.Module,
    head: nn.Module,
    prompts: torch.Tensor,
    count: int,
    *,
    temperature: float,
    max_tokens: int,
    end: int,
    never: int,
    generator: torch.Generator,
) -> list[list[list[int]]]:
    """``count`` answers to each of the prompts ``[N, S, D]``, as token ids.

    An answer has at most ``max_tokens`` of them; one that isn't cut off there has ``end`` as its last. ``never`` is a
    token that is not drawn: the one that stands for pictures.
    """
    out = llm(inputs_embeds=prompts, use_cache=True)
    cache = out.past_key_values
    cache.batch_repeat_interleave(count)
    logits = head(out.last_hidden_state[:, -1]).repeat_interleave(count, dim=0)  # [N * C, V]
    answers: list[list[int]] = [[] for _ in range(len(prompts) * count)]
    rows, ended = list(range(len(answers))), set[int]()  # the answers that the cache's rows belong to
    embed = llm.get_input_embeddings()  # type: ignore[operator]
    for _ in range(max_tokens):
        logits[:, never] = -torch.inf
        tokens = _draw_tokens(logits.float() / temperature, generator)
        for answer, token in zip(rows, tokens[:, 0].tolist(), strict=True):
            if answer not in ended:
                answers[answer].append(token)
                if token == end:
                    ended.add(answer)
        if len(ended) == len(answers):
            break
        on = [row for row, answer in enumerate(rows) if answer not in ended]
        if len(on) < _WORTH_KEEPING * len(rows):
            cache.batch_select_indices(torch.tensor(on, device=tokens.device))
            rows, tokens = [rows[row] for row in on], tokens[on]
        out = llm(inputs_embeds=embed(tokens), past_key_values=cache, use_cache=True)
        logits = head(out.last_hidden_state[:, -1])
    return [answers[first : first + count] for first in range(0, len(answers), count)]


def _draw_tokens(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A token of each row ``[N, 1]``. torch.multinomial draws a random number for every word, which takes longer."""
    sums = torch.softmax(logits, dim=-1).cumsum(dim=-1)
    places = torch.rand(len(sums), 1, generator=generator, device=sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, places, right=True).clamp(max=sums.shape[1] - 1)
