"""One answer: from a request with decoded pictures to pieces of text, in steps that the scheduler takes in turn."""

from __future__ import annotations

import hashlib
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from llava_edge.generate import Generation
from llava_edge.grammar import GrammarSampler
from llava_edge.prompt import Answer, ImageRef, Segment, UserText, up_to_pictures
from llava_edge.sampling import Sampler, likeliest
from llava_edge.types import FinishReason, Usage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llava_edge.generate import Chooser
    from llava_edge.model import Model, Picture
    from llava_edge.server.lanes import Lane
    from llava_edge.server.metrics import Metrics
    from llava_edge.server.protocol import ChatRequest

REMEMBERED_ANSWERS, REMEMBERED_TOKENS = 4096, 1 << 20


@dataclass(frozen=True)
class TokenLogprob:
    """A token of the answer, how likely it was (natural logarithm), and the likeliest ones in its place."""

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """A piece of text, and the tokens that were chosen since the last one."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The answer is complete."""

    reason: FinishReason
    usage: Usage
    timings: dict[str, float | None]


@dataclass(frozen=True)
class Failed:
    """There will be no (more) answer."""

    error: BaseException


Event: TypeAlias = Piece | Finished | Failed


@dataclass(eq=False)
class Job:
    """A request on its way. ``emit`` takes its events, in the scheduler's thread; times are those of the clock.

    ``grammar`` is what the request's schema allows, in llama.cpp's notation.
    """

    request: ChatRequest
    pictures: Sequence[Sequence[tuple[Picture, int | None]]]  # of every turn, with the number of their tokens
    emit: Callable[[Event], None]
    arrived: float
    deadline: float
    grammar: str | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    cancelled_at: float = 0.0


class AnswerMemory:
    """Which tokens an answer was made of, for when it comes back as text: tokenising it could give others."""

    def __init__(self) -> None:
        self._ids: OrderedDict[bytes, array[int]] = OrderedDict()
        self._tokens = 0

    def remember(self, history: Sequence[Segment], text: str, ids: Sequence[int]) -> None:
        """Note an answer to a history that ends with its question."""
        key = _fingerprint(history, text)
        self._tokens += len(ids) - len(self._ids.pop(key, ()))
        self._ids[key] = array("i", ids)
        while len(self._ids) > REMEMBERED_ANSWERS or self._tokens > REMEMBERED_TOKENS:
            _, oldest = self._ids.popitem(last=False)
            self._tokens -= len(oldest)

    def recall(self, history: Sequence[Segment], text: str) -> Segment:
        """The answer's tokens, or its text if they are not known."""
        key = _fingerprint(history, text)
        if key not in self._ids:
            return UserText(text)
        self._ids.move_to_end(key)
        return Answer(tuple(self._ids[key]))


def history(model: Model, job: Job, memory: AnswerMemory) -> list[Segment]:
    """The conversation as segments, up to where the answer begins."""
    request = job.request
    segments: list[Segment] = []
    for number, (turn, pictures) in enumerate(zip(request.turns, job.pictures, strict=True)):
        refs = [ImageRef(model.encoded_key(picture, count)) for picture, count in pictures]
        segments += model.format.turn(number, refs, turn.question, request.system)
        if turn.answer is not None:
            segments.append(memory.recall(segments, turn.answer))
    return segments


class RecordingSampler:
    """Chooses as another sampler does, and notes how likely the token was before any filter."""

    def __init__(self, sampler: Chooser, model: Model, top: int) -> None:
        self._sampler = sampler
        self._model = model
        self._top = top
        self._noted: list[TokenLogprob] = []

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token."""
        token = self._sampler.choose(logits)
        wide = logits.astype(np.float64)
        peak = wide.max()
        total = peak + np.log(np.exp(wide - peak).sum())
        best = likeliest(logits, self._top) if self._top else ()
        self._noted.append(
            TokenLogprob(
                self._model.engine.piece(token),
                float(wide[token] - total),
                tuple((self._model.engine.piece(int(i)), float(wide[i] - total)) for i in best),
            )
        )
        return token

    def take(self, count: int) -> tuple[TokenLogprob, ...]:
        """What was noted of the next tokens of the answer."""
        taken, self._noted = self._noted[:count], self._noted[count:]
        return tuple(taken)


def answer(
    model: Model,
    job: Job,
    lane: Lane,
    segments: Sequence[Segment],
    memory: AnswerMemory,
    metrics: Metrics,
) -> Generator[int | None, NDArray[np.float32], None]:
    """Compute an answer. Yields None after a piece of work, or a token whose logits it has to be sent.

    A request for no tokens is over when its pictures are read.
    """
    request, clock = job.request, {"queue_seconds": time.perf_counter() - job.arrived}
    started = time.perf_counter()
    encoded = {}
    for pictures in job.pictures:
        for picture, count in pictures:
            known = model.is_encoded(picture, count)
            metrics.picture(known)
            encoded[model.encoded_key(picture, count)] = model.encode(picture, count)
            if not known:
                yield None
    clock["encode_seconds"] = time.perf_counter() - started
    units = model.tokenizer.units(segments)
    if model.remembered is not None:
        model.remembered.restore(lane.cache, units, encoded)
    ahead = not request.max_tokens
    steps = lane.cache.prefill_steps(up_to_pictures(units) if ahead else units, encoded, ahead=ahead)
    if model.remembered is not None and len(request.turns) == 1:
        steps = model.remembered.keeping(lane.cache, units, encoded, steps)
    prefill = yield from steps
    clock["prefill_seconds"] = time.perf_counter() - started - clock["encode_seconds"]
    metrics.prompt(prefill.tokens, prefill.cached)
    if ahead:
        if model.remembered is not None:
            model.remembered.write_prefix()
        job.emit(Finished("length", Usage(prefill.tokens, prefill.cached, prefill.image, 0), {**clock}))
        return
    logits = model.engine.logits()
    generation = Generation()
    sampler: Chooser = Sampler(request.sampling)
    rules = None
    if job.grammar is not None:
        sampler = rules = GrammarSampler(model.engine, job.grammar, sampler)
    recorder = None
    if request.top_logprobs is not None:
        sampler = recorder = RecordingSampler(sampler, model, request.top_logprobs)
    loop = model.token_loop(generation, sampler, request.max_tokens, request.stop)
    told = 0
    try:
        while True:
            text = loop.step(logits, lane.cache.free)
            noted = recorder.take(loop.sure - told) if recorder else ()  # none of a text that is held back
            told = loop.sure
            if text or noted:
                job.emit(Piece(text, noted))
            if model.remembered is not None:
                model.remembered.write_prefix()  # once the first word is out
            if loop.done:
                break
            logits = yield generation.ids[-1]
            generation.decoded += 1
    finally:
        if rules is not None:
            rules.close()
    if _text_of(model, generation.ids).strip() == generation.text.strip():  # a stop text may stand inside a token
        memory.remember(segments, generation.text, generation.ids)
    assert generation.first_token_at is not None
    generation.decode_seconds = time.perf_counter() - generation.first_token_at
    clock["ttft_seconds"] = generation.first_token_at - job.arrived
    usage = Usage(prefill.tokens, prefill.cached, prefill.image, len(generation.ids))
    speed = generation.decoded / generation.decode_seconds if generation.decoded else None
    metrics.finished(usage, clock["ttft_seconds"], speed)
    job.emit(Finished(generation.finish_reason, usage, {**clock, "decode_tokens_per_second": speed}))


def _text_of(model: Model, ids: Sequence[int]) -> str:
    return b"".join(model.engine.piece(token) for token in ids).decode("utf-8", "replace")


def _fingerprint(history: Sequence[Segment], text: str) -> bytes:
    digest = hashlib.sha256(text.encode())
    for segment in history:
        digest.update(repr(segment).encode())
    return digest.digest()
