"""A conversation: turns, pictures and answers. What was evaluated once stays in the KV cache."""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from llava_edge.ahead import Ahead
from llava_edge.errors import InputError
from llava_edge.generate import Generation, generate
from llava_edge.kv_cache import finish
from llava_edge.prompt import Answer, ImageRef, Segment, Unit, up_to_pictures
from llava_edge.sampling import Sampler
from llava_edge.types import Chunk, Reply, SamplingParams, Timings, Usage, within

if TYPE_CHECKING:
    from llava_edge.images import ImageSource
    from llava_edge.kv_cache import Prefill
    from llava_edge.model import Model, Picture
    from llava_edge.vision import EncodedImage


@dataclass(frozen=True)
class _Turn:
    """A question and its answer. Of its pictures it holds names, and embeddings, so that they are never made twice."""

    question: str
    segments: tuple[Segment, ...]
    pictures: tuple[str, ...]
    encoded: tuple[EncodedImage, ...]
    answer: str = ""
    ids: tuple[int, ...] = ()


@dataclass
class _Clock:
    """When the steps of an answer ended."""

    started: float
    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0


class ChatSession:
    """A conversation with a model; made by ``Model.chat``.

    A question that fails (a bad picture, a full context) leaves the conversation as it was. An answer that is
    stopped early stays in it as far as it came.
    """

    def __init__(self, model: Model, system: str | None = None) -> None:
        self._model = model
        self._system = system
        self._turns: tuple[_Turn, ...] = ()
        self._pending: tuple[Picture, ...] = ()
        # Weak, so that a stream that is left in its middle closes at once.
        self._stream: weakref.ref[Generator[Chunk, None, None]] | None = None
        self._ahead: Ahead | None = None
        self._closed = False
        model.format.turn(0, [], "?", system)  # a system message that the format can't hold is refused here

    def __enter__(self) -> ChatSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<llava_edge.ChatSession with {self._model.name}, {len(self._turns)} turns>"

    def close(self) -> None:
        """End the conversation. The model stays loaded."""
        self.reset()
        self._closed = True

    def reset(self) -> None:
        """Forget all turns and pictures. An answer that is being streamed is stopped."""
        self._stop_stream()
        self._drop_ahead()
        self._turns = self._pending = ()

    def truncate(self, n_turns: int) -> None:
        """Forget everything after the first turns, and pictures that were added to the next question."""
        if not 0 <= n_turns <= len(self._turns):
            raise InputError(f"n_turns is {n_turns}; the chat has {len(self._turns)}")
        self._stop_stream()
        self._drop_ahead()
        self._turns, self._pending = self._turns[:n_turns], ()

    def add_image(self, source: ImageSource) -> None:
        """Read a picture now; it goes with the next question. ImageError says what is wrong with it."""
        picture = self._model.open_picture(source, self._picture_count() + 1)
        self._drop_ahead()
        self._pending = (*self._pending, picture)

    def read_ahead(self) -> None:
        """Begin to encode and read the pictures that were added, while the question is not known yet.

        It goes on in a thread of its own. The next question waits for it, and finds the pictures in the KV cache; a
        picture more, :meth:`reset` and Ctrl-C stop it. While the model answers, nothing happens.
        """
        model = self._model
        with model.turnstile:
            if model.answering is not None:
                return
            model.stop_ahead()
            if self._pending:
                self._ahead = model.ahead = Ahead(model.engine, self._read_pictures)
                model.ahead.start()

    def _read_pictures(self) -> None:
        model = self._model
        encoded = tuple(model.encode(picture) for picture in self._pending)
        turn = self._turn("?", self._pending, encoded)
        units = model.tokenizer.units(self._history(turn))
        known = self._known(turn)
        if model.remembered is not None:
            model.remembered.restore(model.cache, units, known)
        steps = model.cache.prefill_steps(up_to_pictures(units), known, ahead=True)
        finish(self._keeping(units, known, steps))

    @property
    def turns(self) -> list[tuple[str, str, list[str]]]:
        """Questions and answers so far: (role, text, names of pictures)."""
        listed: list[tuple[str, str, list[str]]] = []
        for turn in self._turns:
            listed.append(("user", turn.question, list(turn.pictures)))
            listed.append(("assistant", turn.answer, []))
        return listed

    def ask(
        self,
        text: str,
        images: Sequence[ImageSource] = (),
        *,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> Reply:
        """Ask a question and wait for the whole answer.

        Parameters
        ----------
        text
            The question.
        images
            Pictures that it is about, before the text: paths, ``PIL.Image``, arrays or bytes.
        max_tokens
            Longest answer.
        stop
            Texts that end the answer; they are not part of it.
        **sampling
            Fields of :class:`llava_edge.SamplingParams`: ``temperature`` (0 is greedy), ``top_p``, ``top_k``,
            ``min_p``, ``seed``.

        Raises
        ------
        LlavaEdgeError
            A picture can't be read, the context is full, an argument is out of range.
        """
        stream = self.stream(text, images, max_tokens=max_tokens, stop=stop, **sampling)
        try:
            for chunk in stream:
                if chunk.reply is not None:
                    return chunk.reply
        finally:
            stream.close()
        raise AssertionError("a stream ends with a reply")

    def stream(
        self,
        text: str,
        images: Sequence[ImageSource] = (),
        *,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> Generator[Chunk, None, None]:
        """The same as :meth:`ask`, piece by piece; the last chunk has the reply and no text.

        Closing the generator, or leaving a loop over it, stops the answer, which stays in the conversation as far as it
        came.
        """
        started = time.perf_counter()
        if self._closed:
            raise InputError("this chat is closed", hint="Begin another one with model.chat().")
        if isinstance(images, (str, os.PathLike, bytes, Image.Image, np.ndarray)):
            images = [images]
        for name, value in (("images", images), ("stop", stop)):
            if not isinstance(value, Iterable):
                raise InputError(f"{name} is {value!r}; expected a list")
        sources = list(images)
        if not isinstance(text, str) or not (text.strip() or sources or self._pending):
            raise InputError("the question is empty")
        if not within(max_tokens, Integral, 1, math.inf):
            raise InputError(f"max_tokens is {max_tokens!r}; expected a whole number from 1 on")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(text, str) and text for text in stops):
            raise InputError(f"stop is {list(stops)}; expected texts that are not empty")
        known = SamplingParams.__dataclass_fields__
        if unknown := sorted(set(sampling) - set(known)):
            raise InputError(f"unknown option {', '.join(unknown)}", hint=f"Sampling has {', '.join(known)}.")
        params = SamplingParams(**sampling)
        self._stop_stream()
        stream = self._answer(text, sources, max_tokens, stops, params, started)
        self._stream = weakref.ref(stream)
        return stream

    def _answer(
        self,
        text: str,
        sources: Sequence[ImageSource],
        max_tokens: int,
        stop: tuple[str, ...],
        params: SamplingParams,
        started: float,
    ) -> Generator[Chunk, None, None]:
        model = self._model
        generation = Generation()
        turn, past = None, self._turns
        try:
            with model.turnstile:
                if model.answering is not None:
                    raise InputError(
                        "the model is answering in another chat", hint="Finish or close that stream first."
                    )
                model.answering = generation
            try:
                if model.ahead is not None and model.ahead is self._ahead:
                    self._ahead.wait()
            finally:
                model.stop_ahead()
            clock = _Clock(started)
            turn, prefill = self._prepare(text, sources, clock)
            for piece in generate(model.token_loop(generation, Sampler(params), max_tokens, stop), model.cache):
                yield Chunk(piece)
                self._write_prefix()
            self._write_prefix()
            self._commit(turn, generation)
            yield Chunk("", self._reply(generation, prefill, clock))
        except (GeneratorExit, KeyboardInterrupt):
            if turn is not None and generation.first_token_at is not None and self._turns is past:
                self._commit(turn, generation)
            raise
        finally:
            if model.answering is generation:
                model.answering = None

    def _prepare(self, text: str, sources: Sequence[ImageSource], clock: _Clock) -> tuple[_Turn, Prefill]:
        """Everything up to the logits of the first token. Nothing of the conversation changes."""
        model = self._model
        first = self._picture_count() + 1
        new = tuple(model.open_picture(source, number) for number, source in enumerate(sources, first))
        pictures = self._pending + new
        began = time.perf_counter()
        encoded = tuple(model.encode(picture) for picture in pictures)
        encoded_at = time.perf_counter()
        turn = self._turn(text, pictures, encoded)
        units = model.tokenizer.units(self._history(turn))
        known = self._known(turn)
        if model.remembered is not None:
            model.remembered.restore(model.cache, units, known)
        prefill = finish(self._keeping(units, known, model.cache.prefill_steps(units, known)))
        clock.encode_seconds = encoded_at - began
        clock.prefill_seconds = time.perf_counter() - encoded_at
        return turn, prefill

    def _turn(self, text: str, pictures: tuple[Picture, ...], encoded: tuple[EncodedImage, ...]) -> _Turn:
        refs = [ImageRef(image.key) for image in encoded]
        segments = self._model.format.turn(len(self._turns), refs, text, self._system)
        return _Turn(text, tuple(segments), tuple(picture.name for picture in pictures), encoded)

    def _drop_ahead(self) -> None:
        """Stop reading ahead, if it is this chat that does."""
        if self._ahead is not None and self._model.ahead is self._ahead:
            self._model.stop_ahead()
        self._ahead = None

    def _known(self, turn: _Turn) -> dict[str, EncodedImage]:
        return {image.key: image for past in (*self._turns, turn) for image in past.encoded}

    def _keeping(
        self, units: Sequence[Unit], known: dict[str, EncodedImage], steps: Generator[None, None, Prefill]
    ) -> Generator[None, None, Prefill]:
        """The steps, with a copy for the disk of what ends with a picture; nobody else begins with a later turn."""
        if self._model.remembered is None or self._turns:
            return steps
        return self._model.remembered.keeping(self._model.cache, units, known, steps)

    def _write_prefix(self) -> None:
        if self._model.remembered is not None:
            self._model.remembered.write_prefix()

    def _history(self, turn: _Turn) -> list[Segment]:
        segments: list[Segment] = []
        for past in self._turns:
            segments += [*past.segments, Answer(past.ids)]
        return [*segments, *turn.segments]

    def _commit(self, turn: _Turn, generation: Generation) -> None:
        ids = tuple(generation.ids)
        done = _Turn(turn.question, turn.segments, turn.pictures, turn.encoded, generation.text, ids)
        self._turns, self._pending = (*self._turns, done), ()

    def _reply(self, generation: Generation, prefill: Prefill, clock: _Clock) -> Reply:
        assert generation.first_token_at is not None
        evaluated = prefill.tokens - prefill.cached
        usage = Usage(prefill.tokens, prefill.cached, prefill.image, len(generation.ids))
        timings = Timings(
            load_seconds=self._model.load_seconds,
            encode_seconds=clock.encode_seconds,
            prefill_seconds=clock.prefill_seconds,
            ttft_seconds=generation.first_token_at - clock.started,
            decode_seconds=generation.decode_seconds,
            prefill_tokens_per_second=_rate(evaluated, clock.prefill_seconds),
            decode_tokens_per_second=_rate(generation.decoded, generation.decode_seconds),
        )
        ids = tuple(generation.ids)
        return Reply(generation.text, generation.finish_reason, self._model.name, usage, timings, ids)

    def _picture_count(self) -> int:
        return sum(len(turn.pictures) for turn in self._turns) + len(self._pending)

    def _stop_stream(self) -> None:
        stream = None if self._stream is None else self._stream()
        if stream is not None:
            try:
                stream.close()
            except ValueError:
                raise InputError("this chat is answering in another thread") from None
        self._stream = None


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count and seconds > 0 else None
