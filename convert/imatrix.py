"""An importance matrix that has seen pictures: what goes into every matrix product of the language model.

Instruction data runs through the model with its pictures as embeddings. llama.cpp's evaluation callback shows the
inputs of each product; their squares are summed column by column, weighted by the kind of the token that they belong
to. Rounding then spares the columns that matter (``llama_model_quantize``).

Shapes: T tokens of a batch, K columns of a matrix.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import llava_edge
from llava_edge.convert.gguf_file import tensor_types
from llava_edge.convert.imatrix_file import Sums, write_imatrix
from llava_edge.convert.observe import GgmlTensor, Observer, rows_of
from llava_edge.engine import Engine
from llava_edge.errors import ImageError, InputError
from llava_edge.prompt import Answer, BundleFormat, ImageRef, PromptTokenizer, Segment, TokenRun

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llava_edge.bundle import PromptFormat
    from llava_edge.model import Model
    from llava_edge.vision import EncodedImage

log = logging.getLogger(__name__)

_MATRIX = re.compile(rb"blk\.\d+\.\w+\.weight\Z")
_STEP_SECONDS = 2.0
_ROWS = 256
_MOST_GIGABYTES = 4.0


@dataclass(frozen=True)
class Weights:
    """How much a token counts, by its kind; 0 leaves a kind out."""

    text: float = 1.0
    image: float = 1.0
    answer: float = 1.0

    def __post_init__(self) -> None:
        if min(self.text, self.image, self.answer) < 0 or max(self.text, self.image, self.answer) == 0:
            raise InputError("the weights of text, image and answer must be 0 or more, and not all 0")


@dataclass(frozen=True)
class Sample:
    """A picture, or none, and turns of (question, answer)."""

    name: str
    image: Path | None
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Piece:
    """Tokens or a picture's embeddings that are evaluated together, and what each counts."""

    weight: float
    kind: str
    ids: tuple[int, ...] = ()
    image: EncodedImage | None = None


class Collector:
    """Sums of squares of every matrix's inputs; ``weight`` is that of the tokens that are being evaluated.

    With ``correlations`` sums of the products of any two inputs as well, ``outer``, once for all matrices that read
    them; ``same`` has those that share another one's.
    """

    def __init__(self, *, correlations: bool = False) -> None:
        self.sums: dict[str, Sums] = {}
        self.weight = 1.0
        self.outer: dict[str, NDArray[np.float32]] = {}
        self.same: dict[str, str] = {}
        self._correlations = correlations
        self._first: dict[bytes, str] = {}  # the first matrix that read an input
        self._rows: dict[str, list[NDArray[np.float32]]] = {}

    def wants(self, tensor: GgmlTensor) -> bool:
        """Whether this tensor is the product of a weight matrix of a block."""
        return bool(tensor.src[0]) and _MATRIX.match(tensor.src[0].contents.name) is not None

    def see(self, tensor: GgmlTensor) -> None:
        """Add the inputs of a product."""
        if not self.weight:
            return
        inputs = rows_of(tensor.src[1].contents)
        entry = self.sums.setdefault(tensor.src[0].contents.name.decode(), Sums(np.zeros(inputs.shape[1])))
        entry.squares += self.weight * np.square(inputs, dtype=np.float64).sum(axis=0)
        entry.count += self.weight * len(inputs)
        if self._correlations:
            self._keep(tensor.src[0].contents.name.decode(), tensor.src[1].contents.name, inputs)

    def _keep(self, matrix: str, inputs_name: bytes, inputs: NDArray[np.float32]) -> None:
        first = self._first.setdefault(inputs_name or matrix.encode(), matrix)
        if first != matrix:
            self.same[matrix] = first
            return
        rows = self._rows.setdefault(matrix, [])
        rows.append(inputs * np.float32(self.weight**0.5))
        if sum(map(len, rows)) >= _ROWS:
            self._add(matrix)

    def _add(self, matrix: str) -> None:
        inputs = np.concatenate(self._rows.pop(matrix))
        products = inputs.T @ inputs
        self.outer[matrix] = self.outer[matrix] + products if matrix in self.outer else products

    def finish(self) -> None:
        """Add the rows that are kept until there are enough for a quick product."""
        for matrix in list(self._rows):
            self._add(matrix)


def make_imatrix(
    bundle: Path,
    data: Path,
    images: Path | None,
    output: Path,
    *,
    weights: Weights,
    limit: int | None = None,
    n_ctx: int | None = None,
    correlations: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """See :func:`llava_edge.convert.make_imatrix`; without ``images`` pictures are left out."""
    say, start = progress or log.info, time.monotonic()
    if not output.absolute().parent.is_dir():
        raise InputError(f"{output.parent} does not exist", hint="Make the directory first.")
    samples = read_samples(data, images)[:limit]
    collector, counts = Collector(correlations=correlations), {"text": 0, "image": 0, "answer": 0}
    skipped, last = 0, start
    with llava_edge.load(bundle, n_ctx=64, n_gpu_layers=0, cache=False) as model:
        prompt = _bundle_prompt(model)
        if correlations:
            _check_memory(model.engine.path)
        with Observer(collector.wants, collector.see) as observer:
            engine = Engine(
                model.engine.path, n_ctx=n_ctx, n_gpu_layers=0, n_batch=1 << 16, observer=observer.callback,
                every_output=True,
            )  # fmt: skip
            try:
                for number, sample in enumerate(samples, 1):
                    pieces = _pieces(model, engine, prompt, sample, weights)
                    if sum(_length(piece) for piece in pieces) > engine.n_ctx:
                        skipped += 1
                        continue
                    _evaluate(engine, collector, pieces, counts)
                    if time.monotonic() - last > _STEP_SECONDS or number == len(samples):
                        last = time.monotonic()
                        say(f"  {number} of {len(samples)} samples")
            finally:
                engine.close()
    if not collector.sums:
        raise InputError(f"no sample of {data} fits the context of {engine.n_ctx} tokens", hint="Raise --n-ctx.")
    collector.finish()
    write_imatrix(
        output, collector.sums, [data.name], len(samples) - skipped, engine.n_ctx, collector.outer, collector.same
    )
    return {
        "output": str(output),
        "samples": len(samples) - skipped,
        "skipped": skipped,
        "tokens": counts,
        "matrices": len(collector.sums),
        "seconds": round(time.monotonic() - start, 1),
    }


def _check_memory(path: Path) -> None:
    """InputError where the products of a large model's inputs would fill the memory."""
    shapes = {name: shape for name, (_, shape) in tensor_types(path).items() if _MATRIX.match(name.encode())}
    inputs = {
        re.sub(r"attn_[kv]\.", "attn_q.", name).replace("ffn_up.", "ffn_gate."): s[0] for name, s in shapes.items()
    }
    need = sum(4 * width**2 for width in inputs.values()) / 1e9
    if need > _MOST_GIGABYTES:
        raise InputError(
            f"the correlations of this model's inputs take {need:.0f} GB; at most {_MOST_GIGABYTES:.0f} are taken",
            hint="Leave --correlations out: an importance matrix without them fits any model.",
        )


def read_samples(data: Path, images: Path | None) -> list[Sample]:
    """LLaVA's JSON: ``[{"id", "image", "conversations": [{"from", "value"}]}]``. Errors name the sample."""
    try:
        listed = json.loads(data.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no such file: {data}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"can't read {data}: {error}") from None
    if not isinstance(listed, list) or not listed:
        raise InputError(f"{data} holds no list of samples")
    return [_sample(entry, number, images) for number, entry in enumerate(listed)]


def _sample(entry: Any, number: int, images: Path | None) -> Sample:
    name = str(entry.get("id", number)) if isinstance(entry, dict) else str(number)
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    wanted = ("human", "gpt")
    if (
        not isinstance(turns, list)
        or not turns
        or len(turns) % 2
        or not all(
            isinstance(turn, dict) and turn.get("from") == wanted[i % 2] and isinstance(turn.get("value"), str)
            for i, turn in enumerate(turns)
        )
    ):
        raise InputError(f"sample {name}: conversations is not a list of turns from human and gpt by turns")
    texts = [turn["value"].replace("<image>", "").strip() for turn in turns]
    file = entry.get("image")
    image = None
    if file is not None and images is not None:
        image = images / str(file)
        if not image.is_file():
            raise ImageError(f"sample {name}: no such picture: {image}", hint="Is --images the right folder?")
    return Sample(name, image, tuple(zip(texts[::2], texts[1::2], strict=True)))


def _bundle_prompt(model: Model) -> PromptFormat:
    if model.bundle is None:
        raise InputError("an importance matrix needs a bundle, whose manifest tells the prompt's format")
    return model.bundle.manifest.prompt


def _pieces(model: Model, engine: Engine, prompt: PromptFormat, sample: Sample, weights: Weights) -> list[Piece]:
    """A conversation in the pieces in which the runtime evaluates it, answers in one piece each."""
    tokenizer, writes = PromptTokenizer(engine), BundleFormat(prompt)
    tokenizer.learn(writes.turn(0, [ImageRef("")], "?", None))
    encoded = model.encode(model.open_picture(sample.image)) if sample.image else None
    segments: list[Segment] = []
    pieces: list[Piece] = []
    for number, (question, answer) in enumerate(sample.turns):
        shown = [ImageRef("")] if encoded is not None and number == 0 else []
        segments = list(writes.turn(number, shown, question, None))
        for unit in tokenizer.units(segments):
            if isinstance(unit, TokenRun):
                pieces.append(Piece(weights.text, "text", unit.ids))
            else:
                pieces.append(Piece(weights.image, "image", image=encoded))
        if ids := tokenizer.plain(answer):
            pieces.append(Piece(weights.answer, "answer", Answer(tuple(ids)).ids))
    return pieces


def _length(piece: Piece) -> int:
    return piece.image.n_tokens if piece.image else len(piece.ids)


def _evaluate(engine: Engine, collector: Collector, pieces: Sequence[Piece], counts: dict[str, int]) -> None:
    engine.truncate(0)
    for piece in pieces:
        collector.weight = piece.weight
        counts[piece.kind] += _length(piece)
        if piece.image is None:
            engine.decode_tokens(piece.ids)
            continue
        for chunk in piece.image.chunks:
            rows: NDArray[np.float32] | None = chunk.embeddings
            if rows is not None:
                engine.decode_embeddings(rows, logits=True)
