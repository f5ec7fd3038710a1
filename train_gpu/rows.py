"""Samples to rows of tokens: documents, packing, and the tensors of a batch.

A document is one sample, or several of one picture that share a reading of it: what they all begin with, at least up
to the picture's last token, is there once, and each sample is a branch that sees that prefix and itself. A branch's
loss is that of the same sample alone. Packing lays documents one after the other in a row; none sees another.

Shapes: B rows, S positions of the padded row, N pictures, I tokens of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from llava_edge.errors import InputError
from llava_edge.train_gpu.prompts import IGNORE, Tokens

if TYPE_CHECKING:
    from llava_edge.train_gpu.samples import PictureRef


@dataclass(frozen=True)
class Document:
    """Tokens with their positions; ``branches`` is 0 in the shared prefix and numbers the branches from 1.

    ``weights`` has the weight of each branch's labels, of the prefix's first.
    """

    ids: list[int]
    labels: list[int]
    positions: list[int]
    branches: list[int]
    pictures: tuple[PictureRef, ...]
    name: str
    weights: tuple[float, ...] = (1.0,)

    def __len__(self) -> int:
        return len(self.ids)

    def unlabelled(self) -> Document:
        """The same without a label: it takes no part in the loss."""
        return replace(self, labels=[IGNORE] * len(self.labels))


def make_document(
    samples: Sequence[Tokens], pictures: tuple[PictureRef, ...], name: str, image_token: int, image_tokens: int
) -> Document:
    """One document of samples that all begin with the same tokens up to their only picture, or of one sample."""
    spread = [_spread(tokens, image_token, image_tokens) for tokens in samples]
    if len(spread) == 1:
        ids, labels = spread[0].ids, spread[0].labels
        return Document(ids, labels, list(range(len(ids))), [0] * len(ids), pictures, name, (spread[0].weight,))
    head = _shared(spread)
    if head < spread[0].ids.index(image_token) + image_tokens:
        raise InputError(f"sample {name}: the samples of this picture begin differently and can't share it")
    ids, labels, positions, branches = spread[0].ids[:head], [IGNORE] * head, list(range(head)), [0] * head
    for number, tokens in enumerate(spread, start=1):
        ids += tokens.ids[head:]
        labels += tokens.labels[head:]
        positions += range(head, len(tokens.ids))
        branches += [number] * (len(tokens.ids) - head)
    weights = (1.0, *(tokens.weight for tokens in spread))
    return Document(ids, labels, positions, branches, pictures, name, weights)


def _shared(samples: Sequence[Tokens]) -> int:
    """How many tokens all begin with, less what each needs of its own: the token that predicts its first label."""
    own = min(next(i for i, label in enumerate(tokens.labels) if label != IGNORE) - 1 for tokens in samples)
    columns = zip(*(tokens.ids[:own] for tokens in samples), strict=True)
    return next((place for place, column in enumerate(columns) if len(set(column)) > 1), own)


def _spread(tokens: Tokens, image_token: int, count: int) -> Tokens:
    """Each picture's token, ``count`` times."""
    ids: list[int] = []
    labels: list[int] = []
    for token, label in zip(tokens.ids, tokens.labels, strict=True):
        times = count if token == image_token else 1
        ids += [token] * times
        labels += [label] * times
    return Tokens(ids, labels, tokens.weight)


def truncate(document: Document, length: int, image_token: int) -> Document:
    """The document without what stands beyond ``length``; an error if that is a picture or every label."""
    if len(document) <= length:
        return document
    if image_token in document.ids[length:]:
        raise InputError(f"sample {document.name}: a picture stands beyond data.max_length = {length} tokens")
    cut = replace(
        document,
        ids=document.ids[:length],
        labels=document.labels[:length],
        positions=document.positions[:length],
        branches=document.branches[:length],
    )
    if all(label == IGNORE for label in cut.labels):
        raise InputError(
            f"sample {document.name}: {len(document)} tokens, and no answer before data.max_length = {length}"
        )
    return cut


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Divide documents over rows of at most ``capacity`` tokens.

    First fit, the longest first, says how many rows it takes. They are then filled evenly, each document going to the
    shortest row, if none gets too long by that: all are padded to the longest. Rows come longest first, so that
    neighbours need little padding.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rows: list[list[int]] = []
    used: list[int] = []
    for index in longest_first:
        place = next((row for row, tokens in enumerate(used) if tokens + lengths[index] <= capacity), None)
        if place is None:
            place = len(rows)
            rows.append([])
            used.append(0)
        rows[place].append(index)
        used[place] += lengths[index]
    even: list[list[int]] = [[] for _ in rows]
    used = [0] * len(rows)
    for index in longest_first:
        place = min(range(len(used)), key=lambda row: used[row])
        even[place].append(index)
        used[place] += lengths[index]
    if max(used, default=0) <= capacity:
        rows = even
    return sorted(rows, key=lambda row: (-sum(lengths[i] for i in row), row))


@dataclass(frozen=True)
class Batch:
    """Rows of equal length for one forward pass.

    ``documents`` numbers the documents of a row from 1, 0 is padding. ``weights`` is what the loss of each label is
    multiplied by, and ``temperature`` what the logits are divided by. ``pictures`` are pixels ``[N, 3, H, W]`` or
    features ``[N, P, D]`` in the order of their tokens; where there are none, one blank stands in.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor
    branches: torch.Tensor
    weights: torch.Tensor
    pictures: torch.Tensor
    are_features: bool
    image_tokens: int
    n_pictures: int
    names: tuple[str, ...]
    temperature: float = 1.0

    @property
    def real_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.documents > 0).sum())

    @property
    def n_labels(self) -> int:
        """Labels that count. A row's first token has no one that could predict it."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("ids", "labels", "positions", "documents", "branches", "weights", "pictures")
        }
        return replace(self, **moved)

    def seen(self) -> torch.Tensor:
        """``bool [B, 1, S, S]``: whether position i of a row may attend to position j."""
        width = self.ids.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=self.ids.device).tril()
        together = self.documents[:, :, None] == self.documents[:, None, :]
        branch = (self.branches[:, :, None] == self.branches[:, None, :]) | (self.branches[:, None, :] == 0)
        return (causal & together & branch)[:, None]


def collate(rows: Sequence[Sequence[Document]], pictures: torch.Tensor, are_features: bool, image_tokens: int) -> Batch:
    """Lay the documents of each row one after the other and pad to the longest row."""
    width = max((sum(map(len, row)) for row in rows), default=0) or 1
    shape = (len(rows), width)
    ids = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE)
    positions = torch.zeros(shape, dtype=torch.long)
    documents = torch.zeros(shape, dtype=torch.long)
    branches = torch.zeros(shape, dtype=torch.long)
    weights = torch.ones(shape)
    for number, row in enumerate(rows):
        at = 0
        for order, document in enumerate(row, start=1):
            place = (number, slice(at, at + len(document)))
            ids[place] = torch.tensor(document.ids)
            labels[place] = torch.tensor(document.labels)
            labels[number, at] = IGNORE  # nothing before it in its document predicts the first token
            positions[place] = torch.tensor(document.positions)
            documents[place] = order
            branches[place] = torch.tensor(document.branches)
            weights[place] = torch.tensor(document.weights)[branches[place]]
            at += len(document)
    found = [document for row in rows for document in row]
    count = sum(len(document.pictures) for document in found)
    names = tuple(document.name for document in found)
    return Batch(
        ids, labels, positions, documents, branches, weights, pictures, are_features, image_tokens, count, names
    )
