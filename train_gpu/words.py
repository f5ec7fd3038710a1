"""What visual tokens say before a language model listens: words, by the language model's own embeddings.

A projector from random numbers costs the language model thousands of forward and backward passes before it says
anything about the picture. Here visual tokens first learn words without the language model: token i says word w with a
probability softmax(v_i . E_w + b_w) over the LLM's own embedding rows E_w, and a picture says what its tokens say on
average. b_w takes up how frequent a word is, so that v_i need not.

Where it is known what stands where (``boxes.json`` of ``llava-edge datagen scenes``), each token learns to say what it
covers instead: the thing, its colour or the ground's, and "one" in its middle, so that things can be counted. Every
token learns to say where in the picture it lies, which the language model can't tell from its number.

Shapes: B pictures of a batch, N pictures, I image tokens, F width of the features, D width of the LLM, W words.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from llava_edge.errors import InputError
from llava_edge.train_gpu.datagen.symbols import word_set, words
from llava_edge.train_gpu.features import through_blocks, used_blocks
from llava_edge.train_gpu.model import fold_standardisation, pool_tokens, unfold_standardisation
from llava_edge.train_gpu.optim import learning_rate_factor, warmup_share
from llava_edge.train_gpu.precision import has_bfloat16

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

    from llava_edge.train_gpu.features import FeatureCache

log = logging.getLogger(__name__)

STOP_WORDS = word_set(
    "a an the is are it its this that there of in on at to with and or no not yes one by from for picture shows his "
    "her their while he she they as more exactly kind be up into out off over animal image photo"
)

PLACES = ("top", "bottom", "left", "right", "middle")
PLACE_WEIGHT = 0.2
"""Of the words for where a token lies, beside those for what it shows."""
LENGTH_WEIGHT = 0.1
"""Of a new projector's tokens being as long as the embeddings of words."""
SOFTENED = 0.5
"""By how much trained tokens' products with words are made smaller. They are far longer than words (in nano 20 times),
and a part of them that is too small for the language model to notice would be enough to say a word."""


def word_pieces(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    """Ids of a word's tokens within a text, without a blank that stands alone."""
    ids: list[int] = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    return [token for token in ids if tokenizer.decode([token]).strip()] or ids


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
    pieces = {w: set(word_pieces(tokenizer, w)) for c in said.values() for w in c}
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


def cell_words(layout: Mapping[str, Any], side: int) -> list[dict[str, float]]:
    """What each cell of a ``side`` x ``side`` grid shows, row by row; an empty one shows an unknown photograph.

    A word counts as much as what it names covers of the cell, "one" as much as the thing whose middle lies there.
    """
    cells: list[dict[str, float]] = [defaultdict(float) for _ in range(side * side)]
    free = np.ones((side, side))
    for thing in layout["things"]:
        left, top, right, bottom = (edge * side for edge in thing["box"])
        covered = np.outer(_overlap(top, bottom, side), _overlap(left, right, side))
        free -= covered
        said = [word for word in (thing["noun"], thing["colour"]) if word is not None]
        for row, column in np.argwhere(covered > 0.05):
            for word in said:
                cells[row * side + column][word] += float(covered[row, column])
        row, column = (min(side - 1, int(middle / 2)) for middle in (top + bottom, left + right))
        cells[row * side + column]["one"] += float(covered[row, column])
    if layout["ground"] is not None:
        for cell, share in zip(cells, free.ravel(), strict=True):
            if share > 0:
                cell[layout["ground"]] += float(share)
                cell["background"] += float(share)
    return cells


def _overlap(first: float, last: float, side: int) -> Any:
    """How much of each of ``side`` unit intervals lies between two edges."""
    starts = np.arange(side)
    return (np.minimum(last, starts + 1) - np.maximum(first, starts)).clip(0)


def place_words(side: int) -> list[Counter[str]]:
    """Where each cell of a grid lies: in which third across and down."""
    thirds = [min(2, int(3 * (cell + 0.5) / side)) for cell in range(side)]
    rows, columns = ("top", "middle", "bottom"), ("left", "middle", "right")
    return [Counter((rows[row], columns[column])) for row in thirds for column in thirds]


def common_directions(tokens: torch.Tensor) -> torch.Tensor:
    """The leading singular vectors of visual tokens ``[..., D]``, one for each 72 of their width: ``[D // 72, D]``.

    They are the mean and what differs most between trained tokens, which outweighs the words; in nano eight of 576.
    """
    rows = tokens.reshape(-1, tokens.shape[-1])
    rows = rows[:: math.ceil(len(rows) / 20_000)]
    directions: torch.Tensor = torch.linalg.svd(rows, full_matrices=False).Vh
    return directions[: tokens.shape[-1] // 72]


class WordReader(nn.Module):
    """Reads words off visual tokens; only its bias is trained beside the projector."""

    def __init__(self, embeddings: torch.Tensor) -> None:
        super().__init__()
        self.embeddings: torch.Tensor
        self.register_buffer("embeddings", embeddings.float())
        self.bias = nn.Parameter(torch.zeros(len(embeddings)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probability of each word at each token, ``[B, I, D]`` to ``[B, I, W]``."""
        return torch.log_softmax((tokens @ self.embeddings.T).float() + self.bias, dim=-1)


class Lesson:
    """What the visual tokens of each picture should say.

    Parameters
    ----------
    said
        Words of whole pictures, by name; see :func:`picture_words`.
    layouts
        Layouts of pictures by name, as ``boxes.json`` has them; these are taught cell by cell.
    tokenizer
        The language model's.
    image_tokens
        Visual tokens of a picture, a square number.

    Attributes
    ----------
    ids
        Tokens of the language model that are taught, W of them.
    places
        Those of :data:`PLACES`, each word's first.

    Raises
    ------
    InputError
        There is nothing to teach.
    """

    def __init__(
        self,
        said: dict[str, Counter[str]],
        layouts: Mapping[str, Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        image_tokens: int,
    ) -> None:
        if not said:
            raise InputError("no sample has a picture and a word to teach", hint="Name samples with answers.")
        self.layouts, self.side = layouts, int(image_tokens**0.5)
        self.names = list(said)
        self._rows = {name: row for row, name in enumerate(said)}
        self._tokenizer = tokenizer
        self._pieces: dict[str, list[int]] = {}
        ids, self._whole = word_targets(said, tokenizer)
        known: set[int] = set()
        for layout in layouts.values():
            for words_ in cell_words(layout, 1):
                known.update(token for word in words_ for token in self._tokens(word))
        self.ids = [*ids, *sorted(known - set(ids))]
        self._column = {token: column for column, token in enumerate(self.ids)}
        self.places = [self._tokens(word)[0] for word in PLACES]
        self._place = torch.tensor([[cell[word] / 2 for word in PLACES] for cell in place_words(self.side)])  # [I, 5]

    def _tokens(self, word: str) -> list[int]:
        if word not in self._pieces:
            self._pieces[word] = word_pieces(self._tokenizer, word)
        return self._pieces[word]

    def loss(self, names: Sequence[str], said: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of what the tokens of pictures say, ``[B, I, W]`` log-probabilities."""
        boxed = [index for index, name in enumerate(names) if name in self.layouts]
        whole = [index for index, name in enumerate(names) if name not in self.layouts]
        total = said.new_zeros(())
        if whole:
            target = self._whole[[self._rows[names[index]] for index in whole]]
            spoken = torch.logsumexp(said[whole], dim=1) - math.log(said.shape[1])  # [B, W]
            total = total - (target * spoken[:, : target.shape[1]]).sum()
        if boxed:
            cells = torch.stack([self._cells(self.layouts[names[index]]) for index in boxed])
            total = total - (cells * said[boxed]).sum()
        return total / len(names)

    def place_loss(self, said: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the words of :data:`PLACES` at each token, ``[B, I, 5]`` log-probabilities."""
        return -(self._place * said).sum(-1).mean()

    def _cells(self, layout: Mapping[str, Any]) -> torch.Tensor:
        """``[I, W]``, which adds up to 1: half of it on cells that show a thing, where others show something too."""
        target = torch.zeros(self.side**2, len(self.ids))
        thing = torch.zeros(self.side**2, 1)
        for row, shown in enumerate(cell_words(layout, self.side)):
            thing[row] = any(word not in ("background", layout["ground"]) for word in shown)
            for word, count in shown.items():
                tokens = self._tokens(word)
                for token in tokens:
                    target[row, self._column[token]] += count / len(tokens)
        target = target / target.sum(dim=1, keepdim=True).clamp(min=1e-6)
        halves = [half for half in (target * thing, target * (1 - thing)) if half.any()]
        return sum((half / half.sum() for half in halves), torch.zeros_like(target)) / len(halves)


class _Sight(nn.Module):
    """The way from a cache to visual tokens: the tower's blocks that it leaves to be run, and the projector."""

    def __init__(self, model: LlavaForConditionalGeneration, cache: FeatureCache, image_tokens: int) -> None:
        super().__init__()
        self.config, self.blocks, self.image_tokens = model.config, cache.blocks, image_tokens
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.mean: torch.Tensor
        self.std: torch.Tensor
        mean, std = cache.statistics(self.tower, model.config)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """What is cached, ``[B, T, H]`` or ``[B, P, F]``, to ``[B, I, D]``."""
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16("cpu")):
            features = through_blocks(self.tower, self.config, states, self.blocks) if self.blocks else states
            tokens = self.projector((features.float() - self.mean) / self.std)
        return pool_tokens(tokens.float(), self.image_tokens)


def align_words(
    model: LlavaForConditionalGeneration,
    cache: FeatureCache,
    samples: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    layouts: Mapping[str, Mapping[str, Any]] | None = None,
    keep: Collection[str] = (),
    keep_weight: float = 10.0,
    image_tokens: int = 16,
    epochs: float = 10,
    batch_size: int = 128,
    lr: float = 1e-3,
    tower_lr: float = 1e-4,
    seed: int = 0,
) -> None:
    """Train the projector of ``model`` in place, and the blocks of its tower that ``cache`` leaves to be run.

    ``layouts`` say what stands where in some of the pictures. The visual tokens of the pictures in ``keep`` are held
    near what they are at the start, for a language model that has learnt to read them: ``keep_weight`` is that of the
    share of them that has changed, as the ratio of sums of squares. ``epochs`` may be a fraction.

    Raises
    ------
    InputError
        The samples teach nothing, or the cache lacks one of their pictures.
    """
    said = {name: counter for name, counter in picture_words(samples).items() if counter}
    lesson = Lesson(said, layouts or {}, tokenizer, image_tokens)
    cache.require({*lesson.names, *keep})
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    blocks = used_blocks(tower, model.config)[-cache.blocks :] if cache.blocks else []
    kinds = [(module, next(module.parameters()).dtype) for module in (*blocks, projector)]
    for module, _ in kinds:
        module.float()
    attention = tower.config._attn_implementation
    tower.set_attn_implementation("eager")  # on a CPU the fused kernel has a slow backward pass
    sight = _Sight(model, cache, image_tokens)
    unfold_standardisation(projector, sight.mean, sight.std)  # the optimiser likes unit inputs
    try:
        _teach(
            sight, cache, lesson, model.get_input_embeddings().weight.detach().float(), keep=set(keep),
            keep_weight=keep_weight, epochs=epochs, batch_size=batch_size, lr=lr, tower_lr=tower_lr, seed=seed,
        )  # fmt: skip
    finally:
        fold_standardisation(projector, sight.mean, sight.std)
        model.requires_grad_(False)
        projector.eval()
        tower.set_attn_implementation(attention)
        for module, kind in kinds:
            module.to(kind)


def _teach(
    sight: _Sight,
    cache: FeatureCache,
    lesson: Lesson,
    embeddings: torch.Tensor,
    *,
    keep: set[str],
    keep_weight: float,
    epochs: float,
    batch_size: int,
    lr: float,
    tower_lr: float,
    seed: int,
) -> None:
    def states_of(names: Sequence[str]) -> torch.Tensor:
        return torch.from_numpy(np.stack([cache[name] for name in names])).float()

    length = float(embeddings.norm(dim=-1).mean())
    before = None
    if keep:
        before = copy.deepcopy(sight).eval().requires_grad_(False)
        common = common_directions(before(states_of(sorted(keep)[:: math.ceil(len(keep) / 256)])))
        embeddings = SOFTENED * (embeddings - embeddings @ common.T @ common)
    reader, places = WordReader(embeddings[lesson.ids]), WordReader(embeddings[lesson.places])
    sight.requires_grad_(False).projector.train().requires_grad_(True)
    if sight.config.projector_hidden_act == "linear":  # one matrix: the second is the identity and stays it
        sight.projector.linear_2.requires_grad_(False)
    blocks = used_blocks(sight.tower, sight.config)[-cache.blocks :] if cache.blocks else []
    of_projector = [parameter for parameter in sight.projector.parameters() if parameter.requires_grad]
    of_words = [*of_projector, *reader.parameters(), *places.parameters()]
    of_tower = [parameter for block in blocks for parameter in block.requires_grad_(True).parameters()]
    groups: list[dict[str, Any]] = [{"params": of_words, "lr": lr}]
    if of_tower:
        groups.append({"params": of_tower, "lr": tower_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, len(lesson.names))
    total = math.ceil(epochs * len(lesson.names) / batch_size)
    warmup = warmup_share(total, 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor((step + 1) / (total + 1), warmup)
    )
    log.info("%d words of %d pictures; %d blocks of the tower", len(lesson.ids), len(lesson.names), len(blocks))
    order: list[int] = []
    losses: list[float] = []
    began = time.monotonic()
    for step in range(1, total + 1):
        if len(order) < batch_size:
            order += torch.randperm(len(lesson.names), generator=generator).tolist()
        names, order = [lesson.names[row] for row in order[:batch_size]], order[batch_size:]
        visual = sight(states_of(names))
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16("cpu")):
            loss = lesson.loss(names, reader(visual)) + PLACE_WEIGHT * lesson.place_loss(places(visual))
        held = [index for index, name in enumerate(names) if name in keep]
        if before is None:
            loss = loss + LENGTH_WEIGHT * ((visual.norm(dim=-1) / length - 1) ** 2).mean()
        elif held:
            with torch.no_grad():
                was = before(states_of([names[index] for index in held]))
            moved = (visual[held] - was).square().sum() / was.square().sum()
            loss = loss + keep_weight * moved * len(held) / len(names)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([*of_words, *of_tower], 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % max(1, total // 50) == 0 or step == total:
            rate = step * batch_size / (time.monotonic() - began)
            log.info("words: step %d of %d, loss %.3f, %.0f pictures a second", step, total, np.mean(losses), rate)
            losses.clear()
