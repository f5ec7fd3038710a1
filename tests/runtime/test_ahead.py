"""Pictures are read while the question is typed, and a changed mind leaves no trace."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llava_edge
from llava_edge.kv_cache import finish
from llava_edge.prompt import ImageRef, up_to_pictures


@pytest.fixture
def model(tiny_model: llava_edge.Model) -> llava_edge.Model:
    tiny_model.forget()
    return tiny_model


def fresh(model: llava_edge.Model, picture: Path) -> tuple[Any, ...]:
    """What a chat answers that has read nothing ahead."""
    model.forget()
    reply = model.chat().ask("What is it?", [picture], max_tokens=8)
    return reply.token_ids, model.cache.logits().tobytes()


def test_a_picture_is_in_the_cache_before_the_question(model: llava_edge.Model, pictures: list[Path]) -> None:
    expected = fresh(model, pictures[0])
    model.forget()
    chat = model.chat()
    chat.add_image(pictures[0])
    chat.read_ahead()
    assert model.ahead is not None
    model.ahead.wait()
    assert any(isinstance(unit, ImageRef) for unit in model.cache.units)
    reply = chat.ask("What is it?", max_tokens=8)
    assert reply.usage.cached_tokens > reply.usage.image_tokens
    assert (reply.token_ids, model.cache.logits().tobytes()) == expected


def test_what_is_there_already_stays(model: llava_edge.Model, pictures: list[Path]) -> None:
    model.chat().ask("What is it?", pictures[:1], max_tokens=6)
    before, encoded = model.cache.units, model.encode(model.open_picture(pictures[0]))
    finish(model.cache.prefill_steps(up_to_pictures(before), {encoded.key: encoded}, ahead=True))
    assert model.cache.units == before


def test_a_question_waits_for_its_picture(model: llava_edge.Model, pictures: list[Path]) -> None:
    expected = fresh(model, pictures[1])
    model.forget()
    chat = model.chat()
    chat.add_image(pictures[1])
    chat.read_ahead()
    reply = chat.ask("What is it?", max_tokens=8)
    assert (reply.token_ids, model.cache.logits().tobytes()) == expected
    assert reply.usage.cached_tokens > reply.usage.image_tokens


def test_a_picture_of_a_later_turn_keeps_the_turns_before(model: llava_edge.Model, pictures: list[Path]) -> None:
    chat = model.chat()
    first = chat.ask("What is it?", pictures[:1], max_tokens=6)
    before = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    chat.add_image(pictures[1])
    chat.read_ahead()
    second = chat.ask("And this?", max_tokens=6)
    assert second.usage.cached_tokens > before


def test_nothing_is_read_while_the_model_answers(model: llava_edge.Model, pictures: list[Path]) -> None:
    stream = model.chat().stream("What is it?", max_tokens=8)
    next(stream)
    other = model.chat()
    other.add_image(pictures[0])
    other.read_ahead()
    assert model.ahead is None
    stream.close()


CHANGES: dict[str, Callable[[llava_edge.ChatSession, list[Path]], object]] = {
    "reset": lambda chat, pictures: chat.reset(),
    "another picture": lambda chat, pictures: chat.add_image(pictures[2]),
    "read ahead again": lambda chat, pictures: chat.read_ahead(),
    "close": lambda chat, pictures: chat.close(),
    "another chat": lambda chat, pictures: chat._model.chat().ask("Why?", max_tokens=2),
    "forget": lambda chat, pictures: chat._model.forget(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_mind_at_any_moment_leaves_no_trace(
    model: llava_edge.Model, pictures: list[Path], change: str
) -> None:
    expected = fresh(model, pictures[0])
    chosen = random.Random(change)
    for _ in range(20):
        model.forget()
        chat = model.chat()
        chat.add_image(pictures[0])
        chat.add_image(pictures[1])
        chat.read_ahead()
        time.sleep(chosen.random() * 0.01)
        CHANGES[change](chat, pictures)
        reply = model.chat().ask("What is it?", pictures[:1], max_tokens=8)
        assert (reply.token_ids, model.cache.logits().tobytes()) == expected
        assert not model.engine.stopping


def test_control_c_while_a_question_waits_stops_the_reading(model: llava_edge.Model, pictures: list[Path]) -> None:
    expected = fresh(model, pictures[0])
    interrupted = 0
    chosen = random.Random(1)
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        for _ in range(40):
            model.forget()
            chat = model.chat()
            try:
                for picture in pictures:
                    chat.add_image(picture)
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + chosen.random() * 0.01)
                chat.read_ahead()
                chat.ask("What is it?", max_tokens=2)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            model.stop_ahead()
            reply = model.chat().ask("What is it?", pictures[:1], max_tokens=8)
            assert (reply.token_ids, model.cache.logits().tobytes()) == expected
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 5
