"""The order of the data and its way to batches. Step n is the same wherever and whenever it is asked for.

Nothing here keeps a state: an epoch's order follows from the seed and the epoch's number, and a step's samples from
its number. So a run goes on after a stop as if there had been none, and every process knows the whole step.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from llava_edge.errors import InputError
from llava_edge.train_gpu.pictures import stack
from llava_edge.train_gpu.prompts import IMAGE, Renderer, Tokens
from llava_edge.train_gpu.rows import Batch, Document, collate, make_document, pack, truncate

if TYPE_CHECKING:
    from llava_edge.train_gpu.config import DataConfig, OptimConfig
    from llava_edge.train_gpu.pictures import Pictures
    from llava_edge.train_gpu.samples import Sample, Skipped

Item: TypeAlias = "tuple[Sample, ...]"
"""What is drawn: one sample, or all samples of a picture where they share a reading of it."""


@dataclass(frozen=True)
class Step:
    """One process's part of one optimiser step.

    ``names`` are the samples of all processes; ``drawn`` is what the model drew itself, whose weights hold all of its
    scale.
    """

    batches: tuple[Batch, ...]
    names: tuple[str, ...]
    truncated: int
    drawn: tuple[Batch, ...] = ()

    @property
    def n_labels(self) -> int:
        """Labels in this process's part."""
        return sum(batch.n_labels for batch in self.batches)


class Mixture:
    """A seeded stream of steps over weighted sources.

    Parameters
    ----------
    sources
        Samples by source. With weights (``data.weights``, or those of ``data.sources``) a source makes up its share
        of every epoch, walking through its own samples in shuffled passes; without, an epoch is each sample once.
    grid_tokens
        Visual tokens of a whole picture, used where ``data.image_tokens`` is empty.
    """

    def __init__(
        self,
        sources: dict[str, list[Sample]],
        pictures: Pictures,
        renderer: Renderer,
        config: DataConfig,
        optim: OptimConfig,
        *,
        grid_tokens: int,
        seed: int,
        skipped: Skipped,
    ) -> None:
        self.pictures = pictures
        self.renderer = renderer
        self.config = config
        self.optim = optim
        self.grid_tokens = grid_tokens
        self.seed = seed
        self.skipped = skipped
        self.items = {name: _items(samples, config.branches) for name, samples in sources.items()}
        weights = config.weights or {n: s.weight for n, s in config.sources.items() if s.weight is not None}
        self.n_items = sum(map(len, self.items.values()))
        self.shares = _shares(self.n_items, weights) if weights else {n: len(i) for n, i in self.items.items()}
        self.steps = optim.steps or math.ceil(optim.epochs * self.n_items / optim.batch_size)  # type: ignore[operator]
        self._orders: dict[int, list[tuple[str, int]]] = {}

    @property
    def samples(self) -> Iterator[Sample]:
        """Every sample of every source."""
        return (sample for items in self.items.values() for item in items for sample in item)

    def order(self, epoch: int) -> list[tuple[str, int]]:
        """The items of an epoch as (source, number), ``n_items`` of them."""
        known = self._orders.get(epoch)
        if known is None:
            known = [(name, item) for name, share in self.shares.items() for item in self._walk(name, epoch, share)]
            random.Random(f"{self.seed} epoch {epoch}").shuffle(known)
            self._orders = {**{e: o for e, o in self._orders.items() if e >= epoch - 1}, epoch: known}
        return known

    def _walk(self, source: str, epoch: int, share: int) -> Iterator[int]:
        size = len(self.items[source])
        shuffled: dict[int, list[int]] = {}
        for draw in range(epoch * share, (epoch + 1) * share):
            number, place = divmod(draw, size)
            if number not in shuffled:
                shuffled[number] = random.Random(f"{self.seed} {source} {number}").sample(range(size), size)
            yield shuffled[number][place]

    def image_tokens(self, step: int) -> int:
        """The count of visual tokens that a step's pictures are pooled to."""
        if not self.config.image_tokens:
            return self.grid_tokens
        rng = random.Random(f"{self.seed} tokens {step}")
        return rng.choices(self.config.image_tokens, self.config.image_token_weights)[0]

    def documents(self, step: int) -> tuple[list[Document], int]:
        """The documents of a step, and how many of them were cut at the maximum length."""
        first = step * self.optim.batch_size
        last = first + self.optim.batch_size
        if self.optim.epochs is not None:
            last = min(last, round(self.optim.epochs * self.n_items))
        tokens = self.image_tokens(step)
        documents, cut = [], 0
        for draw in range(first, last):
            epoch, place = divmod(draw, self.n_items)
            source, number = self.order(epoch)[place]
            try:
                whole = self._document(self.items[source][number], draw, tokens)
                documents.append(truncate(whole, self.config.max_length, self.renderer.image_token))
            except InputError as error:
                self.skipped.add(error)
                continue
            cut += len(documents[-1]) < len(whole)
        return documents, cut

    def _document(self, item: Item, draw: int, image_tokens: int) -> Document:
        rng = random.Random(f"{self.seed} draw {draw}")
        chosen = rng.sample(item, min(self.config.branches, len(item))) if len(item) > 1 else list(item)
        rendered: list[Tokens] = []
        for sample in chosen:
            after = self.config.image_position == "random" and rng.random() < 0.5
            rendered.append(self.renderer.render(place_picture(sample, after=after)))
        name = chosen[0].id if len(chosen) == 1 else f"{chosen[0].pictures[0].name} x {len(chosen)}"
        return make_document(rendered, chosen[0].pictures, name, self.renderer.image_token, image_tokens)

    def step(self, step: int, rank: int = 0, world: int = 1) -> Step:
        """The batches of one process. Every process gets as many; the last ones may be empty."""
        documents, cut = self.documents(step)
        mine = self.batches(documents, self.image_tokens(step), rank, world)
        return Step(tuple(mine), tuple(document.name for document in documents), cut)

    def batches(self, documents: Sequence[Document], image_tokens: int, rank: int = 0, world: int = 1) -> list[Batch]:
        """Documents whose pictures have ``image_tokens`` each as the batches of one process, at least one."""
        rows = [[index] for index in sorted(range(len(documents)), key=lambda i: -len(documents[i]))]
        if self.config.packing:
            rows = pack([len(document) for document in documents], self.config.max_length)
        size = self.optim.micro_batch_rows or max(1, math.ceil(len(rows) / world))
        micro = [rows[start : start + size] for start in range(0, len(rows), size)] or [[]]
        micro += [[] for _ in range(-len(micro) % world)]
        return [self.batch([[documents[i] for i in row] for row in part], image_tokens) for part in micro[rank::world]]

    def batch(self, rows: list[list[Document]], image_tokens: int) -> Batch:
        """Documents by row as one batch, with their pictures."""
        arrays = []
        for row in rows:
            for place, document in enumerate(row):
                try:
                    loaded = [self.pictures.load(picture) for picture in document.pictures]
                except InputError as error:
                    self.skipped.add(error)
                    loaded = [self.pictures.blank() for _ in document.pictures]
                    row[place] = document.unlabelled()
                arrays += loaded
        return collate(rows or [[]], stack(arrays or [self.pictures.blank()]), self.pictures.are_features, image_tokens)


def place_picture(sample: Sample, *, after: bool = False) -> Sample:
    """The sample with its only picture before, or after, the first question; others are left as they are."""
    question, answer = sample.turns[0]
    if len(sample.pictures) != 1 or IMAGE not in question:
        return sample
    text = question.replace(IMAGE, "").strip()
    moved = (f"{text}\n{IMAGE}" if after else f"{IMAGE}\n{text}") if text else IMAGE
    return replace(sample, turns=((moved, answer), *sample.turns[1:]))


def _items(samples: list[Sample], branches: int) -> list[Item]:
    if branches == 1:
        return [(sample,) for sample in samples]
    groups: dict[object, list[Sample]] = {}
    for number, sample in enumerate(samples):
        shared = len(sample.pictures) == 1 and IMAGE in sample.turns[0][0]
        groups.setdefault(sample.pictures if shared else number, []).append(sample)
    return [tuple(group) for group in groups.values()]


def _shares(total: int, weights: dict[str, float]) -> dict[str, int]:
    """Whole numbers that add up to ``total``, in the ratio of the weights (largest remainders)."""
    scale = total / sum(weights.values())
    shares = {name: math.floor(weight * scale) for name, weight in weights.items()}
    rest = sorted(weights, key=lambda name: weights[name] * scale - shares[name], reverse=True)
    for name in rest[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def ahead(make: Callable[[int], Step], first: int, last: int, workers: int) -> Generator[Step]:
    """``make(first)`` … ``make(last - 1)`` in order, each begun by a thread while those before it are used."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="data")
    waiting: deque[Future[Step]] = deque()
    try:
        for number in range(first, last):
            waiting.append(pool.submit(make, number))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
