"""Where the projector starts: visual tokens that lie near the embeddings of the words that pictures are spoken of with.

A projector from random numbers costs the language model thousands of forward and backward passes before it says
anything about the picture. Here the projector first learns, without the language model, to predict the words of a
picture's answers: token i says word w with a probability softmax(v_i . E_w + b_w) over the LLM's own embedding rows
E_w, and a picture says what its tokens say on average. b_w takes up how frequent a word is, so that v_i need not.

Shapes: N pictures, I image tokens, F width of the features, D width of the LLM, W words.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from llava_edge.train_gpu.datagen.symbols import word_set, words
from llava_edge.train_gpu.features import through_blocks, used_blocks
from llava_edge.train_gpu.model import fold_standardisation, pool_tokens, unfold_standardisation
from llava_edge.train_gpu.precision import has_bfloat16

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

    from llava_edge.train_gpu.features import FeatureCache

log = logging.getLogger(__name__)

STOP_WORDS = word_set(
    "a an the is are it its this that there of in on at to with and or no not yes one by from for picture shows his "
    "her their while he she they as more exactly kind be up into out off over animal image photo"
)


def picture_words(samples: Sequence[dict[str, Any]]) -> dict[str, Counter[str]]:
    """How often each word is said of each picture, over the answers that affirm something."""
    said: dict[str, Counter[str]] = {}
    for sample in samples:
        counter = said.setdefault(sample["image"], Counter())
        for turn in sample["conversations"]:
            if turn["from"] == "gpt" and words(turn["value"][:3]) != {"no"}:
                counter.update(words(turn["value"]) - STOP_WORDS)
    return said


def word_targets(
    said: dict[str, Counter[str]], tokenizer: PreTrainedTokenizerBase, least: int = 3
) -> tuple[list[int], torch.Tensor]:
    """Token ids of the words ``[W]`` and what each picture should say, ``[N, W]``, every row adding up to 1.

    Rare words weigh more (inverse document frequency); a word of several tokens stands for each of them.
    """
    pieces = {w: set(tokenizer(f" {w}", add_special_tokens=False)["input_ids"]) for c in said.values() for w in c}
    weights = [Counter({t: n for word, n in counter.items() for t in pieces[word]}) for counter in said.values()]
    pictures = Counter(token for counter in weights for token in counter)
    ids = sorted(token for token, count in pictures.items() if count >= least)
    column = {token: index for index, token in enumerate(ids)}
    target = torch.zeros(len(weights), len(ids))
    for row, counter in enumerate(weights):
        for token, count in counter.items():
            if token in column:
                target[row, column[token]] = count * math.log(len(weights) / pictures[token])
    return ids, target / target.sum(dim=1, keepdim=True).clamp(min=1e-6)


class WordReader(nn.Module):
    """Reads words off visual tokens; only its bias is trained beside the projector."""

    def __init__(self, embeddings: torch.Tensor) -> None:
        super().__init__()
        self.embeddings: torch.Tensor
        self.register_buffer("embeddings", embeddings.float())
        self.bias = nn.Parameter(torch.zeros(len(embeddings)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probability of each word, ``[B, I, D]`` to ``[B, W]``."""
        said = torch.log_softmax((tokens @ self.embeddings.T).float() + self.bias, dim=-1)  # [B, I, W]
        return torch.logsumexp(said, dim=1) - math.log(tokens.shape[1])


def align_words(
    model: LlavaForConditionalGeneration,
    cache: FeatureCache,
    samples: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_tokens: int = 16,
    epochs: int = 10,
    batch_size: int = 128,
    lr: float = 1e-3,
    tower_lr: float = 1e-4,
    seed: int = 0,
) -> None:
    """Train the projector of ``model`` in place, and the blocks of its tower that ``cache`` leaves to be run.

    The features are pooled to ``image_tokens`` before the projector here, which costs a fraction of pooling behind it.
    """
    said = {name: counter for name, counter in picture_words(samples).items() if counter}
    ids, target = word_targets(said, tokenizer)
    names = list(said)
    table = model.get_input_embeddings().weight.detach()
    reader = WordReader(table[ids])
    norm = float(reader.embeddings.norm(dim=-1).mean())
    tower = model.model.vision_tower
    blocks = used_blocks(tower, model.config)[-cache.blocks :] if cache.blocks else []
    tower_parameters = [p for block in blocks for p in block.requires_grad_(True).parameters()]
    projector = model.model.multi_modal_projector.float().train()
    mean, std = cache.statistics(tower, model.config)
    unfold_standardisation(projector, mean, std)  # the optimiser likes unit inputs
    groups: list[dict[str, Any]] = [{"params": [*projector.parameters(), *reader.parameters()], "lr": lr}]
    if tower_parameters:
        groups.append({"params": tower_parameters, "lr": tower_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    total = epochs * math.ceil(len(names) / batch_size)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=total, pct_start=0.1)
    log.info("%d words of %d pictures", len(ids), len(names))
    pooled = None if blocks else pooled_features(cache, names, image_tokens)
    for epoch in range(epochs):
        losses = []
        for batch in torch.split(torch.randperm(len(names), generator=generator), batch_size):
            with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16("cpu")):
                if pooled is not None:
                    features = pooled[batch].float()
                else:
                    states = torch.from_numpy(np.stack([cache[names[row]] for row in batch.tolist()])).float()
                    features = pool_tokens(through_blocks(tower, model.config, states, cache.blocks), image_tokens)
                visual = projector((features.float() - mean) / std)
                loss = -(target[batch] * reader(visual)).sum(dim=-1).mean()
            loss = loss + 0.1 * ((visual.float().norm(dim=-1) / norm - 1) ** 2).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        log.info("words: epoch %d of %d, loss %.3f", epoch + 1, epochs, sum(losses) / len(losses))
    fold_standardisation(projector, mean, std)
    model.requires_grad_(False)
    projector.eval()


def pooled_features(cache: FeatureCache, names: Sequence[str], tokens: int) -> torch.Tensor:
    """``float16 [N, tokens, F]``."""
    parts = []
    for start in range(0, len(names), 256):
        block = np.stack([cache[name] for name in names[start : start + 256]])
        parts.append(pool_tokens(torch.from_numpy(block).float(), tokens).half())
    return torch.cat(parts)
