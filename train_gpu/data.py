"""LLaVA JSON to batches.

Samples of one picture share one reading of it: the prefix up to the image's last token is there once, and each
sample is a branch that sees the prefix and itself. A branch's loss is that of the same sample alone, at a
fraction of the tokens.

Shapes: B rows, S positions of the padded row, I image tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llava_edge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llava_edge.train_gpu.config import DataConfig
    from llava_edge.train_gpu.features import FeatureCache

IGNORE = -100
Ids = tuple[list[int], list[int]]
"""Token ids and labels of the same length; the label is the token itself where the loss counts, else IGNORE."""


class ChatML:
    """The prompt format of nano: prefix, then the image, then each branch. Only answers and stop tokens count."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.start = tokenizer.convert_tokens_to_ids("<|im_start|>")
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.newline = self._plain("\n")
        self.user = [self.start, *self._plain("user\n")]
        self.assistant = [self.end, *self.newline, self.start, *self._plain("assistant\n")]

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def branch(self, sample: dict[str, Any]) -> Ids:
        """All that follows the image: questions, answers, stop tokens."""
        turns = sample["conversations"]
        ids: list[int] = []
        labels: list[int] = []
        for index, turn in enumerate(turns):
            if turn["from"] != ("human", "gpt")[index % 2]:
                raise InputError(f"sample {sample['id']}: turn {index} is from {turn['from']!r}")
            if index % 2 == 0:
                scaffold = [] if index == 0 else [*self.newline, *self.user]
                new = [*scaffold, *self._plain(_question(sample, index)), *self.assistant]
                labels += [IGNORE] * len(new)
            else:
                new = [*self._plain(turn["value"]), self.end]
                labels += new
            ids += new
        self._check(sample, ids)
        return ids, labels

    def _check(self, sample: dict[str, Any], ids: list[int]) -> None:
        """The pieces must give the ids of the whole text: a mismatch would train on a prompt that nobody sends."""
        turns = sample["conversations"]
        text = _question(sample, 0)
        for index in range(1, len(turns)):
            if index % 2:
                text += f"<|im_end|>\n<|im_start|>assistant\n{turns[index]['value']}<|im_end|>"
            else:
                text += f"\n<|im_start|>user\n{turns[index]['value']}"
        whole = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if whole != ids:
            at = next(
                (i for i, (a, b) in enumerate(zip(whole, ids, strict=False)) if a != b), min(len(whole), len(ids))
            )
            around = self.tokenizer.convert_ids_to_tokens(whole[max(0, at - 5) : at + 5])
            raise InputError(f"sample {sample['id']}: tokenised turns and text differ at token {at}, around {around}")


def _question(sample: dict[str, Any], index: int) -> str:
    """The text of a human turn; in the first, what follows the image, its newline included."""
    value: str = sample["conversations"][index]["value"]
    if index:
        return value
    if not value.startswith("<image>\n") or value.count("<image>") != 1:
        raise InputError(f"sample {sample['id']}: the first turn must start with one '<image>' and a newline")
    return value.removeprefix("<image>")


@dataclass(frozen=True)
class Batch:
    """Rows of equal shape. ``seen[b, 0, i, j]`` says whether position i of row b may attend to position j."""

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    seen: torch.Tensor
    features: torch.Tensor
    image_tokens: int
    image_start: int
    names: tuple[str, ...]


def collate(
    prefix: list[int], rows: list[list[Ids]], features: np.ndarray, image_tokens: int, names: list[str]
) -> Batch:
    """Lay prefix, image and branches of each row one after the other and pad to the longest row."""
    head = len(prefix) + image_tokens
    width = max(head + sum(len(ids) for ids, _ in branches) for branches in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORE)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    branch = torch.full((len(rows), width), -1)
    for row, branches in enumerate(rows):
        ids[row, : len(prefix)] = torch.tensor(prefix)
        positions[row, :head] = torch.arange(head)
        branch[row, :head] = 0
        at = head
        for number, (branch_ids, branch_labels) in enumerate(branches, start=1):
            end = at + len(branch_ids)
            ids[row, at:end] = torch.tensor(branch_ids)
            labels[row, at:end] = torch.tensor(branch_labels)
            positions[row, at:end] = torch.arange(head, head + len(branch_ids))
            branch[row, at:end] = number
            at = end
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    same = branch[:, :, None] == branch[:, None, :]
    seen = causal & (same | (branch[:, None, :] == 0))
    return Batch(
        ids, labels, positions, seen[:, None], torch.from_numpy(features), image_tokens, len(prefix), tuple(names)
    )


class Mixture:
    """An endless, seeded stream of batches. Step n is the same batch whenever and wherever it is asked for."""

    def __init__(
        self,
        samples: dict[str, list[dict[str, Any]]],
        features: FeatureCache,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        batch_size: int,
        seed: int,
    ) -> None:
        unknown = set(config.weights) - set(samples)
        if unknown:
            raise InputError(f"data.weights names {sorted(unknown)}; the samples have {sorted(samples)}")
        self.format = ChatML(tokenizer)
        self.prefix = self.format.user
        self.features = features
        self.config = config
        self.batch_size = batch_size
        self.seed = seed
        self.pictures: dict[str, list[tuple[str, list[dict[str, Any]]]]] = {}
        for source in config.weights:
            by_picture: dict[str, list[dict[str, Any]]] = {}
            for sample in samples[source]:
                by_picture.setdefault(sample["image"], []).append(sample)
            self.pictures[source] = list(by_picture.items())

    def batch(self, step: int) -> Batch:
        """The batch of one step."""
        rng = random.Random(f"{self.seed} {step}")
        config = self.config
        tokens = rng.choices(config.image_tokens, config.image_token_weights)[0]
        sources = rng.choices(list(config.weights), list(config.weights.values()), k=self.batch_size)
        rows, names = [], []
        for source in sources:
            name, samples = self.pictures[source][rng.randrange(len(self.pictures[source]))]
            chosen = rng.sample(samples, min(config.branches, len(samples)))
            rows.append([self.format.branch(sample) for sample in chosen])
            names.append(name)
        features = np.stack([self.features[name] for name in names])
        return collate(self.prefix, rows, features, tokens, names)

    def from_step(self, step: int) -> Iterator[Batch]:
        """Batches from a step on."""
        while True:
            yield self.batch(step)
            step += 1
