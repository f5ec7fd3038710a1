"""Where the projector starts: visual tokens that lie near the embeddings of the words that pictures are spoken of with.

A projector from random numbers costs the language model thousands of forward and backward passes before it says
anything about the picture. Here the projector first learns, without the language model, to predict the words of a
picture's answers: token i says word w with a probability softmax(v_i . E_w + b_w) over the LLM's own embedding rows
E_w, and a picture says what its tokens say on average. b_w takes up how frequent a word is, so that v_i need not.

Where it is known what stands where (``boxes.json`` of ``llava-edge datagen scenes``), each token learns to say what
it covers instead: the thing, its colour or the ground's, and "one" in its middle, so that things can be counted. Every
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


PLACES = ("top", "bottom", "left", "right", "middle")


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
    """The directions that make up most of visual tokens ``[..., D]``, one in 72, ``[D / 72, D]``.

    In nano eight of 576 make up four fifths of what differs between its tokens, and say no word.
    """
    directions: torch.Tensor = torch.linalg.svd(tokens.reshape(-1, tokens.shape[-1])[:20_000], full_matrices=False).Vh
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
        Layouts of pictures by name; these are taught cell by cell.
    image_tokens
        Visual tokens of a picture.
    """

    def __init__(
        self,
        said: dict[str, Counter[str]],
        layouts: Mapping[str, Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        image_tokens: int,
    ) -> None:
        self.layouts, self.side = layouts, int(image_tokens**0.5)
        self.names = list(said)
        self._rows = {name: row for row, name in enumerate(said)}
        self._tokenizer = tokenizer
        self._pieces: dict[str, list[int]] = {}
        ids, self._whole = word_targets(said, tokenizer)
        shown = {layout["ground"] for layout in layouts.values()} | {
            word
            for layout in layouts.values()
            for thing in layout["things"]
            for word in (thing["noun"], thing["colour"])
        }
        known = {token for word in shown - {None} | {"one", "background"} for token in self._tokens(word)}
        self.ids = [*ids, *sorted(known - set(ids))] if layouts else ids
        self._column = {token: column for column, token in enumerate(self.ids)}
        self.places = [self._tokens(word)[0] for word in PLACES]
        self._place = torch.tensor([[cell[word] / 2 for word in PLACES] for cell in place_words(self.side)])  # [I, 5]

    def _tokens(self, word: str) -> list[int]:
        if word not in self._pieces:
            self._pieces[word] = self._tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
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
        """``[I, W]``; all of it adds up to 1, half of it on cells that show a thing."""
        target = torch.zeros(self.side**2, len(self.ids))
        thing = torch.zeros(self.side**2, dtype=torch.bool)
        for row, words_ in enumerate(cell_words(layout, self.side)):
            thing[row] = any(word not in ("background", layout["ground"]) for word in words_)
            for word, count in words_.items():
                tokens = self._tokens(word)
                for token in tokens:
                    target[row, self._column[token]] += count / len(tokens)
        target = target / target.sum(dim=1, keepdim=True).clamp(min=1e-6)
        share = torch.where(thing, 0.5 / thing.sum(), 0.5 / (~thing).sum().clamp(min=1))
        return target * share[:, None]


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
    near what they are at the start, for a language model that has learnt to read them.
    """
    said = {name: counter for name, counter in picture_words(samples).items() if counter}
    lesson = Lesson(said, layouts or {}, tokenizer, image_tokens)
    table = model.get_input_embeddings().weight.detach().float()
    norm = float(table.norm(dim=-1).mean())
    tower = model.model.vision_tower
    blocks = used_blocks(tower, model.config)[-cache.blocks :] if cache.blocks else []
    projector = model.model.multi_modal_projector.float()
    for block in blocks:
        block.float()
    if blocks:
        tower.set_attn_implementation("eager")  # on a CPU the fused kernel has a slow backward pass
    mean, std = cache.statistics(tower, model.config)
    unfold_standardisation(projector, mean, std)  # the optimiser likes unit inputs

    def tokens_of(names: Sequence[str], tower: Any, projector: Any) -> torch.Tensor:
        states = torch.from_numpy(np.stack([cache[name] for name in names])).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16("cpu")):
            features = through_blocks(tower, model.config, states, cache.blocks) if cache.blocks else states
            return pool_tokens(projector((features.float() - mean) / std), image_tokens).float()  # [B, I, D]

    before = None
    if keep:
        before = nn.ModuleList(copy.deepcopy([tower, projector])).eval().requires_grad_(False)
        seen = tokens_of(sorted(keep)[:: math.ceil(len(keep) / 256)], *before)
        common = common_directions(seen)
        table = (table - table @ common.T @ common) / 2
    reader, places = WordReader(table[lesson.ids]), WordReader(table[lesson.places])
    tower_parameters = [p for block in blocks for p in block.requires_grad_(True).parameters()]
    parameters = [*projector.train().requires_grad_(True).parameters(), *reader.parameters(), *places.parameters()]
    groups: list[dict[str, Any]] = [{"params": parameters, "lr": lr}]
    if tower_parameters:
        groups.append({"params": tower_parameters, "lr": tower_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    total = math.ceil(epochs * len(lesson.names) / batch_size)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=total, pct_start=0.1)
    log.info("%d words of %d pictures", len(lesson.ids), len(lesson.names))
    every = max(1, total // 50)
    order: list[int] = []
    losses: list[float] = []
    began = time.monotonic()
    for step in range(total):
        if len(order) < batch_size:
            order += torch.randperm(len(lesson.names), generator=generator).tolist()
        names, order = [lesson.names[row] for row in order[:batch_size]], order[batch_size:]
        visual = tokens_of(names, tower, projector)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16("cpu")):
            loss = lesson.loss(names, reader(visual)) + 0.2 * lesson.place_loss(places(visual))
        held = [index for index, name in enumerate(names) if name in keep]
        if before is None:
            loss = loss + 0.1 * ((visual.norm(dim=-1) / norm - 1) ** 2).mean()
        elif held:
            with torch.no_grad():
                was = tokens_of([names[index] for index in held], *before)
            moved = (visual[held] - was).square().sum() / was.square().sum()
            loss = loss + keep_weight * moved * len(held) / len(names)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % every == 0 or step + 1 == total:
            rate = (step + 1) * batch_size / (time.monotonic() - began)
            log.info("words: step %d of %d, loss %.3f, %.0f pictures a second", step + 1, total, np.mean(losses), rate)
            losses.clear()
    fold_standardisation(projector, mean, std)
    model.requires_grad_(False)
    projector.eval()
